"""A proxy of the S3 server that throttles with SlowDown errors."""

import http.client
import http.server
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Proxy(http.server.ThreadingHTTPServer):
    """Proxy that forwards requests or refuses them: the `first` of each kind, and a `share` at random."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = endpoint.split("://")[1]
        self.first, self.share = 0, 0.0
        self.random, self.lock = random.Random(0), threading.Lock()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.refused = 0

    def refuses(self, request: str) -> bool:
        """Record a request and return True if it is to be refused."""
        with self.lock:
            self.times[request].append(time.monotonic())
            refused = len(self.times[request]) <= self.first or self.random.random() < self.share
            self.refused += refused
            return refused


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection to the proxy."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        """Forward a request and its response, or refuse it."""
        body = b"".join(self.chunks())
        if self.server.refuses(f"{self.command} {self.path}"):
            self.reply(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {*HOP_BY_HOP, "expect"}}
        upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        response = upstream.getresponse()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = response.headers.get("Content-Length", "0")
        self.reply(response.status, headers, response.read())
        upstream.close()

    def chunks(self) -> Iterator[bytes]:
        """Yield the body, chunked or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_: Any) -> None:
        pass
