"""A comparison of all finished runs of a tree: each is evaluated once, then one page covers all."""

import io
import logging

import pyarrow.parquet as pq

from carclass import storage
from carclass.config.schema import EvaluateSettings
from carclass.evaluation.evaluate import evaluate_run
from carclass.experiments import report, status
from carclass.experiments.collect import collect_comparison, evaluation_uri
from carclass.experiments.tree import Tree

log = logging.getLogger(__name__)


def compare_runs(tree: Tree) -> list[str]:
    """Tests the finished runs that aren't tested yet, writes the page and its table, and returns where they lie.

    UserError when no run is finished.
    """
    found = status.tree_status(tree)
    untested = [
        name for name, one in found.items() if one.state == "finished" and not storage.exists(evaluation_uri(one))
    ]
    for i, name in enumerate(untested, 1):
        outcome = evaluate_run(tree.budget.root, EvaluateSettings(run=name))
        log.info("lineage: tested %d of %d: %s, accuracy %.3f", i, len(untested), name, outcome.accuracy)
    compared = collect_comparison(tree, found)
    place = storage.join(tree.budget.root, "comparison")
    page = report.render_comparison(compared)
    table = io.BytesIO()
    pq.write_table(report.comparison_table(compared), table)
    for name, data in {"comparison.parquet": table.getvalue(), "comparison.html": page.encode()}.items():
        storage.write_bytes(storage.join(place, name), data)
    return [storage.join(place, name) for name in ("comparison.html", "comparison.parquet")]
