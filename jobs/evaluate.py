"""A run and a dataset → a report in one HTML file: accuracy, confusion matrix, curves and the worst mistakes.

python jobs/evaluate.py --config FILE --run NAME
python jobs/evaluate.py --config FILE --run NAME --dataset v1 --split val
python jobs/evaluate.py --config FILE --run NAME --stage frozen
"""

from carclass import progress
from carclass.config import cli


def main() -> None:
    settings = cli.parse_job(__doc__, "evaluate")
    from carclass.evaluation.evaluate import evaluate_run

    evaluation = evaluate_run(settings.root, settings.evaluate)
    metrics = evaluation.metrics
    rows = [
        (f"{metrics['split']} accuracy", f"{metrics['accuracy']:.3f}"),
        (f"{metrics['split']} top-{metrics['top5_k']} accuracy", f"{metrics['top5_accuracy']:.3f}"),
        ("photos", f"{metrics['num_photos']:,} of {metrics['dataset']}"),
        ("model", f"{metrics['stage']} epoch {metrics['epoch']}"),
        ("report", evaluation.report_uri),
    ]
    print(progress.table(rows, title=f"run {settings.evaluate.run}"))


if __name__ == "__main__":
    cli.main(main)
