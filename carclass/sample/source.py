"""The sample on storage, below a root."""

import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

from carclass import storage
from carclass.sample.generate import write_sample

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """URIs of the sample's files."""

    photos: str
    labels: str
    truth: str


def ensure_sample(root: str) -> Sample:
    """Return the sample below a root, drawn and stored unless it exists."""
    uri = storage.join(root, "sample")
    sample = Sample(*(storage.join(uri, name) for name in ("photos", "labels.csv", "truth.json")))
    if not storage.exists(sample.labels):
        log.info("sample: drawing cars into %s", uri)
        with tempfile.TemporaryDirectory() as folder:
            write_sample(Path(folder))
            # labels.csv is written last, as it marks the sample as complete.
            for path in sorted(Path(folder).rglob("*.*"), key=lambda path: path.name == "labels.csv"):
                storage.write_bytes(storage.join(uri, str(path.relative_to(folder))), path.read_bytes())
    return sample
