"""Files that jobs write within the folder of photos are no inputs."""

import logging
from pathlib import Path

import pytest

from carclass.data.inventory import Inventory
from carclass.ingestion import listing
from carclass.ingestion.own_files import own_prefixes


def write(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")


def listed(photos: Path, root: Path) -> list[str]:
    with Inventory() as inventory:
        listing.list_photos(str(photos), inventory, root=str(root))
        return list(inventory.keys())


@pytest.mark.parametrize("inner", [".", "out", "a/out"])
def test_files_of_jobs_below_the_photos_are_no_inputs(tmp_path: Path, inner: str):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    write(tmp_path / inner, "datasets/v1/lease.json", "datasets/v1/parts/x.parquet", "experiments/first/config.yml")
    assert listed(tmp_path, tmp_path / inner) == ["a/1.jpg", "b/2.jpg"]


def test_other_files_below_the_root_are_inputs(tmp_path: Path):
    write(tmp_path, "out/3.jpg", "out/datasets/v1/manifest.json", "datasets-of-mine/4.jpg")
    assert listed(tmp_path, tmp_path / "out") == ["datasets-of-mine/4.jpg", "out/3.jpg"]


def test_a_root_reached_by_a_link_is_recognised(tmp_path: Path):
    write(tmp_path / "photos", "a/1.jpg", "out/datasets/v1/manifest.json")
    (tmp_path / "link").symlink_to(tmp_path / "photos" / "out")
    assert listed(tmp_path / "photos", tmp_path / "link") == ["a/1.jpg"]


def test_the_files_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "carclass")
    write(tmp_path, "1.jpg", "out/sweeps/a/trials.json", "out/datasets/v1/manifest.json")
    listed(tmp_path, tmp_path / "out")
    assert "2 files written by jobs are left out" in caplog.text


@pytest.mark.parametrize(
    ("photos", "root", "first"),
    [
        ("s3://b/cars", "s3://b/cars/out", "out/datasets/"),
        ("s3://b/cars/", "s3://b/cars", "datasets/"),
        ("s3://b", "s3://b/out/", "out/datasets/"),
        ("s3://b/cars", "s3://b/carsout", None),
        ("s3://b/cars", "s3://other/cars/out", None),
        ("s3://b/cars/photos", "s3://b/cars", None),
        ("/b/cars", "s3://b/cars/out", None),
    ],
)
def test_a_root_within_a_prefix_is_recognised(photos: str, root: str, first: str | None):
    assert (own_prefixes(photos, root) or (None,))[0] == first
