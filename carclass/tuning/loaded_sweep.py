"""A sweep for notebooks: `carclass.load_sweep("results/sweeps/head").trials`."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from carclass.data.results import find_place
from carclass.errors import UserError
from carclass.reporting.notebook import facts_html
from carclass.tuning import report
from carclass.tuning.collect import collect_sweep
from carclass.tuning.results import SweepResult

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LoadedSweep:
    """The trials of a sweep, which may still go on."""

    result: SweepResult

    @cached_property
    def trials(self) -> "pd.DataFrame":
        """Return a row per trial, with a column per varied setting; repeats with other seeds included."""
        frame: pd.DataFrame = report.trials_table(self.result).to_pandas().set_index("number")
        return frame

    @property
    def best(self) -> dict[str, Any]:
        """Return the varied settings of the best trial, by dotted key. Raise UserError if no trial is complete."""
        self._check_complete()
        return dict(self.result.best.trial.values)

    def summary(self) -> list[str]:
        """Return results and recommendations in sentences. Raise UserError if no trial is complete."""
        return report.summarise(self.result)

    def _check_complete(self) -> None:
        if not self.result.complete:
            raise UserError(f"no trial of sweep `{self.result.name}` is complete yet.")

    def __repr__(self) -> str:
        return f"LoadedSweep({self.result.name}, {len(self.result.searched):,} trials)"

    def _repr_html_(self) -> str:
        facts = [
            *((name.lower(), value) for name, value in self.result.facts),
            ("trials", f"{len(self.result.searched):,}"),
        ]
        facts += [("complete", f"{len(self.result.complete):,}")]
        if self.result.complete:
            best = self.result.best
            facts += [("best", f"trial {best.trial.number}: {best.trial.title}, val accuracy {best.accuracy:.3f}")]
        return facts_html(f"sweep {self.result.name}", facts)


def load_sweep(uri: str | os.PathLike[str]) -> LoadedSweep:
    """Load a sweep from `<root>/sweeps/<name>`. Raise UserError if there is none."""
    place = find_place(uri, "sweeps", "sweep")
    return LoadedSweep(collect_sweep(place.root, place.name))
