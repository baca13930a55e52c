"""Simulated hosts: Linux namespaces with their own network, processes, shared memory and host name. They need root."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.helpers.clusters import Job

NETWORK, OUTSIDE = "10.77.0", "198.51.100"
SWITCH = "carclass-switch"
RAY_FOLDER = Path("/tmp/carclass-ray")
"""Path of Ray's folder, the same on every host."""
ENTER = """set -e
mount --bind "$1" "$2"; mount --bind "$3" /etc/hosts; mount -t tmpfs -o size=4g tmpfs /dev/shm; hostname "$4"
shift 4
exec "$@"
"""
"""Script that starts a command on a host: Ray's folder, its mount point, hosts file, host name, command."""


def missing_requirement() -> str | None:
    """Return the reason for which hosts cannot be created, None if they can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    if absent := [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]:
        return f"{', '.join(absent)} not found"
    done = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "true"], capture_output=True, check=False)
    return None if done.returncode == 0 else "creating namespaces is not permitted"


class Host:
    """A host on a network, by default the cluster's."""

    def __init__(self, name: str, number: int, folder: Path, names: Path, network: str = NETWORK) -> None:
        self.name, self.space, self.address = name, f"carclass-{name}", f"{network}.{number}"
        self.home, self.names = folder / name, names
        self.ray = self.home / "ray"
        self.ray.mkdir(parents=True)
        self.started: list[subprocess.Popen] = []
        self.cable = f"port{number}"
        _make_space(self.space)
        _sh(f"ip link add eth0 netns {self.space} type veth peer name {self.cable} netns {SWITCH}")
        _sh(f"ip -n {SWITCH} link set {self.cable} up")
        _sh(f"ip -n {self.space} address add {self.address}/24 dev eth0")
        self.plug()
        _sh(f"ip -n {self.space} route add default via {network}.254")

    def give_token(self, token: str) -> None:
        """Write the cluster's token to Ray's default path."""
        path = self.home / ".ray" / "auth_token"
        path.parent.mkdir(exist_ok=True)
        path.touch(0o600)
        path.write_text(token)

    def plug(self) -> None:
        """Connect the host to the network."""
        _sh(f"ip -n {self.space} link set eth0 up")

    def unplug(self) -> None:
        """Disconnect the host; its processes keep running."""
        _sh(f"ip -n {self.space} link set eth0 down")

    def start(self, command: Sequence[str | Path], environment: dict[str, str]) -> Job:
        """Start a command in the background."""
        log = self.home / f"{len(self.started)}.log"
        # In a PID namespace, whose processes all end with the first one.
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["sh", "-c", ENTER, "sh", self.ray, RAY_FOLDER, self.names, self.name]
        environment = {**environment, "HOME": str(self.home), "RAY_TMPDIR": str(RAY_FOLDER)}
        with log.open("w") as out:
            full = ["ip", "netns", "exec", self.space, *unshare, *enter, *command]
            process = subprocess.Popen(full, env=environment, stdout=out, stderr=subprocess.STDOUT)
        self.started.append(process)
        return Job(process, log)

    def run(self, command: Sequence[str | Path], environment: dict[str, str]) -> tuple[int, str]:
        """Run a command and return its exit status and output."""
        done = self.start(command, environment)
        return done.process.wait(timeout=300), done.log.read_text()

    def kill(self) -> None:
        """Kill all processes of the host."""
        for process in self.started:
            process.kill()
            process.wait(timeout=60)


H = TypeVar("H", bound=Host)


class Network:
    """Hosts on one switch, with a router that blocks connections from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, folder / "hosts"
        self.hosts: dict[str, Host] = {}
        folder.mkdir()
        RAY_FOLDER.mkdir(exist_ok=True)
        self.names.write_text("127.0.0.1 localhost\n")
        _make_space(SWITCH)
        _sh(f"ip -n {SWITCH} link add bridge type bridge")
        _sh(f"ip -n {SWITCH} link set bridge up")
        _sh(f"ip -n {SWITCH} address add {NETWORK}.254/24 dev bridge")
        self.forward(False)

    def add(self, name: str, number: int | None = None, kind: type[H] = Host) -> H:  # type: ignore[assignment]
        """Add a host to the switch. number: the last of its address, by default the next one."""
        host = self.hosts[name] = kind(name, number or len(self.hosts) + 1, self.folder, self.names)
        _sh(f"ip -n {SWITCH} link set {host.cable} master bridge")
        with self.names.open("a") as file:  # appended in place, because running hosts have mounted the file
            file.write(f"{host.address} {name}\n")
        return host

    def add_outside(self, name: str, kind: type[H] = Host) -> H:  # type: ignore[assignment]
        """Add a host in another network behind the router."""
        host = self.hosts[name] = kind(name, len(self.hosts) + 1, self.folder, self.names, OUTSIDE)
        _sh(f"ip -n {SWITCH} address add {OUTSIDE}.254/24 dev {host.cable}")
        return host

    def remove(self, host: Host) -> None:
        """Kill and remove a host."""
        host.kill()
        del self.hosts[host.name]
        _sh(f"ip netns delete {host.space}")

    def forward(self, on: bool) -> None:
        """Let the router forward packets or not."""
        _sh(f"ip netns exec {SWITCH} sysctl -q -w net.ipv4.ip_forward={int(on)}")

    def close(self) -> None:
        """Kill and remove all hosts."""
        for host in [*self.hosts.values()]:
            self.remove(host)
        _sh(f"ip netns delete {SWITCH}")
        with suppress(OSError):
            RAY_FOLDER.rmdir()


def _make_space(name: str) -> None:
    """Create a network namespace with loopback; first remove one left by a killed test, with its processes."""
    if Path("/run/netns", name).exists():
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _sh(f"ip netns delete {name}")
    _sh(f"ip netns add {name}")
    _sh(f"ip -n {name} link set lo up")


def _sh(command: str) -> None:
    """Run a command and assert that it succeeds."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
