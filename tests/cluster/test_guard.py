"""The guard in cluster/aws.yaml, which ends nodes on which Ray does not run; its minutes last 10 ms here."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.clusters import wait_for
from tests.helpers.hosts import missing_requirement

AWS = Path(__file__).parents[2] / "cluster" / "aws.yaml"
pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
SHIMS = {
    "shutdown": 'echo "$*" >> "$FOLDER/shutdowns"',
    "sleep": "exec /bin/sleep 0.01",
    "systemd-run": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
}
"""Programs of the host by name, as shell scripts."""


class Machine:
    """A process namespace that runs the user data of a node, with or without Ray."""

    def __init__(self, folder: Path, *, with_ray: bool) -> None:
        self.folder = folder
        for name, text in SHIMS.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        shutil.copy("/bin/sleep", folder / "raylet")
        user_data = yaml.safe_load(AWS.read_text())["available_node_types"]["head"]["node_config"]["UserData"]
        (folder / "user-data").write_text(user_data)
        ray = f"{folder}/raylet 1 & " if with_ray else ""
        self.process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", f"{ray}sh {folder}/user-data"],
            env={"PATH": f"{folder}:/usr/bin:/bin:/usr/sbin:/sbin", "FOLDER": str(folder)},
        )

    def shutdowns(self) -> list[str]:
        """Return the arguments of the calls of `shutdown`."""
        file = self.folder / "shutdowns"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(params=[True, False], ids=["with Ray", "without Ray"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(tmp_path, with_ray=request.param)
    yield machine
    machine.process.kill()
    machine.process.wait()


def test_a_node_ends_after_three_days_in_any_case(machine: Machine):
    wait_for(machine.shutdowns, machine.process, machine.folder / "user-data")
    assert machine.shutdowns()[0] == f"-P +{3 * 24 * 60}"


def test_a_node_ends_half_an_hour_after_ray_and_not_before(tmp_path: Path):
    machine, started = Machine(tmp_path, with_ray=True), time.monotonic()
    machine.process.wait(timeout=60)
    assert machine.shutdowns()[1:] == ["-P now"]
    assert time.monotonic() - started > 1 + 30 * 0.01  # Ray runs for a second


def test_a_node_ends_on_which_ray_never_started(tmp_path: Path):
    machine = Machine(tmp_path, with_ray=False)
    machine.process.wait(timeout=60)
    assert machine.shutdowns()[1:] == ["-P now"]
