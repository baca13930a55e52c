"""Leases of targets on S3: conditional writes, the store's clock, and stores without conditional writes."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from carclass import storage
from carclass.data import lease
from carclass.data.lease import LeaseLostError, hold_lease
from carclass.errors import UserError


@pytest.fixture
def uri(bucket: str) -> str:
    return f"s3://{bucket}/out/datasets/v1"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expire after two seconds: S3's clock counts whole seconds."""
    monkeypatch.setattr(lease, "RENEW_S", 0.3)
    monkeypatch.setattr(lease, "EXPIRE_S", 2.0)
    monkeypatch.setattr(lease, "POLL_S", 0.1)


def leave_lease(uri: str) -> None:
    """Write the lease of a job on another host that has ended without releasing it."""
    with hold_lease(uri, "mask") as held:
        content = json.loads(storage.read_bytes(held.file))
    storage.write_bytes(held.file, json.dumps(content | {"owner": "other", "host": "far", "machine": ""}).encode())


def run_together(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_lease_is_held_renewed_and_released(s3: Any, bucket: str, uri: str):
    with hold_lease(uri, "ingest") as held:
        held.check()
        held.check()
    assert s3.list_objects_v2(Bucket=bucket).get("Contents", []) == []


def test_a_second_job_is_refused(uri: str):
    in_use = pytest.raises(UserError, match="in use by the job `ingest`")
    with hold_lease(uri, "ingest"), in_use, hold_lease(uri, "mask"):
        pass


@pytest.mark.usefixtures("brief")
def test_one_of_several_takes_a_lease_left_on_another_host(uri: str):
    leave_lease(uri)
    held, refused = [], []

    def compete() -> None:
        try:
            with hold_lease(uri, "ingest") as mine:
                held.append(mine.holder.owner)
                time.sleep(1)
                mine.check()
        except UserError as error:
            refused.append(str(error))

    run_together(compete, 3)
    assert (len(held), len(refused)) == (1, 2)


def test_a_holder_that_was_replaced_may_not_go_on(uri: str):
    with hold_lease(uri, "ingest") as held:
        leave = json.loads(storage.read_bytes(held.file)) | {"owner": "other", "host": "far"}
        storage.write_bytes(held.file, json.dumps(leave).encode())
        with pytest.raises(LeaseLostError, match="far"):
            held.check()


def test_one_of_several_creates_a_file(uri: str):
    written = []
    run_together(lambda: written.append(storage.create(f"{uri}/x", threading.current_thread().name.encode())), 8)
    assert sum(written) == 1
