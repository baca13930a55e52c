"""A port forwarded from here into another host's network, as a session of AWS' Systems Manager does.

python -m tests.helpers.tunnel LISTEN_PORT SPACE HOST PORT
"""

import ctypes
import os
import shutil
import socket
import socketserver
import sys
import threading
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NETWORK_SPACE = 0x40000000  # CLONE_NEWNET


class Tunnel(socketserver.ThreadingTCPServer):
    """Listens on this host's loopback; what comes in goes on from within a network namespace, or from here."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, port: int, space: str | None, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.space, self.target = space, target
        self.open: set[socket.socket] = set()

    def cut(self) -> None:
        """Ends all connections; new ones are taken."""
        for connection in [*self.open]:
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """A peer that hung up is no news."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Connection(socketserver.BaseRequestHandler):
    """One connection, in a thread that moves to the other host and stays there."""

    server: Tunnel

    def handle(self) -> None:
        if self.server.space is not None:
            move_to(self.server.space)
        with socket.create_connection(self.server.target) as there:
            self.server.open.add(self.request)
            back = threading.Thread(target=copy, args=(there, self.request), daemon=True)
            back.start()
            copy(self.request, there)
            back.join()
            self.server.open.discard(self.request)


def move_to(space: str) -> None:
    """Takes this thread to another network."""
    with Path("/run/netns", space).open() as there:
        if LIBC.setns(there.fileno(), NETWORK_SPACE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Everything from one end to the other, and then its end."""
    try:
        with source.makefile("rb", buffering=0) as reading, sink.makefile("wb", buffering=0) as writing:
            shutil.copyfileobj(reading, writing)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


if __name__ == "__main__":
    Tunnel(int(sys.argv[1]), sys.argv[2], (sys.argv[3], int(sys.argv[4]))).serve_forever()
