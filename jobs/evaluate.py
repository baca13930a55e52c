"""A run and a dataset → a report in one HTML file: accuracy, confusion matrix, curves and the worst mistakes.

python jobs/evaluate.py --config FILE --run NAME
python jobs/evaluate.py --config FILE --run NAME --dataset v1 --split val
python jobs/evaluate.py --config FILE --run NAME --stage frozen
"""

from typing import Any

from carclass import progress
from carclass.config import cli
from carclass.formatting import rate_text


def main() -> None:
    config = cli.parse_job(__doc__, "evaluate")
    settings = config.evaluate.model_copy(update={"run": config.or_trained(config.evaluate.run)})
    from carclass.evaluation.target import find_target

    target = find_target(config.root, settings)
    from carclass.evaluation.evaluate import evaluate_target  # late: it takes seconds to load

    evaluation = evaluate_target(target, settings)
    rows = [*metrics_rows(evaluation.metrics), ("report", evaluation.report_uri)]
    print(progress.table(rows, title=f"run {settings.run}"))


def metrics_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the accuracies under the name of their split, with the photos and the model that they are of."""
    from carclass.runs.run import epoch_text

    split, top_k = metrics["split"], metrics["top5_k"]
    has_top_k = metrics["num_classes"] > top_k  # of k classes, the label is always among the first k
    return [
        (f"{split} accuracy", rate_text(metrics["accuracy"])),
        *([(f"{split} top-{top_k} accuracy", rate_text(metrics["top5_accuracy"]))] if has_top_k else []),
        ("photos", f"{metrics['num_photos']:,} of {metrics['dataset']}"),
        ("model", epoch_text(metrics)),
    ]


if __name__ == "__main__":
    cli.main(main)
