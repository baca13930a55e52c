"""A dataset and a search file → a sweep: many short trainings, what they say of each setting, and the best experiment.

  python jobs/tune.py --config jobs/experiments/searches/both.yml              on the sample, once `make demo` ran
  python jobs/tune.py --config jobs/experiments/searches/both.yml --experiment my.yml --name mine --num_trials 32
  python jobs/tune.py --config FILE --analyse                                  look at what is there, train nothing

The same name goes on with a sweep that was interrupted; a finished one is left alone. The last lines say where the
analysis, the table of trials and the best experiment file lie: `python jobs/train.py --config best.yml` trains it.
"""

import textwrap
from collections import Counter

from carclass import progress
from carclass.config import cli
from carclass.tuning import report, search_space
from carclass.tuning.collect import collect_sweep, publish_sweep
from carclass.tuning.search_space import Search
from carclass.tuning.tune import run_sweep

FLAGS = {
    "resume": "Only go on: an error where no sweep of this name was begun.",
    "analyse": "Train nothing: analyse what there is of the sweep.",
}


def main() -> None:
    """Runs the job."""
    path, search, flags = cli.parse_own_file(__doc__, Search, FLAGS)
    found = search_space.load_space(path, search)
    if "analyse" not in flags:
        run_sweep(found, resume="resume" in flags)
    result = collect_sweep(found.root, search.name)
    places = publish_sweep(found.root, result)
    best = result.best
    rows = [(state, f"{count}") for state, count in Counter(one.trial.state for one in result.outcomes).items()]
    told = [("best", best.trial.title), ("val accuracy", f"{best.accuracy:.3f}"), ("trial", best.trial.name)]
    print(progress.table([*rows, *told], title=f"sweep {search.name}"))
    print("\n".join(textwrap.fill(line, 100) for line in report.summarise(result)))
    print("\n".join(places))


if __name__ == "__main__":
    cli.main(main)
