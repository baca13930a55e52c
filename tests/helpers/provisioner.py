"""Server of the simulated cloud's programs (tests/helpers/shims): carries out their requests in the test process."""

import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.machine import Machine
from tests.helpers.tunnel import Tunnel, enter_namespace

SSH_ALIVE_S = 15.0
"""Seconds until ssh gives up a host that does not answer: Ray sets three keepalives of five seconds."""
UNREACHABLE = 255
"""Exit status of ssh without a connection."""
Message = dict[str, Any]


class Session(NamedTuple):
    """A running ssh: its command and forwarded ports."""

    target: str
    process: subprocess.Popen
    tunnels: list[Tunnel]

    def cut(self) -> None:
        """End the session as a lost connection does."""
        for tunnel in self.tunnels:
            tunnel.cut()
        kill_group(self.process)


class Provisioner(socketserver.ThreadingUnixStreamServer):
    """Server on a Unix socket, which all network namespaces reach.

    find: returns the machine with a name, instance id or address, None without one. operations: functions of a request
    and its standard streams by name, which return an exit status.
    """

    daemon_threads = True

    def __init__(
        self,
        path: Path,
        find: Callable[[str], Machine | None],
        environment: Callable[[Machine], dict[str, str]],
        operations: dict[str, Callable[[Message, list[int]], int]],
    ) -> None:
        super().__init__(str(path), Client)
        self.find, self.environment = find, environment
        self.operations = {"ssh": self.ssh, **operations}
        self.sessions: list[Session] = []
        self.log = path.with_suffix(".log").open("w", buffering=1)

    def ssh(self, request: Message, streams: list[int]) -> int:
        """Run a command on a machine until it ends or the caller or the machine is gone."""
        target, caller = self.find(request["target"]), self.find(request["host"])
        if target is None or target.is_off or caller is None:
            os.write(streams[2], f"ssh: connect to host {request['target']}: Connection timed out\n".encode())
            return UNREACHABLE
        try:
            tunnels = [forward_port(caller, target, forward) for forward in request["forwards"]]
        except OSError as error:
            os.write(streams[2], f"bind: {error}\nCould not request local forwarding.\n".encode())
            return UNREACHABLE
        terminal = os.isatty(streams[0])  # a command must not read the operator's answers
        process = target.popen(
            ["bash", "-c", request["command"]],
            self.environment(target),
            "/home/ubuntu",
            stdin=subprocess.DEVNULL if terminal else streams[0],
            stdout=streams[1],
            stderr=streams[2],
        )
        session = Session(request["target"], process, tunnels)
        self.sessions.append(session)
        try:
            return self._wait(session, target, request["connection"])
        finally:
            self.sessions.remove(session)
            for tunnel in tunnels:
                tunnel.cut()
                tunnel.shutdown()
                tunnel.server_close()

    def _wait(self, session: Session, target: Machine, connection: socket.socket) -> int:
        lost: float | None = None
        while (status := session.process.poll()) is None:
            if target.is_off:
                lost = lost or time.monotonic()
            hung_up = bool(select.select([connection], [], [], 0.05)[0])
            if hung_up or (lost and time.monotonic() - lost > SSH_ALIVE_S):
                kill_group(session.process)
        if lost and (rest := lost + SSH_ALIVE_S - time.monotonic()) > 0:
            select.select([connection], [], [], rest)
        return UNREACHABLE if status < 0 or target.is_off else status


class Client(socketserver.StreamRequestHandler):
    """A request of a program, with its streams."""

    server: Provisioner

    def handle(self) -> None:
        data, streams, _, _ = socket.recv_fds(self.connection, 1 << 20, 3)
        request = json.loads(data)
        try:
            self.server.log.write(f"{time.strftime('%T')} {data.decode()}")
            status = self.server.operations[request["operation"]]({**request, "connection": self.connection}, streams)
            self.server.log.write(f"{time.strftime('%T')} -> {status} {data.decode()[:200]}\n")
        finally:
            for stream in streams:
                os.close(stream)
        with suppress(OSError):
            self.wfile.write(f"{status}\n".encode())


def forward_port(caller: Machine, target: Machine, forward: str) -> Tunnel:
    """Forward a port of the caller's loopback to the target's. forward: LOCAL_PORT:localhost:PORT."""
    local, _, port = forward.split(":")
    tunnel = in_namespace(caller.space, lambda: Tunnel(int(local), target.space, ("127.0.0.1", int(port))))
    threading.Thread(target=tunnel.serve_forever, daemon=True).start()
    return tunnel


def in_namespace(space: str, function: Callable[[], Any]) -> Any:
    """Call a function in a network namespace; its sockets stay there. Raise what it raises."""
    results: list[Any] = []
    errors: list[OSError] = []

    def call() -> None:
        enter_namespace(space)
        try:
            results.append(function())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process and those of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
