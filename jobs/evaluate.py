"""A run and a dataset → a report: accuracy, confusion, curves and the worst mistakes, in one HTML file.

python jobs/evaluate.py --config FILE --run NAME
python jobs/evaluate.py --config FILE --run NAME --dataset v1 --split val
"""

from carclass import progress
from carclass.config import cli
from carclass.evaluation.evaluate import evaluate_run


def main() -> None:
    """Runs the job."""
    settings = cli.parse_job(__doc__, "evaluate")
    found = evaluate_run(settings.root, settings.evaluate)
    rows = [(name, f"{found.metrics[name]:.3f}") for name in ("accuracy", "top5_accuracy")]
    print(progress.table([*rows, ("report", found.report_uri)], title=f"run {settings.evaluate.run}"))


if __name__ == "__main__":
    cli.main(main)
