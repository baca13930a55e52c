"""Same val photos of datasets: by content, and by the source of masked datasets. Sweeps over others are refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from carclass.data.dataset import Dataset
from carclass.data.same_photos import have_same_photos
from carclass.errors import UserError
from carclass.experiments.collect import group_by_val
from carclass.tuning import tune
from tests.helpers.held_out import Photo, publish


def make_dataset(root: Path, name: str, seed: int = 1, prefix: str = "") -> Dataset:
    """Publish a dataset of the same 40 photos; the seed chooses those of val, the prefix begins their names."""
    photos = [Photo(f"{prefix}{label}{i}", label, content=f"{label}{i}") for label in "ab" for i in range(20)]
    return publish(root / "datasets" / name, photos, seed=seed)


def masked(source: Dataset, other: Dataset) -> Dataset:
    """Return another dataset as one that was masked from a source."""
    return replace(other, manifest={**other.manifest, "kind": "masked", "source_digest": source.digest})


def test_photos_split_otherwise_are_not_the_same(tmp_path: Path):
    first, second = make_dataset(tmp_path, "v1"), make_dataset(tmp_path, "v2", seed=2)
    assert not have_same_photos([first, second], "val")
    assert have_same_photos([first], "val")


def test_a_masked_dataset_has_the_photos_of_its_source(tmp_path: Path):
    first, second = make_dataset(tmp_path, "v1"), make_dataset(tmp_path, "v2", seed=2)
    assert have_same_photos([first, masked(first, second)], "val")
    assert not have_same_photos([first, masked(second, first), second, masked(first, second)], "val")


def test_a_sweep_over_datasets_with_other_val_photos_is_refused(tmp_path: Path):
    sources = {name: make_dataset(tmp_path, name, seed) for name, seed in (("v1", 1), ("v2", 2))}
    with pytest.raises(UserError, match=r"my\.yml: `space\.train\.dataset`: v1 and v2 .*Mask one dataset"):
        tune.check_same_val(sources, "my.yml")


def test_a_sweep_over_maskings_of_one_dataset_is_accepted(tmp_path: Path):
    first, second = make_dataset(tmp_path, "v1"), make_dataset(tmp_path, "v2", seed=2)
    tune.check_same_val({"v1": first, "v2": masked(first, second)}, "my.yml")
    tune.check_same_val({"v1": first}, "my.yml")


def test_datasets_of_a_tree_are_grouped_by_their_val_photos(tmp_path: Path):
    for name, seed in (("v1", 1), ("v2", 1), ("v3", 2)):
        make_dataset(tmp_path, name, seed)
    names = ("v1", "v2", "v3", "missing")
    experiments = [SimpleNamespace(settings=SimpleNamespace(dataset=name)) for name in names]
    tree = SimpleNamespace(budget=SimpleNamespace(root=str(tmp_path)), experiments=experiments)
    assert group_by_val(tree) == {"v1": "v1", "v2": "v1", "v3": "v3"}
