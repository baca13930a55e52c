"""Photos in archives made by the usual tools."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import archive, listing
from tests.helpers.archives import COMPRESSORS, NOISE, PHOTOS, add, compressed, needs_zip, read, tar, write, zipped


@pytest.mark.parametrize("suffix", ["tgz", "tar.gz", "TGZ", "tar", "Tar.XZ", "tar.bz2", "tar.zst"])
def test_tar_archives_are_read(tmp_path: Path, suffix: str):
    if suffix.endswith("zst") and not shutil.which("zstd"):
        pytest.skip("needs zstd")
    write(tmp_path / "photos", PHOTOS)
    packed = tmp_path / f"photos.{suffix}".lower()
    subprocess.run(["tar", "--auto-compress", "-cf", packed, "-C", tmp_path / "photos", "."], check=True)
    assert read(str(packed.rename(tmp_path / f"photos.{suffix}"))) == (PHOTOS, {})


@pytest.mark.parametrize("name", ["photos.zip", "photos.ZIP"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_archives_are_read(tmp_path: Path, name: str, method: int):
    assert read(str(zipped(PHOTOS, tmp_path / name, compression=method))) == (PHOTOS, {})


def test_a_large_zip_archive_with_zip64_fields_is_read(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file, file.open("a.jpg", "w", force_zip64=True) as member:
        member.write(NOISE)
    assert read(str(tmp_path / "photos.zip")) == ({"a.jpg": NOISE}, {})


def test_a_uri_may_have_a_scheme(tmp_path: Path):
    zipped(PHOTOS, tmp_path / "photos.zip")
    assert read(f"file://{tmp_path}/photos.zip") == (PHOTOS, {})


@compressed
def test_several_compressed_streams_are_read_as_one(tmp_path: Path, suffix: str):
    """As pigz, pbzip2 and pzstd write them."""
    whole, compress = tar(PHOTOS), COMPRESSORS[suffix]
    blocks = [whole[start : start + 7000] for start in range(0, len(whole), 7000)]
    (tmp_path / f"photos.{suffix}").write_bytes(b"".join(map(compress, blocks)))
    assert read(str(tmp_path / f"photos.{suffix}")) == (PHOTOS, {})


@pytest.mark.parametrize("suffix", ["tar", *COMPRESSORS])
def test_joined_archives_are_read_as_one(tmp_path: Path, suffix: str):
    compress = COMPRESSORS.get(suffix, bytes)
    halves = [tar(dict(list(PHOTOS.items())[part])) for part in (slice(0, 5), slice(5, 10))]
    (tmp_path / f"photos.{suffix}").write_bytes(b"".join(map(compress, halves)))
    assert read(str(tmp_path / f"photos.{suffix}")) == (PHOTOS, {})


@pytest.mark.parametrize("padding", [1, 512, 100_000])
def test_padding_is_ignored(tmp_path: Path, padding: int):
    (tmp_path / "photos.tar").write_bytes(tar(PHOTOS) + bytes(padding))
    (tmp_path / "photos.tgz").write_bytes(gzip.compress(tar(PHOTOS)) + bytes(padding))
    assert read(str(tmp_path / "photos.tar")) == read(str(tmp_path / "photos.tgz")) == (PHOTOS, {})


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(tmp_path: Path, form: int):
    name = "/".join(["ä" * 60] * 5) + ".jpg"
    with tarfile.open(tmp_path / "photos.tar", "w", format=form) as file:
        add(file, name, NOISE)
    assert read(str(tmp_path / "photos.tar")) == ({name: NOISE}, {})


def test_sparse_files_are_read_with_their_holes(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(NOISE)
    os.truncate(tmp_path / "a.jpg", 2_000_000)
    subprocess.run(["tar", "--sparse", "-cf", "photos.tar", "a.jpg"], cwd=tmp_path, check=True)
    assert read(str(tmp_path / "photos.tar")) == ({"a.jpg": NOISE + bytes(2_000_000 - len(NOISE))}, {})


def test_incremental_archives_of_gnu_tar_are_read(tmp_path: Path):
    write(tmp_path / "photos", PHOTOS)
    subprocess.run(["tar", "-cf", "photos.tar", "-g", "state", "-C", "photos", "."], cwd=tmp_path, check=True)
    assert read(str(tmp_path / "photos.tar")) == (PHOTOS, {})


@needs_zip
def test_a_zip_archive_from_a_pipe_is_read(tmp_path: Path):
    subprocess.run(["zip", "-q", "photos.zip", "-"], input=NOISE, cwd=tmp_path, check=True)
    assert read(str(tmp_path / "photos.zip")) == ({"-": NOISE}, {})


@needs_zip
def test_parts_of_zip_archives_are_refused_with_a_remedy(tmp_path: Path):
    write(tmp_path, {"a.jpg": NOISE * 4, "b.jpg": NOISE})
    subprocess.run(["zip", "-q0", "-s", "64k", "photos.zip", "a.jpg", "b.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"last part of several. Join them first: `zip -s 0"):
        read(str(tmp_path / "photos.zip"))
    subprocess.run(["zip", "-q", "-s", "64k", "one.zip", "b.jpg"], cwd=tmp_path, check=True)
    assert read(str(tmp_path / "one.zip")) == ({"b.jpg": NOISE}, {})


def test_archives_in_an_archive_are_not_opened(tmp_path: Path):
    inner = zipped({"a.jpg": NOISE}, tmp_path / "inner.zip").read_bytes()
    assert read(str(zipped({"inner.zip": inner}, tmp_path / "photos.zip"))) == ({"inner.zip": inner}, {})


def test_a_file_that_is_no_archive_is_refused_with_the_endings_of_archives(tmp_path: Path):
    (tmp_path / "photos.rar").write_bytes(NOISE)
    with pytest.raises(UserError, match=r"`ingest.photos`: .*photos.rar is a file. .*\.tar\.zst.*\.zip"):
        read(str(tmp_path / "photos.rar"))


def test_an_archive_without_files_is_refused(tmp_path: Path):
    (tmp_path / "photos.tar").write_bytes(tar({}))
    for path in (tmp_path / "photos.tar", zipped({}, tmp_path / "photos.zip")):
        with pytest.raises(UserError, match=r"`ingest.photos`: no files in"):
            read(str(path))


def test_batches_end_at_a_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "BATCH_BYTES", 10_000)
    path = tmp_path / "photos.tar"
    path.write_bytes(tar(PHOTOS))
    with Inventory() as inventory:
        listing.list_photos(str(path), inventory)
        tables = list(archive.read_photos(str(path), next(inventory.pending(1000)), 256, "ingest.photos"))
    sizes = [sum(map(len, table["data"].to_pylist())) for table in tables]
    assert sum(map(len, tables)) == len(PHOTOS)
    assert max(sizes) < 10_000 + 4000


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path):
    def peak(count: int) -> int:
        (tmp_path / "photos.tar").write_bytes(tar({f"{i}.jpg": b"" for i in range(count)}))
        tracemalloc.start()
        assert sum(1 for _ in archive.list_members(str(tmp_path / "photos.tar"), "ingest.photos")) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)
    assert peak(2000) < 1.1 * peak(200)


def test_only_requested_photos_are_read(tmp_path: Path):
    (tmp_path / "photos.tgz").write_bytes(gzip.compress(tar(PHOTOS)))
    with Inventory() as inventory:
        listing.list_photos(str(tmp_path / "photos.tgz"), inventory)
        requested = next(inventory.pending(1000)).take([7, 2, 5])
    tables = list(archive.read_photos(str(tmp_path / "photos.tgz"), requested, 2, "ingest.photos"))
    assert [len(table) for table in tables] == [2, 1]
    read_keys = {row["key"] for table in tables for row in table.to_pylist()}
    assert read_keys == set(requested["key"].to_pylist())


# A folder in an archive


def nested(folder: Path, suffix: str) -> str:
    """Return an archive of the photos in `x/cars`, beside others."""
    files = {"README": b"text", **{f"x/cars/{key}": data for key, data in PHOTOS.items()}, "x/cars2/a/9.jpg": NOISE}
    if suffix == "zip":
        return str(zipped(files, folder / "photos.zip"))
    (folder / f"photos.{suffix}").write_bytes(COMPRESSORS.get(suffix, bytes)(tar(files)))
    return str(folder / f"photos.{suffix}")


@pytest.mark.parametrize("part", ["!/x/cars", "!/x/cars/", "!/./x//cars"])
@pytest.mark.parametrize("suffix", ["tar", "tgz", "zip"])
def test_a_folder_of_an_archive_is_read_with_keys_below_it(tmp_path: Path, suffix: str, part: str):
    assert read(nested(tmp_path, suffix) + part) == (PHOTOS, {})


@pytest.mark.parametrize("part", ["!", "!/"])
def test_the_top_folder_of_an_archive_is_all_of_it(tmp_path: Path, part: str):
    assert read(nested(tmp_path, "zip") + part) == read(nested(tmp_path, "zip"))


@pytest.mark.parametrize("part", ["!/cars", "!/x/car", "!/README"])
def test_a_folder_that_an_archive_lacks_is_refused_with_those_it_has(tmp_path: Path, part: str):
    with pytest.raises(UserError, match=rf"photos.tgz has no files in the folder {part[2:]}; its folders: .*x/cars/a"):
        read(nested(tmp_path, "tgz") + part)


def test_a_missing_archive_with_a_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"`ingest.photos`: no archive \S+/gone.zip\. Set it to an existing folder"):
        read(str(tmp_path / "gone.zip!/x"))


def test_a_path_into_an_archive_gets_the_spelling(tmp_path: Path):
    path = nested(tmp_path, "tgz")
    with pytest.raises(UserError, match=rf"`ingest.photos`: .* leads into an archive\. Write {path}!/x/cars"):
        read(f"{path}/x/cars")


def test_links_out_of_a_folder_of_an_archive_are_followed(tmp_path: Path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        add(file, "pool/1.jpg", NOISE)
        add(file, "cars/a/1.jpg", type=tarfile.SYMTYPE, linkname="../../pool/1.jpg")
    (tmp_path / "photos.tar").write_bytes(buffer.getvalue())
    assert read(str(tmp_path / "photos.tar!/cars")) == ({"a/1.jpg": NOISE}, {})
