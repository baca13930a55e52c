"""carclass: from a bucket of vehicle photos to a trustworthy fine-grained classifier, on a Ray cluster."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carclass.runs.loaded_run import LoadedRun


def load_run(uri: "str | os.PathLike[str]") -> "LoadedRun":
    """A finished run by its place, `<root>/experiments/<name>`: settings, metrics, predictions, and its network.

    The network takes uint8 (N,3,S,S) RGB photos and gives float32 (N,C) logits. UserError where there is no such run
    or it isn't finished.
    """
    from carclass.runs import loaded_run  # here, as it takes seconds, which `import carclass` should not

    return loaded_run.load_run(uri)
