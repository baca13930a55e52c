"""The whole chain from one file: photos and labels → dataset → masked dataset → run → report.

  python jobs/pipeline.py                                      the embedded sample: drawn cars, a few minutes
  python jobs/pipeline.py --config jobs/experiments/cars196.yml --root s3://bucket/carclass
  ray job submit --working-dir . -- python jobs/pipeline.py --config FILE     on a cluster

What is finished is not done again. The last lines say where the report and the summary (JSON) lie.
"""

import json
import time

from carclass import progress, storage
from carclass.config import cli
from carclass.config.schema import Config, TrainSettings
from carclass.errors import UserError
from carclass.evaluation.evaluate import Evaluation, evaluate_run
from carclass.formatting import number_text
from carclass.ingestion.ingest import ingest_photos
from carclass.masking import quality
from carclass.masking.mask import mask_dataset
from carclass.runs.run import Run
from carclass.training.train import train_run


def main() -> None:
    """Runs the job."""
    settings = cli.parse_job(__doc__, None)
    if settings.ingest is None or settings.train is None:
        raise UserError("a pipeline needs the sections `ingest:` and `train:`; see jobs/experiments/sample.yml.")
    if settings.mask is not None and settings.mask.preview is not None:
        raise UserError("`mask.preview` only looks and publishes nothing to train on. Say it to jobs/mask.py.")
    started = time.monotonic()
    summary: dict[str, int | float] = {}
    photos = ingest_photos(settings.root, settings.ingest)
    summary |= {"photos_in": photos.manifest["inputs"], **{k: photos.manifest[k] for k in ("rows", "quarantined")}}
    if settings.mask is not None:
        masked = mask_dataset(settings.root, settings.mask)
        if (iou := quality.measure(settings.root, masked, settings.mask)) is not None:
            summary["mask_iou"] = iou
    run, found = train_and_evaluate(settings, settings.train)
    summary |= {f"{stage}_val_accuracy": run.best_val_accuracy(stage) for stage in run.stages}
    summary["test_accuracy"] = found.accuracy
    if settings.compare_unmasked:
        plain = {"name": f"{settings.train.name}-unmasked", "dataset": settings.ingest.dataset}
        _, unmasked = train_and_evaluate(settings, settings.train.model_copy(update=plain))
        summary["test_accuracy_unmasked"] = unmasked.accuracy
    summary["seconds"] = time.monotonic() - started
    path = storage.join(run.uri, "summary.json")
    storage.write_bytes(path, json.dumps(summary, indent=1).encode())
    rows = [(name.replace("_", " "), number_text(value)) for name, value in summary.items()]
    print(progress.table(rows, title=f"carclass: {settings.train.name}"))
    print(f"report: {found.report_uri}\nsummary: {path}")


def train_and_evaluate(settings: Config, train: TrainSettings) -> tuple[Run, Evaluation]:
    """A run and what its last stage's best epoch reaches."""
    run = train_run(settings.root, train)
    return run, evaluate_run(settings.root, settings.evaluate.model_copy(update={"run": train.name, "dataset": None}))


if __name__ == "__main__":
    cli.main(main)
