"""Execution of a Dockerfile without Docker: each stage is a folder with a Debian, entered by chroot.

Every command has its own mounts and processes (Linux namespaces), which end with it. A stage based on another one uses
its folder. Needs root, chroot, unshare and debootstrap.
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

# Mounts the container's file systems and the given paths, sets up loopback, and enters the root as the user.
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
exit # no exec: unshare's --kill-child kills the first process, unless that changes its user
"""

# Access of this machine to package registries, which is not part of the image.
REGISTRY_FILES = ("/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip", "/etc/resolv.conf")
REGISTRY_VARIABLES = r"(PIP|UV|SSL)_\w+|\w+_(proxy|PROXY)"


@dataclass
class Stage:
    """State of a Dockerfile's stage: its files, and how its commands run."""

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
        """Run a shell script as the stage's user in its working directory.

        Args:
            script: for `sh -c`.
            variables: additional environment variables.
            mounts: paths of the machine → read-only paths in the root.
            network: use the machine's network; otherwise there is only loopback.
            timeout: seconds until all its processes are killed.
        """
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        enter += ["bash", "-euc", ENTER, "enter", str(self.root), self.user, "host" if network else "none"]
        pairs = [path for pair in {"/etc/hosts": "/etc/hosts", **(mounts or {})}.items() for path in pair]
        command = [*enter, *pairs, "--", "sh", "-c", f"cd {shlex.quote(self.folder)} && {script}"]
        environment = {**self.environment, **(variables or {})}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Dockerfile with their arguments."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, value = line.partition(" ")
            yield name, value.strip()


def debootstrap(image: str, root: Path) -> None:
    """Create a minimal Debian with its Python, in place of a python:*-slim-RELEASE image."""
    match = re.search(r"/python:[\d.]+-slim-(\w+)", image)
    assert match, f"{image} is not a slim image of Python and cannot be replaced by a Debian"
    include = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", include, match[1], str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


class Build:
    """A build of all stages of a Dockerfile below a folder; `arguments` are those of --build-arg."""

    def __init__(self, dockerfile: Path, folder: Path, **arguments: str) -> None:
        self.context, self.folder, self.build_args = dockerfile.parent, folder, arguments
        uv = Path(sys.executable).with_name("uv")
        self.cache = Path(subprocess.check_output([uv, "cache", "dir"], text=True).strip())
        self.stages: dict[str, Stage] = {}
        self.stage = self.preamble = Stage(folder)  # arguments before the first stage
        for name, value in instructions(dockerfile.read_text(encoding="utf-8")):
            getattr(self, f"_{name.lower()}")(value)

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.stage.arguments[name] = self.build_args.get(name, default)

    def _from(self, value: str) -> None:
        source, _, name = string.Template(value).substitute(self.preamble.arguments).partition(" AS ")
        if source in self.stages:
            base = self.stages[source]
            self.stage = replace(base, environment=dict(base.environment), arguments={})
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
        # Hard links to the machine's cache of wheels; if it is on another disk, uv downloads them again.
        cache = root / self.cache.relative_to("/")
        cache.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-al", self.cache, cache], check=False, capture_output=True)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        stage = sources.pop(0).removeprefix("--from=") if value.startswith("--from=") else None
        root = self.stages[stage].root if stage else self.context
        # Hard links from a stage, because finished stages are not modified.
        options = ["-al"] if stage else ["-r", "--preserve=mode"]
        for source in sources:
            path = self.stage.root / (target + Path(source).name if target.endswith("/") else target).lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", *options, root / source.lstrip("/"), path], check=True)

    def _run(self, value: str) -> None:
        mounts = {name: name for name in REGISTRY_FILES if Path(name).exists()}
        if match := re.match(r"--mount=type=bind,source=([^,]+),target=(\S+) ", value):
            mounts[str(self.context / match[1])] = match[2]
            value = value[match.end() :]
        registries = {name: item for name, item in os.environ.items() if re.fullmatch(REGISTRY_VARIABLES, name)}
        variables = registries | {"UV_CACHE_DIR": str(self.cache)} | self.stage.arguments
        done = self.stage.run(value, variables=variables, mounts=mounts, network=True, timeout=500)
        assert done.returncode == 0, f"{value}\n{done.stdout}\n{done.stderr}"

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, text = word.partition("=")
            self.stage.environment[name] = re.sub(r"\$(\w+)", lambda match: self.stage.environment[match[1]], text)

    def _user(self, value: str) -> None:
        self.stage.user = value

    def _workdir(self, value: str) -> None:
        self.stage.folder = value

    def _healthcheck(self, value: str) -> None:
        self.stage.health = json.loads(value.partition("CMD")[2])

    def _cmd(self, value: str) -> None:
        self.stage.command = json.loads(value)
