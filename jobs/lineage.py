"""The tree of experiments: which run starts from which, how far each is, and what came of it.

  python jobs/lineage.py tree                      the tree, with data, state and val accuracy
  python jobs/lineage.py show exp_003              a run: where it comes from, what it changes, its epochs
  python jobs/lineage.py run all --budget tiny     trains what is missing, parents first, siblings in parallel
  python jobs/lineage.py run exp_013               that run, and the ones it comes from
  python jobs/lineage.py rerun-stale               trains anew what was trained with other settings, data or parents
  python jobs/lineage.py compare                   tests each finished run and writes one page over all of them

A budget says which experiment files make the tree, on what data they are trained and how long: a name of those in
jobs/experiments/budgets (tiny: the embedded sample; cars196; full), or a YAML file of your own. Every command can be
interrupted and given again: what is finished is left alone.
"""

import argparse
import sys
from pathlib import Path

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError
from carclass.experiments import tree, tree_view

BUDGETS = Path(__file__).parent / "experiments" / "budgets"


def main() -> None:
    """Runs the job."""
    given = arguments()
    found = tree.load_tree(budget_file(given.budget), {"root": given.root} if given.root else {})
    if given.verb == "tree":
        print(tree_view.draw_tree(found))
    elif given.verb == "show":
        print(tree_view.describe_run(found, needed(given.names, "show")[0]))
    elif given.verb == "compare":
        from carclass.experiments.compare import (
            compare_runs,  # here, as looking at the tree needs neither Ray nor the networks
        )

        print("\n".join(compare_runs(found)))
    else:
        train(found, given)


def arguments() -> argparse.Namespace:
    """What the user typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("verb", choices=("tree", "show", "run", "rerun-stale", "compare"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; `all` of them")
    parser.add_argument("--budget", default="full", metavar="NAME|FILE", help="what the tree is trained on [full]")
    parser.add_argument("--root", metavar="URI", help="folder or s3:// prefix to use instead of the budget's")
    given = parser.parse_args()
    if given.names and given.verb not in ("show", "run"):
        raise UserError(f"`{given.verb}` is of the whole tree: leave {', '.join(given.names)} out.")
    return given


def budget_file(budget: str) -> Path:
    """The file of a budget's name, or the user's own; UserError when there is neither."""
    known = {path.stem: path for path in sorted(BUDGETS.glob("*.yml"))}
    if budget in known:
        return known[budget]
    if not Path(budget).exists():
        raise UserError(f"no budget `{budget}`: give one of {', '.join(known)}, or the path of a YAML file.")
    return Path(budget)


def needed(names: list[str], verb: str) -> list[str]:
    """The names given; UserError when there are none."""
    if not names:
        raise UserError(f"`{verb}` of which experiment? Say `python jobs/lineage.py {verb} NAME`, or look at `tree`.")
    return names


def train(found: tree.Tree, given: argparse.Namespace) -> None:
    """Trains and says what came of it; exit status 1 when anything failed."""
    from carclass.experiments import run

    if given.verb == "run":
        names = needed(given.names, "run")
        outcome = run.run_experiments(found, found.experiments if names == ["all"] else found.with_parents(names))
    else:
        outcome = run.rerun_stale(found)
    print(tree_view.draw_tree(found))
    rows = [("finished", str(len(outcome.finished))), ("failed", str(len(outcome.failed)))]
    print(progress.table([*rows, *outcome.failed.items()], title="experiments"))
    if outcome.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(main)
