"""Telemetry of jobs: log lines, and Ray metrics for the dashboard and Prometheus.

Ray exports a process' metrics every ten seconds and when it exits; gauges persist for another twenty seconds.
Non-finite values are dropped. No tag is named `job` or `instance`, which Prometheus reserves.
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

from carclass.cluster import autoscaler
from carclass.errors import find_user_error
from carclass.progress import Progress
from carclass.storage import StorageError

POLL_S = 10.0
"""Seconds between polls of the nodes; Ray exports metrics at the same interval."""
PRICE_LABEL = "usd-per-hour"
"""Node label with the hourly price in dollars, set by cluster/aws.yaml."""
DEATH_REASONS = {2: "unexpected", 3: "preempted"}
"""Ray's codes (NodeDeathInfo) of unplanned node deaths."""


class PhotoMeter:
    """Counter of a job's processed photos by outcome; only the driver has one, so that no photo counts twice.

    Metrics, tagged with the verb (ingest, mask, predict): ray_carclass_photos_total (by outcome),
    ray_carclass_quarantined_total (by reason), ray_carclass_photos_per_second (since the last report),
    ray_carclass_queue (pending photos). The last two are set to 0 on exit.
    """

    def __init__(self, verb: str, total: int) -> None:
        self.total, self.progress, self.tags = total, Progress(verb, total=total), {"verb": verb}
        self.photos = Counter("carclass_photos", "Processed photos", ("verb", "outcome"))
        self.quarantined = Counter("carclass_quarantined", "Quarantined photos", ("verb", "reason"))
        self.rate = Gauge("carclass_photos_per_second", "Photos per second since the last report", ("verb",))
        self.queue = Gauge("carclass_queue", "Pending photos", ("verb",))
        self.queue.set(total, self.tags)
        self.reported = time.monotonic()

    def __enter__(self) -> "PhotoMeter":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.rate.set(0, self.tags)
        self.queue.set(0, self.tags)
        cause = None if error is None else find_user_error(error)  # of a task, without its traceback
        if isinstance(cause, StorageError):
            counts = f"{self.progress.done:,} of {self.total:,} photos were finished before, and are kept."
            raise StorageError(f"{cause} {counts}") from error
        if cause is not None:
            raise cause from error

    def add(self, outcomes: Sequence[str], reasons: Sequence[str]) -> None:
        """Count photos: the outcome of each row, the reason of each quarantined photo."""
        for outcome, count in collections.Counter(outcomes).items():
            self.photos.inc(count, {**self.tags, "outcome": outcome})
        for reason, count in collections.Counter(reasons).items():
            self.quarantined.inc(count, {**self.tags, "reason": reason})
        count, now = len(outcomes) + len(reasons), time.monotonic()
        self.progress.add(count)
        self.rate.set(count / max(now - self.reported, 1e-9), self.tags)
        self.queue.set(self.total - self.progress.done, self.tags)
        self.reported = now


def report_trial_accuracy(sweep: str, trial: str, accuracy: float) -> None:
    """Set ray_carclass_trial_val_accuracy, tagged with the sweep and the trial's title."""
    _gauge("trial_val_accuracy", "sweep", "trial").set(accuracy, {"sweep": sweep, "trial": trial})


def report_epoch(run: str, stage: str, metrics: Mapping[str, float]) -> None:
    """Set ray_carclass_epoch, _loss and _accuracy (both by split), and _diverged to 0.

    All are tagged with the run and the stage. metrics: an epoch's row from the training loop.
    """
    tags = {"run": run, "stage": stage}
    _gauge("epoch", "run", "stage").set(metrics["epoch"], tags)
    _gauge("diverged", "run", "stage").set(0.0, tags)
    for split in ("train", "val"):
        _gauge("loss", "run", "stage", "split").set(metrics[f"{split}_loss"], {**tags, "split": split})
        _gauge("accuracy", "run", "stage", "split").set(metrics[f"{split}_accuracy"], {**tags, "split": split})


def report_divergence(run: str, stage: str) -> None:
    """Set ray_carclass_diverged to 1: the stage has ended, as its loss or weights are not finite."""
    _gauge("diverged", "run", "stage").set(1.0, {"run": run, "stage": stage})


def watch_nodes() -> None:
    """Report the cost of the cluster's nodes and the number of lost nodes until this process exits.

    Metrics, tagged with Ray's job id: ray_carclass_cost_usd (since now, of all nodes with the label `usd-per-hour`, on
    AWS also of those that start; absent if no node has it), ray_carclass_lost_nodes (since now, by reason).
    """
    stopped, job_id = threading.Event(), ray.get_runtime_context().get_job_id()
    thread = threading.Thread(target=_watch, args=(stopped, job_id), daemon=True)
    thread.start()

    def stop() -> None:  # before Ray shuts down, so that the last values are exported
        stopped.set()
        thread.join(timeout=POLL_S)

    atexit.register(stop)


def _watch(stopped: threading.Event, job_id: str) -> None:
    """Poll the nodes and set the gauges of cost and lost nodes until stopped."""
    cost, lost, tags = CostMeter(), LostNodes(), {"job_id": job_id}
    with suppress(ray.exceptions.RayError):  # the job itself reports a lost cluster
        while ray.is_initialized():
            nodes = ray.nodes()
            cost.update([*nodes, *starting_nodes()], time.monotonic())
            if cost.is_known:
                _gauge("cost_usd", "job_id").set(cost.usd, tags)
            for reason, count in lost.update(nodes).items():
                _gauge("lost_nodes", "job_id", "reason").set(count, {**tags, "reason": reason})
            if stopped.is_set():
                return
            stopped.wait(POLL_S)


def starting_nodes() -> list[dict[str, Any]]:
    """Return an entry like those of ray.nodes() for each node that AWS has started and that has not joined yet."""
    types = autoscaler.node_types()
    starting = autoscaler.starting_types() if types else []
    return [{"Alive": True, "Labels": types[name].get("labels", {})} for name in starting if name in types]


class CostMeter:
    """Cost of a cluster from its nodes' price labels; a node counts from the first poll that finds it alive."""

    def __init__(self) -> None:
        self.usd, self.price, self.polled = 0.0, 0.0, 0.0
        self.is_known = False
        """True once a node has had a price."""

    def update(self, nodes: Iterable[Mapping[str, Any]], now: float) -> None:
        """Add the cost since the last poll. nodes: from ray.nodes(). now: in seconds."""
        self.usd += self.price * (now - self.polled) / 3600
        prices = [price for node in nodes if node["Alive"] and (price := hourly_price(node)) is not None]
        self.is_known |= bool(prices)
        self.price, self.polled = sum(prices), now


def hourly_price(node: Mapping[str, Any]) -> float | None:
    """Return a node's price in dollars per hour, None without a numeric label."""
    with suppress(KeyError, ValueError):
        price = float(node["Labels"][PRICE_LABEL])
        return price if math.isfinite(price) else None
    return None


class LostNodes:
    """Number of nodes lost since the first poll."""

    def __init__(self) -> None:
        self.dead_before: set[str] | None = None

    def update(self, nodes: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """Return the number of lost nodes by reason. nodes: from ray.nodes()."""
        reasons = {node["NodeID"]: DEATH_REASONS.get(node["DeathReason"]) for node in nodes if not node["Alive"]}
        self.dead_before = set(reasons) if self.dead_before is None else self.dead_before
        lost = [reason for node, reason in reasons.items() if node not in self.dead_before]
        return {reason: lost.count(reason) for reason in DEATH_REASONS.values()}


DESCRIPTIONS = {
    "trial_val_accuracy": "val accuracy of a trial's latest epoch",
    "epoch": "Finished epochs of a run's stage",
    "loss": "Mean loss of a run's latest epoch",
    "accuracy": "Accuracy of a run's latest epoch",
    "diverged": "1 if a run's stage ended as its loss or weights were not finite, else 0",
    "cost_usd": "Cost of the nodes in dollars since the job joined the cluster",
    "lost_nodes": "Nodes lost since the job joined the cluster",
}


@cache
def _gauge(name: str, *tags: str) -> Gauge:
    return Gauge(f"carclass_{name}", DESCRIPTIONS[name], tags)
