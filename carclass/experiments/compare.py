"""The runs of a tree on storage → one page over all of them; each finished run is tested once."""

import io
import logging

import pyarrow.parquet as pq

from carclass import config, storage
from carclass.evaluation import evaluate
from carclass.experiments import comparison, gather, standing
from carclass.experiments.tree import Tree

log = logging.getLogger(__name__)


def run(tree: Tree) -> list[str]:
    """Tests the finished runs that aren't tested yet, writes the page and its table, and returns where they lie.

    UserError when no run is finished.
    """
    found = standing.of(tree)
    untested = [
        name for name, one in found.items() if one.state == "finished" and not storage.exists(gather.report(one))
    ]
    for i, name in enumerate(untested, 1):
        outcome = evaluate.run(tree.budget.root, config.Evaluate(run=name))
        log.info("lineage: tested %d of %d: %s, accuracy %.3f", i, len(untested), name, outcome.accuracy)
    compared = gather.read(tree, found)
    place = storage.join(tree.budget.root, "comparison")
    page = comparison.render(compared)
    table = io.BytesIO()
    pq.write_table(comparison.table(compared), table)
    for name, data in {"comparison.parquet": table.getvalue(), "comparison.html": page.encode()}.items():
        storage.write_bytes(storage.join(place, name), data)
    return [storage.join(place, name) for name in ("comparison.html", "comparison.parquet")]
