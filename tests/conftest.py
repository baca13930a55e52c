"""Shared fixtures: a small sample, an S3 server, a Ray cluster, and the dataset ingested from the sample."""

import gc
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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from carclass import s3 as s3_client
from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing
from carclass.sample.generate import write_sample
from tests.helpers.clusters import free_port
from tests.helpers.faulty_s3 import Proxy

Rows = list[dict[str, Any]]
SHARE_A_CLUSTER = ("tests/ray/", "tests/s3/test_s3.py", "tests/s3/test_throttling.py")
FAST_VARIANTS = 2
"""Variants of a parametrized test that belong to `make test`; the others, to `make test-all`."""
OWN_CLUSTERS = tuple(
    f"tests/ray/test_{name}.py"
    for name in ("autoscaling", "classification_crashes", "ingest_crashes", "masking_kills", "rival_ingests")
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return pytest-xdist's scheduler: modules that share a Ray cluster on one worker, all others on any."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            shares = module.startswith(SHARE_A_CLUSTER) and module not in OWN_CLUSTERS
            return "shared cluster" if shares else module

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but the first variants of a parametrized test as slow."""
    variants: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.split("[")[0]
        variants[test] += 1
        if variants[test] > FAST_VARIANTS:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Exempt what imports have allocated from garbage collection: every full pass over it takes a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photos/, labels.csv and truth.json: 60 valid photos of ten classes and 17 edge cases."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, train_per_class=4, test_per_class=2)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start an S3 server on loopback and yield a client; environment variables direct all other clients to it."""
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
            s3_client.reset()  # an earlier client would connect to AWS
            yield boto3.client("s3")
    finally:
        server.kill()
        server.wait()
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the S3 server exited at startup"
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture
def bucket(s3: Any) -> str:
    """Return the name of a new bucket."""
    name = f"test-{uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a proxy in front of the S3 server, used by this process and its child processes."""
    server = Proxy(os.environ["AWS_ENDPOINT_URL"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    s3_client.reset()
    yield server
    s3_client.reset()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def ray_cluster(s3: Any) -> Iterator[str]:
    """Start a local Ray cluster whose workers use the S3 server and yield its address. In-process jobs join it."""
    import ray  # slow, and not needed by tests without a cluster
    import ray.data

    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait for others leave their CPU to other processes
    # A separate folder: with several clusters in one, Ray Train may connect to the wrong one.
    # Not tmp_path, which is too long for a socket.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    port = free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"  # not that of a cluster started by a test
    ray.init(
        address="local",
        num_cpus=4,
        dashboard_port=port,
        include_dashboard=True,  # Ray Train asks it whether the controller of a run is alive
        object_store_memory=500_000_000,
        logging_level=logging.WARNING,
        # Keep idle workers: starting one takes seconds of imports.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    del os.environ["RAY_API_SERVER_ADDRESS"], os.environ["OMP_WAIT_POLICY"]
    shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@pytest.fixture(scope="session")
def ingested(ray_cluster: str, photos_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    """Ingest the small sample from its folder."""
    from carclass.ingestion import ingest

    root = str(tmp_path_factory.mktemp("ingested"))
    settings = IngestSettings(photos=str(photos_folder / "photos"), labels=str(photos_folder / "labels.csv"))
    return ingest.ingest_photos(root, settings)


@pytest.fixture(scope="session")
def contents() -> Callable[[dataset.Dataset], tuple[Rows, Rows]]:
    """Return a function that reads the rows and the quarantine of a dataset, both ordered by key."""

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
    """Return a function that maps the files below a folder to (mtime, inode), which change when a file is rewritten."""

    def files_below(folder: str) -> dict[str, tuple[int, int]]:
        stats = {path: (Path(folder) / path).stat() for path in storage.list_files(folder)}
        return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}

    return files_below
