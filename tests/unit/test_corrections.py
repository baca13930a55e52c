"""Corrections of an audit, applied to the photos of an ingestion."""

from pathlib import Path

import pytest

from carclass.config.ingest_settings import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import labelling
from tests.helpers.inventories import add_keys

KEYS = ["bus/1.jpg", "bus/2.jpg", "car/1.jpg", "car/2.jpg"]
Photo = tuple[str | None, str | None, str | None]


def corrected(folder: Path, *lines: str) -> dict[str, Photo]:
    """Return (label, reason, group) of each photo after corrections. lines: of the table, below its columns."""
    table = folder / "audit.csv"
    table.write_text("\n".join(["key,finding,action", *lines]) + "\n")
    return apply(table)


def apply(table: Path) -> dict[str, Photo]:
    settings = IngestSettings(photos="/photos", corrections=str(table))
    with Inventory() as inventory:
        add_keys(inventory, KEYS)
        labelling.label_photos(settings, inventory)
        return {key: tuple(rest) for key, *rest in inventory.query("SELECT key, label, reason, photo_group FROM input")}


def test_a_photo_that_is_kept_stays_as_it_is(tmp_path: Path):
    assert corrected(tmp_path, "bus/1.jpg,dark,keep", "bus/1.jpg,blurred,")["bus/1.jpg"] == ("bus", None, None)


def test_a_dropped_photo_is_quarantined(tmp_path: Path):
    assert corrected(tmp_path, "bus/1.jpg,dark,drop")["bus/1.jpg"][1] == "dropped"


def test_a_relabelled_photo_has_the_other_class(tmp_path: Path):
    assert corrected(tmp_path, "bus/1.jpg,doubtful_label,relabel:car")["bus/1.jpg"][0] == "car"


def test_grouped_photos_share_a_group(tmp_path: Path):
    photos = corrected(tmp_path, "bus/1.jpg,near_duplicate,group:a", "bus/2.jpg,near_duplicate,group:a")
    assert [photos[key][2] for key in KEYS] == ["a", "a", None, None]


def test_actions_of_two_findings_of_a_photo_are_both_applied(tmp_path: Path):
    photos = corrected(tmp_path, "bus/1.jpg,near_duplicate,group:a", "bus/1.jpg,doubtful_label,relabel:car")
    assert photos["bus/1.jpg"] == ("car", None, "a")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["bus/9.jpg,dark,drop"], r"audit.csv, line 2: `key` is 'bus/9.jpg', but there is no such photo"),
        (["bus/1.jpg,dark,keep", "bus/1.jpg,dark,delete"], r"line 3: `action` is 'delete', but must be keep, drop, "),
        (["bus/1.jpg,dark,relabel:"], r"line 2: `action` is 'relabel:', but must be"),
        (["bus/1.jpg,dark,drop:car"], r"line 2: `action` is 'drop:car', but must be"),
        (
            ["bus/1.jpg,dark,relabel:cat"],
            r"line 2: `action` is relabel:cat, which is none of the classes; did you mean",
        ),
        (
            ["bus/1.jpg,dark,relabel:car", "bus/1.jpg,dark,relabel:bus"],
            r"line 3: 'bus/1.jpg' has the action relabel:bus, but also relabel:car \(.*line 2\)",
        ),
        (
            ["bus/1.jpg,dark,relabel:car", "bus/1.jpg,dark,drop"],
            r"'bus/1.jpg' has the action relabel:car, but also drop",
        ),
    ],
)
def test_a_wrong_correction_is_an_error_with_its_line(tmp_path: Path, lines: list[str], message: str):
    with pytest.raises(UserError, match=message):
        corrected(tmp_path, *lines)


def test_a_table_without_actions_is_refused(tmp_path: Path):
    (tmp_path / "labels.csv").write_text("img_name,class\na.jpg,bus\n")
    with pytest.raises(UserError, match=r"labels.csv has no column `key`. Take an audit.csv"):
        apply(tmp_path / "labels.csv")


def test_a_missing_table_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"`ingest.corrections`: .*audit.csv cannot be read"):
        apply(tmp_path / "audit.csv")
