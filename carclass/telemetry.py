"""What a long job tells of itself: lines in the log, and Ray metrics for the dashboard and Prometheus."""

import time
from collections.abc import Sequence
from functools import cache

from ray.util.metrics import Counter, Gauge

from carclass.progress import Progress


class Meter:
    """Counts photos that have come out of a job, by outcome; only the driver has one, so no photo counts twice.

    Metrics, tagged with the job: ray_carclass_photos_total (by outcome), ray_carclass_quarantined_total (by reason),
    ray_carclass_photos_per_second (since the last report), ray_carclass_queue (photos still to come).
    """

    def __init__(self, job: str, total: int) -> None:
        self.progress = Progress(job, total)
        tags = {"job": job}
        self.photos = Counter("carclass_photos", "Photos that came out", ("job", "outcome")).set_default_tags(tags)
        self.quarantined = Counter("carclass_quarantined", "Photos set aside", ("job", "reason")).set_default_tags(tags)
        self.rate = Gauge("carclass_photos_per_second", "Photos per second", ("job",)).set_default_tags(tags)
        self.queue = Gauge("carclass_queue", "Photos still to come", ("job",)).set_default_tags(tags)
        self.queue.set(total)
        self.reported = time.monotonic()

    def add(self, outcomes: Sequence[str], reasons: Sequence[str]) -> None:
        """Counts photos: the outcome of each row, the reason of each one set aside."""
        for outcome in outcomes:
            self.photos.inc(tags={"outcome": outcome})
        for reason in reasons:
            self.quarantined.inc(tags={"reason": reason})
        count, now = len(outcomes) + len(reasons), time.monotonic()
        self.progress.add(count)
        self.rate.set(count / max(now - self.reported, 1e-9))
        self.queue.set(self.progress.total - self.progress.done)
        self.reported = now


def trial_accuracy(sweep: str, trial: str, accuracy: float) -> None:
    """Sets ray_carclass_trial_val_accuracy, tagged with the sweep and the trial's readable name."""
    _trial_gauge().set(accuracy, {"sweep": sweep, "trial": trial})


@cache
def _trial_gauge() -> Gauge:
    return Gauge("carclass_trial_val_accuracy", "val accuracy of a trial's latest epoch", ("sweep", "trial"))


def run_accuracy(run: str, accuracy: float) -> None:
    """Sets ray_carclass_run_val_accuracy, tagged with the run."""
    _run_gauge().set(accuracy, {"run": run})


@cache
def _run_gauge() -> Gauge:
    return Gauge("carclass_run_val_accuracy", "val accuracy of a run's latest epoch", ("run",))
