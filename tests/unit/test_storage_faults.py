"""Failures of the local disk: of one file, or of the storage, with a remedy; conditional writes."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from carclass import s3, storage


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_failed_read_of_a_disk_is_the_storages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr(Path, "read_bytes", failing(number))
    with pytest.raises(
        storage.StorageError, match=rf"a\.jpg cannot be read \({os.strerror(number)}\)\. Check the path"
    ):
        list(storage.read_many([str(tmp_path / "a.jpg")]))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(storage.StorageError, match="Free some space"):
        storage.write_bytes(str(tmp_path / "a"), b"content")
    assert os.listdir(tmp_path) == []


def test_a_file_below_a_file_is_missing(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "file" / "a.jpg"))


def test_a_folder_deleted_while_it_is_listed_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a/1", "b/2", "c/3"):
        storage.write_bytes(str(tmp_path / name), b"")
    scandir = os.scandir

    def scan(path: str) -> Any:
        if str(path).endswith("/b"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert storage.list_files(str(tmp_path)) == ["a/1", "c/3"]


def test_of_many_creations_one_succeeds(tmp_path: Path):
    uri, results = str(tmp_path / "lease"), []
    threads = [
        threading.Thread(target=lambda i=i: results.append(storage.create(uri, str(i).encode()))) for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 19 + [True]
    assert os.listdir(tmp_path) == ["lease"]


def test_of_many_replacements_of_a_version_one_succeeds(tmp_path: Path):
    uri, results = str(tmp_path / "lease"), []
    storage.create(uri, b"first")
    version = storage.stat(uri).version
    threads = [
        threading.Thread(target=lambda i=i: results.append(storage.replace(uri, str(i).encode(), version)))
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 19 + [True]
    assert os.listdir(tmp_path) == ["lease"]


def test_a_missing_file_is_not_replaced(tmp_path: Path):
    assert not storage.replace(str(tmp_path / "lease"), b"x", "version")


def test_a_file_system_without_hard_links_creates_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    uri = str(tmp_path / "lease")
    assert [storage.create(uri, b"first"), storage.create(uri, b"second")] == [True, False]
    assert storage.read_bytes(uri) == b"first"


def test_times_are_of_the_folders_clock(tmp_path: Path):
    uri = str(tmp_path / "lease")
    storage.create(uri, b"first")
    stat = storage.stat(uri)
    assert stat.size == 5
    assert 0 <= stat.now - stat.modified < 60
    assert os.listdir(tmp_path) == ["lease"]


def test_without_a_date_the_time_of_the_server_is_ours():
    response = {"ResponseMetadata": {"HTTPHeaders": {}}}
    assert abs(s3.server_time(response) - time.time()) < 5
