"""The job chain on a tiny drawn sample, on a Ray cluster of two CPUs: a black box of files in and files out."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from carclass.sample.generate import write_sample
from tests.helpers.clusters import free_port, kill

REPOSITORY = Path(__file__).parents[2]
REPRODUCIBLE = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of the cluster and so of its workers: the same arithmetic on every x86-64 CPU with AVX2."""
NUM_CPUS = 2
"""Of the cluster. A run of two workers, an experiment of a tree and a trial have one CPU thread per process."""

RUN, SWEEP = "both-stages", "head"
SAMPLE = {"train_per_class": 6, "test_per_class": 2}
"""At most 64 train photos, which are one batch when features are cached: a photo's features depend, to the last bit, on
the size of its batch, and which photos share one depends on the order in which they were masked."""
MASK = {
    "detector": {"model": "sample", "weights": "sample", "short_side": 160, "num_proposals": 30, "precision": "fp32"},
    "num_actors": 1,
    "use_gpu": False,
}
FIXED = {
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "use_gpu": False,
    "precision": "fp32",  # bf16 kernels differ between CPUs
}
FROZEN = {"epochs": 3, "batch_size": 16, "views": 3}
UNFROZEN = {"epochs": 2, "batch_size": 16, "lr": 1e-3}
EXPERIMENTS = (
    {"name": "exp_a", "dataset": "v2", "frozen": {**FROZEN, "keep_epochs": [1]}, "unfrozen": None},
    {"name": "exp_b", "dataset": "v2", "parent": "exp_a@1", "frozen": None, "unfrozen": UNFROZEN},
    {"name": "exp_c", "dataset": "v2", "parent": "exp_a@best", "frozen": {**FROZEN, "lr": 5e-4}, "unfrozen": None},
    {"name": "exp_d", "dataset": "v1", "frozen": {**FROZEN, "epochs": 2}, "unfrozen": {**UNFROZEN, "epochs": 1}},
)
SEARCH = {
    "name": SWEEP,
    "experiment": "head.yml",
    "space": {
        "train.frozen.lr": {"min": 1e-4, "max": 1e-2, "log": True},
        "train.frozen.batch_size": {"choices": [8, 16]},
    },
    "num_trials": 2,
    "scheduler": "none",
    "num_seeds": 1,
    "max_concurrent_trials": 1,
}


def run_chain(folder: Path) -> tuple[Path, str]:
    """Run all jobs below a folder and return the root they wrote to and the tree that `lineage.py` printed."""
    write_sample(folder / "sample", **SAMPLE)
    write_configs(folder)
    chain = ("--config", "chain.yml")
    with start_ray(folder) as environment:
        for job, *arguments in (
            ("ingest", *chain),
            ("mask", *chain),
            ("train", *chain),
            ("evaluate", *chain),
            ("tune", "--config", "search.yml"),
            ("lineage", "run", "all", "--budget", "tree.yml"),
        ):
            run_job(folder, environment, job, *arguments)
        tree = run_job(folder, environment, "lineage", "tree", "--budget", "tree.yml")
    return folder / "root", tree


def write_configs(folder: Path) -> None:
    """Write the files that the jobs read: a chain, an experiment and its search, a tree and its budget."""
    root = {"root": str(folder / "root")}
    ingest = {"photos": str(folder / "sample/photos"), "labels": str(folder / "sample/labels.csv"), "num_classes": 10}
    train = {"name": RUN, "dataset": "v2", **FIXED, "num_workers": 2, "frozen": FROZEN, "unfrozen": UNFROZEN}
    head = {"name": SWEEP, "dataset": "v2", **FIXED, "frozen": FROZEN, "unfrozen": None}
    write_yaml(folder / "chain.yml", {**root, "ingest": ingest, "mask": MASK, "train": train, "evaluate": {"run": RUN}})
    write_yaml(folder / "head.yml", {**root, "train": head})
    write_yaml(folder / "search.yml", SEARCH)
    write_yaml(folder / "tree.yml", {**root, "experiments": "exp_*.yml", "devices_per_worker": 1})
    for experiment in EXPERIMENTS:
        write_yaml(folder / f"{experiment['name']}.yml", {**root, "train": {**FIXED, **experiment}})


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a config file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def run_job(folder: Path, environment: dict[str, str], job: str, *arguments: str) -> str:
    """Run a job to its end and return its stdout; AssertionError with its output when it fails."""
    command = [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{job} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def start_ray(folder: Path) -> Iterator[dict[str, str]]:
    """Start a Ray node whose workers stay warm from job to job; yield the environment of jobs that join it."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
    port, dashboard = free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="ray-")  # pytest's own is too long for a socket's path
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**known, **REPRODUCIBLE, **token, "RAY_TMPDIR": temporary, "PYTHONPATH": str(REPOSITORY)}
    # Nothing listens there: Ray Train would else ask the dashboard of another cluster on this machine.
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    options = ["--head", f"--port={port}", f"--num-cpus={NUM_CPUS}", "--num-gpus=0", "--object-store-memory=200000000"]
    options += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--block"]
    options += [f"--dashboard-port={dashboard}", "--include-dashboard=False"]
    options += [f"--dashboard-agent-listen-port={free_port()}"]
    options += [f"--system-config={json.dumps({'idle_worker_killing_time_threshold_ms': 600_000})}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *options]
    with (folder / "ray.log").open("w+") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            kill(node)  # with all processes below it: on SIGTERM it would drain for half a minute
            shutil.rmtree(temporary, ignore_errors=True)
