"""TLS between the nodes of a cluster: an authority per cluster, and a certificate per node that it signs.

  python cluster/image/certificates.py authority FOLDER    creates ca.crt and ca.key, or keeps those of the last months
  python certificates.py node FOLDER [NAME ...]            before `ray start`, on every node

A node's certificate is valid for its IP address, loopback and the given DNS names, as Ray's clients check the name.
`node` writes the files that Ray reads, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT; without
RAY_USE_TLS=1 it does nothing. Ray requires a certificate of this authority from servers and clients alike.
"""

import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALIDITY = timedelta(days=365)
MARGIN = timedelta(days=30)
"""An authority with less time left is replaced, and signs no more certificates of nodes."""
CLOCK_SKEW = timedelta(hours=1)
AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "carclass cluster")])


def main(command: str, folder: str, *names: str) -> None:
    """Run one of the two commands."""
    if command == "authority":
        create_authority(Path(folder))
    elif command == "node":
        if os.environ.get("RAY_USE_TLS") == "1":
            create_node(Path(folder), list(names))
    else:
        sys.exit(__doc__)


def create_authority(folder: Path, validity: timedelta = VALIDITY) -> None:
    """Create the authority, or keep it if it has enough time left."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if certificate.exists() and key.exists() and time_left(read_certificate(certificate)) > MARGIN:
        return
    private = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder().issuer_name(AUTHORITY).subject_name(AUTHORITY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write(key, pem(private))
    write(certificate, sign(builder, private, private, datetime.now(UTC) + validity))


def create_node(folder: Path, names: list[str]) -> None:
    """Create this node's key and certificate, valid as long as the authority. Exit without a valid authority."""
    if not (folder / "ca.key").exists():
        sys.exit(f"carclass: RAY_USE_TLS is 1, but {folder} has no ca.key. Create it with certificates.py authority.")
    authority = read_certificate(folder / "ca.crt")
    if time_left(authority) < MARGIN:
        sys.exit(f"carclass: the authority in {folder} ends at {authority.not_valid_after_utc}. Create it again.")
    private = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_node(folder, private, [node_address(), "127.0.0.1"], names, authority.not_valid_after_utc)
    write(Path(os.environ["RAY_TLS_SERVER_KEY"]), pem(private))
    write(Path(os.environ["RAY_TLS_SERVER_CERT"]), certificate)
    write(Path(os.environ["RAY_TLS_CA_CERT"]), (folder / "ca.crt").read_bytes())


def sign_node(
    folder: Path, private: ec.EllipticCurvePrivateKey, addresses: list[str], names: list[str], end: datetime
) -> bytes:
    """Return a node's certificate, signed by the authority in the folder."""
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "carclass node")])
    hosts = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
    alternatives = x509.SubjectAlternativeName([*hosts, *map(x509.DNSName, ["localhost", *names])])
    builder = x509.CertificateBuilder().issuer_name(AUTHORITY).subject_name(subject)
    return sign(builder.add_extension(alternatives, critical=False), private, signer, end)


def sign(
    builder: x509.CertificateBuilder,
    private: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    end: datetime,
) -> bytes:
    """Return a certificate as PEM, valid from now, with a margin for clocks that differ."""
    builder = builder.public_key(private.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(datetime.now(UTC) - CLOCK_SKEW).not_valid_after(end)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def node_address() -> str:
    """Return the address that Ray announces for this node."""
    import ray.util  # here, because an authority is created without Ray

    return str(ray.util.get_node_ip_address())


def read_certificate(file: Path) -> x509.Certificate:
    """Return a certificate from a PEM file."""
    return x509.load_pem_x509_certificate(file.read_bytes())


def time_left(certificate: x509.Certificate) -> timedelta:
    """Return the time until a certificate expires."""
    return certificate.not_valid_after_utc - datetime.now(UTC)


def pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key without a password."""
    form = serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(file: Path, data: bytes) -> None:
    """Write a file that its owner only can read; a reader never sees a part of it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(data)
    new.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
