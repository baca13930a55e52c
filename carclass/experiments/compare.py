"""Comparison of the runs of a tree: evaluation of each finished run, and the published report."""

import io
import logging

import pyarrow.parquet as pq

from carclass import storage
from carclass.config.schema import EvaluateSettings
from carclass.errors import UserError
from carclass.evaluation.evaluate import evaluate_run
from carclass.experiments import report
from carclass.experiments.collect import collect_comparison, read_test
from carclass.experiments.status import tree_status
from carclass.experiments.tree import Tree
from carclass.formatting import rate_text

log = logging.getLogger(__name__)


def compare_runs(tree: Tree) -> list[str]:
    """Evaluate the finished runs that have no evaluation yet, write page and table, and return their URIs.

    Raise UserError if no run is finished.
    """
    statuses = tree_status(tree)
    finished = [name for name, status in statuses.items() if status.state == "finished"]
    untested = [name for name in finished if read_test(statuses[name]) is None]
    for i, name in enumerate(untested, 1):
        try:
            result = evaluate_run(tree.budget.root, EvaluateSettings(run=name))
        except storage.StorageError:
            raise
        except UserError as error:
            log.warning("lineage: %s could not be evaluated: %s", name, error)
            continue
        log.info(
            "lineage: evaluated %d of %d: %s, test accuracy %s", i, len(untested), name, rate_text(result.accuracy)
        )
    comparison = collect_comparison(tree, statuses)
    folder = storage.join(tree.budget.root, "comparison")
    page = report.render_comparison(comparison)
    table = io.BytesIO()
    pq.write_table(report.comparison_table(comparison), table, write_page_checksum=True)
    for name, data in {"comparison.parquet": table.getvalue(), "comparison.html": page.encode()}.items():
        storage.write_bytes(storage.join(folder, name), data)
    return [storage.join(folder, name) for name in ("comparison.html", "comparison.parquet")]
