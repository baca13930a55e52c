"""Storage and ingestion on S3, with a real server on loopback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing
from carclass.data.inventory import INPUT
from carclass.data.root_check import check_root
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.ingestion.reading import load_photos

Rows = list[dict[str, Any]]


@pytest.fixture
def put(s3: Any, bucket: str) -> Callable[..., None]:
    def put(key: str, data: bytes = b"content", **options: Any) -> None:
        s3.put_object(Bucket=bucket, Key=key, Body=data, **options)

    return put


def keys_in(s3: Any, bucket: str) -> dict[str, str]:
    """Return every key of a bucket with its time of modification."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {item["Key"]: str(item["LastModified"]) for page in pages for item in page.get("Contents", [])}


# Storage


def test_written_objects_can_be_read_by_storage_and_by_boto(s3: Any, bucket: str):
    uri = f"s3://{bucket}/a/ä #?.bin"
    storage.write_bytes(uri, b"content")
    assert storage.read_bytes(uri) == b"content"
    assert s3.get_object(Bucket=bucket, Key="a/ä #?.bin")["Body"].read() == b"content"


def test_a_listing_contains_exactly_the_objects_below_a_prefix(bucket: str, put: Callable[..., None]):
    for key in ("p/b.jpg", "p/a/c.jpg", "p/", "pp/d.jpg", "e.jpg"):
        put(key)
    assert storage.list_files(f"s3://{bucket}/p") == storage.list_files(f"s3://{bucket}/p/") == ["a/c.jpg", "b.jpg"]


def test_a_missing_object_is_a_file_not_found_error(bucket: str):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"s3://{bucket}/missing")


def test_only_objects_exist_and_not_prefixes(bucket: str, put: Callable[..., None]):
    put("a/b")
    assert [storage.exists(f"s3://{bucket}/{key}") for key in ("a/b", "a", "c")] == [True, False, False]


def test_checking_a_root_leaves_no_object_behind(s3: Any, bucket: str):
    check_root(f"s3://{bucket}/out")
    assert [key for key in keys_in(s3, bucket) if not key.endswith("/")] == []


# Ingest


@pytest.fixture(scope="session")
def uploaded(s3: Any, photos_folder: Path) -> str:
    """Upload the small sample, and return its URI."""
    s3.create_bucket(Bucket="sample")
    for path in photos_folder.rglob("*.*"):
        s3.put_object(Bucket="sample", Key=f"cars/{path.relative_to(photos_folder)}", Body=path.read_bytes())
    return "s3://sample/cars"


def settings(uri: str, **overrides: Any) -> IngestSettings:
    return IngestSettings.model_validate({"photos": f"{uri}/photos", "labels": f"{uri}/labels.csv"} | overrides)


def test_a_sample_on_s3_gives_the_same_dataset_as_on_disk(
    uploaded: str, bucket: str, ingested: dataset.Dataset, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    published = ingest_photos(f"s3://{bucket}/out", settings(uploaded))
    assert contents(published) == contents(ingested)
    counts = ("inputs", "rows", "quarantined", "splits", "reasons", "classes")
    assert [published.manifest[name] for name in counts] == [ingested.manifest[name] for name in counts]


@pytest.mark.slow
def test_a_second_run_on_s3_writes_nothing(s3: Any, uploaded: str, bucket: str, ray_cluster: str):
    first = ingest_photos(f"s3://{bucket}/out", settings(uploaded))
    before = keys_in(s3, bucket)
    assert ingest_photos(f"s3://{bucket}/out", settings(uploaded)) == first
    assert keys_in(s3, bucket) == before


def test_unreadable_objects_are_quarantined_and_the_rest_is_published(
    s3: Any, bucket: str, put: Callable[..., None], photos_folder: Path, ray_cluster: str
):
    photos = [(photos_folder / "photos" / name).read_bytes() for name in ("000000.jpg", "000001.jpg", "000002.jpg")]
    put("photos/a.jpg", photos[0])
    put("photos/b//c.jpg", photos[1])
    put("photos/frozen.jpg", photos[2], StorageClass="GLACIER")
    put("labels.csv", b"img_name,class,subset\na.jpg,A,test\nfrozen.jpg,A,train\nb//c.jpg,B,train\ngone.jpg,B,test\n")
    published = ingest_photos(f"s3://{bucket}/out", settings(f"s3://{bucket}", max_quarantined=1))
    quarantine = publishing.read_written(published.uri, "quarantine", ["key", "reason", "detail"]).to_pylist()
    assert sorted(published.read(["key"])["key"].to_pylist()) == ["a.jpg", "b//c.jpg"]
    assert {row["key"]: row["reason"] for row in quarantine} == {"frozen.jpg": "unreadable", "gone.jpg": "missing_file"}
    assert all(row["detail"] for row in quarantine)


def test_a_photo_deleted_after_the_listing_is_unreadable(bucket: str, put: Callable[..., None]):
    put("photos/A/x.jpg")
    rows = [{"key": key, "label": "A", "subset": "train"} for key in ("A/x.jpg", "A/gone.jpg")]
    loaded = list(load_photos(pa.Table.from_pylist(rows, INPUT), f"s3://{bucket}/photos", range(2)))
    assert loaded[0]["data"] == b"content"
    assert loaded[1]["data"] is None
    assert "gone.jpg" in loaded[1]["error"]


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"photos": "s3://{bucket}/photos"}, "`ingest.photos`: no files in s3://{bucket}/photos"),
        ({"photos": "s3://not-there/photos"}, r"s3://not-there/photos cannot be listed .*NoSuchBucket.* Correct the"),
        ({"photos": "s3://{bucket}/photos.tgz"}, "`ingest.photos`: no archive s3://{bucket}/photos.tgz"),
        ({"labels": "s3://{bucket}/labels.csv"}, "`ingest.labels`: s3://{bucket}/labels.csv cannot be read"),
    ],
)
def test_a_missing_source_is_reported_and_nothing_is_published(
    s3: Any, uploaded: str, bucket: str, overrides: dict[str, str], message: str
):
    formatted = {key: value.format(bucket=bucket) for key, value in overrides.items()}
    with pytest.raises(UserError, match=message.format(bucket=bucket)):
        ingest_photos(f"s3://{bucket}/out", settings(uploaded, **formatted))
    assert [key for key in keys_in(s3, bucket) if not key.endswith("/")] == []


def test_a_root_in_a_missing_bucket_is_reported(uploaded: str):
    with pytest.raises(UserError, match=r"s3://not-there/out/.* \(NoSuchBucket .*Correct the bucket's name, or create"):
        ingest_photos("s3://not-there/out", settings(uploaded))


def test_the_error_for_an_empty_bucket_names_the_job_that_makes_a_dataset(bucket: str):
    with pytest.raises(UserError, match=r"no dataset `v1` in .*Run `python jobs/ingest.py --config FILE` first"):
        dataset.load_dataset(f"s3://{bucket}/out", "v1")
