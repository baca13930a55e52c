"""Check of the root: where it cannot be written to, and what the check leaves behind."""

import os
from pathlib import Path

import pytest

from carclass import storage
from carclass.data import dataset
from carclass.data.root_check import check_root
from carclass.errors import UserError


def test_checking_a_root_leaves_neither_file_nor_folder(tmp_path: Path):
    (tmp_path / "old").mkdir()
    check_root(str(tmp_path / "new" / "results"))
    check_root(str(tmp_path / "old"))
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]


def test_a_root_with_results_stays_as_it_is(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    check_root(str(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_root_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"`root`: \S*file is a file\. Give a folder, new or existing"):
        check_root(str(tmp_path / "file"))


def test_a_root_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"`root`: \S*file/a/b is a folder below \S*file, which is a file\. Give"):
        check_root(str(tmp_path / "file" / "a" / "b"))


def test_a_dataset_in_a_root_that_is_a_file_is_unknown(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"no dataset `v1` in .*file is a file, not a folder: correct `root`"):
        dataset.load_dataset(str(tmp_path / "file"), "v1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_without_permission_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_root(str(tmp_path / "results"))


def test_a_root_that_leads_nowhere_is_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to("/nonexistent/folder")
    with pytest.raises(storage.StorageError, match=r"`root`: .*link cannot be written .*link that is in its place"):
        check_root(str(tmp_path / "link"))


def test_a_root_where_nothing_can_be_created_is_refused():
    with pytest.raises(storage.StorageError, match=r"`root`: /proc/1/x cannot be written"):
        check_root("/proc/1/x")
