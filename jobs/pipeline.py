"""The whole chain from one config file: photos and labels → dataset → masked dataset → run → report.

  python jobs/pipeline.py                                      the embedded sample: drawn cars, a few minutes
  python jobs/pipeline.py --config my.yml                      own photos, by a file of jobs/init.py
  python jobs/submit.py -- python jobs/pipeline.py --config FILE               on a cluster

Idempotent and resumable. The last lines name the pages of the datasets and of the run, the summary (JSON), and the
commands that use the run.
"""

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carclass import progress
from carclass.config import cli
from carclass.config.pipeline_sections import check_sections, unmasked_run
from carclass.config.schema import Config, TrainSettings
from carclass.formatting import duration_text, number_text

if TYPE_CHECKING:
    from carclass.evaluation.evaluate import Evaluation
    from carclass.ingestion.inputs import ListedInputs
    from carclass.runs.run import Run

SUMMARY = "summary.json"
"""File below the run."""
SAMPLE = Path(__file__).parent / "experiments" / "sample.yml"


def main() -> None:
    settings, args = cli.parse_job_with_flags(__doc__, None, cli.UPDATE, default=SAMPLE)
    check_sections(settings)
    started = time.monotonic()
    from carclass.experiments.pipeline_places import check_places

    check_places(settings)
    import_verbs(settings)
    from carclass.data.inventory import Inventory
    from carclass.experiments.pipeline_preflight import check_pipeline
    from carclass.runs.run import epoch_text

    with Inventory() as inventory:
        listed = check_pipeline(settings, inventory, update=args.update)
        summary = make_datasets(settings, listed, update=args.update)
    assert settings.train is not None
    run, evaluation = train_and_evaluate(settings, settings.train)
    summary |= {f"{stage}_val_accuracy": run.best_val_accuracy(stage) for stage in run.stages}
    summary["model"] = epoch_text(run.model_facts(run.model_name))
    summary |= name_accuracy(evaluation)
    reports = {"report": evaluation.report_uri}
    if settings.compare_unmasked:
        _, unmasked = train_and_evaluate(settings, unmasked_run(settings))
        summary |= name_accuracy(unmasked, "_unmasked")
        reports["report, unmasked"] = unmasked.report_uri
    summary["seconds"] = time.monotonic() - started
    print_summary(run, summary)
    rows = [*list_results(settings, reports), *list_commands(args, run.settings.name)]
    print(f"\n{progress.table(rows, title='results and next commands')}")


def import_verbs(settings: Config) -> None:
    """Import every verb before work begins: a broken installation shows at once, and PyTorch is loaded before Ray.

    In an environment without the packages that only GPU code calls, MKL cannot load PyTorch's library after Ray.
    """
    import carclass.evaluation.evaluate
    import carclass.training.train

    if settings.mask is not None:
        import carclass.masking.mask  # noqa: F401 - it needs Detectron2


def make_datasets(settings: Config, listed: "ListedInputs", *, update: bool) -> dict[str, int | float | str]:
    """Publish the dataset and the masked dataset; return their counts and the masks' IoU, where it is known."""
    from carclass.experiments.pipeline_preflight import check_run_photos, check_split, find_outdated
    from carclass.ingestion.ingest import ingest_photos

    assert settings.ingest is not None
    manifests = [ingest_photos(settings.root, settings.ingest, update=update, listed=listed).manifest]
    check_split(settings, manifests[0])
    check_run_photos(settings, find_outdated(settings, listed))  # as many photos as before may be other ones
    quality_row: dict[str, float] = {}
    if settings.mask is not None:
        from carclass.masking import quality
        from carclass.masking.mask import mask_dataset

        masked = mask_dataset(settings.root, settings.mask, update=update)
        manifests.append(masked.manifest)
        check_split(settings, masked.manifest)
        if (iou := quality.mean_test_iou(settings.root, masked, settings.mask)) is not None:
            quality_row["mask_iou"] = iou
    return {**count_photos(manifests), **quality_row}


def count_photos(manifests: list[dict[str, Any]]) -> dict[str, int]:
    """Return the photos read, the rows to train on, and those quarantined on the way. manifests: in order."""
    quarantined = sum(manifest["quarantined"] for manifest in manifests)
    return {"photos_in": manifests[0]["inputs"], "rows": manifests[-1]["rows"], "quarantined": quarantined}


def train_and_evaluate(settings: Config, train: TrainSettings) -> "tuple[Run, Evaluation]":
    """Train a run and evaluate its model."""
    from carclass.evaluation.evaluate import evaluate_run
    from carclass.training.train import train_run

    run = train_run(settings.root, train)
    return run, evaluate_run(settings.root, settings.evaluate.model_copy(update={"run": train.name, "dataset": None}))


def name_accuracy(evaluation: "Evaluation", suffix: str = "") -> dict[str, float]:
    """Return an accuracy under the name of its split: `test_accuracy` or `val_accuracy`."""
    return {f"{evaluation.metrics['split']}_accuracy{suffix}": evaluation.accuracy}


def print_summary(run: "Run", summary: dict[str, int | float | str]) -> None:
    """Write summary.json below the run, and print it."""
    from carclass import storage
    from carclass.data import formats
    from carclass.training.train import describe_stages

    formats.write(storage.join(run.uri, SUMMARY), "summary", summary)
    stages = describe_stages(run)
    rows = [(name, stages.get(name, text)) for name, text in summary_rows(summary)]
    print(progress.table(rows, title=f"carclass: {run.settings.name}"))


def summary_rows(summary: dict[str, int | float | str]) -> list[tuple[str, str]]:
    """Return the rows of the summary as text."""
    numbers = {name: value if isinstance(value, str) else number_text(value) for name, value in summary.items()}
    rows = [(name.replace("_", " "), text) for name, text in numbers.items() if name != "seconds"]
    return [*rows, ("time", duration_text(float(summary["seconds"])))]


def list_results(settings: Config, reports: dict[str, str]) -> list[tuple[str, str]]:
    """Return the pages of the datasets and the reports, and the summary. reports: name → URI."""
    from carclass import storage
    from carclass.data.dataset import dataset_uri
    from carclass.runs.run import run_uri

    assert settings.ingest is not None
    assert settings.train is not None
    names = [settings.ingest.dataset, *([] if settings.mask is None else [settings.mask.dataset])]
    pages = [(f"dataset {name}", storage.join(dataset_uri(settings.root, name), "report.html")) for name in names]
    return [*pages, *reports.items(), ("summary", storage.join(run_uri(settings.root, settings.train.name), SUMMARY))]


def list_commands(args: argparse.Namespace, run: str) -> list[tuple[str, str]]:
    """Return the commands that predict new photos with a run, and export it. args: of this job."""
    config = f"--config {shlex.quote(args.config or os.path.relpath(SAMPLE))}"
    root = f"--root {shlex.quote(args.root)}" if args.root else ""
    predict = " ".join(filter(None, ("python jobs/predict.py PHOTOS", config, root, f"--run {run}")))
    export = f"python jobs/export.py --run {run} {root or config}"
    return [("predict new photos", cli.name_commands(predict)), ("export the model", cli.name_commands(export))]


if __name__ == "__main__":
    cli.main(main)
