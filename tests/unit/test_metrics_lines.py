"""Lines of metrics: cut, damaged, of a newer format, with numbers that are not finite."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from carclass.data import formats
from carclass.errors import UserError
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, find_run

FORMAT_1 = Path(__file__).with_name("format_1")
RUN = "experiments/run"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(FORMAT_1, tmp_path / "root")


def metrics_of(root: Path) -> list[dict[str, Any]]:
    return find_run(str(root), "run").metrics()


@pytest.mark.parametrize("cut", [1, 10, 150])
def test_a_cut_last_line_is_left_out(root: Path, cut: int):
    path = root / RUN / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["epoch"] for row in metrics_of(root)] == ([1, 2, 1] if cut == 1 else [1, 2])


def test_lines_overwritten_with_zeros_are_an_error(root: Path):
    path = root / RUN / "metrics.jsonl"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: line 1"):
        metrics_of(root)


def test_a_damaged_line_is_named(root: Path):
    path = root / RUN / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2], ""]))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: line 2: .* Restore it"):
        metrics_of(root)


@pytest.mark.parametrize("epoch", [0, -3])
def test_an_epoch_below_one_is_refused(root: Path, epoch: int):
    path = root / RUN / "metrics.jsonl"
    path.write_text(path.read_text().replace('"epoch": 2', f'"epoch": {epoch}'))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: `epoch` should be greater than 0, but is"):
        metrics_of(root)


def test_lines_of_a_newer_format_are_refused(root: Path):
    path = root / RUN / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"stage"', '{"format": 2, "stage"'))
    with pytest.raises(UserError, match="newer version"):
        metrics_of(root)


def test_a_loss_that_is_not_finite_is_null_on_storage_and_nan_in_memory(root: Path):
    run: Run = find_run(str(root), "run")
    log = MetricsLog(run, "unfrozen", 1)
    rows = [{**log.rows[-1], "epoch": 2, "val_loss": value} for value in (math.nan, math.inf)]
    path = root / RUN / "metrics.jsonl"
    path.write_bytes(formats.encode_lines("metrics", rows))
    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["val_loss"] is None
    assert all(math.isnan(row["val_loss"]) for row in run.metrics())
