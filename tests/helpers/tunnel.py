"""A TCP port forwarded into another host's network namespace, like a session of AWS Systems Manager.

python -m tests.helpers.tunnel LISTEN_PORT SPACE HOST PORT
"""

import ctypes
import os
import shutil
import socket
import socketserver
import sys
import threading
from contextlib import suppress
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


class Tunnel(socketserver.ThreadingTCPServer):
    """Listener on loopback that forwards connections to a target, optionally from a network namespace."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, port: int, space: str | None, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.space, self.target = space, target
        self.connections: set[socket.socket] = set()

    def cut(self) -> None:
        """Close all connections; new ones are accepted."""
        for connection in [*self.connections]:
            with suppress(OSError):  # its peer hung up
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Ignore peers that hung up."""

    @property
    def url(self) -> str:
        """URL of the listener."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Connection(socketserver.BaseRequestHandler):
    """A forwarded connection, in a thread that enters the other namespace for good."""

    server: Tunnel

    def handle(self) -> None:
        if self.server.space is not None:
            enter_namespace(self.server.space)
        with socket.create_connection(self.server.target) as target:
            self.server.connections.add(self.request)
            reverse = threading.Thread(target=copy, args=(target, self.request), daemon=True)
            reverse.start()
            copy(self.request, target)
            reverse.join()
            self.server.connections.discard(self.request)


def enter_namespace(space: str) -> None:
    """Move this thread to a network namespace."""
    with Path("/run/netns", space).open() as namespace:
        if LIBC.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy all data from one socket to another, then shut the sink down."""
    try:
        with source.makefile("rb", buffering=0) as reading, sink.makefile("wb", buffering=0) as writing:
            shutil.copyfileobj(reading, writing)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


if __name__ == "__main__":
    Tunnel(int(sys.argv[1]), sys.argv[2], (sys.argv[3], int(sys.argv[4]))).serve_forever()
