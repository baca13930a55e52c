"""Archives of photos, made for tests, and their content as ingestion reads it."""

import bz2
import gzip
import io
import lzma
import random
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import archive, listing

PHOTOS = {f"{'ab'[i % 2]}/{i}.jpg": random.Random(i).randbytes(3000 + 100 * i) for i in range(10)}
NOISE = random.Random(99).randbytes(20_000)


def read(photos: str, batch_rows: int = 4) -> tuple[dict[str, bytes | str], dict[str, str]]:
    """Return (content or error by key, reason by key) of the files of an archive."""
    with Inventory() as inventory:
        listing.list_photos(photos, inventory)
        rejected = {row[0]: str(row[1]) for row in inventory.rejected_inputs()}
        contents: dict[str, bytes | str] = {}
        for requested in inventory.pending(1000, hash_order=False):
            for table in archive.read_photos(photos, requested, batch_rows, "ingest.photos"):
                assert len(table) <= batch_rows
                contents |= {row["key"]: row["data"] or row["error"] or b"" for row in table.to_pylist()}
    return contents, rejected


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in files.items():
            add(file, name, data)
    return buffer.getvalue()


def add(file: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    file.addfile(info, io.BytesIO(data))


def zipped(files: dict[str, bytes], path: Path, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    **({"tar.zst": zstd} if shutil.which("zstd") else {}),
}
needs_zip = pytest.mark.skipif(not shutil.which("zip"), reason="needs zip")
compressed = pytest.mark.parametrize("suffix", COMPRESSORS)


def refused(path: Path, data: bytes, cause: str, setting: str = "ingest.photos") -> None:
    path.write_bytes(data)
    kind = "zip" if path.suffix == ".zip" else "tar"
    match = rf"^`{setting}`: \S*{path.name} is not a readable {kind} archive \(.*{cause}.*\). Copy it again.$"
    if not data:
        match = rf"{path.name} has no bytes\. Copy it again\.$"
    with Inventory() as inventory, pytest.raises(UserError, match=match):
        listing.list_photos(str(path), inventory, setting)
