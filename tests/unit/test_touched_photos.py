"""Photos whose time of modification alone has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carclass.data import changes, dataset
from carclass.data.draft import Draft
from carclass.errors import UserError
from tests.helpers.small_ingestion import (
    LABELS,
    RELABELLED,
    VERSIONS,
    Job,
    reasons,
    rows,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(dataset.dataset_uri(str(tmp_path), "v1"))


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
        draft.correct(changes.Correction(path, frozenset("a"), {}) for path in files)
        write_missing(draft, write)

    changed: Any = ({**LABELS, "d": ("y", "train")}, {**TOUCHED, "d": "1"})
    with monkeypatch.context() as patched:
        patched.setattr(Draft, "write_missing", with_conflict)
        updated = job(*changed, update=True, touched="abc")
        assert sorted(job.read) == ["a", "d"]
    assert job(*changed, touched="bc").manifest == updated.manifest
