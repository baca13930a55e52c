"""An audit of the small sample, and an ingestion with its corrections."""

import csv
from pathlib import Path

import pytest

from carclass import storage
from carclass.audit import audit
from carclass.config.schema import IngestSettings, ModelSettings, TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos

TRAIN = TrainSettings(name="first", parent="sample", model=ModelSettings(architecture="resnet26-narrow", image_size=64))


@pytest.fixture(scope="module")
def audited(root: str, ingested: dataset.Dataset) -> audit.Audit:
    return audit.audit_dataset(root, ingested, TRAIN)


@pytest.fixture(scope="module")
def findings(audited: audit.Audit) -> list[dict[str, str]]:
    with open(audited.table, newline="") as file:
        return list(csv.DictReader(file))


def test_every_action_is_keep_until_it_is_edited(findings: list[dict[str, str]]):
    assert {row["action"] for row in findings} == {"keep"}


def test_photos_of_findings_are_those_of_the_dataset(ingested: dataset.Dataset, findings: list[dict[str, str]]):
    rows = ingested.read(["key", "label", "split"]).to_pylist()
    assert {(row["key"], row["label"], row["split"]) for row in findings} <= {tuple(row.values()) for row in rows}


def test_copies_with_the_same_bytes_are_near_duplicates(ingested: dataset.Dataset, findings: list[dict[str, str]]):
    keys: dict[str, list[str]] = {}
    for row in ingested.read(["key", "image_id"]).to_pylist():
        keys.setdefault(row["image_id"], []).append(row["key"])
    copies = {key for group in keys.values() if len(group) > 1 for key in group}
    assert copies
    assert copies <= {row["key"] for row in findings if row["finding"] == "near_duplicate"}


def test_the_page_shows_the_photos_of_the_findings(audited: audit.Audit, findings: list[dict[str, str]]):
    page = Path(audited.page).read_text()
    assert all(row["key"] in page for row in findings if row["finding"] == "near_duplicate")


def test_a_table_with_actions_is_not_replaced(root: str, ingested: dataset.Dataset, audited: audit.Audit):
    with pytest.raises(UserError, match=r"audit.csv exists, and may hold actions that you have entered"):
        audit.check_table(root, ingested.name, overwrite=False)
    audit.check_table(root, ingested.name, overwrite=True)


def test_a_run_that_has_learned_the_labels_is_refused_as_backbone(root: str):
    with pytest.raises(UserError, match=r"`train.parent` is exp_002@best, a run that has learned the labels"):
        audit.load_network(root, TRAIN.model_copy(update={"parent": "exp_002@best"}))


def test_changed_corrections_are_applied_by_an_update_and_recorded(
    root: str, ingested: dataset.Dataset, tmp_path: Path, photos_folder: Path
):
    rows = ingested.read(["key", "label", "image_id"]).to_pylist()
    image_ids = [row["image_id"] for row in rows]
    dropped, relabelled, *_ = (row for row in rows if image_ids.count(row["image_id"]) == 1)
    other = next(name for name in ingested.classes if name != relabelled["label"])
    table = tmp_path / "audit.csv"
    settings = IngestSettings(
        dataset="corrected", photos=str(photos_folder / "photos"), labels=str(photos_folder / "labels.csv"),
        corrections=str(table),
    )  # fmt: skip
    table.write_text("key,action\n")
    ingest_photos(root, settings)
    table.write_text(f"key,action\n{dropped['key']},drop\n{relabelled['key']},relabel:{other}\n")
    with pytest.raises(UserError, match="--update"):
        ingest_photos(root, settings)
    corrected = ingest_photos(root, settings, update=True)
    labels = {row["key"]: row["label"] for row in corrected.read(["key", "label"]).to_pylist()}
    assert dropped["key"] not in labels
    assert labels[relabelled["key"]] == other
    assert corrected.manifest["reasons"]["dropped"] == 1
    assert corrected.manifest["corrections"] == storage.sha256(table.read_bytes())
