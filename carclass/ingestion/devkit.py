"""Labels of Stanford's devkit: annotations and names of classes in MATLAB's format."""

import io
import zlib
from collections.abc import Iterator

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from carclass import storage
from carclass.ingestion.labels import LabelsError, LocatedLabel, Subset, make_label


def read_devkit(source: str) -> Iterator[LocatedLabel]:
    """Yield the labels of a devkit's folder; those of test are optional. Raise OSError if it cannot be read."""
    meta = storage.read_bytes(storage.join(source, "cars_meta.mat"))
    subsets: list[tuple[Subset, str]] = [
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ]
    for subset, name in subsets:
        uri = storage.join(source, name)
        if storage.exists(uri):
            for location, label in parse_devkit(storage.read_bytes(uri), meta, subset=subset, source=uri):
                yield location, label._replace(key=f"cars_{subset}/{label.key}")


def parse_devkit(annos: bytes, meta: bytes, *, subset: Subset, source: str) -> Iterator[LocatedLabel]:
    """Parse Stanford's devkit: `cars_{train,test}_annos.mat` and `cars_meta.mat`, all of one subset.

    The key is the photo's `fname`. Class ids start at 1, as in MATLAB. Boxes are ignored. source: name of the
    annotations in errors. Raise LabelsError if a file is malformed.
    """
    annotations = _mat_variable(annos, "annotations", source)
    names = _mat_variable(meta, "class_names", f"{source} (its meta file)")
    fields = annotations.dtype.names or ()
    missing = [name for name in ("fname", "class") if name not in fields]
    if missing:
        raise LabelsError(
            f"{source}: the annotations have no field {', '.join(missing)} (found: {', '.join(fields)}). "
            "Stanford's cars_test_annos.mat has no classes; use cars_test_annos_withlabels.mat."
        )
    if not len(annotations):
        raise LabelsError(f"{source}: no labels in it.")
    for number, (key, class_id) in enumerate(annotations[["fname", "class"]], start=1):
        location = f"{source}, annotation {number} ({key})"
        if not (isinstance(class_id, int | np.integer) and 1 <= class_id <= len(names)):
            raise LabelsError(f"{location}: class {class_id} is not in the meta file's range of 1 to {len(names)}.")
        yield location, make_label(str(key), str(names[class_id - 1]), subset, location)


def _mat_variable(data: bytes, name: str, source: str) -> np.ndarray:
    try:
        variables = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=[name])
    except (ValueError, TypeError, LookupError, OSError, MatReadError, NotImplementedError, zlib.error) as error:
        raise LabelsError(f"{source}: not a readable .mat file of version 5 ({error}).") from error
    if name not in variables:
        raise LabelsError(f"{source}: no variable {name!r}; check that it is a file of the devkit.")
    return np.atleast_1d(variables[name])
