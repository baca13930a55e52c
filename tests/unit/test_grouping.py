"""Groups of photos that share a split, from a column of the labels or a pattern."""

from pathlib import Path
from typing import Any

import pytest

from carclass.config.ingest_settings import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import labelling
from tests.helpers.inventories import add_keys

KEYS = ["1-a.jpg", "1-b.jpg", "2-a.jpg"]
TABLE = "img_name,class,subset,Listing\n1-a.jpg,A,train,x\n1-b.jpg,A,train,x\n2-a.jpg,B,train,\n"


def groups(keys: list[str], table: Path | None = None, text: str = TABLE, **settings: Any) -> dict[str, str | None]:
    """Return the groups of photos with these keys."""
    if table is not None:
        (table / "labels.csv").write_text(text)
        settings["labels"] = str(table / "labels.csv")
    ingest = IngestSettings(photos="/photos", **settings)
    with Inventory() as inventory:
        labelling.read_labels(ingest, inventory)
        add_keys(inventory, keys)
        labelling.label_photos(ingest, inventory)
        return dict(inventory.query("SELECT key, photo_group FROM input"))


@pytest.mark.parametrize("name", ["Listing", "listing"])
def test_a_column_of_the_labels_gives_the_groups(tmp_path: Path, name: str):
    assert groups(KEYS, tmp_path, group=name) == {"1-a.jpg": "x", "1-b.jpg": "x", "2-a.jpg": None}


@pytest.mark.parametrize("pattern", [r"^(\d+)-", r"([^/]+)-[a-z]\.jpg$"])
def test_a_pattern_of_the_keys_gives_the_groups(tmp_path: Path, pattern: str):
    assert groups(KEYS, tmp_path, group=pattern) == {"1-a.jpg": "1", "1-b.jpg": "1", "2-a.jpg": "2"}


def test_a_pattern_needs_no_labels():
    keys = ["A/7/1.jpg", "A/7/2.jpg", "A/8/1.jpg", "B/9/1.jpg"]
    keys = [key.replace("/", "-").replace("-", "/", 1) for key in keys]
    assert list(groups(keys, group=r"/(\d+)-").values()) == ["7", "7", "8", "9"]


def test_without_the_setting_there_are_no_groups(tmp_path: Path):
    assert {*groups(KEYS, tmp_path).values()} == {None}


def test_photos_without_a_group_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    groups(KEYS, tmp_path, group="Listing")
    assert caplog.messages == ["ingest: 1 photos have no group and are each on their own, such as '2-a.jpg'"]


@pytest.mark.parametrize("group", [r"z(\d+)", "subset2()"])
def test_a_group_that_no_photo_has_is_refused(tmp_path: Path, group: str):
    with pytest.raises(UserError, match=r"`ingest.group` is .*, but no photo has such a group, such as '1-a.jpg'"):
        groups(KEYS, tmp_path, group=group)


@pytest.mark.parametrize("group", ["vehicle", r"(\d+)-([ab])", "(a"])
def test_a_group_that_is_neither_a_column_nor_a_pattern_is_refused_with_the_columns(tmp_path: Path, group: str):
    with pytest.raises(UserError, match=r"neither a column of \S+labels.csv \(its columns: img_name, .*Listing\)"):
        groups(KEYS, tmp_path, group=group)


@pytest.mark.parametrize("group", ["vehicle", r"(\d+)-([ab])", "(a", ""])
def test_without_a_table_a_group_is_a_pattern(group: str):
    with pytest.raises(ValueError, match="group"):
        IngestSettings(photos="/photos", group=group)


def test_a_group_in_several_subsets_of_the_source_is_refused(tmp_path: Path):
    text = TABLE.replace("1-b.jpg,A,train", "1-b.jpg,A,test")
    with pytest.raises(UserError, match=r"1 groups have photos in several subsets: 'x' \(t\w+ and t\w+\)"):
        groups(KEYS, tmp_path, text, group="Listing")


def test_a_photo_in_two_groups_is_a_contradiction(tmp_path: Path):
    with pytest.raises(UserError, match=r"1-a.jpg is A \(group y\), but A \(group x\) at .*line 2"):
        groups(KEYS, tmp_path, f"{TABLE}1-a.jpg,A,train,y\n", group="Listing")


def test_other_groups_are_another_input(tmp_path: Path):
    def digest(text: str, **settings: str) -> str:
        (tmp_path / "labels.csv").write_text(text)
        ingest = IngestSettings(photos="/photos", labels=str(tmp_path / "labels.csv"), **settings)
        with Inventory() as inventory:
            labelling.read_labels(ingest, inventory)
            add_keys(inventory, KEYS)
            labelling.label_photos(ingest, inventory)
            return inventory.digest()

    other = TABLE.replace("train,x\n2", "train,y\n2")
    assert digest(TABLE, group="Listing") != digest(other, group="Listing")
    assert digest(TABLE) == digest(other)
