"""Damaged archives, and those of another kind than their names."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import archive, listing
from tests.helpers.archives import (
    COMPRESSORS,
    NOISE,
    PHOTOS,
    compressed,
    needs_zip,
    read,
    refused,
    tar,
    write,
    zipped,
)


@pytest.mark.parametrize("setting", ["ingest.photos", "predict.photos"])
def test_a_damaged_archive_is_reported_with_its_setting(tmp_path: Path, setting: str):
    refused(tmp_path / "photos.tar", tar(PHOTOS)[:1000], "unexpected end", setting)


@pytest.mark.parametrize("suffix", ["tar", *COMPRESSORS])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8])
def test_a_truncated_archive_is_refused(tmp_path: Path, suffix: str, share: float):
    whole = COMPRESSORS.get(suffix, bytes)(tar(PHOTOS))
    refused(tmp_path / f"photos.{suffix}", whole[: int(len(whole) * share)], "")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_archive_that_is_cut_off_between_two_members_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes]):
    half = tar(dict(list(PHOTOS.items())[:5])).rstrip(b"\0")
    half += bytes(-len(half) % 512)
    refused(tmp_path / "photos.tar", compress(half), "its end is missing")


@compressed
@pytest.mark.parametrize("end", [1, 4, 8])
def test_a_compressed_archive_without_its_last_bytes_is_refused(tmp_path: Path, suffix: str, end: int):
    refused(tmp_path / f"photos.{suffix}", COMPRESSORS[suffix](tar(PHOTOS))[:-end], "")


@pytest.mark.parametrize("member", [1, 5, 9])
def test_a_flipped_byte_in_a_header_is_an_error(tmp_path: Path, member: int):
    with tarfile.open(fileobj=io.BytesIO(tar(PHOTOS))) as file:
        offset = file.getmembers()[member].offset
    data = bytearray(tar(PHOTOS))
    data[offset + 3] ^= 1
    refused(tmp_path / "photos.tar", bytes(data), rf"a damaged header at byte {offset:,}: bad checksum")


@compressed
@pytest.mark.parametrize("place", [0.3, 0.7, 0.95])
def test_a_flipped_byte_in_compressed_data_is_an_error(tmp_path: Path, suffix: str, place: float):
    data = bytearray(COMPRESSORS[suffix](tar(PHOTOS)))
    data[int(place * len(data))] ^= 1
    refused(tmp_path / f"photos.{suffix}", bytes(data), "")


@pytest.mark.parametrize("offset", [-5, -1])
def test_checksum_and_length_of_gzip_are_checked(tmp_path: Path, offset: int):
    for prefix in (b"", gzip.compress(tar(PHOTOS))):
        data = bytearray(gzip.compress(tar(PHOTOS)))
        data[offset] ^= 1
        refused(tmp_path / "photos.tgz", prefix + bytes(data), "")


@pytest.mark.parametrize("suffix", ["tar", *COMPRESSORS])
def test_other_data_after_an_archive_is_an_error(tmp_path: Path, suffix: str):
    (tmp_path / f"photos.{suffix}").write_bytes(COMPRESSORS.get(suffix, bytes)(tar(PHOTOS)) + NOISE)
    with pytest.raises(
        UserError, match=r"has data after its end .*\. Remove that data, or create the archive again\.$"
    ):
        read(str(tmp_path / f"photos.{suffix}"))


def test_members_of_negative_size_and_endless_headers_are_errors(tmp_path: Path):
    for kind, size in ((tarfile.REGTYPE, -512), (tarfile.GNUTYPE_LONGNAME, 8 * 2**30)):
        header = tarfile.TarInfo("a.jpg")
        header.size, header.type = size, kind
        refused(tmp_path / "photos.tar", header.tobuf(tarfile.GNU_FORMAT) + tar(PHOTOS), "size")


@pytest.mark.parametrize("name", ["photos.tgz", "photos.tar.zst", "photos.zip"])
def test_another_file_with_an_archives_ending_is_refused(tmp_path: Path, name: str):
    refused(tmp_path / name, b"<html>not found</html>" * 100, "")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_zip_archive_is_refused(tmp_path: Path, share: float):
    whole = zipped(PHOTOS, tmp_path / "photos.zip").read_bytes()
    refused(tmp_path / "photos.zip", whole[: int(len(whole) * share)], "not a zip file")


def test_other_data_after_a_zip_archive_is_an_error(tmp_path: Path):
    whole = zipped(PHOTOS, tmp_path / "photos.zip").read_bytes()
    (tmp_path / "photos.zip").write_bytes(whole + NOISE)
    with pytest.raises(UserError, match=r"photos.zip has data after its end .*Remove that data"):
        read(str(tmp_path / "photos.zip"))


def test_an_archive_of_another_kind_than_its_name_is_refused_with_its_right_name(tmp_path: Path):
    whole = zipped(PHOTOS, tmp_path / "whole.zip").read_bytes()
    right = [("a.tar.gz", whole, "is a zip archive: rename it to .*/a.zip"), ("a.zip", tar(PHOTOS), "to .*/a.tar")]
    right += [("a.zip", compress(tar(PHOTOS)), rf"to .*/a\.{suffix}") for suffix, compress in
              {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}.items()]  # fmt: skip
    for name, data, message in [*right, ("a.zip", b"7z\xbc\xaf" + NOISE, "is a 7z archive, which is not read. Unpack")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{message}\S*( it, and .*)?\.$"):
            read(str(tmp_path / name))


def test_members_that_a_damaged_directory_hides_are_noticed(tmp_path: Path):
    """A byte that makes the comment of a member longer swallows the next members."""
    data = bytearray(zipped(PHOTOS, tmp_path / "photos.zip").read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 32] = 46 + len("b/1.jpg")
    refused(tmp_path / "photos.zip", bytes(data), "9 members in its directory, not 10")


def test_joined_zip_archives_are_refused(tmp_path: Path):
    whole = zipped(PHOTOS, tmp_path / "photos.zip").read_bytes()
    refused(tmp_path / "photos.zip", whole + whole, "not in its directory")


def test_a_damaged_member_of_a_zip_archive_does_not_hide_the_others(tmp_path: Path):
    path = zipped(PHOTOS, tmp_path / "photos.zip")
    path.write_bytes(path.read_bytes().replace(PHOTOS["b/3.jpg"][1000:1010], bytes(10)))
    contents, rejected = read(str(path))
    assert contents.pop("b/3.jpg") == "damaged in the zip archive: Bad CRC-32 for file 'b/3.jpg'"
    assert (contents, rejected) == ({key: data for key, data in PHOTOS.items() if key != "b/3.jpg"}, {})


def test_an_archive_that_is_damaged_after_its_listing_is_reported_when_it_is_read(tmp_path: Path):
    path = tmp_path / "photos.tgz"
    path.write_bytes(gzip.compress(tar(PHOTOS)))
    with Inventory() as inventory:
        listing.list_photos(str(path), inventory)
        requested = next(inventory.pending(1000))
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"`predict.photos`: .* not a readable tar archive .* Copy it again"):
        list(archive.read_photos(str(path), requested, 256, "predict.photos"))


OTHER_BYTES = {name: data[::-1] for name, data in PHOTOS.items()}


@pytest.mark.parametrize("pack", [tar, lambda files: gzip.compress(tar(files))])
def test_other_bytes_of_the_same_size_and_time_are_another_listing(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]
):
    """As in reproducible archives, all of whose files have one time of modification."""
    path = tmp_path / "photos.tar"
    digests = []
    for files in (PHOTOS, dict(PHOTOS), OTHER_BYTES):
        path.write_bytes(pack(files))
        with Inventory() as inventory:
            listing.list_photos(str(path), inventory)
            digests.append(inventory.digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("new", [dict(list(PHOTOS.items())[:5]), dict.fromkeys(PHOTOS, NOISE), OTHER_BYTES])
def test_an_archive_that_is_replaced_after_its_listing_is_reported(tmp_path: Path, new: dict[str, bytes]):
    path = tmp_path / "photos.tar"
    path.write_bytes(tar(PHOTOS))
    with Inventory() as inventory:
        listing.list_photos(str(path), inventory)
        requested = next(inventory.pending(1000))
    path.write_bytes(tar(new))
    with pytest.raises(UserError, match=r"cannot be read: it has changed since it was listed: .*Run the job again"):
        list(archive.read_photos(str(path), requested, 256, "ingest.photos"))


@needs_zip
def test_encrypted_zip_archives_are_refused_with_a_remedy(tmp_path: Path):
    write(tmp_path, {"a.jpg": NOISE})
    subprocess.run(["zip", "-q", "-P", "secret", "photos.zip", "a.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"a.jpg is encrypted. Unpack it, and create it again without a password"):
        read(str(tmp_path / "photos.zip"))


def test_unusual_compression_in_zip_archives_is_refused_with_a_remedy(tmp_path: Path):
    path = zipped({"a.jpg": NOISE}, tmp_path / "photos.zip", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r"a.jpg is compressed by the method 12, .* create it again with `zip -r`"):
        read(str(path))
