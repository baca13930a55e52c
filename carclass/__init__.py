"""Fine-grained classification of vehicle photos on a Ray cluster, from a bucket of photos to a report."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carclass.runs.loaded_run import LoadedRun


def load_run(uri: "str | os.PathLike[str]") -> "LoadedRun":
    """Return a finished run by its URI, `<root>/experiments/<name>`: settings, metrics, predictions and model.

    The model maps uint8 (N,3,S,S) RGB photos to float32 (N,C) logits. Raise UserError if there is no such run or it is
    not finished.
    """
    from carclass.runs import loaded_run  # late: `import carclass` has to be fast

    return loaded_run.load_run(uri)
