"""A published dataset for notebooks: `carclass.load_dataset("results/datasets/v2").summary()`."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from carclass.data import dataset, publishing
from carclass.data.dataset import SPLITS, Dataset
from carclass.data.results import find_place
from carclass.errors import UserError
from carclass.reporting.notebook import facts_html

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LoadedDataset:
    """A published dataset; its rows are read when they are asked for."""

    dataset: Dataset

    @property
    def classes(self) -> list[str]:
        """Return the class names in the order of their indices."""
        return self.dataset.classes

    @cached_property
    def photos(self) -> "pd.DataFrame":
        """Return a row per photo without its pixels: key, label, split and so on."""
        names = [name for name in self._columns if name not in ("image", "mask")]
        frame: pd.DataFrame = self.dataset.read(names).to_pandas()
        return frame

    @property
    def _columns(self) -> list[str]:
        is_masked = self.dataset.manifest["kind"] == "masked"
        return list((dataset.MASKED_ROW if is_masked else dataset.ROW).names)

    def summary(self) -> "pd.DataFrame":
        """Return the photos of each class by split, and in total."""
        counts = self.photos.groupby(["label", "split"], observed=True).size().unstack(fill_value=0)
        counts = counts.reindex(columns=list(SPLITS), fill_value=0)
        return counts.assign(total=counts.sum(axis=1))

    @cached_property
    def quarantined(self) -> "pd.DataFrame":
        """Return a row per input that was set aside: key, reason, detail."""
        columns = ["key", "reason", "detail"]
        rows = publishing.read_written(self.dataset.uri, "quarantine", columns, self.dataset.quarantine)
        frame: pd.DataFrame = rows.drop(["part"]).to_pandas()
        return frame

    def images(self, keys: Sequence[str]) -> list[Image.Image]:
        """Return photos by their keys, as they are stored. Raise UserError for a key that the dataset does not have."""
        try:
            rows = self.dataset.rows(list(keys), ["image"])
        except KeyError as error:
            raise UserError(f"dataset `{self.dataset.name}` has no photo with the key {error.args[0]!r}.") from error
        return [Image.open(io.BytesIO(row["image"])) for row in rows]

    def __repr__(self) -> str:
        return f"LoadedDataset({self.dataset.uri})"

    def _repr_html_(self) -> str:
        manifest = self.dataset.manifest
        facts = [("uri", self.dataset.uri), ("classes", f"{len(self.classes):,}"), ("photos", f"{manifest['rows']:,}")]
        facts += [(split, f"{number:,}") for split, number in manifest["splits"].items()]
        facts += [("quarantined", f"{manifest['quarantined']:,}")]
        return facts_html(f"dataset {self.dataset.name}", facts)


def load_dataset(uri: str | os.PathLike[str]) -> LoadedDataset:
    """Load a dataset from `<root>/datasets/<name>`. Raise UserError if none is published there."""
    place = find_place(uri, "datasets", "dataset")
    return LoadedDataset(dataset.load_dataset(place.root, place.name))
