"""Photos of a split that a run or its ancestors were trained or chosen on, found by the hash of their content.

On train photos a model is more accurate than on new ones, and on the val photos its best epoch was chosen on a little.
Within a dataset, no photo is in two splits; between two, as of the same photos ingested under two names, it may be.
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
    """Photos of a split that are train photos of some runs, or val photos of some but train photos of none."""

    number: int
    total: int  # photos of the split
    runs: list[str]  # names of the runs that were trained on them
    unknown: list[str]  # names of runs whose train photos are no longer known
    num_val: int  # val photos; not counted in a val split, on which the run's own epoch is chosen anyway
    val_runs: list[str]  # names of the runs whose val photos they are

    @property
    def text(self) -> str:
        """Return the numbers in words: "3 of 40 are train photos of first"; empty if there are none."""
        parts = []
        if self.number:
            parts.append(f"{self.number:,} of {self.total:,} are train photos of {', '.join(self.runs)}")
        if self.num_val:
            names = ", ".join(self.val_runs)
            parts.append(
                f"{self.num_val:,} of {self.total:,} are val photos of {names}, whose epoch was chosen on them"
            )
        return ", ".join(parts)

    @property
    def unknown_text(self) -> str:
        """Return whose train photos are not known, in words; empty if all are."""
        if not self.unknown:
            return ""
        return (
            f"the train photos of {', '.join(self.unknown)} are not known, as the run or its dataset is gone or has "
            "changed since: they may be among these photos, unless it changed by --update, which keeps splits"
        )


def find_seen_photos(run: Run, source: dataset.Dataset, split: str) -> SeenPhotos:
    """Return the photos of a dataset's split that a run or its ancestors were trained or chosen on."""
    evaluated = image_ids(source, split)
    is_seen = {seen: np.zeros(len(evaluated), bool) for seen in ("train", "val")}
    runs: dict[str, list[str]] = {"train": [], "val": []}
    unknown: list[str] = []
    visited: set[str] = set()  # a run may have been trained anew from its own child
    ancestor: Run | None = run
    while ancestor is not None and ancestor.settings.name not in visited:
        visited.add(ancestor.settings.name)
        trained = dataset.find_dataset(ancestor.root, ancestor.settings.dataset)
        if trained is None or trained.digest != ancestor.lineage()["dataset_digest"]:
            unknown.append(ancestor.settings.name)
        elif trained.digest != source.digest:
            for seen in ("train",) if split == "val" else ("train", "val"):
                found = pc.is_in(evaluated, value_set=image_ids(trained, seen)).to_numpy(zero_copy_only=False)
                runs[seen] += [ancestor.settings.name] if found.any() else []
                is_seen[seen] |= found
        ancestor = _find_parent(ancestor, unknown)
    num_val = int((is_seen["val"] & ~is_seen["train"]).sum())
    return SeenPhotos(int(is_seen["train"].sum()), len(evaluated), runs["train"], unknown, num_val, runs["val"])


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
