"""A run and a dataset → a report in one HTML file: accuracy, confusion matrix, curves and the worst mistakes.

python jobs/evaluate.py --config FILE --run NAME
python jobs/evaluate.py --config FILE --run NAME --dataset v1 --split val
"""

from carclass import progress
from carclass.config import cli


def main() -> None:
    settings = cli.parse_job(__doc__, "evaluate")
    from carclass.evaluation.evaluate import evaluate_run

    evaluation = evaluate_run(settings.root, settings.evaluate)
    rows = [(name, f"{evaluation.metrics[name]:.3f}") for name in ("accuracy", "top5_accuracy")]
    print(progress.table([*rows, ("report", evaluation.report_uri)], title=f"run {settings.evaluate.run}"))


if __name__ == "__main__":
    cli.main(main)
