"""Runs a Dockerfile where there is no Docker: each stage in a folder that is a Debian of its own, by chroot.

Every command has its own mounts and processes (Linux namespaces), which end with it. A stage made of another one goes
on in that one's folder. Needs root, chroot, unshare and debootstrap.
"""

import json
import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

TOOLS = ("chroot", "debootstrap", "ip", "unshare")

# Mounts what a container has and what is given, ends the network but for loopback, enters the root as the user.
ENTER = r"""
root=$1 user=$2 network=$3; shift 3
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
    mount --bind "$1" "$root$2"
    mount -o remount,ro,bind "$root$2"
    shift 2
done; shift
[ "$network" = host ] || ip link set lo up
chroot --userspec="$user" "$root" "$@"
exit # no exec: unshare's --kill-child reaches the first process, and is forgotten when that takes another user
"""

# How the machine reaches its package registries, whatever they are: it is none of the image's.
REGISTRY_FILES = ("/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip", "/etc/resolv.conf")
REGISTRY_VARIABLES = r"(PIP|UV|SSL)_\w+|\w+_(proxy|PROXY)"


@dataclass
class Stage:
    """What a Dockerfile's stage has become so far: its files, and how its commands run."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",  # as the official Python images
        }
    )
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    health: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(
        self,
        script: str,
        *,
        variables: Mapping[str, str] | None = None,
        mounts: Mapping[str, str] | None = None,
        network: bool = False,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell script as the stage's user in its folder.

        Args:
            script: for `sh -c`.
            variables: more of the environment.
            mounts: paths of the machine, and where they can be read in the root.
            network: the machine's; else there is only a loopback device of the command's own.
            timeout: in seconds; then it is killed, with all that it started.
        """
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        enter += ["bash", "-euc", ENTER, "enter", str(self.root), self.user, "host" if network else "none"]
        pairs = [path for pair in {"/etc/hosts": "/etc/hosts", **(mounts or {})}.items() for path in pair]
        command = [*enter, *pairs, "--", "sh", "-c", f"cd {shlex.quote(self.folder)} && {script}"]
        environment = {**self.environment, **(variables or {})}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile, each with all that follows it."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, value = line.partition(" ")
            yield name, value.strip()


def debootstrap(image: str, root: Path) -> None:
    """A Debian with its Python and nothing else, in the place of a python:*-slim-RELEASE image."""
    found = re.search(r"/python:[\d.]+-slim-(\w+)", image)
    assert found, f"{image} is no slim image of Python; what can stand in for it here?"
    include = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", include, found[1], str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


class Build:
    """Builds all stages of a Dockerfile below a folder; `arguments` are those of --build-arg."""

    def __init__(self, dockerfile: Path, folder: Path, **arguments: str) -> None:
        self.context, self.folder, self.given = dockerfile.parent, folder, arguments
        uv = Path(sys.executable).with_name("uv")
        self.cache = Path(subprocess.check_output([uv, "cache", "dir"], text=True).strip())
        self.stages: dict[str, Stage] = {}
        self.stage = self.before = Stage(folder)  # holds what ARG says before the first stage
        for name, value in instructions(dockerfile.read_text(encoding="utf-8")):
            getattr(self, f"_{name.lower()}")(value)

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.stage.arguments[name] = self.given.get(name, default)

    def _from(self, value: str) -> None:
        source, _, name = string.Template(value).substitute(self.before.arguments).partition(" AS ")
        if source in self.stages:
            made_of = self.stages[source]
            self.stage = replace(made_of, environment=dict(made_of.environment), arguments={})
        else:
            self.stage = Stage(self.folder / f"stage-{len(self.stages)}")
            if source == "scratch":
                self.stage.root.mkdir()
            else:
                self._debian(source, self.stage.root)
        self.stages[name or "last"] = self.stage

    def _debian(self, image: str, root: Path) -> None:
        base = self.folder / "base"
        if not base.exists():
            debootstrap(image, base)
        subprocess.run(["cp", "-a", base, root], check=True)
        # The machine's cache of wheels, linked file by file; where it lies on another disk, uv fetches them anew.
        goal = root / self.cache.relative_to("/")
        goal.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-al", self.cache, goal], check=False, capture_output=True)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        made = sources.pop(0).removeprefix("--from=") if value.startswith("--from=") else None
        root = self.stages[made].root if made else self.context
        # From a stage by hard links, as nobody writes into what a stage has left.
        how = ["-al"] if made else ["-r", "--preserve=mode"]
        for source in sources:
            goal = self.stage.root / (target + Path(source).name if target.endswith("/") else target).lstrip("/")
            goal.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", *how, root / source.lstrip("/"), goal], check=True)

    def _run(self, value: str) -> None:
        mounts = {name: name for name in REGISTRY_FILES if Path(name).exists()}
        if found := re.match(r"--mount=type=bind,source=([^,]+),target=(\S+) ", value):
            mounts[str(self.context / found[1])] = found[2]
            value = value[found.end() :]
        registries = {name: said for name, said in os.environ.items() if re.fullmatch(REGISTRY_VARIABLES, name)}
        variables = registries | {"UV_CACHE_DIR": str(self.cache)} | self.stage.arguments
        done = self.stage.run(value, variables=variables, mounts=mounts, network=True, timeout=500)
        assert done.returncode == 0, f"{value}\n{done.stdout}\n{done.stderr}"

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, said = word.partition("=")
            self.stage.environment[name] = re.sub(r"\$(\w+)", lambda found: self.stage.environment[found[1]], said)

    def _user(self, value: str) -> None:
        self.stage.user = value

    def _workdir(self, value: str) -> None:
        self.stage.folder = value

    def _healthcheck(self, value: str) -> None:
        self.stage.health = json.loads(value.partition("CMD")[2])

    def _cmd(self, value: str) -> None:
        self.stage.command = json.loads(value)
