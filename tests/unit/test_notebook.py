"""The notebook: its cells run on an evaluated run, and it is stored without outputs."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from tests.helpers.evaluated_run import CLASSES, publish_evaluated_run

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "model_evaluation.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    assert [cell for cell in code_cells() if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.slow
def test_all_cells_run_on_an_evaluated_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_evaluated_run(tmp_path)
    monkeypatch.setenv("CARCLASS_ROOT", str(tmp_path))
    monkeypatch.setenv("CARCLASS_RUN", "first")
    monkeypatch.setattr(mpl, "rcParams", mpl.rcParams.copy())
    plt.switch_backend("agg")
    names: dict[str, Any] = {}
    try:
        for cell in code_cells():
            exec("".join(cell["source"]), names)
        assert plt.get_fignums() == [1, 2, 3, 4]
    finally:
        plt.close("all")
    assert list(names["report"].index) == [*CLASSES, "macro average", "weighted average"]
    assert names["confusion"].to_numpy().sum() == 9
    assert sorted(names["prediction"]["top5"]) == CLASSES
