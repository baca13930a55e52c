"""A comparison of runs for notebooks: `carclass.load_comparison("results/comparison").runs`."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from carclass import storage
from carclass.data import dataset
from carclass.errors import UserError
from carclass.reporting.notebook import facts_html

if TYPE_CHECKING:
    import pandas as pd

TABLE = "comparison.parquet"


@dataclass(frozen=True)
class LoadedComparison:
    """The table that jobs/lineage.py compare has written last."""

    uri: str
    runs: "pd.DataFrame"
    """A row per run, in the tree's order, with settings and accuracies; indexed by name."""

    def summary(self) -> "pd.DataFrame":
        """Return the finished runs with parent, dataset and accuracies, the best on val first.

        `test_photos` is a column if the runs were tested on different numbers of photos.
        """
        columns = ["parent", "dataset", "val_accuracy", "test_accuracy", "test_low", "test_high"]
        finished = self.runs[self.runs["state"] == "finished"]
        columns += ["test_photos"] if finished["test_photos"].nunique() > 1 else []
        return finished.sort_values("val_accuracy", ascending=False, kind="stable")[columns]

    def __repr__(self) -> str:
        return f"LoadedComparison({self.uri}, {len(self.runs):,} runs)"

    def _repr_html_(self) -> str:
        summary = self.summary()
        facts = [("uri", self.uri), ("runs", f"{len(self.runs):,}"), ("finished", f"{len(summary):,}")]
        if len(summary):
            facts += [("best on val", f"{summary.index[0]}: {summary['val_accuracy'].iloc[0]:.3f}")]
        return facts_html("comparison", facts)


def load_comparison(uri: str | os.PathLike[str]) -> LoadedComparison:
    """Load a comparison from `<root>/comparison`. Raise UserError if there is none."""
    folder = os.fspath(uri).rstrip("/")
    if not storage.exists(storage.join(folder, TABLE)):
        raise UserError(
            f"{folder} is not a comparison: it has no {TABLE}. Give the folder <root>/comparison, which "
            "`jobs/lineage.py compare` writes."
        )
    return LoadedComparison(folder, dataset.read_part(storage.join(folder, TABLE)).to_pandas().set_index("name"))
