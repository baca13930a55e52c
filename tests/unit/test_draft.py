"""Drafts of datasets: what has changed since rows were written, and what an update keeps, corrects and reads again."""

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

SETTINGS = {"max_side": 800}
Labels = dict[str, tuple[str, str]]
"""Key → (label, subset)."""
LABELS: Labels = {"a": ("x", "train"), "b": ("y", "train"), "c": ("x", "test")}
VERSIONS = dict.fromkeys("abc", "1")


def keep_split(subset: str, image_id: str) -> str:
    return subset


class Job:
    """A small ingestion: photos are their keys and versions."""

    def __init__(self, uri: str, settings: dict[str, Any] = SETTINGS) -> None:
        self.uri, self.settings = uri, settings
        self.read: list[str] = []
        self.contents: dict[str, str] = {}

    def __call__(
        self,
        labels: Labels = LABELS,
        versions: dict[str, str] = VERSIONS,
        *,
        update: bool = False,
        fail: str = "",
        touched: str = "",
    ) -> dataset.Dataset:
        """Publish the photos with these labels and versions.

        fail: keys that storage cannot deliver. touched: keys of photos with the content that they had in the first run.
        """
        root, _, name = self.uri.rpartition("/datasets/")
        self.read = []
        if not self.contents:
            self.contents = {key: image_id(key, version) for key, version in versions.items()}
        compared = {key: image_id(key, version) for key, version in versions.items()}
        compared |= {key: self.contents[key] for key in touched}
        with Inventory() as inventory:
            inventory.add_inputs(Listed(key, 1, version) for key, version in versions.items())
            for key in versions:
                label, subset = labels.get(key, (None, None))
                reason = "NULL" if label else "'no_label'"
                update_sql = f"UPDATE input SET label = ?, subset = ?, reason = {reason} WHERE key = ?"
                list(inventory.query(update_sql, label, subset, key))
            published = dataset.find_same_dataset(root, name, self.settings)
            draft = Draft(self.uri, self.settings, inventory, published)
            if draft.is_current(
                update=update,
                read_image_ids=lambda tables: (
                    (key, None if key in fail else compared[key])
                    for table in tables
                    for key in table["key"].to_pylist()
                ),
            ):
                assert published is not None
                return published
            draft.begin()
            draft.reconcile(keep_split)
            draft.write_missing(lambda: self.write_pending(draft, fail))
            return draft.publish(draft.complete(sorted({label for label, _ in labels.values()}), {"kind": "photos"}))

    def write_pending(self, draft: Draft, fail: str) -> None:
        for table in draft.inventory.pending(2):
            sources = table.to_pylist()
            self.read += [source["key"] for source in sources]
            rows = [photo_row(source) for source in sources if source["key"] not in fail]
            failed = [
                {**quarantine_row(source["key"], Reason.UNREADABLE, "404", source["fingerprint"]), "attempts": 1}
                for source in sources
                if source["key"] in fail
            ]
            for folder, written in (("parts", rows), ("quarantine", failed)):
                if written:
                    publishing.write_rows(self.uri, folder, written, self.settings)
        rejected = [quarantine_row(*row) for row in draft.inventory.rejected_inputs()]
        if rejected:
            publishing.write_rows(self.uri, "quarantine", rejected, self.settings)


def image_id(key: str, version: str) -> str:
    return storage.sha256(f"{key}{Listed(key, 1, version).fingerprint}".encode())


def photo_row(source: dict[str, Any]) -> dict[str, Any]:
    image = f"{source['key']}{source['fingerprint']}".encode()
    columns = {"image_id": storage.sha256(image), "width": 1, "height": 1, "image": image}
    return {**columns, **source, "split": source["subset"]}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(dataset.dataset_uri(str(tmp_path), "v1"))


def rows(published: dataset.Dataset) -> dict[str, tuple[str, str]]:
    table = published.read(["key", "label", "split"]).to_pylist()
    return {row["key"]: (row["label"], row["split"]) for row in sorted(table, key=lambda row: row["key"])}


def reasons(published: dataset.Dataset) -> dict[str, str]:
    table = publishing.read_written(published.uri, "quarantine", ["key", "reason"]).to_pylist()
    return {row["key"]: row["reason"] for row in table}


RELABELLED = {**LABELS, "b": ("x", "test")}


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


# Photos whose time of modification alone has changed

TOUCHED = dict.fromkeys("abc", "2")


@pytest.mark.parametrize("update", [False, True])
def test_photos_with_a_new_time_alone_make_no_new_version(job: Job, update: bool, files_below: Callable[[str], dict]):
    published, before = job(), files_below(job.uri)
    assert job(versions=TOUCHED, touched="abc", update=update).manifest == published.manifest
    assert (job.read, files_below(job.uri)) == ([], before)


def test_photos_with_a_new_time_alone_are_not_named_among_the_changes(job: Job):
    job()
    changed = {**TOUCHED, "d": "1"}
    with pytest.raises(UserError, match=r"Since then: 1 added \(d\), 1 replaced \(b\)\. Run again"):
        job({**LABELS, "d": ("x", "train")}, changed, touched="ac")


def test_an_update_reads_no_photos_with_a_new_time_alone(job: Job):
    job()
    changed: Any = ({**RELABELLED, "d": ("y", "train")}, {**TOUCHED, "d": "1"})
    updated = job(*changed, update=True, touched="abc")
    assert (job.read, rows(updated)["b"]) == (["d"], ("x", "test"))
    assert job(*changed, touched="abc").manifest == updated.manifest


def test_a_photo_that_cannot_be_read_counts_as_replaced(job: Job):
    job()
    with pytest.raises(UserError, match=r"Since then: 1 replaced \(a\)\."):
        job(versions=TOUCHED, touched="abc", fail="a")


def test_files_that_are_not_read_have_no_content_to_compare(job: Job):
    published = job(labels={"a": LABELS["a"], "c": LABELS["c"]})
    assert reasons(published) == {"b": "no_label"}
    again = job(labels={"a": LABELS["a"], "c": LABELS["c"]}, versions={**VERSIONS, "b": "2"})
    assert again.manifest == published.manifest


def test_a_touched_photo_that_is_read_again_for_another_reason_is_current_afterwards(
    job: Job, monkeypatch: pytest.MonkeyPatch
):
    job()
    write_missing = Draft.write_missing

    def with_conflict(draft: Draft, write: Callable[[], None]) -> None:
        """Read a photo again, as one in conflict is when others have changed."""
        files = [path for key, path in draft.inventory.files_by_key() if key == "a"]
        draft._correct(changes.Correction(path, frozenset("a"), {}) for path in files)
        write_missing(draft, write)

    changed: Any = ({**LABELS, "d": ("y", "train")}, {**TOUCHED, "d": "1"})
    with monkeypatch.context() as patched:
        patched.setattr(Draft, "write_missing", with_conflict)
        updated = job(*changed, update=True, touched="abc")
        assert sorted(job.read) == ["a", "d"]
    assert job(*changed, touched="bc").manifest == updated.manifest


def test_a_new_label_of_a_photo_in_quarantine_is_a_change(job: Job):
    job({**LABELS, "b": ("y", "train")}, fail="b")
    with pytest.raises(UserError, match=r"Since then: labels of photos in quarantine\. Run again with --update"):
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
        draft.reconcile(keep_split)
        assert list(inventory.query("SELECT key FROM written WHERE reason = 'label_conflict'")) == []


def conflict(key: str) -> dict[str, Any]:
    return quarantine_row(key, Reason.LABEL_CONFLICT, "same bytes", Listed(key, 1, "1").fingerprint)


def test_a_class_whose_photos_are_all_in_quarantine_is_named_and_left_out(job: Job, caplog: pytest.LogCaptureFixture):
    assert job(fail="b").classes == ["x"]
    assert "classes left out, as all their photos are in quarantine: 'y'" in caplog.text


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
