"""Damaged files of a dataset: every reader refuses them with a way out, and jobs make them again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carclass import storage
from carclass.data import dataset, draft, streaming
from carclass.data.changes import Correction
from carclass.data.crash_guard import NoCrashGuard
from carclass.errors import UserError
from carclass.evaluation.collect import to_arrays
from carclass.prediction import predictions
from carclass.training.block_columns import to_block_columns
from tests.helpers.parts import SETTINGS, finished_keys, publish, write_rows


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return dataset.dataset_uri(str(tmp_path), "v1")


@pytest.fixture
def damaged(uri: str) -> dataset.Dataset:
    """A published dataset with a changed byte in the middle of a photo."""
    image = np.random.default_rng(0).bytes(5000)
    write_rows(uri, "a", image=image)
    published = publish(uri, "a")
    path = Path(published.part_uris[0])
    damage(path, path.read_bytes().index(image[2000:2100]))
    return published


def damage(path: Path, position: int) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


READS: dict[str, Callable[[dataset.Dataset], Any]] = {
    "all rows": lambda published: published.read(["image"]),
    "rows by key": lambda published: published.rows(["a"], ["image"]),
    "rows by position": lambda published: dataset.take_rows(published.part_uris[0], [0], ["image"]),
    "rows of a split": lambda published: streaming.read_part_rows(
        pa.Table.from_pylist([part._asdict() for part in published.parts]), ["image"], "train"
    ),
    "a part to correct": lambda published: draft.correct_part(
        Correction(next(iter(published.manifest["parts"])), frozenset("b"), {}), published.uri, SETTINGS
    ),
    "a part of predictions": lambda published: [
        *predictions._read_parts(published.uri, list(published.manifest["parts"]), ["image"])
    ],
}


@pytest.mark.parametrize("read", READS)
def test_a_photo_with_a_changed_byte_is_refused_by_every_reader(damaged: dataset.Dataset, read: str):
    with pytest.raises(
        UserError, match=r"\.parquet is missing or damaged \(.*CRC.*\)\. .* Otherwise restore it; or delete"
    ):
        READS[read](damaged)


@pytest.mark.parametrize("read", ["all rows", "rows by key", "rows of a split"])
def test_a_part_of_another_dataset_of_the_same_name_is_refused(uri: str, tmp_path: Path, read: str):
    write_rows(uri, "a", image=b"one")
    published = publish(uri, "a")
    READS[read](published)
    other = dataset.dataset_uri(str(tmp_path), "v2")
    write_rows(other, "a", image=b"two")  # the name of a part depends on its keys, not on its photos
    shutil.copytree(f"{other}/parts", f"{uri}/parts", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"parts/.*\.parquet has other rows than those .* published with.* Restore it"):
        READS[read](published)


def test_a_part_that_another_program_wrote_is_refused(uri: str):
    write_rows(uri, "a", image=b"one")
    published = publish(uri, "a")
    (part,) = published.part_uris
    pq.write_table(pq.read_table(part).replace_schema_metadata(), part)
    with pytest.raises(UserError, match="has other rows than those"):
        published.read(["key"])


@pytest.mark.parametrize("read", [lambda source: source.read(["key"]), lambda source: [*streaming.number_rows(source)]])
def test_a_part_that_the_manifest_does_not_list_is_missed(uri: str, tmp_path: Path, read: Callable[..., object]):
    write_rows(uri, "a", image=b"one")
    write_rows(uri, "b", image=b"two")
    path = Path(publish(uri, "ab").uri, "manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "parts": dict([*manifest["parts"].items()][:1])}))
    damaged = dataset.Dataset(uri, json.loads(path.read_text()))
    with pytest.raises(UserError, match=r"manifest.json is damaged: `rows` is 2, but the `parts` have 1"):
        read(damaged)


@pytest.mark.parametrize("size", [None, 32])
def test_a_label_that_is_none_of_the_classes_is_an_error(size: int | None):
    batch = pa.table({"image_id": ["0"], "key": ["a"], "label": ["car"], "image": [b""]})
    with pytest.raises(UserError, match=r"label 'car', which is none of the `classes` in .*manifest.json.* Restore"):
        to_block_columns(batch, ["bus", "truck"], size, NoCrashGuard())
    with pytest.raises(UserError, match="label 'car'"):
        to_arrays(batch, ["bus", "truck"])


def test_a_part_with_a_changed_byte_in_a_key_is_made_again(uri: str):
    write_rows(uri, [storage.sha256(b"key")])
    (path,) = Path(uri, "parts").iterdir()
    column = pq.read_metadata(path).row_group(0).column(dataset.ROW.names.index("key"))
    damage(path, column.data_page_offset - 10)  # the end of the page with the values
    assert finished_keys(uri) == set()
    assert not path.exists()


def test_parts_of_earlier_versions_have_no_checksums_and_are_read(uri: str):
    write_rows(uri, "a", image=b"pixels")
    (path,) = Path(uri, "parts").iterdir()
    pq.write_table(pq.read_table(path), path)
    assert dataset.read_part(str(path), ["image"])["image"].to_pylist() == [b"pixels"]


@pytest.mark.parametrize(("key", "value"), [("rows", 2), ("quarantined", 1), ("inputs", 7), ("inputs", -1)])
def test_counts_that_contradict_each_other_are_refused(damaged: dataset.Dataset, tmp_path: Path, key: str, value: int):
    path = Path(damaged.uri, "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"manifest.json is damaged: `{key}` .*Delete the file"):
        dataset.find_dataset(str(tmp_path), "v1")
