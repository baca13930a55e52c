"""A simulated virtual machine: a host with an init process, which commands enter, and folders of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.clusters import Job, wait_for
from tests.helpers.hosts import Host

OWN = ("/tmp/ray", "/tmp/ray_tmp_mount", "/opt/carclass", "/home/carclass", "/home/ubuntu")
"""Folders that every machine has for itself."""
INIT = """set -e
mount --bind "$1" /etc/hosts; mount --bind "$2" /etc/profile; mount -t tmpfs -o size=8g tmpfs /dev/shm; hostname "$3"
home=$4; shift 4
for folder in "$@"; do mkdir -p "$home$folder"; mount --bind "$home$folder" "$folder"; done
touch /home/ubuntu/.bashrc /home/carclass/.bashrc
{ cat /etc/passwd; echo ubuntu:x:0:0::/home/ubuntu:/bin/bash; } > "$home/passwd"
mount --bind "$home/passwd" /etc/passwd
touch "$home/booted"
exec "$PYTHON" -S -E -c "$REAP"
"""
"""Script of the first process: hosts file, profile of login shells, host name, home, folders. All users are root."""
REAP = """
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""
"""Program that collects ended processes: Ray waits for those it stops."""
IN_FOLDER = ["sh", "-c", 'cd "$0" && exec "$@"']


class Machine(Host):
    """A host that outlives the commands which started its processes."""

    init: int | None = None
    is_off = False
    """True once it was killed."""

    def boot(self, profile: Path) -> None:
        """Start the first process and wait until its folders are mounted. profile: script of login shells."""
        for folder in OWN:  # mount points
            Path(folder).mkdir(parents=True, exist_ok=True)
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["sh", "-c", INIT, "sh", self.names, profile, self.name, self.home, *OWN]
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "REAP": REAP}
        log = self.home / "init.log"
        with log.open("w") as out:
            full = ["ip", "netns", "exec", self.space, *unshare, *script]
            process = subprocess.Popen(full, env=environment, stdout=out, stderr=out)
        self.started.append(process)
        wait_for((self.home / "booted").exists, process, log)
        self.init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())

    def popen(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        folder: str | Path,
        **streams: Any,
    ) -> subprocess.Popen:
        """Start a command in a folder of the machine, in a process group of its own."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--mount", "--uts", "--pid", *IN_FOLDER, folder, *command]
        return subprocess.Popen(enter, env=environment, start_new_session=True, **streams)

    def start(self, command: Sequence[str | Path], environment: dict[str, str], folder: str | Path = "/") -> Job:
        """Start a command in the background."""
        log = self.home / f"{len(self.started)}.log"
        with log.open("w") as out:
            process = self.popen(command, environment, folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.started.append(process)
        return Job(process, log)

    def kill(self) -> None:
        """Kill all processes: those of the namespace end with its first one."""
        self.is_off = True
        super().kill()
