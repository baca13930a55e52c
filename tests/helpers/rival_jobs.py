"""Small jobs that write one dataset beside each other, in processes that are paused at given points."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carclass import storage
from carclass.data import dataset, lease, publishing
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.errors import UserError

KEYS = "abcdefgh"
OPERATIONS = ("create", "replace", "write_bytes", "delete")
NUM_OPERATIONS = 30
"""About as many as a job needs that is not disturbed."""


@dataclass(frozen=True)
class Plan:
    """Course of one job."""

    seed: int  # of its settings: jobs with the same one do the same work
    delay: float  # seconds until it starts
    paused_at: int  # number of the storage operation before which its process is stopped
    pause: float  # seconds until it goes on
    far: bool  # it runs on another host


def make_plans(rng: random.Random, count: int) -> list[Plan]:
    """Return the plans of jobs beside each other."""
    return [
        Plan(
            seed=rng.randrange(2),
            delay=rng.uniform(0, 0.2),
            paused_at=rng.randrange(NUM_OPERATIONS),
            pause=rng.choice([0.1, 0.4, 1.2]),
            far=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def run_jobs(root: str, plans: list[Plan], results: Path) -> list[dict[str, Any]]:
    """Run jobs beside each other, and return the result of each, see `run_job`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.rival_jobs"])
    files = [results / f"{i}.json" for i in range(len(plans))]
    processes = [
        context.Process(target=run_job, args=(root, asdict(plan), str(file)))
        for plan, file in zip(plans, files, strict=True)
    ]
    for process in processes:
        process.start()
    resume_at: dict[int, float] = {}
    while any(process.is_alive() for process in processes):
        for process, plan in zip(processes, plans, strict=True):
            pid = process.pid or 0
            if _is_stopped(pid) and time.monotonic() > resume_at.setdefault(pid, time.monotonic() + plan.pause):
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    return [json.loads(file.read_bytes()) for file in files]


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def run_job(root: str, plan: dict[str, Any], result: str) -> None:
    """Publish a small dataset, and write {"published": seed} or {"refused": message} or {"failed": error}."""
    lease.RENEW_S, lease.EXPIRE_S, lease.POLL_S = 0.1, 0.7, 0.05
    if plan["far"]:
        lease._machine = lambda: f"far {os.getpid()}"
    _stop_before_operation(plan["paused_at"])
    time.sleep(plan["delay"])
    try:
        outcome: dict[str, Any] = {"published": publish(root, {"seed": plan["seed"]}).manifest["settings"]["seed"]}
    except UserError as error:
        outcome = {"refused": str(error)}
    except BaseException as error:
        outcome = {"failed": repr(error)}
    Path(result).write_text(json.dumps(outcome))


def _stop_before_operation(number: int) -> None:
    """Stop this process before a storage operation; all of its threads stand still then."""
    count = 0

    def stop_once(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGSTOP)
            return function(*args)

        return wrapped

    for name in OPERATIONS:
        setattr(storage, name, stop_once(getattr(storage, name)))


def publish(root: str, settings: dict[str, Any], image: bytes = b"x") -> dataset.Dataset:
    """Publish the dataset v1 with a row per key, each with this image, as ingest does it."""
    uri = dataset.dataset_uri(root, "v1")
    dataset.find_same_dataset(root, "v1", settings)
    with lease.hold_lease(uri, "ingest") as held, Inventory() as inventory:
        published = dataset.find_same_dataset(root, "v1", settings)
        inventory.add_inputs(Listed(key, 1, "1") for key in KEYS)
        list(inventory.query("UPDATE input SET label = 'a', subset = 'train'"))
        draft = Draft(uri, settings, inventory, published, lease=held)
        if draft.is_current(update=False):
            assert published is not None
            return published
        draft.begin()
        draft.reconcile()
        draft.write_missing(lambda: _write_pending(draft, image))
        return draft.publish(draft.complete(["a"], {"kind": "photos"}))


def _write_pending(draft: Draft, image: bytes) -> None:
    size = random.Random(os.getpid()).randint(1, 4)  # another batch size than that of a rival
    for table in draft.inventory.pending(size):
        photo = {"split": "train", "width": 1, "height": 1, "image": image}
        rows = [{**row, **photo, "image_id": storage.sha256(row["key"].encode())} for row in table.to_pylist()]
        publishing.write_rows(draft.uri, "parts", rows, draft.settings)
