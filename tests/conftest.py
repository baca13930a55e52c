"""What tests share: a small sample, an S3 server and a Ray cluster on this machine, a dataset made of the sample."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing
from carclass.sample.generate import write_sample
from tests.helpers.busy_s3 import Proxy
from tests.helpers.clusters import free_port

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, labels.csv and truth.json: 60 good photos of ten classes and the sample's 17 oddities."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, train_per_class=4, test_per_class=2)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of an S3 server on loopback; the environment sends everyone else there too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{endpoint}/moto-api/", server)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", endpoint)
            environment.setenv("AWS_ACCESS_KEY_ID", "test")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
            storage._s3.cache_clear()  # a client made before would speak to AWS
            yield boto3.client("s3")
    finally:
        server.kill()
        server.wait()
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the S3 server ended at once"
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture
def bucket(s3: Any) -> str:
    """The name of a bucket of the test's own."""
    name = f"test-{uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy to which this process and those that it starts speak."""
    server = Proxy(os.environ["AWS_ENDPOINT_URL"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    storage._s3.cache_clear()
    yield server
    storage._s3.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def ray_cluster(s3: Any) -> Iterator[str]:
    """A Ray cluster on this machine, by its address; its workers know the S3 server. Jobs called here join it."""
    import ray  # here, so that tests without a cluster don't wait for it
    import ray.data

    # A folder of its own: Ray Train looks there for its cluster, and finds another one if there are several. Not
    # pytest's, whose path is too long for a socket.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    port = free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"  # not that of a cluster which a test starts
    ray.init(
        address="local",
        num_cpus=4,
        dashboard_port=port,
        include_dashboard=True,  # Ray Train asks it whether a run's controller is still there
        object_store_memory=500_000_000,
        logging_level=logging.WARNING,
        # Idle workers stay: starting one costs seconds of imports.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    del os.environ["RAY_API_SERVER_ADDRESS"]
    shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@pytest.fixture(scope="session")
def ingested(ray_cluster: str, photos_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    """The small sample, ingested from its folder."""
    from carclass.ingestion import ingest

    root = str(tmp_path_factory.mktemp("ingested"))
    settings = IngestSettings(photos=str(photos_folder / "photos"), labels=str(photos_folder / "labels.csv"))
    return ingest.ingest_photos(root, settings)


@pytest.fixture(scope="session")
def contents() -> Callable[[dataset.Dataset], tuple[Rows, Rows]]:
    """All that a dataset holds, in the order of its keys: rows and quarantine."""

    def contents(published: dataset.Dataset) -> tuple[Rows, Rows]:
        schema = dataset.MASKED_ROW if published.manifest["kind"] == "masked" else dataset.ROW
        rows = published.read(schema.names).to_pylist()
        quarantine = (
            publishing.read_written(published.uri, "quarantine", dataset.QUARANTINE.names).drop(["part"]).to_pylist()
        )
        return sorted(rows, key=lambda row: row["key"]), sorted(quarantine, key=lambda row: row["key"])

    return contents


@pytest.fixture(scope="session")
def files_below() -> Callable[[str], dict[str, tuple[int, int]]]:
    """Every file below a local folder, with its time of change and its inode: a file written again has others."""

    def files_below(folder: str) -> dict[str, tuple[int, int]]:
        stats = {path: (Path(folder) / path).stat() for path in storage.list_files(folder)}
        return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}

    return files_below
