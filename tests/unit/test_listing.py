"""Listing of local folders, and memory of an ingestion up to its first task."""

import logging
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import labelling, listing


def listed(uri: str) -> list[str]:
    return sorted(file.key for page in listing.list_pages(uri) for file in page)


def fill(folder: Path, count: int) -> str:
    """Write empty photos in folders of a thousand, and labels.csv; return the folder of the photos."""
    for start in range(0, count, 1000):
        (folder / f"photos/{start // 1000:02d}").mkdir(parents=True)
        for i in range(start, min(start + 1000, count)):
            (folder / f"photos/{start // 1000:02d}/{i:06d}.jpg").touch()
    rows = (f"{i:06d}.jpg,class {i % 10},{'test' if i % 5 else 'train'}\n" for i in range(count))
    (folder / "labels.csv").write_text("img_name,class,subset\n" + "".join(rows))
    return str(folder / "photos")


def test_pages_contain_every_file_once(tmp_path: Path):
    photos = fill(tmp_path, 2500)
    pages = list(listing.list_pages(photos))
    assert max(map(len, pages)) <= listing.PAGE_KEYS
    assert sorted(file.key for page in pages for file in page) == storage.list_files(photos)


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}", "file://{}/"])
def test_uris_may_have_a_scheme_and_a_trailing_slash(tmp_path: Path, form: str):
    storage.write_bytes(str(tmp_path / "a/ä #?.txt"), b"")
    assert listed(form.format(tmp_path)) == ["a/ä #?.txt"]


def test_links_to_folders_and_files_are_followed(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "target/a.jpg"), b"")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/folder").symlink_to(tmp_path / "target")
    (tmp_path / "photos/b.jpg").symlink_to(tmp_path / "target/a.jpg")
    (tmp_path / "photos/broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert listed(str(tmp_path / "photos")) == ["b.jpg", "broken.jpg", "folder/a.jpg"]


def reasons(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """Return (reason, detail) of each listed file."""
    return {file.key: (file.reason, file.detail) for page in listing.list_pages(str(folder)) for file in page}


def test_a_broken_link_is_a_missing_file(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    assert reasons(tmp_path) == {
        "a.jpg": ("missing_file", "a broken link (No such file or directory)"),
        "b.jpg": ("missing_file", "a broken link (Too many levels of symbolic links)"),
    }


def test_entries_that_are_no_files_are_listed_with_their_kind(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    assert reasons(tmp_path) == {
        "pipe.jpg": ("missing_file", "a named pipe, not a file"),
        "socket.jpg": ("missing_file", "a socket, not a file"),
    }


def test_a_link_to_a_folder_above_ends(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").touch()
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/here").symlink_to(".")
    assert listed(str(tmp_path)) == ["a/x.jpg"]


def test_names_that_are_not_utf_8_are_listed_in_a_printable_form(tmp_path: Path):
    folder = os.fsencode(tmp_path) + b"/Citro\xebn"
    os.mkdir(folder)
    open(folder + b"/x.jpg", "wb").close()
    open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb").close()
    detail = "the name is not UTF-8; rename the file or its folder"
    assert reasons(tmp_path) == {"Citro\\xebn/x.jpg": ("bad_name", detail), "\\xff.jpg": ("bad_name", detail)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_named(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed"):
        listed(str(tmp_path))


def test_a_folder_that_is_deleted_while_it_is_listed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").touch()
    scan = os.scandir

    def delete_first(folder: bytes):
        if folder.endswith(b"/b"):
            os.unlink(folder + b"/x.jpg")
            os.rmdir(folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", delete_first)
    assert listed(str(tmp_path)) == ["a/x.jpg", "c/x.jpg"]


def test_a_missing_folder_has_no_pages(tmp_path: Path):
    assert listed(str(tmp_path / "missing")) == []


def test_a_file_cannot_be_listed(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be listed"):
        listed(str(tmp_path / "file"))


def test_other_schemes_are_refused():
    with pytest.raises(UserError, match="gs:// is not supported"):
        listed("gs://bucket/a")


def plan(folder: Path) -> int:
    """List and label photos, read the pending ones, and return the peak of Python's memory in bytes."""
    settings = IngestSettings(photos=str(folder / "photos"), labels=str(folder / "labels.csv"))
    tracemalloc.start()
    with Inventory() as inventory:
        labelling.read_labels(settings, inventory)
        listing.list_photos(settings.photos, inventory)
        labelling.label_photos(settings, inventory)
        assert sum(map(len, inventory.pending(256))) == inventory.count_inputs()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.slow  # 8 s
def test_memory_does_not_grow_with_the_number_of_keys(tmp_path: Path):
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    fill(tmp_path / "few", 5_000)
    fill(tmp_path / "many", 50_000)
    plan(tmp_path / "few")  # import modules
    few, many = plan(tmp_path / "few"), plan(tmp_path / "many")
    assert many < 1.1 * few


def test_a_long_listing_logs_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    photos = fill(tmp_path, 2000)
    pages = listing.list_pages

    def slowly(uri: str, empty: list[str] | None = None):
        for page in pages(uri, empty):
            now[0] += 6
            yield page

    now = [0.0]
    monkeypatch.setattr("carclass.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(listing, "list_pages", slowly)
    with Inventory() as inventory, caplog.at_level(logging.INFO):
        listing.list_photos(photos, inventory, empty=[])
    assert caplog.messages == ["list: 1,000 keys, 167/s", "list: 2,000 keys, 167/s"]
