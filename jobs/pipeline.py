"""The whole chain from one config file: photos and labels → dataset → masked dataset → run → report.

  python jobs/pipeline.py                                      the embedded sample: drawn cars, a few minutes
  python jobs/pipeline.py --config jobs/experiments/cars196.yml --root s3://bucket/carclass
  python jobs/submit.py -- python jobs/pipeline.py --config FILE               on a cluster

Idempotent and resumable. The last lines name the report and the summary (JSON).
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carclass import progress
from carclass.config import cli
from carclass.config.schema import Config, TrainSettings
from carclass.errors import UserError
from carclass.formatting import number_text

if TYPE_CHECKING:
    from carclass.evaluation.evaluate import Evaluation
    from carclass.runs.run import Run

SAMPLE = Path(__file__).parent / "experiments" / "sample.yml"


def main() -> None:
    settings, args = cli.parse_job_with_flags(__doc__, None, cli.UPDATE, default=SAMPLE)
    if settings.ingest is None or settings.train is None:
        raise UserError("a pipeline needs the sections `ingest:` and `train:`; see jobs/experiments/sample.yml.")
    check_evaluation(settings, settings.train)
    if settings.compare_unmasked and settings.train.dataset == settings.ingest.dataset:
        raise UserError(
            f"`compare_unmasked` has no effect: `train.dataset` is {settings.train.dataset}, the unmasked dataset. "
            "Train on the masked one (`mask.dataset`), or leave `compare_unmasked` out."
        )
    started = time.monotonic()
    import_verbs(settings)
    from carclass.runs.run import epoch_text

    check_requirements(settings, settings.train)
    summary = make_datasets(settings, update=args.update)
    run, evaluation = train_and_evaluate(settings, settings.train)
    summary |= {f"{stage}_val_accuracy": run.best_val_accuracy(stage) for stage in run.stages}
    summary["model"] = epoch_text(evaluation.metrics)
    summary |= name_accuracy(evaluation)
    if settings.compare_unmasked:
        changes = {"name": f"{settings.train.name}-unmasked", "dataset": settings.ingest.dataset}
        _, unmasked = train_and_evaluate(settings, settings.train.model_copy(update=changes))
        summary |= name_accuracy(unmasked, "_unmasked")
    summary["seconds"] = time.monotonic() - started
    print_summary(run, evaluation, summary)


def check_evaluation(settings: Config, train: TrainSettings) -> None:
    """Raise UserError if the run cannot be evaluated as set."""
    stage = settings.evaluate.stage
    if stage is not None and getattr(train, stage) is None:
        raise UserError(f"`evaluate.stage` is {stage}, but `train.{stage}` is null. Leave `evaluate.stage` out.")
    if settings.evaluate.dataset not in (None, train.dataset):
        raise UserError(
            f"`evaluate.dataset` is {settings.evaluate.dataset}, but a pipeline evaluates on the dataset it trains on, "
            f"{train.dataset}. Leave it out, and run jobs/evaluate.py on {settings.evaluate.dataset} afterwards."
        )


def import_verbs(settings: Config) -> None:
    """Import every verb before work begins: a broken installation shows at once, and PyTorch is loaded before Ray.

    In an environment without the packages that only GPU code calls, MKL cannot load PyTorch's library after Ray.
    """
    import carclass.evaluation.evaluate
    import carclass.training.train

    if settings.mask is not None:
        import carclass.masking.mask  # noqa: F401 - it needs Detectron2


def check_requirements(settings: Config, train: TrainSettings) -> None:
    """Fetch and check the weights of every step, and the run's loggers. Raise UserError if they are unusable."""
    from carclass.runs.metrics_loggers import check_loggers
    from carclass.training.pretrained import check_parent

    check_loggers(settings.root, train)
    if settings.mask is not None:
        from carclass.masking.mask import pin_detector

        pin_detector(settings.root, settings.mask)
    check_parent(settings.root, train)


def make_datasets(settings: Config, *, update: bool) -> dict[str, int | float | str]:
    """Publish the dataset and the masked dataset; return their counts and the masks' IoU, where it is known."""
    from carclass.ingestion.ingest import ingest_photos

    assert settings.ingest is not None
    manifests = [ingest_photos(settings.root, settings.ingest, update=update).manifest]
    check_split(settings, manifests[0])
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


def check_split(settings: Config, manifest: dict[str, Any]) -> None:
    """Raise UserError if a dataset has no photos to evaluate on, which would end the pipeline after training."""
    split = settings.evaluate.split
    if not manifest["splits"][split]:
        raise UserError(
            f"`evaluate.split` is {split}, but no photo is in {split}. Add labelled photos with this subset, or choose "
            f"another split: --evaluate.split {'val' if split == 'test' else 'test'}."
        )


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


def print_summary(run: "Run", evaluation: "Evaluation", summary: dict[str, int | float | str]) -> None:
    """Write summary.json below the run, and print it."""
    from carclass import storage
    from carclass.data import formats

    uri = storage.join(run.uri, "summary.json")
    formats.write(uri, "summary", summary)
    rows = [
        (name.replace("_", " "), value if isinstance(value, str) else number_text(value))
        for name, value in summary.items()
    ]
    print(progress.table(rows, title=f"carclass: {run.settings.name}"))
    print(f"report: {evaluation.report_uri}\nsummary: {uri}")


if __name__ == "__main__":
    cli.main(main)
