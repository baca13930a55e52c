"""The autoscaler as the head's files tell: the nodes without GPUs that it may start, and failures in its log."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from carclass.cluster import autoscaler, telemetry

NOW = datetime(2026, 11, 28, 6, 55)
LOG = """2026-11-28 06:54:47,086\tINFO node_provider.py:491 -- Failed to launch 1 nodes of type {}: Node Launch \
Exception (VcpuLimitExceeded): You have requested more vCPU capacity
2026-11-28 06:54:47,090\tINFO instance_manager.py:263 -- Update instance REQUESTED->ALLOCATION_FAILED (type=read): \
launch failed with Failed to launch 1 nodes of type read with request id 1:
2026-11-28 06:54:50,090\tWARNING util.py:279 -- Dropping the empty legacy field head_node.
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write_config(home: Path, *cpu_nodes: str) -> None:
    """Write the head's copy of the cluster's file, with a GPU node, a head, and nodes without GPUs."""
    resources = {"CPU": 16, "memory": 24_000_000_000}
    labels = {"usd-per-hour": "0.5"}
    types = {name: {"resources": resources, "max_workers": 8, "labels": labels} for name in cpu_nodes}
    types["mask"] = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 16, "labels": labels}
    types["head"] = {"resources": {"CPU": 0, "memory": 8_000_000_000}, "max_workers": 0, "labels": labels}
    config = {"head_node_type": "head", "available_node_types": types}
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps(config))


def test_the_largest_size_counts_all_nodes_without_gpus(home: Path):
    write_config(home, "read")
    assert autoscaler.largest_size() == {"CPU": 128, "memory": 8 * 24_000_000_000}


def test_the_largest_node_is_one_without_gpus(home: Path):
    assert autoscaler.largest_node_cpus() == 0
    write_config(home, "read")
    assert autoscaler.largest_node_cpus() == 16


def test_the_largest_size_is_unknown_without_such_nodes_or_elsewhere(home: Path):
    assert autoscaler.largest_size() is None
    write_config(home)
    assert autoscaler.largest_size() is None


def test_nothing_starts_where_there_is_no_autoscaler(home: Path):
    assert telemetry.starting_nodes() == []


def test_the_last_failure_is_told_with_its_reason():
    log = LOG.format("read") + LOG.format("mask")
    assert autoscaler.find_failure(log, NOW) == (
        "Failed to launch 1 nodes of type mask: Node Launch Exception (VcpuLimitExceeded): "
        "You have requested more vCPU capacity"
    )


def test_a_failed_setup_is_told():
    line = (
        "2026-11-28 06:54:20,423\tINFO threaded_ray_installer.py:81 -- Ray installation failed on instance i-1: failed"
    )
    assert autoscaler.find_failure(line, NOW) == "Ray installation failed on instance i-1"


def test_an_old_failure_and_a_log_without_one_tell_nothing():
    assert autoscaler.find_failure(LOG.format("read"), NOW.replace(hour=7)) is None
    assert autoscaler.find_failure("", NOW) is None
