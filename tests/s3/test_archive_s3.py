"""Archives of photos on S3."""

import gzip
import io
import random
import tarfile
import zipfile
from typing import Any

import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import archive, listing

PHOTOS = {f"a/{i}.jpg": random.Random(i).randbytes(300_000) for i in range(20)}


def tgz() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in PHOTOS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), 1)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in PHOTOS.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bucket(s3: Any) -> str:
    s3.create_bucket(Bucket="archives")
    return "s3://archives"


@pytest.mark.parametrize(("name", "pack"), [("photos.tgz", tgz), ("photos.zip", zipped)])
def test_archives_on_s3_are_read(s3: Any, bucket: str, name: str, pack: Any):
    s3.put_object(Bucket="archives", Key=name, Body=pack())
    with Inventory() as inventory:
        listing.list_photos(f"{bucket}/{name}", inventory)
        tables = list(archive.read_photos(f"{bucket}/{name}", next(inventory.pending(100)), 8, "ingest.photos"))
    assert {row["key"]: row["data"] for table in tables for row in table.to_pylist()} == PHOTOS


def test_an_archive_that_vanishes_from_s3_is_reported(s3: Any, bucket: str):
    s3.put_object(Bucket="archives", Key="gone.zip", Body=zipped())
    with Inventory() as inventory:
        listing.list_photos(f"{bucket}/gone.zip", inventory)
        requested = next(inventory.pending(100))
    s3.delete_object(Bucket="archives", Key="gone.zip")
    with pytest.raises(UserError, match=r"`predict.photos`: s3://archives/gone.zip cannot be read .*Restore it"):
        list(archive.read_photos(f"{bucket}/gone.zip", requested, 8, "predict.photos"))
