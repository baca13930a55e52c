"""Arrays out of a pickle, in a process that can do nothing else: the pickle on stdin → safetensors on stdout.

Run by weights.py as `python -I unpickle.py` with an empty environment. Whatever the pickle names besides what
arrays are made of is refused, and the process can neither open files nor start others.
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
# Both names that numpy has had for its core, since pickles keep the one of their time.
ALLOWED: dict[str, dict[str, Any]] = {
    "numpy": {"ndarray": np.ndarray, "dtype": np.dtype},
    "numpy.core.multiarray": _MULTIARRAY,
    "numpy._core.multiarray": _MULTIARRAY,
    "numpy.core.numeric": _NUMERIC,
    "numpy._core.numeric": _NUMERIC,
    "collections": {"OrderedDict": collections.OrderedDict},
    "_codecs": {"encode": lambda text, _: text.encode("latin1")},
}
"""All that a pickle of arrays by name needs, by module."""


class ArrayUnpickler(pickle.Unpickler):
    """Knows the parts of arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The part called so; UnpicklingError for every other one."""
        try:
            return ALLOWED[module][name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array") from None


def drop_privileges() -> None:
    """From here on the process opens no file or connection, writes to no file and, but for root's, starts no other."""
    for power in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(power, (0, 0))


def main() -> None:
    drop_privileges()
    arrays = ArrayUnpickler(sys.stdin.buffer, encoding="latin1").load()["model"]
    sys.stdout.buffer.write(save({name: np.asarray(array) for name, array in arrays.items()}))


if __name__ == "__main__":
    main()
