"""New photos and a run → predictions: class, calibrated probability, and rejection of uncertain photos.

  python jobs/predict.py car.jpg --config FILE --run NAME
  python jobs/predict.py s3://bucket/new/ --config FILE --run NAME
  python jobs/predict.py DIR --config FILE --run NAME --threshold 0.5 --name monday

Photos are processed as the run's own: read, masked if its dataset is (by the same detector), classified. No labels are
needed. Photos that are named one by one are predicted in seconds, and the result is printed alone; the exit status is
1 if none of them can be read. Of a folder, prefix or archive, every file has one row in
<run>/predictions/<name>/predictions.parquet and .csv: the most probable class and its probability, the five most
probable classes, and the vehicle's box, or the reason for its quarantine; predictions.html shows the photos, to be
filtered. When there are more photos, the same command predicts these alone.

Probabilities are calibrated: of the photos with 0.8, about 80 % should be right. The temperature is fitted on the
run's val photos at its first evaluation or prediction and stored with the model; it is valid for similar photos. An
interrupted job resumes. The report of the run shows which threshold gives which accuracy.
"""

import argparse
import logging
from typing import TYPE_CHECKING

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError
from carclass.formatting import terminal_text

if TYPE_CHECKING:
    from carclass.config.schema import PredictSettings
    from carclass.prediction.predict import PredictionResult


log = logging.getLogger("carclass.predict")


def main() -> None:
    config, args = cli.parse_job_with_flags(__doc__, "predict", {}, listed="photos")
    assert config.predict is not None
    settings = config.predict.model_copy(update={"run": config.or_trained(config.predict.run)})
    if settings.run is None:
        raise UserError("`predict.run` is missing: name the run to use, e.g. --run first.")
    from carclass.ingestion.listing import check_place, spelled_once
    from carclass.prediction import named_photos, predictions
    from carclass.runs.run import find_run

    if photos := named_photos.find_photos(args.listed or [settings.photos]):
        check_options(args, named_photos.STORED_ONLY)
    else:
        check_place(settings.photos, "predict.photos")
    run = find_run(config.root, settings.run)
    stage = run.select_stage(settings.stage)
    if photos:
        predicted, calibration = named_photos.predict_named(run, stage, settings, photos)
        rows, failed = named_photos.describe_rows(predicted), all(row["label"] is None for row in predicted)
        rows += [] if failed else [("probabilities", calibration.verdict)]
    else:
        predictions.check_photos(predictions.predictions_uri(run.uri, settings.name), spelled_once(settings.photos))
        log.info("predict: loading PyTorch")  # it takes seconds
        from carclass.prediction.predict import predict_by_run

        rows, failed = result_rows(settings, predict_by_run(run, stage, settings)), False
    print(progress.table(rows, title=f"predictions of {settings.run}"))
    if failed:
        raise SystemExit(1)


def check_options(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Raise UserError for an option that has no effect on predictions which are not stored."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(
                f"`--{name}` has no effect on photos that are named one by one, whose predictions are printed and not "
                "stored. Leave it out, or give their folder."
            )


def result_rows(settings: "PredictSettings", result: "PredictionResult") -> list[tuple[str, str]]:
    """Return the counts, the calibration and the files of stored predictions."""
    from carclass import storage
    from carclass.prediction import predictions

    counts, calibration = result.counts, result.calibration
    before, after = calibration.expected_calibration_error_before, calibration.expected_calibration_error_after
    return [
        ("files", f"{counts.files:,}"),
        ("predicted", f"{counts.predicted:,}"),
        *([(f"  below {settings.threshold:g}, rejected", f"{counts.rejected:,}")] if settings.threshold else []),
        *([("junk, left out", terminal_text(counts.others.text))] if counts.others.number else []),
        ("quarantined", f"{sum(counts.reasons.values()):,}"),
        *((f"  {reason}", f"{number:,}") for reason, number in counts.reasons.items()),
        ("probabilities", calibration.verdict),
        *([("calibration error (val)", f"{before:.3f} → {after:.3f}")] if calibration.temperature != 1 else []),
        ("page", storage.join(result.uri, predictions.PAGE)),
        ("Parquet", storage.join(result.uri, predictions.TABLE)),
        ("CSV", storage.join(result.uri, predictions.CSV)),
    ]


if __name__ == "__main__":
    cli.main(main)
