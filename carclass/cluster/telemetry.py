"""What a long job tells of itself: lines in the log, and Ray metrics for the dashboard and Prometheus.

Ray shows a process's metrics every ten seconds and when it ends, its gauges for twenty seconds more. It drops numbers
that are not finite. No tag is called `job` or `instance`: these are Prometheus' own.
"""

import atexit
import collections
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from carclass.progress import Progress

POLL_S = 10.0
"""Seconds between two looks at the nodes; Ray exports metrics as often."""
PRICE_LABEL = "usd-per-hour"
"""The label that says what a node costs, as cluster/aws.yaml sets it."""
DEATH_REASONS = {2: "unexpected", 3: "preempted"}
"""Why a node died, by Ray's numbers (NodeDeathInfo), where nobody wanted it to."""


class PhotoMeter:
    """Counts photos that have come out of a job, by outcome; only the driver has one, so no photo counts twice.

    Metrics, tagged with the verb (ingest, mask, predict): ray_carclass_photos_total (by outcome),
    ray_carclass_quarantined_total (by reason), ray_carclass_photos_per_second (since the last report),
    ray_carclass_queue (photos still to come). The last two are 0 once the meter is left.
    """

    def __init__(self, verb: str, total: int) -> None:
        self.progress, self.tags = Progress(verb, total), {"verb": verb}
        self.photos = Counter("carclass_photos", "Photos that came out", ("verb", "outcome"))
        self.quarantined = Counter("carclass_quarantined", "Photos set aside", ("verb", "reason"))
        self.rate = Gauge("carclass_photos_per_second", "Photos per second since the last report", ("verb",))
        self.queue = Gauge("carclass_queue", "Photos still to come", ("verb",))
        self.queue.set(total, self.tags)
        self.reported = time.monotonic()

    def __enter__(self) -> "PhotoMeter":
        return self

    def __exit__(self, *_: object) -> None:
        self.rate.set(0, self.tags)
        self.queue.set(0, self.tags)

    def add(self, outcomes: Sequence[str], reasons: Sequence[str]) -> None:
        """Counts photos: the outcome of each row, the reason of each one set aside."""
        for outcome, count in collections.Counter(outcomes).items():
            self.photos.inc(count, {**self.tags, "outcome": outcome})
        for reason, count in collections.Counter(reasons).items():
            self.quarantined.inc(count, {**self.tags, "reason": reason})
        count, now = len(outcomes) + len(reasons), time.monotonic()
        self.progress.add(count)
        self.rate.set(count / max(now - self.reported, 1e-9), self.tags)
        self.queue.set(self.progress.total - self.progress.done, self.tags)
        self.reported = now


def trial_accuracy(sweep: str, trial: str, accuracy: float) -> None:
    """Sets ray_carclass_trial_val_accuracy, tagged with the sweep and the trial's readable name."""
    _gauge("trial_val_accuracy", "sweep", "trial").set(accuracy, {"sweep": sweep, "trial": trial})


def epoch_finished(run: str, stage: str, metrics: Mapping[str, float]) -> None:
    """Sets ray_carclass_epoch, _loss and _accuracy (both by split), and _diverged: 1 when a loss is not finite.

    All are tagged with the run and the stage. metrics: as the training loop tells them.
    """
    tags = {"run": run, "stage": stage}
    losses = {split: metrics[f"{split}_loss"] for split in ("train", "val")}
    _gauge("epoch", "run", "stage").set(metrics["epoch"], tags)
    _gauge("diverged", "run", "stage").set(float(not all(map(math.isfinite, losses.values()))), tags)
    for split, loss in losses.items():
        _gauge("loss", "run", "stage", "split").set(loss, {**tags, "split": split})
        _gauge("accuracy", "run", "stage", "split").set(metrics[f"{split}_accuracy"], {**tags, "split": split})


def watch_nodes() -> None:
    """From now until this process ends, tells what the cluster's nodes cost and how many are lost.

    Metrics, tagged with Ray's id of the job: ray_carclass_cost_usd (since now, of all nodes with the label
    `usd-per-hour`; there is none where no node has it), ray_carclass_lost_nodes (since now, by reason).
    """
    ended, job_id = threading.Event(), ray.get_runtime_context().get_job_id()
    thread = threading.Thread(target=_watch, args=(ended, job_id), daemon=True)
    thread.start()

    def end() -> None:  # before Ray does, so that the last sum is told too
        ended.set()
        thread.join(timeout=POLL_S)

    atexit.register(end)


def _watch(ended: threading.Event, job_id: str) -> None:
    bill, lost, tags = CostMeter(), LostNodes(), {"job_id": job_id}
    with suppress(ray.exceptions.RayError):  # of a lost cluster the job hears itself
        while ray.is_initialized():
            nodes = ray.nodes()
            bill.add(nodes, time.monotonic())
            if bill.is_known:
                _gauge("cost_usd", "job_id").set(bill.usd, tags)
            for reason, count in lost.add(nodes).items():
                _gauge("lost_nodes", "job_id", "reason").set(count, {**tags, "reason": reason})
            if ended.is_set():
                return
            ended.wait(POLL_S)


class CostMeter:
    """What a cluster has cost, by its nodes' labels; a node is paid from the first look that finds it alive."""

    def __init__(self) -> None:
        self.usd, self.price, self.looked = 0.0, 0.0, 0.0
        self.is_known = False  # whether any node said what it costs

    def add(self, nodes: Iterable[Mapping[str, Any]], now: float) -> None:
        """Looks at the nodes, as ray.nodes() lists them. now: in seconds."""
        self.usd += self.price * (now - self.looked) / 3600
        prices = [price for node in nodes if node["Alive"] and (price := price_of(node)) is not None]
        self.is_known |= bool(prices)
        self.price, self.looked = sum(prices), now


def price_of(node: Mapping[str, Any]) -> float | None:
    """Dollars per hour; None where a node doesn't say, or says no number."""
    with suppress(KeyError, ValueError):
        price = float(node["Labels"][PRICE_LABEL])
        return price if math.isfinite(price) else None
    return None


class LostNodes:
    """How many nodes were lost since the first look."""

    def __init__(self) -> None:
        self.before: set[str] | None = None

    def add(self, nodes: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """Looks at the nodes, as ray.nodes() lists them; the count of each reason."""
        reasons = {node["NodeID"]: DEATH_REASONS.get(node["DeathReason"]) for node in nodes if not node["Alive"]}
        self.before = set(reasons) if self.before is None else self.before
        found = [reason for node, reason in reasons.items() if node not in self.before]
        return {reason: found.count(reason) for reason in DEATH_REASONS.values()}


DESCRIPTIONS = {
    "trial_val_accuracy": "val accuracy of a trial's latest epoch",
    "epoch": "Epochs that a run's stage has finished",
    "loss": "Mean loss of a run's latest epoch",
    "accuracy": "Accuracy of a run's latest epoch",
    "diverged": "1 when a loss of a run's latest epoch is not finite, else 0",
    "cost_usd": "Dollars that the nodes have cost since the job joined them",
    "lost_nodes": "Nodes lost since the job joined the cluster",
}


@cache
def _gauge(name: str, *tags: str) -> Gauge:
    return Gauge(f"carclass_{name}", DESCRIPTIONS[name], tags)
