"""A dataset being written: which inputs are written, which files are outdated, and what is still missing.

The files of a published version stay until the manifest of the next one is written.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.data import changes, formats, publishing
from carclass.data.changes import Correction, ReadImageIds
from carclass.data.dataset import SPLITS, Dataset, dataset_uri, find_same_dataset, read_part, to_json
from carclass.data.inventory import Inventory, chunks
from carclass.data.lease import Lease
from carclass.data.publishing import WrittenPart
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.progress import Progress

log = logging.getLogger(__name__)
MAX_PASSES = 3
"""A second pass is needed only if a lost node caused photos to be written twice."""
DELETIONS_PER_CHECK = 64
"""Files deleted after each check of the lease: they take a fraction of a second."""
NOTES = "draft.json"
"""Settings of an unfinished dataset."""
Corrected = tuple[str, str | None]
"""Paths of a corrected file: of the old one, and of the new one, if any row is left."""
RunTasks = Callable[[Callable[[Correction], Corrected], Iterable[Correction]], Iterator[Corrected]]


def run_here(function: Callable[[Correction], Corrected], items: Iterable[Correction]) -> Iterator[Corrected]:
    """Yield function(item) for each item, computed in this process."""
    return map(function, items)


def find_version(root: str, name: str, settings: dict[str, Any]) -> Dataset | None:
    """Return the published dataset, or None. Raise UserError if it was made or begun with other settings."""
    published = find_same_dataset(root, name, settings)
    _is_begun(dataset_uri(root, name), settings)
    return published


def _is_begun(uri: str, settings: dict[str, Any]) -> bool:
    """Return True if a dataset is unfinished. Raise UserError if it was begun with other settings."""
    new = json.loads(to_json(settings))
    try:
        old = formats.read(storage.join(uri, NOTES), "draft")["settings"]
    except (FileNotFoundError, NotADirectoryError, formats.DamagedFileError):
        return False
    if changed := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        raise UserError(
            f"{uri} is unfinished and was begun with other settings ({', '.join(changed)}). Choose another name, run "
            "again with those settings, or delete the folder."
        )
    return True


@dataclass
class Draft:
    """A dataset being written by one job."""

    uri: str
    settings: dict[str, Any]  # that determine the rows
    inventory: Inventory
    published: Dataset | None = None  # the version to be replaced
    run_tasks: RunTasks = run_here
    lease: Lease | None = None  # of the uri; None if no other job writes there
    discarded: set[str] = field(default_factory=set)  # outdated files of the published version

    @property
    def published_paths(self) -> set[str]:
        """Return the paths of the published version's files."""
        return set() if self.published is None else {*self.published.manifest["parts"], *self.published.quarantine}

    def begin(self) -> None:
        """Record the settings. Raise UserError if the draft was begun with other settings."""
        if not _is_begun(self.uri, self.settings):
            formats.write(storage.join(self.uri, NOTES), "draft", {"settings": self.settings})

    def is_current(self, *, update: bool, read_image_ids: ReadImageIds | None = None) -> bool:
        """Return True if the published version needs no work. update: whether a new version may be published.

        read_image_ids: to compare the content of inputs that may have changed. Raise UserError if inputs have changed
        and the version must not be updated.
        """
        if self.published is None:
            return False
        manifest = self.published.manifest
        if "listing" not in manifest and not update:
            log.warning("%s recorded no inputs (format 1), so it is taken as it is; --update makes it anew", self.uri)
            return True
        if self._has_same_inputs(read_image_ids):
            if missing := self.published_paths.difference(publishing.list_parts(self.uri)):
                log.warning("%s lacks %d of its files, such as %s; made again", self.uri, len(missing), min(missing))
                return False
            num_unreadable = manifest["reasons"].get(Reason.UNREADABLE, 0)
            if num_unreadable and not update:
                log.warning("%s: %d photos were unreadable; --update tries them again", self.uri, num_unreadable)
            if num_unreadable and update:
                return False
            if storage.exists(storage.join(self.uri, NOTES)):  # the job was killed after it had published
                self.delete_outdated(self.published_paths)
            return True
        if not update:
            self.sync()
            found = (
                changes.changes_text(changes.find_changes(self.inventory))
                or "labels of photos in quarantine, or groups"
            )
            raise UserError(
                f"{self.uri} was published from other photos or labels. Since then: {found}. Run again with --update "
                "to publish a new version, in which only new photos are read, or choose another name."
            )
        return False

    def _has_same_inputs(self, read_image_ids: ReadImageIds | None) -> bool:
        """Return True if the published version has the inputs of today: by fingerprint, else by content."""
        assert self.published is not None
        listing = self.published.manifest.get("listing")
        if listing == self.inventory.digest():
            return True
        if listing is None or read_image_ids is None:
            return False
        self.sync()
        changes.recognize_unchanged(self.inventory, read_image_ids)
        return bool(listing == self.inventory.digest())

    def sync(self) -> None:
        """Record new files in the inventory, and forget deleted ones.

        Damaged files, and those of an unfinished job with other settings, are deleted. Files without our metadata are
        left alone.
        """
        recorded = set(self.inventory.contents())
        existing = set(publishing.list_parts(self.uri)) - self.discarded
        new = sorted(existing - recorded)
        progress = Progress("inventory", "parts", len(new))
        read = partial(publishing.read_written_columns, self.uri)
        for path, rows in zip(new, storage.in_parallel(read, new), strict=True):
            if not self._record(path, rows):
                existing.discard(path)
            progress.add(1)
        self.inventory.commit_parts(removed=recorded - existing)

    def log_resumed(self) -> None:
        """Log how many photos of an unpublished draft an interrupted job has finished, if some are left."""
        is_begun = self.published is None and self.inventory.contents()
        if is_begun and (num_pending := self.inventory.count_pending()):
            total = self.inventory.count_inputs()
            log.info("%s: resumed, %s of %s photos are done", self.uri, f"{total - num_pending:,}", f"{total:,}")

    def _record(self, path: str, rows: pa.Table | None) -> bool:
        """Record a file's rows, and return True; delete it if it is damaged or outdated."""
        metadata = {} if rows is None else rows.schema.metadata or {}
        if rows is None:
            log.warning("%s: %s is damaged and is made again", self.uri, path)
        elif publishing.SETTINGS_KEY not in metadata:
            return False
        elif metadata[publishing.SETTINGS_KEY] == storage.sha256(to_json(self.settings)).encode():
            content = metadata[publishing.CONTENT_KEY].decode()
            if self.published is None or self.published.contents.get(path, content) == content:
                self.inventory.add_part(path, rows, content)
                return True
            log.warning("%s: %s is not the file that was published, and is made again", self.uri, path)
        else:
            self.discard([path])
            return False
        self._delete([path])
        return False

    def discard(self, paths: Collection[str]) -> None:
        """Delete files, or set them aside if they are published."""
        outdated = self.published_paths.intersection(paths)
        self.discarded |= outdated
        self._delete(path for path in paths if path not in outdated)

    def restore(self, paths: Iterable[str]) -> None:
        """Take written files as current, also one that has the rows, and so the name, of one that was set aside."""
        self.discarded.difference_update(paths)

    def record(self, parts: Iterable[WrittenPart]) -> None:
        """Record files as they are written; their rows count after the next `sync`."""
        for part in parts:
            self.restore([part.path])
            if not self.inventory.has_part(part.path):
                self.inventory.add_part(*part)

    def _delete(self, paths: Iterable[str]) -> None:
        """Delete files. Raise UserError if the draft is no longer this job's."""
        uris = (storage.join(self.uri, path) for path in paths)
        for chunk in chunks(uris, DELETIONS_PER_CHECK):
            self.check_lease()
            list(storage.in_parallel(storage.delete, chunk))

    def check_lease(self) -> None:
        """Raise UserError if another job has taken the draft over, or has published one here."""
        if self.lease is not None:
            self.lease.check()
        publishing.check_manifest(self.uri, self.published)

    def reconcile(self) -> None:
        """Correct the rows whose inputs were removed, replaced or relabelled since they were written.

        Relabelled rows are in the split of their subset. Photos that storage could not deliver become pending again.
        """
        self.sync()
        self.log_resumed()
        found = [change for change in changes.find_changes(self.inventory) if change.kind != "added" or self.published]
        if found:
            log.info("%s: since it was written: %s", self.uri, changes.changes_text(found))
        if found or self.inventory.count_pending():  # conflicts depend on other photos too
            self.correct(changes.rows_with_reason(self.inventory, Reason.LABEL_CONFLICT, Reason.LEAKAGE))
        self.correct(changes.find_corrections(self.inventory))

    def retry_unreadable(self) -> None:
        """Remove the rows of photos that storage could not deliver, so that they are read again."""
        self.correct(changes.rows_with_reason(self.inventory, Reason.UNREADABLE))

    def finish_withdrawals(self) -> None:
        """Remove rows that are in quarantine from their parts."""
        self.correct(Correction(path, frozenset(keys), {}) for path, keys in self.inventory.withdrawn_rows())

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Write files again with corrected rows, and delete the old ones."""
        correct = partial(correct_part, uri=self.uri, settings=self.settings)
        corrected = list(self.run_tasks(correct, corrections))
        if corrected:
            written = {new for _, new in corrected if new is not None}
            self.discard({old for old, _ in corrected} - written)
            self.restore(written)
            self.sync()

    def write_missing(self, write: Callable[[], None]) -> None:
        """Call `write` until every input is written once, at most MAX_PASSES times."""
        for _ in range(MAX_PASSES):
            self.sync()
            self.finish_withdrawals()  # a withdrawn row has two files until then
            self.drop_duplicates()
            if not self.inventory.missing_keys():
                return
            write()

    def drop_duplicates(self) -> None:
        """Delete files that repeat a key of an earlier file; their other photos become pending again.

        Two processes may write the same photos in different batches, for example if one was wrongly considered dead.
        """
        if duplicates := self.inventory.duplicate_parts():
            self.discard(duplicates)
            self.sync()

    def complete(self, classes: Sequence[str], facts: dict[str, Any]) -> Dataset:
        """Check that no input is lost, and return the complete dataset with its manifest, which is not written yet.

        facts: further fields of the manifest. Raise AssertionError, as it is a bug, if a key is missing, duplicate or
        unknown.
        """
        self.sync()
        inventory = self.inventory
        assert inventory.duplicate_input() is None, f"{self.uri}: duplicate input {inventory.duplicate_input()}"
        inventory.forget_recorded()
        num_inputs, counts = inventory.count_inputs(), inventory.written_counts()
        missing, unexpected = inventory.missing_keys(), inventory.unexpected_keys()
        assert not missing + unexpected, f"{self.uri}: {num_inputs} inputs, missing {missing}, unexpected {unexpected}"
        contents = inventory.contents()
        manifest = {
            "format": formats.KINDS["manifest"].format,
            "settings": self.settings,
            "listing": inventory.digest(),
            "inputs": num_inputs,
            **counts,
            "splits": {split: counts["splits"].get(split, 0) for split in SPLITS},
            "classes": self._written_classes(classes),
            **{
                folder: {path: content for path, content in contents.items() if path.startswith(f"{folder}/")}
                for folder in ("parts", "quarantine")
            },
            **facts,
        }
        return Dataset(self.uri, json.loads(to_json(manifest)))

    def _written_classes(self, classes: Sequence[str]) -> list[str]:
        """Return the classes that have photos, and name those whose photos are all in quarantine."""
        written = {label for split in SPLITS for label in self.inventory.class_counts(split)}
        if empty := [name for name in self.inventory.classes() if name in classes and name not in written]:
            names = ", ".join(map(repr, empty[:10])) + (" …" if len(empty) > 10 else "")
            log.warning("%s: classes left out, as all their photos are in quarantine: %s", self.uri, names)
        return [name for name in classes if name in written]

    def publish(self, complete: Dataset) -> Dataset:
        """Write the manifest, then delete the files of the replaced version."""
        self.check_lease()
        self.published = publishing.publish_manifest(complete, self.published)
        self.delete_outdated(self.published_paths)
        return self.published

    def delete_outdated(self, current: Collection[str]) -> None:
        """Delete our files except the current ones, and the notes that tell that there may be such files."""
        others = sorted({*publishing.list_parts(self.uri)}.difference(current))
        tables = storage.in_parallel(partial(publishing.read_written_columns, self.uri), others)
        is_ours = [rows is None or publishing.SETTINGS_KEY in (rows.schema.metadata or {}) for rows in tables]
        self._delete(compress(others, is_ours))
        storage.delete(storage.join(self.uri, NOTES))


def correct_part(correction: Correction, uri: str, settings: dict[str, Any]) -> Corrected:
    """Write a file again without its stale rows and with new labels, and return its old and its new path.

    A row that quarantine has already is removed from its part afterwards: a job that is killed in between finishes the
    withdrawal when it is resumed.
    """
    path = correction.path
    rows = read_part(storage.join(uri, path))
    rows = publishing.add_fingerprints(rows).replace_schema_metadata()
    kept = rows.filter(pa.array([key not in correction.stale for key in rows["key"].to_pylist()], pa.bool_()))
    if correction.labels:
        kept = _relabel(kept, correction)
    if not len(kept):
        return path, None
    return path, publishing.write_part(uri, path.split("/")[0], kept, settings).path


def _relabel(rows: pa.Table, correction: Correction) -> pa.Table:
    """Return the rows with new labels and splits."""
    labels, splits = rows["label"].to_pylist(), rows["split"].to_pylist()
    for i, key in enumerate(rows["key"].to_pylist()):
        if key in correction.labels:
            labels[i], splits[i] = correction.labels[key]
    for name, values in (("label", labels), ("split", splits)):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return rows
