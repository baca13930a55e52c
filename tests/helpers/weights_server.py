"""A web server of weights files on loopback, with the faults of real ones; it is also a proxy of any host."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CUT = 100_000
"""Bytes after which /cut/ ends the connection."""


class WeightsServer(http.server.ThreadingHTTPServer):
    """Server of `files`: by name below any path, or by path.

    /cut/: an answer ends after CUT bytes; /cut/whole/: without ranges. /moved/: redirects. A missing file is 404.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etag = '"1"'
        self.requests: list[tuple[str, str | None]] = []  # path or URL, and range

    @property
    def address(self) -> str:
        """Return the URL of the server."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WeightsServer

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Range"]))
        folder, _, name = self.path.rpartition("/")
        data = self.server.files.get(self.path, self.server.files.get(name))
        if data is None:
            self.send_error(404)
        elif folder.endswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/{name}")
            self.end_headers()
        else:
            self._send(data, cut="/cut" in folder, ranges="/whole" not in folder)

    def _send(self, data: bytes, *, cut: bool, ranges: bool) -> None:
        start = 0
        if ranges and self.headers["Range"] and self.headers["If-Range"] == self.server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if ranges:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + CUT] if cut else data[start:])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serve_weights() -> Iterator[WeightsServer]:
    """Yield a running server."""
    with WeightsServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
