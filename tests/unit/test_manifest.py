"""Manifests of datasets: values that are missing or of another type are named with a way out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from carclass.data import dataset
from carclass.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(Path(__file__).with_name("format_1"), tmp_path / "root")


def manifest(root: Path, **changes: Any) -> Path:
    """Give the dataset v2 a manifest of format 2 with other values. changes: dotted keys have `__`; ... removes one."""
    path = root / "datasets" / "v2" / "manifest.json"
    former = json.loads(path.read_text())
    content = {
        **former,
        "format": 2,
        "parts": dict.fromkeys(former["parts"], "0" * 64),
        "quarantine": {},
        "listing": "0",
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = content
        for step in sections:
            section = section[step]
        if value is ...:
            del section[name]
        else:
            section[name] = value
    path.write_text(json.dumps(content))
    return path


def test_a_manifest_of_format_2_is_read(root: Path):
    manifest(root)
    assert dataset.load_dataset(str(root), "v2").digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "2"}, "`format` is '2'"),
        ({"format": "1"}, "`format` is '1'"),
        ({"format": True}, "`format` is True"),
        ({"format": 2.0}, r"`format` is 2\.0"),
        ({"inputs": None}, "`inputs` should be a valid integer, but is null"),
        ({"inputs": "38"}, '`inputs` should be a valid integer, but is "38"'),
        ({"inputs": True}, "`inputs` should be a valid integer, but is true"),
        ({"inputs": ...}, "`inputs` is missing"),
        ({"rows": 38.5}, r"`rows` should be a valid integer, but is 38\.5"),
        ({"quarantined": []}, r"`quarantined` should be a valid integer, but is \[\]"),
        ({"reasons": {"corrupt": "2"}}, r'`reasons\.corrupt` should be a valid integer, but is "2"'),
        ({"splits__val": None}, r"`splits\.val` should be a valid integer, but is null"),
        ({"listing": None}, "`listing` should be a valid string, but is null"),
        ({"listing": ...}, "`listing` is missing"),
        ({"quarantine": None}, "`quarantine` should be a valid dictionary, but is null"),
        ({"quarantine": ["quarantine/a.parquet"]}, "`quarantine` should be a valid dictionary"),
        ({"quarantine": ...}, "`quarantine` is missing"),
        ({"parts": ["parts/a.parquet"]}, "`parts` should be a valid dictionary"),
        ({"parts": {"parts/a.parquet": 3}}, r"`parts\.parts/a\.parquet` should be a valid string, but is 3"),
        ({"classes": ["a", 3]}, r"`classes\.1` should be a valid string, but is 3"),
        ({"outcomes": {"vehicle": None}}, r"`outcomes\.vehicle` should be a valid integer, but is null"),
        ({"source_digest": 3}, "`source_digest` should be a valid string, but is 3"),
    ],
)
def test_a_value_of_another_type_is_named_with_a_way_out(root: Path, changes: dict[str, Any], message: str):
    path = manifest(root, **changes)
    with pytest.raises(UserError, match=rf"{path} is damaged: {message}.*Delete the file and run the same job again"):
        dataset.load_dataset(str(root), "v2")
