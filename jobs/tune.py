"""A dataset and a search file → a sweep: many short trainings, the effect of each setting, and the best experiment.

  python jobs/tune.py --config jobs/experiments/searches/both.yml              on the sample, after jobs/pipeline.py
  python jobs/tune.py --config jobs/experiments/searches/both.yml --experiment my.yml --name mine --num_trials 32
  python jobs/tune.py --config FILE --analyse                                  analyse existing trials, train nothing

The same name resumes an interrupted sweep; a finished one is left unchanged. The last lines name the analysis, the
table of trials and the best experiment file: `python jobs/train.py --config best.yml` trains it.
"""

import textwrap
from collections import Counter

from carclass import progress
from carclass.config import cli
from carclass.config.search import Search
from carclass.formatting import rate_text

FLAGS = {
    "resume": {"action": "store_true", "help": "Resume only: an error if there is no sweep of this name."},
    "analyse": {"action": "store_true", "help": "Train nothing: analyse the trials so far."},
}


def main() -> None:
    path, search, args = cli.parse_file(__doc__, Search, FLAGS)
    from carclass.data.dataset import find_dataset
    from carclass.training.train import warn_if_unfreezing_hurt
    from carclass.tuning import report, search_space, trial_records
    from carclass.tuning.collect import collect_sweep, publish_sweep
    from carclass.tuning.tune import run_sweep

    space = search_space.load_space(path, search)
    if not args.analyse:
        run_sweep(space, resume=args.resume)
    result = collect_sweep(space.root, search.name)
    uris = publish_sweep(space.root, result)
    best = result.best
    states = Counter(trial.trial.state for trial in result.trials)
    rows = [
        *((state, f"{count}") for state, count in states.items()),
        ("best", best.trial.title),
        (f"{result.stage} val accuracy", rate_text(best.accuracy)),
        ("trial", best.trial.name),
    ]
    print(progress.table(rows, title=f"sweep {search.name}"))
    print("\n".join(textwrap.fill(line, 100) for line in report.summarise(result)))
    print("\n".join(uris))
    recorded, _ = trial_records.load_records(space.root, search.name)
    run = trial_records.trial_run(recorded, best.trial)
    if (source := find_dataset(space.root, run.settings.dataset)) is not None:  # a sweep is analysed without it too
        warn_if_unfreezing_hurt(run, source)


if __name__ == "__main__":
    cli.main(main)
