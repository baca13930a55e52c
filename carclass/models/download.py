"""Downloads over HTTP, with progress lines; an interrupted one is resumed as long as each request brings bytes."""

import http.client
import logging
import urllib.error
import urllib.request

from carclass.formatting import bytes_text
from carclass.progress import Progress

log = logging.getLogger(__name__)
MEGABYTE = 1_000_000
MAX_REQUESTS = 20
TIMEOUT_SECONDS = 60
INTERRUPTIONS = (http.client.HTTPException, ConnectionError, TimeoutError)


class Download:
    """File on the web, read in one request or, after interruptions, in several."""

    def __init__(self, uri: str) -> None:
        self.uri, self.data, self.validator = uri, bytearray(), ""
        self.size: int | None = None  # bytes, if the server tells
        self.progress: Progress | None = None

    def request(self) -> None:
        """Read the file, or the rest of it. Raise an error of INTERRUPTIONS if the answer ends early."""
        headers = {"Range": f"bytes={len(self.data)}-", "If-Range": self.validator} if self.data else {}
        request = urllib.request.Request(self.uri, headers=headers)  # noqa: S310 - a URI of the user or of a publisher
        opener = urllib.request.build_opener()  # with the proxies of the environment as they are now
        with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            if self.uri.startswith("https:") and not response.url.startswith("https:"):
                raise urllib.error.URLError(f"redirected to {response.url}, which is not encrypted")
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                self._start(response)
            assert self.progress is not None
            while piece := response.read(MEGABYTE):
                self.data += piece
                self.progress.add(len(piece) // MEGABYTE)
        if self.size is not None and len(self.data) < self.size:
            raise http.client.IncompleteRead(b"", self.size - len(self.data))

    def _start(self, response: http.client.HTTPResponse) -> None:
        """Begin with the first byte: the server sends the whole file."""
        length, tag = response.headers.get("Content-Length", ""), response.headers.get("ETag", "")
        self.size = int(length) if length.isdigit() else None
        # Without a validator the rest could be that of another version; a weak one does not promise equal bytes.
        self.validator = "" if tag.startswith("W/") else tag
        self.data.clear()
        self.progress = Progress("weights", "MB", None if self.size is None else self.size // MEGABYTE, interval=1.0)


def fetch(uri: str) -> bytes:
    """Return the content of a file on the web.

    Proxies are those of the environment (`https_proxy`). Raise OSError or HTTPException if it cannot be read whole.
    """
    log.info("weights: downloading %s", uri)
    download, furthest = Download(uri), ("", 0)
    for _ in range(MAX_REQUESTS):
        try:
            download.request()
        except INTERRUPTIONS as error:
            if not download.data or furthest == (furthest := (download.validator, len(download.data))):
                raise
            log.info("weights: interrupted after %s (%s), going on", bytes_text(len(download.data)), error)
            if not download.validator:
                download.data.clear()
        else:
            return bytes(download.data)
    raise http.client.IncompleteRead(b"")


def failure_text(error: Exception, key: str) -> str:
    """Return the cause of a failed `fetch` in parentheses, and the remedy. key: the setting that names the file."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500:
        return f"({error}). Correct the address, or set `{key}` to the URI of a file you have."
    # urllib wraps the errors of a connection.
    cause = error.reason if type(error) is urllib.error.URLError else error
    return (
        f"({str(cause) or type(cause).__name__}). Check the network, the proxy (https_proxy) and certificates "
        "(SSL_CERT_FILE), and run the same command again; or download the file on another machine and set "
        f"`{key}` to its path."
    )
