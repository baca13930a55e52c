"""Roots of budgets: two never share the folders of their runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from carclass.errors import UserError
from carclass.experiments.budget_root import check_budget, claim_root
from carclass.experiments.tree import load_tree

JOBS = Path(__file__).parents[2] / "jobs"
BUDGETS = sorted((JOBS / "experiments" / "budgets").glob("*.yml"))


def test_a_root_belongs_to_the_first_budget_that_trains_there(tmp_path: Path):
    claim_root(str(tmp_path), "tiny")
    claim_root(str(tmp_path), "tiny")
    with pytest.raises(UserError, match=r"holds the experiments of the budget `tiny`.*Use `--budget tiny`"):
        claim_root(str(tmp_path), "full")


def test_a_root_without_a_budget_is_read_by_any(tmp_path: Path):
    check_budget(str(tmp_path), "full")
    assert not list(tmp_path.iterdir())


def test_the_included_budgets_have_roots_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CARCLASS_ROOT", "/results")
    roots = {load_tree(file, {}).budget.root.removesuffix("/seed-1") for file in BUDGETS}
    assert roots == {f"/results/{file.stem}" for file in BUDGETS}


@pytest.mark.parametrize("words", [("tree",), ("rerun-stale", "--yes")], ids=" ".join)
def test_another_budget_is_refused_in_its_root(tmp_path: Path, words: tuple[str, ...]):
    claim_root(str(tmp_path), "cars196")
    command = [sys.executable, str(JOBS / "lineage.py"), *words, "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds the experiments of the budget `cars196`" in done.stderr
