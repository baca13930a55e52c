"""A proxy of the S3 server that misbehaves: errors with and without a body, resets, stalls, bodies that end early."""

import http.client
import http.server
import random
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{}</Code><Message>refused by the test</Message></Error>"""
CODES = {
    301: "PermanentRedirect", 400: "ExpiredToken", 403: "AccessDenied", 404: "NoSuchKey", 429: "TooManyRequests",
    500: "InternalError", 502: "BadGateway", 503: "SlowDown", 504: "GatewayTimeout",
}  # fmt: skip
RESET, STALL, TRUNCATED, CUT, FLIPPED, PAGE = "reset", "stall", "truncated", "cut", "flipped", "page"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Fault:
    """Fault of the requests whose "METHOD /path?query" matches a pattern."""

    kind: int | str
    """HTTP status, RESET, STALL, TRUNCATED (the connection ends early), CUT (half a body with the length of that half),
    FLIPPED (a wrong byte) or PAGE (a gateway's page with status 200)."""
    pattern: str = ""
    first: int | None = None
    """Number of such requests, for each path, that fail; by default all."""
    after: int = 0
    """Number of such requests that succeed before any fails."""
    has_body: bool = True
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    by_path: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def applies(self, request: str) -> bool:
        """Count a request and return True if it fails."""
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        if self.seen <= self.after:
            return False
        self.by_path[request] += 1
        return self.first is None or self.by_path[request] <= self.first


class Proxy(http.server.ThreadingHTTPServer):
    """Proxy that forwards requests, or fails them: by `faults`, the `first` of each kind, and a `share` at random."""

    daemon_threads = True

    def __init__(self, endpoint: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.upstream = endpoint.split("://")[1]
        self.faults: list[Fault] = []
        self.first, self.share = 0, 0.0
        self.random, self.lock = random.Random(0), threading.Lock()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.refused = 0

    def fault_of(self, request: str) -> Fault | None:
        """Record a request and return its fault, if any."""
        with self.lock:
            self.times[request].append(time.monotonic())
            found = next((fault for fault in self.faults if fault.applies(request)), None)
            if found is None and (len(self.times[request]) <= self.first or self.random.random() < self.share):
                found = Fault(503)
            self.refused += found is not None
            return found

    def count(self, pattern: str) -> int:
        """Return the number of requests that match a pattern."""
        return sum(len(times) for request, times in self.times.items() if re.search(pattern, request))


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection to the proxy."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        """Forward a request and its response, or fail it."""
        body = b"".join(self.chunks())
        fault = self.server.fault_of(f"{self.command} {self.path}")
        if fault is None or fault.kind in (TRUNCATED, CUT, FLIPPED):
            self.forward(body, "" if fault is None or self.command == "HEAD" else str(fault.kind))
        elif fault.kind == PAGE:
            self.reply(200, {"Content-Type": "text/html"}, b"<html>Please sign in.</html>")
        elif fault.kind == STALL:
            time.sleep(1)  # tests lower the client's read timeout
            self.close_connection = True
        elif fault.kind == RESET:
            self.reset()
        else:
            assert isinstance(fault.kind, int)
            error = ERROR.format(fault.code or CODES[fault.kind]).encode() if fault.has_body else b""
            self.reply(fault.kind, {"Content-Type": "application/xml", **fault.headers}, error)

    def forward(self, body: bytes, damage: str) -> None:
        """Forward a request and its response, damaged as a fault of this kind."""
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {*HOP_BY_HOP, "expect"}}
        upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        response = upstream.getresponse()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = response.headers.get("Content-Length", "0")
        data = response.read()
        if damage == TRUNCATED:
            headers["Content-Length"] = str(len(data))
            self.close_connection = True
        if damage == FLIPPED:
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif damage:
            data = data[: len(data) // 2]
        if damage in (CUT, FLIPPED):  # no checksum tells
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        self.reply(response.status, headers, data)
        upstream.close()

    def reset(self) -> None:
        """Close the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

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
