"""Full disks and power losses: one paragraph, no leftovers, and the same command goes on once there is space."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from carclass import storage
from carclass.config import cli
from carclass.data import dataset
from carclass.errors import UserError
from tests.helpers import rival_jobs

IMAGE = os.urandom(50_000)
"""The small disk has room for one part with it; there are at least two."""
SETTINGS = {"seed": 1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 80 KiB, as far as that is allowed."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a disk needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_reported_in_one_paragraph(disk: Path):
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\). Free some space") as caught:
        rival_jobs.publish(str(disk), SETTINGS, IMAGE)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_temporary_files_and_no_lease(disk: Path):
    with pytest.raises(UserError):
        rival_jobs.publish(str(disk), SETTINGS, IMAGE)
    assert [path for path in files_below(disk) if path.endswith(("tmp", "lease.json", "manifest.json"))] == []


def test_a_job_goes_on_once_there_is_space(disk: Path):
    with pytest.raises(UserError):
        rival_jobs.publish(str(disk), SETTINGS, IMAGE)
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    published = rival_jobs.publish(str(disk), SETTINGS, IMAGE)
    assert len(published.read(["key"])) == len(rival_jobs.KEYS)


class OutOfDiskError(Exception):
    """Error of Ray's object store, by its name."""


class TaskError(Exception):
    """Error of a remote task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback")
        self.cause = cause


FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")


@pytest.mark.parametrize(
    "error", [FULL, TaskError(FULL), OutOfDiskError("spilled\nand so on"), TaskError(TaskError(FULL))]
)
def test_a_full_disk_elsewhere_is_reported_by_every_job(error: Exception, capsys: pytest.CaptureFixture[str]):
    def job() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.main(job)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith("error: no space left on a disk (")


def test_another_error_keeps_its_traceback():
    def job() -> None:
        raise OSError(errno.EBADF, "a bug")

    with pytest.raises(OSError, match="a bug"):
        cli.main(job)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed"])
def test_parts_damaged_by_a_power_loss_are_made_again(tmp_path: Path, damage: str):
    published = rival_jobs.publish(str(tmp_path), SETTINGS, IMAGE)
    Path(published.uri, "manifest.json").unlink()  # lost too
    part = Path(published.part_uris[0])
    size = part.stat().st_size
    with part.open("r+b") as file:
        file.truncate({"empty": 0, "cut": size // 2, "zeroed": 0}[damage])
        file.truncate(size if damage == "zeroed" else file.seek(0, os.SEEK_END))
    again = rival_jobs.publish(str(tmp_path), SETTINGS, IMAGE)
    assert sorted(again.read(["key", "image"])["key"].to_pylist()) == list(rival_jobs.KEYS)


def test_temporary_files_of_a_killed_job_are_removed_by_the_next(tmp_path: Path):
    uri = dataset.dataset_uri(str(tmp_path), "v1")
    leftover = Path(uri, "parts", f".x.parquet.{'a' * 32}.tmp")
    storage.write_bytes(str(leftover), b"half")
    rival_jobs.publish(str(tmp_path), SETTINGS)
    assert not leftover.exists()
