"""New photos and a run → predictions: what each photo shows, how sure that is, and which should be looked at.

  python jobs/predict.py --config FILE --run NAME --photos s3://bucket/new/
  python jobs/predict.py --config FILE --run NAME --photos DIR --threshold 0.5 --name monday

Photos go the way that the run's own went: read, masked if its dataset is (by the same detector), classified. No labels
are needed. Every file is in <run>/predictions/<name>/predictions.parquet and .csv once: with the likeliest class, its
probability, the five likeliest, and the vehicle's box, or with the reason why it can't be classified.

Probabilities are calibrated: of the photos given 0.8, about 80 % should be right. The temperature is fitted on the
run's val photos by its first prediction and kept in <run>/calibration.json; it holds for photos like these. A killed
job goes on where it was.
"""

from carclass import progress, storage
from carclass.config import cli
from carclass.prediction import predictions
from carclass.prediction.predict import predict_photos


def main() -> None:
    """Runs the job."""
    settings = cli.parse_job(__doc__, "predict")
    assert settings.predict is not None
    found = predict_photos(settings.root, settings.predict)
    counts, fitted = found.counts, found.calibration
    error = (fitted.expected_calibration_error_before, fitted.expected_calibration_error_after)
    rows = [("photos", f"{counts.photos:,}"), ("predicted", f"{counts.predicted:,}")]
    rows += [(f"  below {settings.predict.threshold:g}, rejected", f"{counts.rejected:,}")]
    rows += [("quarantined", f"{sum(counts.reasons.values()):,}")]
    rows += [(f"  {reason}", f"{number:,}") for reason, number in counts.reasons.items()]
    rows += [("temperature", f"{fitted.temperature:.3f}, from {fitted.num_photos:,} val photos")]
    rows += [("calibration error (val)", f"{error[0]:.3f} → {error[1]:.3f}")]
    rows += [("table", storage.join(found.uri, predictions.TABLE)), ("sheet", storage.join(found.uri, predictions.CSV))]
    print(progress.table(rows, title=f"predictions of {settings.predict.run}"))


if __name__ == "__main__":
    cli.main(main)
