"""Sandboxed subprocess that reads arrays from a pickle: the pickle on stdin → safetensors on stdout.

Run by weights.py as `python -I unpickle.py` with an empty environment. The unpickler resolves only the globals that
NumPy arrays need, and the process can neither open files nor start processes.
"""

import collections
import pickle
import resource
import sys
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric
from safetensors.numpy import save

_MULTIARRAY = {"_reconstruct": multiarray._reconstruct, "scalar": multiarray.scalar}
_NUMERIC = {"_frombuffer": numeric._frombuffer}  # type: ignore[attr-defined]
# NumPy 2 renamed numpy.core to numpy._core; pickles hold either name.
ALLOWED_GLOBALS: dict[str, dict[str, Any]] = {
    "numpy": {"ndarray": np.ndarray, "dtype": np.dtype},
    "numpy.core.multiarray": _MULTIARRAY,
    "numpy._core.multiarray": _MULTIARRAY,
    "numpy.core.numeric": _NUMERIC,
    "numpy._core.numeric": _NUMERIC,
    "collections": {"OrderedDict": collections.OrderedDict},
    "_codecs": {"encode": lambda text, _: text.encode("latin1")},
}
"""Module → name → object: all globals of a pickled dict of arrays."""


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler restricted to ALLOWED_GLOBALS."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed global; raise UnpicklingError for any other."""
        try:
            return ALLOWED_GLOBALS[module][name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of an array") from None


def drop_privileges() -> None:
    """Forbid this process to open files or sockets, to write to files and, unless it runs as root, to fork."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def main() -> None:
    drop_privileges()
    arrays = ArrayUnpickler(sys.stdin.buffer, encoding="latin1").load()["model"]
    sys.stdout.buffer.write(save({name: np.asarray(array) for name, array in arrays.items()}))


if __name__ == "__main__":
    main()
