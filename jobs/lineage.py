"""The tree of experiments: parents, state and results of all runs.

  python jobs/lineage.py tree                      the tree, with data, state and val accuracy
  python jobs/lineage.py show exp_003              a run: parents, changed settings, epochs
  python jobs/lineage.py run all --budget tiny     train missing runs, parents first, siblings in parallel
  python jobs/lineage.py run exp_013               train one run and its parents
  python jobs/lineage.py rerun-stale exp_003       train a run again whose settings, data or parents have changed
  python jobs/lineage.py rerun-stale --yes         all stale runs; the old ones are moved to <root>/replaced/ whole
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
from carclass.config import cli, installation
from carclass.errors import UserError, unknown_name

if TYPE_CHECKING:
    from carclass.experiments.tree import Tree

BUDGETS = Path(__file__).parent / "experiments" / "budgets"


def main() -> None:
    args = parse_arguments()
    file = find_budget(args.budget)
    from carclass.experiments import budget_root, tree_view
    from carclass.experiments import tree as trees

    tree = trees.load_tree(file, {"root": args.root} if args.root else {})
    budget_root.check_budget(tree.budget.root, file.stem)
    if args.verb == "tree":
        print(tree_view.draw_tree(tree))
    elif args.verb == "show":
        print("\n".join(tree_view.describe_run(tree, name) for name in args.names))
    elif args.verb == "compare":
        from carclass.experiments.compare import compare_runs

        print("\n".join(compare_runs(tree)))
    else:
        names = choose_experiments(tree, args)
        tree.with_parents(names)  # an unknown name claims no root
        if names:
            budget_root.claim_root(tree.budget.root, file.stem)
        train_tree(tree, names, replace=args.verb == "rerun-stale")


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line. Raise UserError if the verb and the names do not match."""
    parser = cli.JobParser(__doc__)
    parser.add_argument("verb", choices=("tree", "show", "run", "rerun-stale", "compare"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or `all`")
    parser.add_argument("--budget", default="full", metavar="NAME|FILE", help="data and length of training [full]")
    parser.add_argument("--root", metavar="URI", help="folder or s3:// prefix to use instead of the budget's root")
    parser.add_argument("--yes", action="store_true", help="`rerun-stale` all stale runs")
    args = parser.parse()
    if args.names and args.verb not in ("show", "run", "rerun-stale"):
        raise UserError(f"`{args.verb}` applies to the whole tree: omit {', '.join(args.names)}.")
    if args.yes and (args.verb != "rerun-stale" or args.names):
        raise UserError("`--yes` has an effect with `rerun-stale` and no names only: it retrains all stale runs.")
    if args.verb in ("show", "run") and not args.names:
        raise UserError(f"`{args.verb}` needs the name of an experiment, as listed by `python jobs/lineage.py tree`.")
    return args


def find_budget(budget: str) -> Path:
    """Return the file of a budget given by name or path. Raise UserError if there is none."""
    known = {path.stem: path for path in sorted(BUDGETS.glob("*.yml"))}
    if budget in known:
        return known[budget]
    if not (path := installation.find_config(budget)).exists():
        raise unknown_name("budget", budget, list(known), str(BUDGETS), "Or give the path of a YAML file.")
    return path


def choose_experiments(tree: "Tree", args: argparse.Namespace) -> list[str]:
    """Return the names of the experiments to train.

    Raise UserError, which lists the stale runs, if `rerun-stale` has neither names nor `--yes`.
    """
    if args.verb == "run":
        return [each.name for each in tree.experiments] if args.names == ["all"] else args.names
    if args.names:
        return args.names
    from carclass.experiments.run import find_stale

    stale = find_stale(tree)
    if stale and not args.yes:
        raise UserError(
            f"stale in {tree.budget.root}: {'; '.join(f'{name} ({reason})' for name, reason in stale.items())}. Add "
            f"the names of those to train again to the command, as in `rerun-stale {next(iter(stale))}`, or `--yes` "
            "for all of them. Their old runs are moved to `replaced/` in the root, with their weights."
        )
    return list(stale)


def train_tree(tree: "Tree", names: list[str], *, replace: bool) -> None:
    """Train experiments and print the results; exit with status 1 if any failed."""
    from carclass.experiments import run, tree_view

    results = run.rerun_stale(tree, names) if replace else run.run_experiments(tree, tree.with_parents(names))
    print(tree_view.draw_tree(tree))
    rows = [("finished", str(len(results.finished))), ("failed", str(len(results.failed)))]
    print(progress.table([*rows, *results.failed.items()], title="experiments"))
    if results.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(main)
