"""A sweep on storage → what it found, and the files that tell of it. Needs no cluster, and no sweep that has ended."""

import io

import pyarrow.parquet as pq
import yaml

from carclass import storage
from carclass.runs.run import code_version
from carclass.tuning import report, results, trial_records
from carclass.tuning.search_space import Space, get_setting
from carclass.tuning.trial_records import Trial


def collect_sweep(root: str, name: str) -> results.SweepResult:
    """All that is known of a sweep. UserError when it isn't there."""
    space, book = trial_records.load_records(root, name)
    outcomes = [_outcome(space, trial) for trial in book.found.values()]
    return results.SweepResult(
        name=name,
        facts=_facts(space),
        stage=space.stage,
        device=book.found[0].device if book.found else "CPU",
        dimensions=space.dimensions,
        outcomes=outcomes,
        seed=space.search.seed,
    )


def publish_sweep(root: str, found: results.SweepResult) -> list[str]:
    """Publishes a sweep's table, page and best settings, and returns where. UserError when no trial has finished."""
    uri = trial_records.sweep_uri(root, found.name)
    page = report.render_analysis(found)
    table = io.BytesIO()
    pq.write_table(report.trials_table(found), table)
    files = {"best.yml": _best(root, found), "trials.parquet": table.getvalue(), "analysis.html": page.encode()}
    for file, data in files.items():
        storage.write_bytes(storage.join(uri, file), data)
    return [storage.join(uri, file) for file in files]


def _outcome(space: Space, trial: Trial) -> results.TrialResult:
    this = trial_records.trial_run(space, trial)
    rows = [row for row in this.metrics() if row["stage"] == space.stage]
    return results.TrialResult(
        trial=trial,
        epochs=rows,
        max_epochs=get_setting(this.settings, f"train.{space.stage}.epochs"),
        devices=trial.devices,
        finished=rows[-1]["time"] if rows else None,
    )


def _facts(space: Space) -> list[tuple[str, str]]:
    search, train = space.search, space.base
    pruning: str = search.scheduler
    if pruning == "asha":
        pruning = f"ASHA: from epoch {space.min_epochs} on, one in {search.reduction_factor} goes on"
    return [
        ("experiment", train.name),
        ("dataset", train.dataset),
        ("stage", f"{space.stage}, {space.max_epochs} epochs"),
        ("sampler", f"{search.sampler}, seed {search.seed}"),
        ("pruning", pruning),
        ("root", space.root),
        ("code", code_version()),
    ]


def _best(root: str, found: results.SweepResult) -> bytes:
    """The best trial's settings as an experiment file."""
    space, _ = trial_records.load_records(root, found.name)
    best = found.best
    settings = trial_records.trial_run(space, best.trial).settings.model_copy(update={"name": f"{found.name}-best"})
    text = yaml.safe_dump({"root": root, "train": settings.model_dump(mode="json")}, sort_keys=False)
    told = f"# Trial {best.trial.number} of sweep {found.name}: {best.trial.title}\n"
    return (told + f"# val accuracy {best.accuracy:.4f} in the search\n" + text).encode()
