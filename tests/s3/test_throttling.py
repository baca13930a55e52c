"""An S3 that says SlowDown: what was asked is asked again, later, and nothing is lost or doubled.

A proxy before the S3 server refuses the first few requests for each object, or a share of all at random, as a throttled
S3 does. This file, run as a script, is the job whose processes all speak to the proxy.
"""

import http.client
import http.server
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carclass import config, dataset, ingest, storage
from carclass.masking import stream

Rows = list[dict[str, Any]]
MASK = config.Mask(
    detector=config.Detector(model="sample", weights="sample", short_side=96, num_proposals=10),
    num_actors=1,
    part_rows=16,
)

SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
CONTENT = bytes(10_000)  # larger than an answer that says no, which a reader gets in its place


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on, or refuses them: the first few of each, and a share at random."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = endpoint.split("://")[1]
        self.first, self.share = 0, 0.0
        self.random, self.lock = random.Random(0), threading.Lock()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.refused = 0

    def refuses(self, request: str) -> bool:
        with self.lock:
            self.times[request].append(time.monotonic())
            refused = len(self.times[request]) <= self.first or self.random.random() < self.share
            self.refused += refused
            return refused


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = b"".join(self.chunks())
        if self.server.refuses(f"{self.command} {self.path}"):
            self.reply(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        behind = http.client.HTTPConnection(self.server.behind, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in {*HOP_BY_HOP, "expect"}}
        behind.request(self.command, self.path, body, {**kept, "Content-Length": str(len(body))})
        answer = behind.getresponse()
        given = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        if self.command == "HEAD":
            given["Content-Length"] = answer.headers.get("Content-Length", "0")
        self.reply(answer.status, given, answer.read())
        behind.close()

    def chunks(self) -> Iterator[bytes]:
        """The body, whichever way it is framed."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_: Any) -> None:
        pass


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


def test_a_request_that_is_refused_is_made_again(proxy: Proxy, bucket: str):
    proxy.first = 2
    uri = f"s3://{bucket}/a/b.bin"
    storage.write_bytes(uri, CONTENT)
    assert storage.read_bytes(uri) == CONTENT
    assert storage.list_files(f"s3://{bucket}/a") == ["b.bin"]
    assert proxy.refused >= 6


def test_the_time_between_attempts_grows(proxy: Proxy, bucket: str):
    proxy.first = 5
    storage.write_bytes(f"s3://{bucket}/b.bin", CONTENT)
    (times,) = [times for request, times in proxy.times.items() if "b.bin" in request and request.startswith("PUT")]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(waits) == 5
    # Drawn at random below a limit that doubles: the last two are longer than the first two all but always.
    assert sum(waits[-2:]) > sum(waits[:2])


def job(root: str, photos: str) -> None:
    """Ingest and masking in a cluster of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    ingest.run(root, config.Ingest(photos=f"{photos}/photos", labels=f"{photos}/labels.csv"))
    stream.run(root, MASK)


def test_a_throttled_job_makes_the_dataset_of_an_undisturbed_one(
    proxy: Proxy,
    s3: Any,
    bucket: str,
    ingested: dataset.Dataset,
    photos_folder: Path,
    contents: Callable[[dataset.Dataset], tuple[Rows, Rows]],
):
    expected = stream.run(ingested.uri.rsplit("/", 2)[0], MASK.model_copy(update={"dataset": "unthrottled"}))
    for path in photos_folder.rglob("*.*"):
        s3.put_object(Bucket=bucket, Key=f"cars/{path.relative_to(photos_folder)}", Body=path.read_bytes())
    proxy.share = 0.15
    command = [sys.executable, __file__, f"s3://{bucket}/out", f"s3://{bucket}/cars"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert proxy.refused > 20
    proxy.share = 0.0
    for found, wanted in zip(contents(dataset.load(f"s3://{bucket}/out", "v2")), contents(expected), strict=True):
        assert [a["key"] for a, b in zip(found, wanted, strict=True) if a != b] == []


if __name__ == "__main__":
    job(*sys.argv[1:])
