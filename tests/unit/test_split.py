"""Splits held out from train: exact shares of each class, copies and groups together, no change by new photos."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from carclass.config.ingest_settings import IngestSettings
from carclass.data.dataset import Dataset
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import split
from carclass.ingestion.ingest import _warn_about_few_val
from tests.helpers.held_out import SHARES, Photo, add_photos, publish, splits, write_pending

CARS = dict(zip("abcdefgh", (1, 2, 3, 7, 25, 25, 40, 101), strict=True))


def cars(numbers: dict[str, int], **fields: Any) -> list[Photo]:
    return [Photo(f"{label}/{i}", label, **fields) for label, number in numbers.items() for i in range(number)]


def counts(published: Dataset) -> dict[str, Counter[str]]:
    """Return the number of photos of each split by class."""
    rows = published.read(["label", "split"]).to_pylist()
    return {name: Counter(row["split"] for row in rows if row["label"] == name) for name in published.classes}


def test_the_share_of_each_class_is_exact_to_one_photo(tmp_path: Path):
    for name, found in counts(publish(tmp_path, cars(CARS))).items():
        assert abs(found["test"] - 0.2 * CARS[name]) <= 0.5
        assert abs(found["val"] - 0.2 * (CARS[name] - found["test"])) <= 0.5


@pytest.mark.parametrize("shares", [{"val": 0.95}, {"test": 0.95}, {"test": 0.5, "val": 0.5}])
def test_a_large_share_leaves_a_train_photo_of_each_class(tmp_path: Path, shares: dict[str, float]):
    assert all(found["train"] for found in counts(publish(tmp_path, cars(CARS), shares)).values())


def test_without_a_share_no_photo_is_held_out(tmp_path: Path):
    assert {*splits(publish(tmp_path, cars(CARS), {})).values()} == {"train"}


def test_another_seed_holds_out_other_photos(tmp_path: Path):
    first, second = (splits(publish(tmp_path / str(seed), cars(CARS), seed=seed)) for seed in (1, 2))
    assert first != second
    assert Counter(first.values()) == Counter(second.values())


def test_a_larger_share_holds_out_a_superset(tmp_path: Path):
    small, large = (splits(publish(tmp_path / str(share), cars(CARS), {"val": share})) for share in (0.1, 0.3))
    assert {key for key in small if small[key] == "val"} < {key for key in large if large[key] == "val"}


def test_the_order_of_the_source_and_the_names_do_not_matter(tmp_path: Path):
    photos = cars(CARS)
    renamed = [Photo(f"new/{photo.key}", photo.label, content=photo.key) for photo in reversed(photos)]
    first, second = splits(publish(tmp_path / "1", photos)), splits(publish(tmp_path / "2", renamed))
    assert {f"new/{key}": value for key, value in first.items()} == second


def test_added_photos_move_no_earlier_one_and_the_shares_stay_exact(tmp_path: Path):
    published = publish(tmp_path, cars(CARS))
    before = splits(published)
    numbers = {name: number + 50 for name, number in CARS.items()} | {"new": 30}
    extended = publish(tmp_path, cars(numbers), published=published)
    assert before.items() <= splits(extended).items()
    for name, found in counts(extended).items():
        assert abs(found["test"] - 0.2 * numbers[name]) <= 1
        assert abs(found["val"] - 0.2 * (numbers[name] - found["test"])) <= 1


def test_removed_and_relabelled_photos_move_no_other(tmp_path: Path):
    published = publish(tmp_path, cars(CARS))
    before = splits(published)
    photos = [Photo(photo.key, "b" if photo.key == "h/7" else photo.label) for photo in cars(CARS)[10:]]
    after = splits(publish(tmp_path, photos, published=published))
    assert after == {photo.key: before[photo.key] for photo in photos}


def test_a_renamed_photo_stays_in_its_split(tmp_path: Path):
    published = publish(tmp_path, cars(CARS))
    before = splits(published)
    photos = [Photo(f"new/{photo.key}", photo.label, content=photo.key) for photo in cars(CARS)]
    after = splits(publish(tmp_path, photos, published=published))
    assert after == {f"new/{key}": value for key, value in before.items()}


def test_the_splits_of_a_version_by_another_rule_stay(tmp_path: Path):
    photos = cars({"a": 10, "b": 10})
    published = publish(tmp_path, photos, {"val": 0.7})
    before = splits(published)
    assert splits(publish(tmp_path, photos, {"val": 0.2}, published)) == before


def test_copies_share_a_split_and_the_shares_stay_exact(tmp_path: Path):
    photos = [Photo(f"{name}/{i}", name, content=f"{name}{i // 3}") for name in "ab" for i in range(90)]
    published = publish(tmp_path, photos)
    found = splits(published)
    assert all(len({found[f"{name}/{3 * i + j}"] for j in range(3)}) == 1 for name in "ab" for i in range(30))
    assert all(abs(found["test"] - 18) <= 1 and abs(found["val"] - 14.4) <= 1 for found in counts(published).values())


def test_a_copy_of_an_earlier_photo_joins_its_split(tmp_path: Path):
    published = publish(tmp_path, cars({"a": 20, "b": 20}))
    before = splits(published)
    copies = [Photo(f"copy/{photo.key}", photo.label, content=photo.key) for photo in cars({"a": 20, "b": 20})]
    found = splits(publish(tmp_path, [*cars({"a": 20, "b": 20}), *copies], published=published))
    assert all(found[f"copy/{key}"] == value for key, value in before.items())


def test_groups_share_a_split(tmp_path: Path):
    photos = [Photo(f"{name}/{i}", name, group=f"{name}-{i % 10}") for name in "ab" for i in range(100)]
    published = publish(tmp_path, photos)
    found = splits(published)
    assert all(len({found[f"{name}/{i + 10 * j}"] for j in range(10)}) == 1 for name in "ab" for i in range(10))
    assert counts(published) == {name: Counter(train=60, test=20, val=20) for name in "ab"}


def test_groups_with_a_photo_of_the_same_bytes_are_one(tmp_path: Path):
    chain = [Photo(f"a/{i}", "a", content=str((i + 1) // 2), group=f"g{i // 2}") for i in range(10)]
    published = publish(tmp_path, [*chain, *cars({"b": 40, "a2": 40})])
    assert len({value for key, value in splits(published).items() if key.startswith("a/")}) == 1


def test_a_new_photo_joins_the_split_of_its_group(tmp_path: Path):
    old = [Photo(f"{name}/{i}", name, group=f"{name}-{i % 10}") for name in "ab" for i in range(100)]
    published = publish(tmp_path, old)
    new = [Photo(f"{name}/new-{i}", name, group=f"{name}-{i}") for name in "ab" for i in range(10)]
    found = splits(publish(tmp_path, [*old, *new], published=published))
    assert all(found[f"{name}/new-{i}"] == found[f"{name}/{i}"] for name in "ab" for i in range(10))


def test_a_group_of_several_classes_shares_a_split(tmp_path: Path):
    photos = [Photo(f"{name}/{i}", name, group=str(i)) for name in "ab" for i in range(50)]
    found = splits(publish(tmp_path, photos))
    assert all(found[f"a/{i}"] == found[f"b/{i}"] for i in range(50))


def test_large_groups_come_as_near_to_the_share_as_they_can():
    units = [("x", {"a": 6}), ("y", {"a": 9}), ("z", {"a": 4})]
    quotas = {"a": 8}
    assert list(split.choose_units(units, quotas, is_last=False)) == ["x"]
    assert list(split.choose_units([("y", {"a": 9}), ("z", {"a": 4}), ("w", {"a": 3})], quotas, is_last=True)) == ["w"]


@pytest.mark.parametrize("subset", ["val", "test"])
def test_a_split_of_the_source_is_kept_as_it_is(tmp_path: Path, subset: str):
    own = cars({"a": 30, "b": 1}, subset=subset)
    rest = {name: share for name, share in SHARES.items() if name != subset}
    found = splits(publish(tmp_path, [*own, *(Photo(f"new/{i}", "ab"[i % 2]) for i in range(50))], rest))
    assert {key for key, value in found.items() if value == subset} == {photo.key for photo in own}


def test_a_killed_job_is_finished_with_the_same_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = splits(publish(tmp_path / "whole", cars(CARS)))
    monkeypatch.setattr(Draft, "discard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "killed", cars(CARS))
    monkeypatch.undo()
    assert splits(publish(tmp_path / "killed", cars(CARS))) == expected


# Shares of a source


def shares_of(*subsets: str, published: Dataset | None = None, **settings: Any) -> dict[str, float]:
    with Inventory() as inventory:
        add_photos(inventory, [Photo(str(i), "a", subset) for i, subset in enumerate(subsets)])
        shares = split.find_shares(inventory, IngestSettings(photos="/photos", **settings))
        split.check_shares(published, shares)
        return shares


@pytest.mark.parametrize(
    ("subsets", "shares"),
    [
        (["train"], {"test": 0.2, "val": 0.2}),
        (["train", "test"], {"val": 0.2}),
        (["train", "val"], {"test": 0.2}),
        (["train", "val", "test"], {}),
    ],
)
def test_splits_that_a_source_lacks_are_held_out(subsets: list[str], shares: dict[str, float]):
    assert shares_of(*subsets) == shares


def test_a_share_of_zero_holds_out_nothing():
    assert shares_of("train", test_fraction=0, val_fraction=0) == {}


def test_a_source_without_a_test_subset_is_warned_about(caplog: pytest.LogCaptureFixture):
    shares_of("train", test_fraction=0.3)
    assert caplog.messages == [
        "ingest: /photos has no test subset: 30% of each class's photos are held out for test (`ingest.test_fraction`)"
    ]


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_share_of_a_split_that_the_source_has_is_refused(name: str):
    with pytest.raises(UserError, match=rf"`ingest.{name}_fraction` is 0.3 and has no effect: /photos has photos of"):
        shares_of("train", name, **{f"{name}_fraction": 0.3})


@pytest.mark.parametrize("value", [0, 0.2])
def test_a_share_of_zero_or_the_default_is_accepted_beside_a_split_of_the_source(value: float):
    assert shares_of("train", "test", "val", test_fraction=value, val_fraction=value) == {}


@pytest.mark.parametrize(
    ("held_out", "subsets", "message"),
    [
        ({"val": 0.2}, ["train"], r"with 20% val held out .* have 20% test and 20% val.*`ingest.test_fraction: 0`"),
        ({"test": 0.2, "val": 0.2}, ["train", "test"], r"with 20% test and 20% val held out .* have 20% val\. "),
        ({"val": 0.2}, ["train", "test", "val"], r"would now have nothing\. "),
    ],
)
def test_a_version_keeps_the_origin_of_its_splits(held_out: dict[str, float], subsets: list[str], message: str):
    with pytest.raises(UserError, match=message):
        shares_of(*subsets, published=Dataset("/datasets/v1", {"held_out": held_out, "settings": {}}))


def test_a_version_of_a_former_format_is_as_a_source_with_a_test_subset():
    assert shares_of("train", "test", published=Dataset("v1", {"settings": {"val_fraction": 0.2}})) == {"val": 0.2}


@pytest.mark.parametrize(
    ("held_out", "advice"), [(["val"], "set a larger `ingest.val_fraction`"), ([], "or add val photos to the source")]
)
def test_classes_with_few_val_photos_are_warned_about(
    held_out: list[str], advice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    photos = [*cars({"a": 9, "b": 10}, subset="val"), *(Photo(f"c/{i}", "c") for i in range(99))]
    with Inventory() as inventory:
        add_photos(inventory, photos)
        draft = Draft(str(tmp_path), {}, inventory)
        draft.write_missing(lambda: write_pending(draft, photos))
        inventory.set_held_out(held_out)
        _warn_about_few_val(inventory, ["a", "b", "c"])
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("ingest: 2 of 3 classes have fewer than 10 val photos (c 0, a 9): ")
    assert message.endswith(advice)
