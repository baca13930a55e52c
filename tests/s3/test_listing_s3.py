"""Listing of buckets: every key once in any layout, in constant memory, with retries."""

import itertools
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from carclass import s3 as s3_client
from carclass import storage
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import listing
from carclass.tools.benchmarks import scale
from tests.helpers.faulty_s3 import PAGE, Fault, Proxy

LAYOUTS = {
    "flat": [f"{i:02d}.jpg" for i in range(30)],
    "a folder per class": [f"class {i % 3}/{i}.jpg" for i in range(30)],
    "subset and class": [f"{subset}/class {i % 5}/{i}.jpg" for i in range(20) for subset in ("train", "test")],
    "a folder per photo": [f"{i}/photo.jpg" for i in range(30)],
    "uneven": ["a.jpg", "b/c.jpg", "b/d/e/f/g.jpg", *(f"h/{i:02d}.jpg" for i in range(30))],
    "odd names": ["a//b.jpg", "ä ö/#?&+%.jpg", "a/b c.jpg", "a.jpg", "a/", "a-/c.jpg"],
}


def listed(uri: str) -> list[str]:
    return sorted(file.key for file in itertools.chain.from_iterable(listing.list_pages(uri)))


def put(s3: Any, bucket: str, keys: Iterable[str]) -> None:
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"" if key.endswith("/") else b"x")


@pytest.mark.parametrize("limits", [(64, 10_000), (4, 10_000), (64, 12)], ids=["deep", "flat", "crowded levels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_is_listed_once(
    s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, layout: str, limits: tuple[int, int]
):
    monkeypatch.setattr(listing, "MIN_PREFIXES", limits[0])
    monkeypatch.setattr(listing, "MAX_PREFIXES", limits[1])
    shorten_responses(monkeypatch)
    expected = sorted(key for key in LAYOUTS[layout] if not key.endswith("/"))
    put(s3, bucket, [f"p/{key}" for key in LAYOUTS[layout]])
    put(s3, bucket, ["beside.jpg", "pp/beside.jpg"])
    assert listed(f"s3://{bucket}/p") == listed(f"s3://{bucket}/p/") == expected


def shorten_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit responses to five entries, so that a few keys need several."""
    request = listing._Bucket._request
    monkeypatch.setattr(listing._Bucket, "_request", lambda *args, **options: request(*args, **options, MaxKeys=5))


def test_a_file_whose_key_is_that_of_a_folder_is_quarantined(s3: Any, bucket: str):
    for key in ("p/", "p/a/", "p/a/b.jpg"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    files = itertools.chain.from_iterable(listing.list_pages(f"s3://{bucket}/p"))
    found = {file.key: file.reason for file in files}
    assert found == {"/": Reason.BAD_NAME, "a/": Reason.BAD_NAME, "a/b.jpg": None}


def test_a_missing_prefix_has_no_keys(bucket: str):
    assert listed(f"s3://{bucket}/missing") == []


def test_a_missing_bucket_is_reported(s3: Any):
    with pytest.raises(UserError, match=r"s3://not-there/photos cannot be listed .*Correct the bucket's name"):
        listed("s3://not-there/photos")


def test_a_refused_listing_is_reported_with_a_remedy(proxy: Proxy, bucket: str):
    proxy.faults = [Fault(403)]
    with pytest.raises(UserError, match=rf"s3://{bucket}/p cannot be listed \(Acc.*\)\. The credentials lack a perm"):
        listed(f"s3://{bucket}/p")


@pytest.mark.slow
def test_a_page_of_a_gateway_in_place_of_a_listing_is_requested_again(s3: Any, proxy: Proxy, bucket: str):
    put(s3, bucket, LAYOUTS["a folder per class"])
    proxy.faults = [Fault(PAGE, "GET .*list-type", first=2)]
    assert listed(f"s3://{bucket}") == storage.list_files(f"s3://{bucket}") == sorted(LAYOUTS["a folder per class"])
    assert proxy.refused >= 8


def test_a_listing_that_stays_a_page_of_a_gateway_is_the_storages_fault(
    proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3_client, "FIRST_PAUSE", 0.001)
    proxy.faults = [Fault(PAGE, "GET .*list-type")]
    with pytest.raises(UserError, match=r"cannot be listed \(ResponseParserError: a response without IsTruncated"):
        listed(f"s3://{bucket}/p")


def test_throttled_requests_are_retried(s3: Any, proxy: Proxy, bucket: str):
    put(s3, bucket, LAYOUTS["a folder per class"])
    proxy.first = 2
    assert listed(f"s3://{bucket}") == sorted(LAYOUTS["a folder per class"])
    assert proxy.refused >= 8  # the level, and the three folders


def peak(folder: Path) -> int:
    """List the bucket of a folder, and return the peak of Python's memory in bytes."""
    with scale.serve_s3(folder / "buckets"):
        tracemalloc.start()
        count = sum(map(len, listing.list_pages("s3://photos")))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == int(folder.name)
    return peak_bytes


@pytest.mark.slow  # 26 s
def test_memory_does_not_grow_with_the_number_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "THREADS", 2)  # memory holds one response per thread
    monkeypatch.setattr(scale, "NUM_CLASSES", 5)
    for count in (5_000, 20_000):
        scale.write_photos(tmp_path / str(count), count)
    peak(tmp_path / "5000")  # warm up caches
    assert peak(tmp_path / "20000") < 1.1 * peak(tmp_path / "5000")


def test_a_bucket_can_be_listed_without_a_prefix(s3: Any, bucket: str):
    put(s3, bucket, LAYOUTS["uneven"])
    assert listed(f"s3://{bucket}") == storage.list_files(f"s3://{bucket}")
