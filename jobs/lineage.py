"""The tree of experiments: parents, state and results of all runs.

  python jobs/lineage.py tree                      the tree, with data, state and val accuracy
  python jobs/lineage.py show exp_003              a run: parents, changed settings, epochs
  python jobs/lineage.py run all --budget tiny     train missing runs, parents first, siblings in parallel
  python jobs/lineage.py run exp_013               train one run and its parents
  python jobs/lineage.py rerun-stale               train runs again whose settings, data or parents have changed
  python jobs/lineage.py compare                   test each finished run and write one report over all of them

A budget names the experiment files of the tree, their datasets and the length of training: one of
jobs/experiments/budgets (tiny: the embedded sample; cars196; full), or a YAML file of your own. All commands are
idempotent and resumable.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError, unknown_name

if TYPE_CHECKING:
    from carclass.experiments.tree import Tree

BUDGETS = Path(__file__).parent / "experiments" / "budgets"


def main() -> None:
    args = parse_arguments()
    file = find_budget(args.budget)
    from carclass.experiments import tree as trees
    from carclass.experiments import tree_view

    tree = trees.load_tree(file, {"root": args.root} if args.root else {})
    if args.verb == "tree":
        print(tree_view.draw_tree(tree))
    elif args.verb == "show":
        print(tree_view.describe_run(tree, args.names[0]))
    elif args.verb == "compare":
        from carclass.experiments.compare import compare_runs

        print("\n".join(compare_runs(tree)))
    else:
        train_tree(tree, args)


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line. Raise UserError if the verb and the names do not match."""
    parser = cli.JobParser(__doc__)
    parser.add_argument("verb", choices=("tree", "show", "run", "rerun-stale", "compare"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or `all`")
    parser.add_argument("--budget", default="full", metavar="NAME|FILE", help="data and length of training [full]")
    parser.add_argument("--root", metavar="URI", help="folder or s3:// prefix to use instead of the budget's root")
    args = parser.parse()
    takes_names = args.verb in ("show", "run")
    if args.names and not takes_names:
        raise UserError(f"`{args.verb}` applies to the whole tree: omit {', '.join(args.names)}.")
    if takes_names and not args.names:
        raise UserError(f"`{args.verb}` needs the name of an experiment, as listed by `python jobs/lineage.py tree`.")
    return args


def find_budget(budget: str) -> Path:
    """Return the file of a budget given by name or path. Raise UserError if there is none."""
    known = {path.stem: path for path in sorted(BUDGETS.glob("*.yml"))}
    if budget in known:
        return known[budget]
    if not Path(budget).exists():
        raise unknown_name("budget", budget, list(known), str(BUDGETS), "Or give the path of a YAML file.")
    return Path(budget)


def train_tree(tree: "Tree", args: argparse.Namespace) -> None:
    """Train experiments and print the results; exit with status 1 if any failed."""
    from carclass.experiments import run, tree_view

    if args.verb == "run":
        experiments = tree.experiments if args.names == ["all"] else tree.with_parents(args.names)
        results = run.run_experiments(tree, experiments)
    else:
        results = run.rerun_stale(tree)
    print(tree_view.draw_tree(tree))
    rows = [("finished", str(len(results.finished))), ("failed", str(len(results.failed)))]
    print(progress.table([*rows, *results.failed.items()], title="experiments"))
    if results.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(main)
