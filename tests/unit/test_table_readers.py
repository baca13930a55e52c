"""Tables that jobs write, in other programs: an older pyarrow, DuckDB and Polars."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carclass.data import dataset
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.data.publishing import write_part
from carclass.experiments.report import comparison_table
from carclass.prediction import predictions
from carclass.tuning.report import trials_table
from tests.helpers.inventories import add_keys
from tests.helpers.sweeps import make_sweep
from tests.helpers.trees import sixteen

READERS = ("pyarrow==14.0.2", "numpy<2", "duckdb==1.1.3", "polars==1.9.0")
READ = """
import json, sys
import duckdb, polars, pyarrow.parquet as pq
for path in sys.argv[1:]:
    rows = pq.read_table(path).to_pylist()
    assert rows == polars.read_parquet(path, use_pyarrow=False).to_dicts(), path
    assert len(rows) == len(duckdb.sql(f"SELECT * FROM '{path}'").fetchall()), path
    print(json.dumps([row.get("box") for row in rows]))
"""
BOX = [1.0, 2.0, 3.5, 4.0]


def tables(folder: Path) -> list[Path]:
    """Write a table of each kind, with and without boxes."""
    for schema, where in [(dataset.MASKED_ROW, "parts"), (dataset.ROW, "parts"), (dataset.QUARANTINE, "quarantine")]:
        rows = [{"key": "a", "box": BOX}, {"key": "b", "box": None}]
        write_part(str(folder), where, pa.Table.from_pylist(rows, schema), {"of": schema.names})
    predictions.write_batch(pa.Table.from_pylist(rows, predictions.PREDICTION), str(folder), {})
    pq.write_table(trials_table(make_sweep()), folder / "trials.parquet")
    pq.write_table(comparison_table(sixteen()), folder / "comparison.parquet")
    return sorted(folder.rglob("*.parquet"))


# Half a minute: it installs the readers in an environment of their own.
@pytest.mark.slow
def test_every_table_is_read_by_older_and_other_programs(tmp_path: Path):
    python = tmp_path / "env" / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", python, *READERS]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the readers can't be installed: {installed.stderr[-300:]}")
    (tmp_path / "data").mkdir()
    paths = tables(tmp_path / "data")
    done = subprocess.run([python, "-c", READ, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    boxes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(boxes) == len(paths) == 6
    assert boxes.count([BOX, None]) == 2


@pytest.mark.parametrize("schema", [dataset.MASKED_ROW, predictions.PREDICTION])
def test_no_column_has_lists_of_a_fixed_length(schema):
    """Readers before pyarrow 26 fail at a null among them."""
    assert [field.name for field in schema if pa.types.is_fixed_size_list(field.type)] == []


OLD_BOX = pa.field("box", pa.list_(pa.float32(), 4))


def test_datasets_with_lists_of_a_fixed_length_stay_readable(tmp_path: Path):
    old = pa.schema([("key", pa.string()), OLD_BOX])
    pq.write_table(pa.Table.from_pylist([{"key": "a", "box": BOX}, {"key": "b"}], old), tmp_path / "old.parquet")
    part = str(tmp_path / "old.parquet")
    for rows in (dataset.read_part(part), dataset.take_rows(part, [0, 1], ["key", "box"])):
        assert rows["box"].to_pylist() == [BOX, None]
        assert rows.schema.field("box").type == dataset.MASKED_ROW.field("box").type


def test_predictions_begun_with_lists_of_a_fixed_length_are_finished(tmp_path: Path):
    old = pa.schema([OLD_BOX if field.name == "box" else field for field in predictions.PREDICTION])
    for key, schema in (("a", old), ("b", predictions.PREDICTION)):
        rows = pa.Table.from_pylist([{"key": key, "label": "x", "box": BOX}], schema)
        predictions.write_batch(rows, str(tmp_path), {})
    with Inventory() as inventory:
        add_keys(inventory, ["a", "b"])
        Draft(str(tmp_path), {}, inventory).sync()
        predictions.publish_predictions(str(tmp_path), inventory, "", 0.5, lambda _: "page")
    assert pq.read_table(tmp_path / predictions.TABLE)["box"].to_pylist() == [BOX, BOX]
