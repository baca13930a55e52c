"""The sample as photos in a bucket: drawn once below a root, wherever that is."""

import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

from carclass import storage
from carclass.sample.generate import write_sample

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Where the sample's files are."""

    photos: str
    labels: str
    truth: str


def write_once(root: str) -> Sample:
    """The sample below a root, drawn and stored if it isn't there."""
    uri = storage.join(root, "sample")
    found = Sample(*(storage.join(uri, name) for name in ("photos", "labels.csv", "truth.json")))
    if not storage.exists(found.labels):
        log.info("sample: drawing cars into %s", uri)
        with tempfile.TemporaryDirectory() as folder:
            write_sample(Path(folder))
            # labels.csv last: it says that all photos are there.
            for path in sorted(Path(folder).rglob("*.*"), key=lambda path: path.name == "labels.csv"):
                storage.write_bytes(storage.join(uri, str(path.relative_to(folder))), path.read_bytes())
    return found
