"""Sandboxed subprocess that reads arrays from a pickle: the pickle on stdin → safetensors on stdout.

Run by weights.py as `python -I unpickle.py` with an empty environment. The unpickler resolves only the globals that
arrays of numbers need, by functions that build nothing else. The process can neither open files nor start processes,
and its memory is limited by the size of the pickle.
"""

import collections
import io
import pickle
import re
import resource
import sys
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric
from safetensors.numpy import save

SPARE_BYTES, COPIES = 2**28, 8
"""Memory beyond what the process has when it begins: a constant, and multiples of the pickle's size."""
_ARRAY = "numpy.ndarray"
"""Stands for the class, which pickles name only as an argument of `_reconstruct`."""


class _NotAnArrayError(pickle.UnpicklingError):
    """Error of a pickle with anything but arrays of numbers."""


def _dtype(name: str, *_: object) -> np.dtype:
    """Return a type of numbers by its name; raise an error for objects, strings, records and dates."""
    if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?[biuf]\d*", name):
        raise _NotAnArrayError(f"it has an array of {name!r}, which are not numbers")
    return np.dtype(name, copy=True)  # the pickle sets its byte order


def _reconstruct(kind: object, shape: object, _: object) -> np.ndarray:
    """Return an empty array, whose shape and numbers follow in the pickle."""
    if kind != _ARRAY or shape != (0,):
        raise _NotAnArrayError("it has an array of a class or shape of its own")
    return np.empty(0, np.int8)


_MULTIARRAY = {"_reconstruct": _reconstruct, "scalar": multiarray.scalar}
_NUMERIC = {"_frombuffer": numeric._frombuffer}  # type: ignore[attr-defined]
# NumPy 2 renamed numpy.core to numpy._core; pickles hold either name.
ALLOWED_GLOBALS: dict[str, dict[str, Any]] = {
    "numpy": {"ndarray": _ARRAY, "dtype": _dtype},
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
            raise _NotAnArrayError(f"it refers to {module}.{name}, which is not part of an array") from None


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a pickled {"model": {name: array}}; raise an error if it holds anything else there."""
    content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    arrays = content.get("model") if type(content) is dict else None
    if not isinstance(arrays, dict):
        raise _NotAnArrayError("it has no dict `model` of arrays")
    for name, array in arrays.items():
        if type(name) is not str or type(array) is not np.ndarray or array.dtype.kind not in "biuf":
            raise _NotAnArrayError(f"{str(name)[:100]} in `model` is not an array of numbers")
    return arrays


def limit_memory(num_bytes: int) -> None:
    """Limit the memory that this process may still allocate."""
    if sys.platform == "linux":  # macOS has no such limit
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))


def drop_privileges() -> None:
    """Forbid this process to open files or sockets, to write to files and, unless it runs as root, to fork."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def main() -> None:
    data = sys.stdin.buffer.read()
    limit_memory(SPARE_BYTES + COPIES * len(data))
    drop_privileges()
    sys.stdout.buffer.write(save(read_arrays(data)))


if __name__ == "__main__":
    main()
