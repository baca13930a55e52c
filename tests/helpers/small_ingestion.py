"""An ingestion without photos: rows are made of keys and versions."""

from typing import Any

from carclass import storage
from carclass.data import dataset, publishing
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.data.quarantine import Reason, quarantine_row

SETTINGS = {"max_side": 800}
Labels = dict[str, tuple[str, str]]
"""Key → (label, subset)."""
LABELS: Labels = {"a": ("x", "train"), "b": ("y", "train"), "c": ("x", "test")}
VERSIONS = dict.fromkeys("abc", "1")


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
            draft.reconcile()
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
                    draft.restore([publishing.write_rows(self.uri, folder, written, self.settings).path])
        rejected = [quarantine_row(*row) for row in draft.inventory.rejected_inputs()]
        if rejected:
            draft.restore([publishing.write_rows(self.uri, "quarantine", rejected, self.settings).path])


def image_id(key: str, version: str) -> str:
    return storage.sha256(f"{key}{Listed(key, 1, version).fingerprint}".encode())


def photo_row(source: dict[str, Any]) -> dict[str, Any]:
    image = f"{source['key']}{source['fingerprint']}".encode()
    columns = {"image_id": storage.sha256(image), "width": 1, "height": 1, "image": image}
    return {**columns, **source, "split": source["subset"]}


def rows(published: dataset.Dataset) -> dict[str, tuple[str, str]]:
    table = published.read(["key", "label", "split"]).to_pylist()
    return {row["key"]: (row["label"], row["split"]) for row in sorted(table, key=lambda row: row["key"])}


def reasons(published: dataset.Dataset) -> dict[str, str]:
    table = publishing.read_written(published.uri, "quarantine", ["key", "reason"]).to_pylist()
    return {row["key"]: row["reason"] for row in table}


RELABELLED = {**LABELS, "b": ("x", "test")}
