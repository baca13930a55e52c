"""Drafts of datasets: what has changed since rows were written, and what an update keeps, corrects and reads again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carclass import storage
from carclass.data import changes, dataset, publishing
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.data.quarantine import Reason, quarantine_row
from carclass.errors import UserError
from tests.helpers.small_ingestion import (
    LABELS,
    RELABELLED,
    SETTINGS,
    VERSIONS,
    Job,
    Labels,
    reasons,
    rows,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(dataset.dataset_uri(str(tmp_path), "v1"))


# Digests


def test_the_digest_covers_labels(tmp_path: Path):
    digests = {
        Job(dataset.dataset_uri(str(tmp_path), name))(labels).digest
        for name, labels in {"one": LABELS, "two": {**LABELS, "b": ("x", "train")}}.items()
    }
    assert len(digests) == 2


def test_the_digest_covers_the_photos_content(tmp_path: Path):
    first = Job(dataset.dataset_uri(str(tmp_path), "one"))()
    second = Job(dataset.dataset_uri(str(tmp_path), "two"))(versions={**VERSIONS, "a": "2"})
    assert first.digest != second.digest


def test_the_digest_depends_neither_on_files_nor_on_the_way_there(tmp_path: Path, job: Job):
    job(versions={"c": "1"}, labels={"c": LABELS["c"]})
    updated = job(update=True)
    at_once = Job(dataset.dataset_uri(str(tmp_path), "v2"))()
    assert updated.part_uris != at_once.part_uris
    assert updated.digest == at_once.digest


def test_the_manifest_has_the_hash_of_every_file(job: Job):
    published = job()
    files = {path for folder in ("parts", "quarantine") for path in published.manifest[folder]}
    assert files == set(publishing.list_parts(job.uri))
    assert all(len(content) == 64 for content in published.manifest["parts"].values())


def test_the_digest_of_a_manifest_of_format_1_is_the_hash_of_the_manifest():
    manifest = {"settings": {}, "classes": ["a"], "parts": ["parts/a.parquet"]}
    assert dataset.Dataset("uri", manifest).digest == storage.sha256(dataset.to_json(manifest))


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path, job: Job):
    storage.write_bytes(storage.join(job.uri, "manifest.json"), b'{"format": 99}')
    with pytest.raises(UserError, match="a newer version of carclass"):
        dataset.find_dataset(str(tmp_path), "v1")


# Unchanged and changed inputs of a published dataset


def test_unchanged_inputs_read_and_write_nothing(job: Job, files_below: Callable[[str], dict]):
    job()
    before = files_below(job.uri)
    job(update=True)
    assert (job.read, files_below(job.uri)) == ([], before)


@pytest.mark.parametrize(
    ("labels", "versions", "message"),
    [
        (RELABELLED, VERSIONS, r"1 relabelled \(b\)"),
        ({**LABELS, "d": ("x", "train")}, {**VERSIONS, "d": "1"}, r"1 added \(d\)"),
        (LABELS, {"a": "1", "c": "1"}, r"from other photos or labels. Since then: 1 removed \(b\)"),
        (LABELS, {**VERSIONS, "c": "2"}, r"1 replaced \(c\)"),
        ({"a": LABELS["a"], "c": LABELS["c"]}, VERSIONS, r"1 relabelled \(b\)"),
    ],
)
def test_changed_inputs_are_named_and_need_permission(
    job: Job, labels: Labels, versions: dict[str, str], message: str, files_below: Callable[[str], dict]
):
    job()
    before = files_below(job.uri)
    with pytest.raises(UserError, match=message + r"\. Run again with --update"):
        job(labels, versions)
    assert files_below(job.uri) == before


def test_a_removed_file_that_had_no_label_is_removed_only(job: Job):
    job(versions={**VERSIONS, "stray": "1"})
    with pytest.raises(UserError, match=r"Since then: 1 removed \(stray\)\. Run again"):
        job()


def test_many_changes_are_counted_with_a_few_examples(job: Job):
    job()
    with pytest.raises(UserError, match=r"11 added \(d10, d11, d12, …\)"):
        job({**LABELS, "d9": ("x", "train")}, {**VERSIONS, **{f"d{i}": "1" for i in range(10, 21)}})


def test_a_new_label_of_a_photo_in_quarantine_is_a_change(job: Job):
    job({**LABELS, "b": ("y", "train")}, fail="b")
    with pytest.raises(UserError, match=r"Since then: labels of photos in quarantine, or groups\. Run again"):
        job({**LABELS, "b": ("x", "train")})


# Updates


def test_an_update_changes_labels_and_splits_without_reading_photos(job: Job):
    job()
    assert rows(job(RELABELLED, update=True)) == {"a": ("x", "train"), "b": ("x", "test"), "c": ("x", "test")}
    assert job.read == []


def test_an_update_reads_only_new_and_replaced_photos(job: Job):
    job()
    updated = job({**LABELS, "d": ("y", "train")}, {**VERSIONS, "a": "2", "d": "1"}, update=True)
    assert sorted(job.read) == ["a", "d"]
    assert sorted(rows(updated)) == ["a", "b", "c", "d"]
    (image,) = [row["image"] for row in updated.rows(["a"], ["image"])]
    assert image == f"a{Listed('a', 1, '2').fingerprint}".encode()


def test_an_update_drops_removed_photos(job: Job):
    job()
    assert sorted(rows(job(versions={"a": "1", "c": "1"}, update=True))) == ["a", "c"]


def test_a_photo_that_loses_its_label_is_quarantined_and_returns_with_it(job: Job):
    job()
    without = job({"a": LABELS["a"], "c": LABELS["c"]}, update=True)
    assert (sorted(rows(without)), reasons(without)) == (["a", "c"], {"b": "no_label"})
    again = job(update=True)
    assert (sorted(rows(again)), reasons(again)) == (["a", "b", "c"], {})


def test_an_update_leaves_only_files_of_the_new_version(job: Job):
    job()
    updated = job(RELABELLED, {**VERSIONS, "a": "2"}, update=True)
    assert set(publishing.list_parts(job.uri)) == {*updated.manifest["parts"], *updated.manifest["quarantine"]}


def test_the_published_version_is_complete_until_the_next_is_published(job: Job, monkeypatch: pytest.MonkeyPatch):
    published = job()
    interrupt(job, monkeypatch, RELABELLED, {**VERSIONS, "a": "2"}, update=True)
    assert rows(published) == LABELS


@pytest.mark.parametrize("step", range(8))
def test_an_update_killed_after_any_write_ends_as_an_undisturbed_one(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    job()
    change: Any = ({**RELABELLED, "d": ("y", "train")}, {"a": "2", "b": "1", "d": "1"})
    count = 0

    def fail_after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise KeyboardInterrupt
            return function(*args)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "create", "replace", "delete"):
            patch.setattr(storage, name, fail_after(getattr(storage, name)))
        try:
            job(*change, update=True)
        except KeyboardInterrupt:
            assert rows(dataset.load_dataset(str(tmp_path), "v1"))  # one version is complete
    updated = job(*change, update=True)
    undisturbed = Job(dataset.dataset_uri(str(tmp_path), "v2"))(*change)
    assert updated.digest == undisturbed.digest
    assert set(publishing.list_parts(job.uri)) == {*updated.manifest["parts"], *updated.manifest["quarantine"]}


# Unfinished drafts


def interrupt(job: Job, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """Run the job until its manifest is to be written."""
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job(*args, **options)


def test_a_draft_killed_before_labels_were_corrected_has_the_new_labels(job: Job, monkeypatch: pytest.MonkeyPatch):
    interrupt(job, monkeypatch)
    assert rows(job(RELABELLED)) == {"a": ("x", "train"), "b": ("x", "test"), "c": ("x", "test")}
    assert job.read == []


def test_photos_deleted_since_the_draft_was_begun_are_dropped(job: Job, monkeypatch: pytest.MonkeyPatch):
    interrupt(job, monkeypatch)
    assert sorted(rows(job(versions={"a": "1", "c": "1"}))) == ["a", "c"]


def test_a_resumed_job_says_how_many_photos_are_done(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "carclass"):
        interrupt(job, monkeypatch, versions={"a": "1", "b": "1"})
        assert caplog.messages == []
        job()
    assert caplog.messages[0] == f"{job.uri}: resumed, 2 of 3 photos are done"


def test_unreadable_photos_are_read_again_by_a_resumed_job(job: Job, monkeypatch: pytest.MonkeyPatch):
    interrupt(job, monkeypatch, fail="b")
    assert sorted(rows(job())) == ["a", "b", "c"]
    assert job.read == ["b"]


def test_unreadable_photos_of_a_published_dataset_are_read_again_by_an_update(job: Job):
    assert reasons(job(fail="b")) == {"b": "unreadable"}
    assert reasons(job()) == {"b": "unreadable"}
    assert reasons(job(update=True)) == {}


def test_a_draft_with_other_settings_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch):
    interrupt(job, monkeypatch)
    with pytest.raises(UserError, match=r"begun with other settings \(max_side\)"):
        Job(job.uri, {"max_side": 400})()


def test_a_damaged_part_is_made_again(job: Job):
    published = job()
    part = Path(published.part_uris[0])
    part.write_bytes(b"")
    again = job({**LABELS, "d": ("y", "train")}, {**VERSIONS, "d": "1"}, update=True)
    assert sorted(rows(again)) == ["a", "b", "c", "d"]


def test_a_part_that_is_not_the_published_one_is_made_again(job: Job):
    published = job()
    parts = [Path(uri) for uri in published.part_uris]
    assert len(parts) > 1
    parts[0].write_bytes(parts[1].read_bytes())
    again = job({**LABELS, "d": ("y", "train")}, {**VERSIONS, "d": "1"}, update=True)
    assert sorted(rows(again)) == ["a", "b", "c", "d"]


def test_files_of_others_are_left_alone(job: Job):
    other = Path(job.uri) / "parts" / "mine.parquet"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    job()
    job(RELABELLED, update=True)
    assert other.read_bytes() == b"mine"


# Leaks


def test_conflicts_are_decided_again_when_any_input_changes(job: Job):
    published = job()
    publishing.write_rows(job.uri, "quarantine", [conflict("a")], SETTINGS)
    with Inventory() as inventory:
        draft = Draft(job.uri, SETTINGS, inventory, published)
        inventory.add_inputs([Listed("b", 1, "1"), Listed("c", 1, "2"), Listed("a", 1, "1")])
        draft.reconcile()
        assert list(inventory.query("SELECT key FROM written WHERE reason = 'label_conflict'")) == []


def test_a_photo_that_stays_unreadable_is_published_again(job: Job):
    job(fail="b")
    assert reasons(job(fail="b", update=True)) == {"b": "unreadable"}


def conflict(key: str) -> dict[str, Any]:
    return quarantine_row(key, Reason.LABEL_CONFLICT, "same bytes", Listed(key, 1, "1").fingerprint)


def test_a_class_whose_photos_are_all_in_quarantine_is_named_and_left_out(job: Job, caplog: pytest.LogCaptureFixture):
    assert job(fail="b").classes == ["x"]
    assert "classes left out, as all their photos are in quarantine: 'y'" in caplog.text


def test_a_class_without_inputs_is_no_class_whose_photos_are_in_quarantine(job: Job, caplog: pytest.LogCaptureFixture):
    """As in a preview, which has some photos of the source."""
    with Inventory() as inventory:
        inventory.add_inputs([Listed("a", 1, "1")])
        assert Draft(job.uri, SETTINGS, inventory)._written_classes(["x", "y"]) == []
    assert "'y'" not in caplog.text


def test_changes_are_written_in_words():
    found = [changes.Change("added", 2, ["a", "b"]), changes.Change("removed", 1200, ["c"])]
    assert changes.changes_text(found) == "2 added (a, b), 1,200 removed (c, …)"


def test_a_file_that_was_deleted_is_made_again(job: Job):
    published = job()
    storage.delete(storage.join(published.uri, min(published.manifest["parts"])))
    again = job()
    assert again.digest == published.digest
    assert {*again.manifest["parts"]} <= {*publishing.list_parts(published.uri)}
    assert job.read
