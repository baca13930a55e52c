"""New photos and a run → predictions: class, calibrated probability, and rejection of uncertain photos.

  python jobs/predict.py --config FILE --run NAME --photos s3://bucket/new/
  python jobs/predict.py --config FILE --run NAME --photos DIR --threshold 0.5 --name monday

Photos are processed as the run's own: read, masked if its dataset is (by the same detector), classified. No labels are
needed. Every file has one row in <run>/predictions/<name>/predictions.parquet and .csv: the most probable class and its
probability, the five most probable classes, and the vehicle's box, or the reason for its quarantine.

Probabilities are calibrated: of the photos with 0.8, about 80 % should be right. The temperature is fitted on the
run's val photos at its first evaluation or prediction and stored with the model; it is valid for similar photos. An
interrupted job resumes.
"""

from carclass import progress
from carclass.config import cli


def main() -> None:
    settings = cli.parse_job(__doc__, "predict")
    from carclass import storage
    from carclass.prediction import predictions
    from carclass.prediction.predict import predict_photos

    assert settings.predict is not None
    result = predict_photos(settings.root, settings.predict)
    counts, calibration = result.counts, result.calibration
    before, after = calibration.expected_calibration_error_before, calibration.expected_calibration_error_after
    rows = [
        ("inputs", f"{counts.photos:,}"),
        ("predicted", f"{counts.predicted:,}"),
        (f"  below {settings.predict.threshold:g}, rejected", f"{counts.rejected:,}"),
        ("quarantined", f"{sum(counts.reasons.values()):,}"),
        *((f"  {reason}", f"{number:,}") for reason, number in counts.reasons.items()),
        ("temperature", calibration.text),
        *([("calibration error (val)", f"{before:.3f} → {after:.3f}")] if calibration.temperature != 1 else []),
        ("Parquet", storage.join(result.uri, predictions.TABLE)),
        ("CSV", storage.join(result.uri, predictions.CSV)),
    ]
    print(progress.table(rows, title=f"predictions of {settings.predict.run}"))


if __name__ == "__main__":
    cli.main(main)
