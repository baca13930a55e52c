"""A dataset → a run: ResNet50 with a frozen backbone, then unfrozen, on one or several workers.

  python jobs/train.py --config FILE
  python jobs/train.py --config FILE --name second --unfrozen.lr 3e-5 --num_workers 4

The same name resumes a run; a finished run is left unchanged. The run's model is the best epoch over its stages by val
accuracy.
"""

from carclass import progress
from carclass.config import cli


def main() -> None:
    settings = cli.parse_job(__doc__, "train")
    assert settings.train is not None
    from carclass.data.dataset import load_dataset
    from carclass.models.weights_place import check_weights_place
    from carclass.runs.run import model_text, parse_parent

    load_dataset(settings.root, settings.train.dataset)
    if parse_parent(settings.train.parent) is None:
        check_weights_place(settings.train.parent, "train.parent")
    from carclass.training.train import describe_stages, train_run  # late: it takes seconds to load

    run = train_run(settings.root, settings.train)
    rows = [*describe_stages(run).items(), ("model", model_text(run.model_facts(run.model_name))), ("run", run.uri)]
    print(progress.table(rows, title=f"run {settings.train.name}"))


if __name__ == "__main__":
    cli.main(main)
