"""Photos in archives: those made by the usual tools, damaged ones, links, names and bombs."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import archive, listing, members, tar_archive

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


# Formats


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


# Damage


def refused(path: Path, data: bytes, cause: str, setting: str = "ingest.photos") -> None:
    path.write_bytes(data)
    kind = "zip" if path.suffix == ".zip" else "tar"
    match = rf"^`{setting}`: \S*{path.name} is not a readable {kind} archive \(.*{cause}.*\). Copy it again.$"
    if not data:
        match = rf"{path.name} has no bytes\. Copy it again\.$"
    with Inventory() as inventory, pytest.raises(UserError, match=match):
        listing.list_photos(str(path), inventory, setting)


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


@pytest.mark.parametrize("new", [dict(list(PHOTOS.items())[:5]), dict.fromkeys(PHOTOS, NOISE)])
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


# Links


def linked_folder(folder: Path) -> Path:
    """Write 23 files: 20 photos, a hard link, a symbolic link before its target, and a link to that link."""
    write(folder, {f"a/{i:02d}.jpg": random.Random(i).randbytes(2000 + i) for i in range(20)})
    os.link(folder / "a/07.jpg", folder / "a/hard.jpg")
    (folder / "a/0.jpg").symlink_to("../a/11.jpg")
    (folder / "soft.jpg").symlink_to("a/0.jpg")
    return folder


def pack(folder: Path, suffix: str) -> str:
    """Pack a folder with symbolic links as such, by the usual tools; return the archive."""
    target = str(folder.with_name(f"{folder.name}.{suffix}"))
    command = ["zip", "-qry", target, "."] if suffix == "zip" else ["tar", "-czf", target, "."]
    subprocess.run(command, cwd=folder, check=True)
    return target


packed = pytest.mark.parametrize("suffix", ["tgz", pytest.param("zip", marks=needs_zip)])


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file that the folder's listing yields."""
    keys = [file.key for page in listing.list_pages(str(folder)) for file in page if file.reason is None]
    return {key: (folder / key).read_bytes() for key in keys}


@packed
def test_links_to_files_have_the_bytes_of_their_targets(tmp_path: Path, suffix: str):
    folder = linked_folder(tmp_path / "photos")
    contents, rejected = read(pack(folder, suffix))
    assert len(contents) == 23
    assert (contents, rejected) == (files_of(folder), {})


@packed
def test_links_to_folders_are_followed(tmp_path: Path, suffix: str):
    folder = linked_folder(tmp_path / "photos")
    (folder / "again").symlink_to("a")
    (folder / "b").mkdir()
    (folder / "b/deep").symlink_to("../again")
    contents, rejected = read(pack(folder, suffix))
    assert len(contents) == 23 + 2 * 22
    assert (contents, rejected) == (files_of(folder), {})


@packed
def test_links_that_lead_nowhere_are_quarantined_under_their_names(tmp_path: Path, suffix: str):
    folder = write(tmp_path / "photos", {"a/x.jpg": NOISE})
    links = {"gone.jpg": "a/gone.jpg", "outside.jpg": "../a/x.jpg", "absolute.jpg": "/a/x.jpg", "loop.jpg": "loop.jpg"}
    links |= {"one.jpg": "two.jpg", "two.jpg": "one.jpg"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert read(pack(folder, suffix)) == ({"a/x.jpg": NOISE}, dict.fromkeys(links, Reason.MISSING_FILE))


@packed
def test_links_to_folders_above_add_no_files(tmp_path: Path, suffix: str):
    folder = write(tmp_path / "photos", {"a/x.jpg": NOISE, "b/c/y.jpg": NOISE})
    for name, target in {"a/parent": "..", "top": ".", "a/to_b": "../b", "b/c/to_a": "../../a", "cc": "b/c"}.items():
        (folder / name).symlink_to(target)
    contents, rejected = read(pack(folder, suffix))
    assert sorted(contents) == sorted(files_of(folder))
    assert rejected == {}


def test_links_to_files_of_absolute_names_are_followed(tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "/data/a.jpg", NOISE)
        add(file, "/data/b.jpg", type=tarfile.SYMTYPE, linkname="/data/a.jpg")
        add(file, "/data/c.jpg", type=tarfile.LNKTYPE, linkname="/data/a.jpg")
    assert read(str(tmp_path / "photos.tar")) == (dict.fromkeys(["data/a.jpg", "data/b.jpg", "data/c.jpg"], NOISE), {})


def test_nested_links_to_folders_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(members, "MAX_LINKED_FILES", 1000)
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "20/a.jpg", NOISE)
        for level in range(20):
            for name in "xy":
                add(file, f"{level}/{name}", type=tarfile.SYMTYPE, linkname=f"../{level + 1}")
    with pytest.raises(UserError, match=r"links to folders lead to more than 1,000 files"):
        read(str(tmp_path / "photos.tar"))


# Names


@pytest.mark.parametrize("name", ["./a/x.jpg", "/a/x.jpg", "../../a/x.jpg", "a/../../a/x.jpg", "a//./x.jpg"])
def test_names_are_paths_below_the_archive(tmp_path: Path, name: str):
    (tmp_path / "photos.tar").write_bytes(tar({name: NOISE}))
    zipped({name: NOISE}, tmp_path / "photos.zip")
    assert read(str(tmp_path / "photos.tar")) == read(str(tmp_path / "photos.zip")) == ({"a/x.jpg": NOISE}, {})


def test_names_that_are_not_utf8_are_quarantined_in_a_printable_form(tmp_path: Path):
    folder = write(tmp_path / "photos", {"a.jpg": NOISE, os.fsdecode(b"caf\xe9/b.jpg"): NOISE})
    expected = ({"a.jpg": NOISE}, {"caf\\xe9/b.jpg": Reason.BAD_NAME})
    assert read(pack(folder, "tgz")) == expected
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as file:
        file.add(folder, "")
    assert read(str(tmp_path / "pax.tar")) == expected


def test_names_in_utf8_without_a_flag_are_read_from_zip_archives(tmp_path: Path):
    path = zipped({"kafx.jpg": NOISE, "caf?.jpg": NOISE}, tmp_path / "photos.zip")
    data = path.read_bytes().replace(b"kafx", "ka\u00df".encode()).replace(b"caf?", b"caf\xe9")
    path.write_bytes(data)
    assert read(str(path)) == ({"kaß.jpg": NOISE}, {"caf\\xe9.jpg": Reason.BAD_NAME})


@pytest.mark.parametrize("system", [0, 3])
@pytest.mark.parametrize("name", ["a\\x.jpg", "a\\\u00e9.jpg"])
def test_backslashes_in_zip_archives_are_slashes(tmp_path: Path, system: int, name: str):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for member, data in (("a\\", b""), (name, NOISE)):
            info = zipfile.ZipInfo(member)
            info.create_system = system
            file.writestr(info, data)
    assert read(str(tmp_path / "photos.zip")) == ({name.replace("\\", "/"): NOISE}, {})


def test_backslashes_in_tar_archives_are_parts_of_names(tmp_path: Path):
    (tmp_path / "photos.tar").write_bytes(tar({"a/x\\y.jpg": NOISE}))
    assert read(str(tmp_path / "photos.tar")) == ({"a/x\\y.jpg": NOISE}, {})


@packed
def test_a_link_to_itself_is_named_as_such(tmp_path: Path, suffix: str):
    (write(tmp_path / "photos", {"x.jpg": NOISE}) / "loop.jpg").symlink_to("loop.jpg")
    details = {file.key: file.detail for file in archive.list_members(pack(tmp_path / "photos", suffix), "")}
    assert details == {"x.jpg": None, "loop.jpg": "a link that leads to itself"}


def test_the_last_of_several_members_with_one_name_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As unpacking leaves it, for example after `tar --append`."""
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for name, data in (("a.jpg", b"old"), ("b.jpg", NOISE), ("./a.jpg", b"new")):
            add(file, name, data)
    assert read(str(tmp_path / "photos.tar")) == ({"a.jpg": b"new", "b.jpg": NOISE}, {})
    assert "1 member(s) are replaced by later ones of the same name, as in unpacking, such as a.jpg" in caplog.text


def test_a_file_that_is_packed_twice_is_read_once(tmp_path: Path):
    """The second time, tar stores a file with several names as a hard link to itself."""
    write(tmp_path, {"a.jpg": NOISE})
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    subprocess.run(["tar", "-cf", "photos.tar", "a.jpg", "a.jpg", "b.jpg", "b.jpg"], cwd=tmp_path, check=True)
    assert read(str(tmp_path / "photos.tar")) == ({"a.jpg": NOISE, "b.jpg": NOISE}, {})


def test_devices_are_quarantined_by_name(tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "a.jpg", NOISE)
        add(file, "pipe", type=tarfile.FIFOTYPE)
        add(file, "disk", type=tarfile.BLKTYPE)
        add(file, "link", type=tarfile.SYMTYPE, linkname="pipe")
    special = zipfile.ZipInfo("pipe")
    special.external_attr = stat.S_IFIFO << 16
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive_file:
        archive_file.writestr("a.jpg", NOISE)
        archive_file.writestr(special, b"")
    assert read(str(tmp_path / "photos.tar"))[1] == dict.fromkeys(["pipe", "disk", "link"], Reason.MISSING_FILE)
    assert read(str(tmp_path / "photos.zip"))[1] == {"pipe": Reason.MISSING_FILE}


# Bombs


def test_large_files_are_quarantined_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "MAX_PHOTO_BYTES", 2**20)
    files = {"a.jpg": NOISE, "large.jpg": bytes(16 * 2**20)}
    write(tmp_path / "photos", files)
    paths = [tmp_path / "photos.tgz", zipped(files, tmp_path / "photos.zip", compression=zipfile.ZIP_DEFLATED)]
    paths[0].write_bytes(gzip.compress(tar(files)))
    del files["large.jpg"]
    tracemalloc.start()
    results = [read(str(path)) for path in paths]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert results == 2 * [({"a.jpg": NOISE}, {"large.jpg": Reason.TOO_LARGE})]
    assert peak < 12 * 2**20
    with Inventory() as inventory:
        listing.list_photos(str(tmp_path / "photos"), inventory)
        assert [row[:2] for row in inventory.rejected_inputs()] == [("large.jpg", Reason.TOO_LARGE)]


def test_a_member_that_is_larger_than_it_says_is_not_expanded(tmp_path: Path):
    path = zipped({"a.jpg": bytes(64 * 2**20)}, tmp_path / "photos.zip", compression=zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace((64 * 2**20).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    tracemalloc.start()
    contents, _ = read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents == {"a.jpg": "damaged in the zip archive: Bad CRC-32 for file 'a.jpg'"}
    assert peak < 16 * 2**20


def test_members_of_a_zip_archive_that_share_their_bytes_are_refused(tmp_path: Path):
    path = zipped({"a.jpg": NOISE, "b.jpg": NOISE}, tmp_path / "photos.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.infolist()[1].header_offset = 0
        file.writestr("c.jpg", NOISE)
    refused(path, path.read_bytes(), "overlaps")


def test_archives_that_expand_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar_archive, "EXPANSION_BYTES", 2**20)
    (tmp_path / "photos.tgz").write_bytes(gzip.compress(tar({"a.jpg": bytes(64 * 2**20)})))
    with pytest.raises(UserError, match="expands to more than 200 times its size"):
        read(str(tmp_path / "photos.tgz"))


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
