"""The Dockerfile, executed in a clean Debian: a Ray node that runs a job chain as an unprivileged user."""

import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.command_runner import _with_interactive

from carclass.sample.generate import write_sample
from tests.helpers.chain import RUN, chain_settings
from tests.helpers.clean_root import TOOLS, Build, Stage, instructions

REPO = Path(__file__).parents[2]
IMAGE = REPO / "cluster" / "image"
LINES = list(instructions((REPO / "Dockerfile").read_text(encoding="utf-8")))
pytestmark = pytest.mark.timeout(900)  # the image and the chain, on two busy cores
BASE = "docker.io/library/python:3.11-slim-bookworm"
INSTALLERS = ("ensurepip", "pip", "pip3", "pip-*", "uv", "uvx", "virtualenv", "distlib")
COMPILERS = ("as", "c++", "cc", "clang", "cpp", "g++", "gcc", "ld", "make", "nvcc", "rustc")

missing = [tool for tool in TOOLS if shutil.which(tool) is None]
CAN_BUILD = sys.platform == "linux" and os.geteuid() == 0 and missing == []


def in_a_clean_root(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that builds the image: 200 s, all of them together."""
    reason = f"needs Linux, root and {', '.join(TOOLS)}; missing: {', '.join(missing) or 'root'}"
    return pytest.mark.slow(pytest.mark.skipif(not CAN_BUILD, reason=reason)(test))


# A head with a worker runs a chain and is stopped. Results are in files, because `ray stop` kills other processes.
LIFE = """
check() {{ name=$1; shift; "$@" >"health.$name" 2>&1; echo $? >"health.$name.code"; }}
await() {{ for _ in $(seq 120); do check "$@"; [ "$(cat "health.$1.code")" = 0 ] && break; sleep 1; done; }}
check before {health}
{command} >head.log 2>&1 &
await head {health}
ray start --address=127.0.0.1:6379 --num-cpus=0 --object-store-memory=100000000 \\
    --dashboard-agent-listen-port=52366 >worker.log 2>&1
await worker {worker_health}
ray job submit --address http://127.0.0.1:8265 --working-dir job -- \\
    python jobs/pipeline.py --config chain.yml >job.log 2>&1
echo $? >job.code
ray stop >stop.log 2>&1
check after {health}
"""


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of this machine."""
    return subprocess.run([shutil.which(name) or name, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.slow  # 5 s
def test_the_dockerfile_passes_hadolint():
    done = tool(str(Path(sys.executable).with_name("hadolint")), REPO / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(IMAGE.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_has_valid_syntax_and_is_executable(script: Path):
    assert tool("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)


def test_every_step_is_one_script_of_cluster_image():
    steps = [re.sub(r"^--mount=\S+ ", "", value) for name, value in LINES if name == "RUN"]
    one_script = r"(python )?(/build/cluster/image|/image)/\w+\.(sh|py)( [^;&|<>]+)?"
    assert [step for step in steps if not re.fullmatch(one_script, step)] == []


def test_the_build_context_contains_all_copied_files():
    admitted = [line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    from_here = [value.split() for name, value in LINES if name == "COPY" and not value.startswith("--from=")]
    copied = [source for *sources, _ in from_here for source in sources]
    assert copied
    assert [path for path in copied if not any(f"{path}/".startswith(f"{folder}/") for folder in admitted)] == []


def test_the_user_is_numeric_so_that_kubernetes_can_check_it():
    assert [value for name, value in LINES if name == "USER"] == ["1000:1000"]


DOCKER = """#!/bin/sh
echo "$*" >> calls
[ "$1" = build ] && exit
[ ! -e offline ] && echo sha256:0123
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs make with a Docker that records calls and knows the base image's digest."""
    shutil.copy(REPO / "Makefile", tmp_path)
    (tmp_path / "cluster" / "image").mkdir(parents=True)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return lambda *words: subprocess.run(
        ["make", *words], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


def test_the_base_image_has_no_default_so_that_a_build_names_it_by_digest():
    assert ("ARG", "BASE") in LINES
    assert {value.split()[0] for name, value in LINES if name == "FROM"} == {"${BASE}", "node", "scratch"}


def test_all_builds_start_from_the_digest_that_the_first_one_looked_up(make: Callable, tmp_path: Path):
    assert make("image").returncode == make("sbom", "DEVICE=cpu").returncode == 0
    lookup, *builds = (tmp_path / "calls").read_text().splitlines()
    assert lookup == f"buildx imagetools inspect {BASE} --format {{{{.Manifest.Digest}}}}"
    start = f"build --platform linux/amd64 --build-arg BASE={BASE}@sha256:0123 --build-arg DEVICE="
    assert builds == [f"{start}cuda --tag carclass .", f"{start}cpu --target sbom --output build/sbom ."]


def test_without_a_digest_nothing_is_built(make: Callable, tmp_path: Path):
    (tmp_path / "offline").touch()
    assert make("image").returncode != 0
    assert "build " not in (tmp_path / "calls").read_text()
    assert list((tmp_path / "cluster" / "image").iterdir()) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    """Build all stages for CPU nodes: the tests' own environment equals that of DEVICE=cuda."""
    folder = tmp_path_factory.mktemp("image")
    try:
        yield Build(REPO / "Dockerfile", folder, BASE=BASE, DEVICE="cpu").stages
    finally:
        shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module")
def node(built: dict[str, Stage]) -> Stage:
    """Return the stage that `docker build` builds by default."""
    return built["last"]


@in_a_clean_root
def test_a_node_has_an_unprivileged_user_with_a_home(node: Stage):
    assert node.run("id -un; id -u; echo ~; pwd").stdout.split() == ["carclass", "1000", *["/home/carclass"] * 2]


@in_a_clean_root
def test_a_timeout_leaves_no_process(node: Stage):
    with pytest.raises(subprocess.TimeoutExpired):
        node.run("sleep 47113", timeout=2)
    deadline = time.monotonic() + 60
    while (remaining := tool("pgrep", "-f", "^sleep 47113$").stdout) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert remaining == ""


@in_a_clean_root
def test_a_node_imports_what_jobs_need(node: Stage):
    done = node.run("python -c 'import ray, torch, torchvision, detectron2; print(ray.__version__)'")
    assert done.stdout.strip() == "2.60.0", done.stderr


@in_a_clean_root
def test_a_node_has_no_compiler(node: Stage):
    assert node.run(f"command -v {' '.join(COMPILERS)}").stdout == ""


@in_a_clean_root
def test_a_node_has_no_installer_of_python_packages(node: Stage):
    names = " -o ".join(f"-name '{name}'" for name in INSTALLERS)
    assert node.run(f"find /opt /usr /home -xdev \\( {names} \\) -not -path '*/torch/include/*'").stdout == ""
    for python, module in itertools.product(("/opt/carclass/bin/python", "/usr/bin/python3"), ("pip", "ensurepip")):
        assert f"No module named {module}" in node.run(f"{python} -m {module}").stderr


@in_a_clean_root
@pytest.mark.parametrize("program", ["bash", "ssh", "rsync", "wget", "whoami"])
def test_a_node_has_what_ray_up_and_kuberay_call(node: Stage, program: str):
    assert node.run(f"command -v {program}").returncode == 0


@in_a_clean_root
def test_ray_up_finds_ray_from_its_login_shells(node: Stage):
    done = node.run(" ".join(_with_interactive("ray --version")))
    assert "2.60.0" in done.stdout, done.stderr


@in_a_clean_root
def test_the_autoscaler_of_kuberay_starts(node: Stage):
    """KubeRay runs it in a sidecar with the head's image."""
    done = node.run("ray kuberay-autoscaler --help")
    assert done.returncode == 0, done.stderr


@in_a_clean_root
def test_a_node_cannot_change_its_environment(node: Stage):
    assert node.run("touch /opt/carclass/bin/ray /opt/carclass/lib/new").returncode != 0


@in_a_clean_root
@pytest.mark.parametrize("script", ["watch_spot", "spot_first", "certificates"])
def test_a_node_has_the_scripts_that_the_templates_call(node: Stage, script: str):
    done = node.run(f"cd /opt/carclass/bin && python -c 'import {script}'")
    assert done.returncode == 0, done.stderr


@in_a_clean_root
def test_an_unknown_device_is_refused(built: dict[str, Stage]):
    done = built["build"].run("/build/cluster/image/device.sh /opt/carclass rocm")
    assert done.returncode == 1
    assert "DEVICE is rocm; give cuda or cpu." in done.stderr


@pytest.fixture(scope="module")
def inventory(built: dict[str, Stage]) -> dict:
    """Return the document of `docker build --target sbom`."""
    (file,) = built["sbom"].root.iterdir()
    assert file.name == "carclass.cdx.json"
    return json.loads(file.read_text())


@in_a_clean_root
def test_the_inventory_lists_the_lock_except_gpu_only_packages_and_installers(inventory: dict):
    machine = {"python_version": "3.11", "python_full_version": "3.11.2"}
    lines = re.findall(r"^[\w.-]+==[^\\]+", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    requirements = [Requirement(line) for line in lines]
    locked = [each for each in requirements if each.marker is None or each.marker.evaluate(machine)]
    listed = {f"{component['name']}=={component['version']}" for component in inventory["components"]}
    (gpu_only,) = re.findall(r"^gpu_only=\((.+)\)$", (IMAGE / "device.sh").read_text(), re.MULTILINE)
    missing_names = [each.name for each in locked if f"{each.name}{each.specifier}" not in listed]
    (installers,) = re.findall(r"pip uninstall --quiet (.+)$", (IMAGE / "remove_installers.sh").read_text(), re.M)
    locked_installers = set(installers.split()) - {"uv", "pip"}
    assert sorted(missing_names) == sorted([*gpu_only.split(), *locked_installers])


@in_a_clean_root
def test_the_inventory_lists_debians_packages(inventory: dict):
    found = {
        component["name"]
        for component in inventory["components"]
        if component.get("purl", "").startswith("pkg:deb/debian/")
    }
    assert {"bash", "libc6", "openssh-client"} <= found


@pytest.fixture(scope="module")
def life(node: Stage) -> Path:
    """Start a head, run the chain as a job and stop the node; return the node's home."""
    home = node.root / "home" / "carclass"
    for name in ("carclass", "jobs"):
        shutil.copytree(REPO / name, home / "job" / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_sample(home / "sample", train_per_class=4, test_per_class=2)
    settings = chain_settings("/home/carclass/results", "/home/carclass/sample")
    settings["train"] |= {"num_workers": 1, "frozen": None}  # one process to start instead of four
    (home / "job" / "chain.yml").write_text(yaml.safe_dump(settings))
    subprocess.run(["chown", "-R", "1000:1000", home / "job", home / "sample"], check=True)
    health = shlex.join(node.health)
    worker_health = health.replace("52365", "52366")  # it shares the head's addresses
    script = LIFE.format(health=health, worker_health=worker_health, command=shlex.join(node.command))
    done = node.run(script, variables={"RAY_AUTH_TOKEN": secrets.token_hex(32)}, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.mark.nightly  # 120 s with its fixture
@in_a_clean_root
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_node_without_ray_is_unhealthy(life: Path, when: str):
    assert (life / f"health.{when}.code").read_text().strip() != "0"


@pytest.mark.nightly  # 120 s with its fixture
@in_a_clean_root
def test_a_heads_health_check_covers_raylet_and_gcs(life: Path):
    assert (life / "health.head").read_text().split("\n") == ["raylet: success", "gcs: success"]


@pytest.mark.nightly  # 120 s with its fixture
@in_a_clean_root
def test_a_workers_health_check_covers_its_raylet(life: Path):
    assert (life / "health.worker").read_text().split("\n") == ["raylet: success", "gcs: success (no local gcs)"]


@pytest.mark.nightly  # 120 s with its fixture
@in_a_clean_root
def test_the_chain_runs_as_a_job(life: Path):
    assert (life / "job.code").read_text().strip() == "0", (life / "job.log").read_text()
    assert (life / "results" / "experiments" / RUN / "report" / "report.html").exists()
