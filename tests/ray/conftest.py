"""Datasets and settings that several modules of this folder use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from carclass.config.schema import DetectorSettings, ExcludeSettings, MaskSettings
from carclass.data import dataset
from tests.helpers.own_cluster import treated_as_own


@pytest.fixture(scope="session")
def root(ingested: dataset.Dataset) -> str:
    """Return the root of the ingested sample."""
    return ingested.uri.rsplit("/", 2)[0]


@pytest.fixture(scope="session")
def mask_settings(photos_folder: Path) -> MaskSettings:
    """Return settings that mask the small sample as v2 and exclude small vehicles."""
    return MaskSettings(
        detector=DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30),
        exclude=ExcludeSettings(min_area_fraction=0.2),
        num_actors=1,
        part_rows=20,
        truth=str(photos_folder / "truth.json"),
    )


@pytest.fixture(scope="session")
def masked(root: str, mask_settings: MaskSettings) -> dataset.Dataset:
    """Mask the small sample."""
    from carclass.masking.mask import mask_dataset  # Detectron2 takes seconds, and pytest's main process needs none

    return mask_dataset(root, mask_settings)


@pytest.fixture
def own_cluster() -> Iterator[None]:
    """Make jobs treat the cluster as what it is, one of their own process."""
    with treated_as_own():
        yield
