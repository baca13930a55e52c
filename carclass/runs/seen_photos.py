"""Photos of a split that a run or its ancestors were trained on, found by the hash of their content.

On them a model is more accurate than on new photos. Within a dataset, no photo is in two splits; between two datasets,
as of the same photos ingested under two names, it may be.
"""

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from carclass import storage
from carclass.data import dataset
from carclass.data.results import split_place
from carclass.data.same_photos import image_ids
from carclass.errors import UserError
from carclass.runs.run import Run, find_run, parse_parent, read_run_settings


class SeenPhotos(NamedTuple):
    """Photos of a split that are train photos of some runs."""

    number: int
    total: int  # photos of the split
    runs: list[str]  # names of the runs that were trained on them
    unknown: list[str]  # names of runs whose train photos are not known any more

    @property
    def text(self) -> str:
        """Return the number in words: "3 of 40 are train photos of first"; empty if there are none."""
        return f"{self.number:,} of {self.total:,} are train photos of {', '.join(self.runs)}" if self.number else ""


def find_seen_photos(run: Run, source: dataset.Dataset, split: str) -> SeenPhotos:
    """Return the photos of a dataset's split that a run or its ancestors were trained on."""
    evaluated = image_ids(source, split)
    is_seen = np.zeros(len(evaluated), bool)
    runs: list[str] = []
    unknown: list[str] = []
    visited: set[str] = set()  # a run may have been trained anew from its own child
    ancestor: Run | None = run
    while ancestor is not None and ancestor.settings.name not in visited:
        visited.add(ancestor.settings.name)
        trained = dataset.find_dataset(ancestor.root, ancestor.settings.dataset)
        if trained is None or trained.digest != ancestor.lineage()["dataset_digest"]:
            unknown.append(ancestor.settings.name)
        elif trained.digest != source.digest:
            found = pc.is_in(evaluated, value_set=image_ids(trained, "train")).to_numpy(zero_copy_only=False)
            runs += [ancestor.settings.name] if found.any() else []
            is_seen |= found
        ancestor = _find_parent(ancestor, unknown)
    return SeenPhotos(int(is_seen.sum()), len(evaluated), runs, unknown)


def _find_parent(run: Run, unknown: list[str]) -> Run | None:
    """Return the run that another starts from; None if there is none, or, listed in `unknown`, it is gone or new."""
    lineage = run.lineage()
    try:
        parent = find_parent_run(run.root, lineage["parent"])
    except storage.StorageError:
        raise
    except UserError:
        unknown.append(lineage["parent"].split("@")[0])
        return None
    if parent is not None and parent.lineage()["started"] > lineage["started"]:
        unknown.append(f"the former {parent.settings.name}, which was trained anew")
        return None
    return parent


def find_parent_run(root: str, parent: str) -> Run | None:
    """Return the run of `train.parent`: `<run>@<epoch>`, or the URI of a run's weights. None for other weights.

    Raise UserError if the run is gone.
    """
    if (epoch := parse_parent(parent)) is not None:
        return find_run(root, epoch.run)
    folder, _, file = parent.rpartition("/")
    run_uri = folder.rpartition("/")[0]
    if file != "best.safetensors" or not storage.exists(storage.join(run_uri, "config.yml")):
        return None
    place = split_place(run_uri)
    settings = read_run_settings(run_uri).model_copy(update={"name": place.name})
    return Run(place.root, settings, place.folder)
