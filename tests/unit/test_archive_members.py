"""Members of archives: links, odd names and sizes that are not true."""

import gzip
import os
import random
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import archive, listing, members, tar_archive
from tests.helpers.archives import NOISE, add, needs_zip, read, refused, tar, write, zipped

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


def unpacked(path: Path) -> dict[str, bytes]:
    """Return the files that GNU tar unpacks, links resolved."""
    folder = path.with_suffix("")
    folder.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", folder], check=True)
    return files_of(folder)


def test_a_hard_link_keeps_the_bytes_of_its_target_when_that_is_replaced_later(tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "a.jpg", b"old")
        add(file, "b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(file, "soft.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(file, "a.jpg", b"new")
    expected = {"a.jpg": b"new", "b.jpg": b"old", "soft.jpg": b"new"}
    assert read(str(tmp_path / "photos.tar")) == (expected, {})
    assert unpacked(tmp_path / "photos.tar") == expected


@pytest.mark.parametrize("folder_again", [False, True])
def test_a_member_below_a_link_to_a_folder_is_in_that_folder_unless_a_folder_replaces_the_link(
    tmp_path: Path, folder_again: bool
):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "v1", type=tarfile.DIRTYPE, mode=0o755)
        add(file, "v1/a.jpg", b"old")
        add(file, "latest", type=tarfile.SYMTYPE, linkname="v1")
        if folder_again:
            add(file, "latest", type=tarfile.DIRTYPE, mode=0o755)
        add(file, "latest/a.jpg", b"new")
        add(file, "latest/b.jpg", NOISE)
    contents, rejected = read(str(tmp_path / "photos.tar"))
    assert (contents["v1/a.jpg"], contents["latest/a.jpg"]) == (b"old" if folder_again else b"new", b"new")
    assert (contents, rejected) == (unpacked(tmp_path / "photos.tar"), {})


def test_a_link_with_the_name_of_a_folder_is_quarantined(tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "a/x.jpg", NOISE)
        add(file, "b/x.jpg", b"other")
        add(file, "a", type=tarfile.SYMTYPE, linkname="b")
    expected = {"a/x.jpg": NOISE, "b/x.jpg": b"other"}, {"a": Reason.MISSING_FILE}
    assert read(str(tmp_path / "photos.tar")) == expected


def test_a_member_in_a_link_out_of_the_archive_is_quarantined(tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        add(file, "a/x.jpg", NOISE)
        add(file, "out", type=tarfile.SYMTYPE, linkname="../elsewhere")
        add(file, "out/y.jpg", NOISE)
    assert read(str(tmp_path / "photos.tar")) == (
        {"a/x.jpg": NOISE}, dict.fromkeys(["out", "out/y.jpg"], Reason.MISSING_FILE)
    )  # fmt: skip


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
    monkeypatch.setattr(members, "MAX_PHOTO_BYTES", 2**20)
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
