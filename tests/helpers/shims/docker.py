"""docker: a container is a set of environment variables and mounts; its commands run on the host.

On the operator's machine it builds and pushes images of which only the name and a digest exist.
"""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.shims import call

STATE = Path(os.environ.get("DOCKER_STATE", "/home/ubuntu/.docker"))
IMAGE_ENV = {
    "HOME": "/home/carclass",
    "PATH": "/opt/carclass/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONUNBUFFERED": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of the Dockerfile's image."""
TRANSPARENT = re.compile(r"AWS_|CLOUD_|TERM$|USER$")
"""Variables that stand for the instance's role, network and terminal."""


def main() -> int:
    STATE.mkdir(parents=True, exist_ok=True)
    name, *words = sys.argv[1:]
    if name in ("image", "buildx", "container"):
        name = f"{name}_{words.pop(0)}"
    command = COMMANDS.get(name)
    if command is None:
        print(f"docker: the simulation has no command {name}", file=sys.stderr)
        return 125
    return command(words)


def login(words: list[str]) -> int:
    """Log in: docker login --username USER --password-stdin REGISTRY."""
    if not sys.stdin.read().strip():
        print("Error: Password Required", file=sys.stderr)
        return 1
    (STATE / "logins").open("a").write(f"{words[-1]}\n")
    print("Login Succeeded")
    return 0


def pull(words: list[str]) -> int:
    """Pull an image: docker pull IMAGE."""
    registry = words[-1].partition("/")[0]
    logins = (STATE / "logins").read_text().split() if (STATE / "logins").exists() else []
    if ".dkr.ecr." in registry and registry not in logins:
        print("Error response from daemon: no basic auth credentials", file=sys.stderr)
        return 1
    status = call("pull", image=words[-1])
    if status == 0:
        (STATE / "images").open("a").write(f"{words[-1]}\n")
    return status


def run(words: list[str]) -> int:
    """Create a container: docker run [OPTION ...] IMAGE COMMAND."""
    container: dict = {"Env": {}, "Mounts": [], "Image": words[-2]}
    options = words[:-2]
    while options:
        option, sign, value = options.pop(0).partition("=")
        if option in ("-v", "-e", "--name", "--env") and not sign:
            value = options.pop(0)
        if option in ("-e", "--env"):
            container["Env"][value.partition("=")[0]] = value.partition("=")[2]
        elif option == "--name":
            container["Name"] = value
        elif option == "-v":
            source, target = value.split(":")
            container["Mounts"].append({"Source": source, "Destination": target})
    for mount in container["Mounts"]:
        for path in mount.values():
            Path(path).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", mount["Source"], mount["Destination"]], check=True)
    (STATE / f"{container['Name']}.json").write_text(json.dumps(container))
    print(hashlib.sha256(os.urandom(9)).hexdigest())
    return 0


def execute(words: list[str]) -> int:
    """Run a command: docker exec [-it] [-e NAME=VALUE] CONTAINER COMMAND ..."""
    given = {}
    while words[0].startswith("-"):
        if words.pop(0) in ("-e", "--env"):
            name, sign, value = words.pop(0).partition("=")
            given[name] = value if sign else os.environ.get(name, "")
    name, *command = words
    if not (STATE / f"{name}.json").exists():
        print(f"Error response from daemon: No such container: {name}", file=sys.stderr)
        return 1
    host = {key: value for key, value in os.environ.items() if TRANSPARENT.match(key)}
    container = json.loads((STATE / f"{name}.json").read_text())
    os.chdir("/home/carclass")
    os.execvpe(command[0], command, {**host, **IMAGE_ENV, **container["Env"], **given, "CONTAINER": name})


def inspect(words: list[str]) -> int:
    """Print a property: docker inspect -f TEMPLATE NAME."""
    template, name = words[-2], words[-1]
    file = STATE / f"{name}.json"
    container = json.loads(file.read_text()) if file.exists() else None
    if "Config.Env" in template:
        print(json.dumps([f"{key}={value}" for key, value in IMAGE_ENV.items()]))
    elif container is None:
        print(f"Error: No such object: {name}", file=sys.stderr)
        return 1
    elif "Mounts" in template:
        print(json.dumps(container["Mounts"]))
    else:
        print(container["Image"] if "Config.Image" in template else "true")
    return 0


def stop(words: list[str]) -> int:
    """Kill the processes started by exec and unmount: docker stop|rm CONTAINER."""
    name = words[-1]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"CONTAINER={name}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    file = STATE / f"{name}.json"
    if file.exists():
        for mount in json.loads(file.read_text())["Mounts"]:
            subprocess.run(["umount", "--lazy", mount["Destination"]], check=True)
        file.unlink()
    return 0


def build(words: list[str]) -> int:
    """Remember a tag, after a look at the Dockerfile: docker build [OPTION ...] FOLDER."""
    stages = re.findall(r"^FROM \S+ AS (\w+)", Path(words[-1], "Dockerfile").read_text(), re.MULTILINE)
    options = dict(itertools.pairwise(words))
    if options.get("--target", stages[0]) not in stages:
        print(f"ERROR: target stage {options['--target']} could not be found", file=sys.stderr)
        return 1
    if tag := options.get("-t", options.get("--tag")):
        (STATE / "images").open("a").write(f"{tag}\n")
        return call("push", image=tag) if "--push" in words else 0
    return 0


def tag(words: list[str]) -> int:
    """Add a name to an image: docker tag SOURCE TARGET."""
    if words[0] not in (STATE / "images").read_text().split():
        print(f"Error response from daemon: No such image: {words[0]}", file=sys.stderr)
        return 1
    (STATE / "images").open("a").write(f"{words[1]}\n")
    return 0


def push(words: list[str]) -> int:
    """Push an image: docker push IMAGE."""
    if words[-1] not in (STATE / "images").read_text().split():
        print(f"An image does not exist locally with the tag: {words[-1]}", file=sys.stderr)
        return 1
    return call("push", image=words[-1])


def inspect_remote(words: list[str]) -> int:
    """Print the digest of an image in a registry: docker buildx imagetools inspect NAME --format TEMPLATE."""
    print(f"sha256:{hashlib.sha256(words[1].encode()).hexdigest()}")
    return 0


def info(words: list[str]) -> int:
    """Print the runtimes: docker info -f TEMPLATE."""
    print("map[nvidia:{} runc:{}]" if words else "")
    return 0


COMMANDS = {
    "build": build, "buildx_build": build, "buildx_imagetools": inspect_remote, "exec": execute,
    "image_inspect": inspect, "info": info, "inspect": inspect, "login": login, "pull": pull, "push": push, "rm": stop,
    "run": run, "stop": stop, "tag": tag,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
