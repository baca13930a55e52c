"""The rules of the house that a program can check: where Ray may live, which way imports point, how long things get."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
PATHS = sorted([*(HOUSE / "carclass").rglob("*.py"), *(HOUSE / "jobs").rglob("*.py")])
NAMES = [".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__") for path in PATHS]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(NAMES, PATHS, strict=True)}

PLAIN = (
    "appearance",
    "archive",
    "augment",
    "benchmarks.frozen",
    "benchmarks.masking_in_process",
    "benchmarks.train_in_process",
    "config",
    "dataset",
    "errors",
    "evaluation.metrics",
    "evaluation.report",
    "experiments.charts",
    "experiments.comparison",
    "experiments.gather",
    "experiments.overview",
    "experiments.significance",
    "experiments.standing",
    "experiments.tree",
    "export",
    "inventory",
    "labels",
    "lineage",
    "listing",
    "loaded",
    "masking.choice",
    "masking.cutout",
    "masking.detector",
    "masking.look",
    "masking.masks",
    "masking.networks",
    "masking.quality",
    "masking.report",
    "masking.sheet",
    "masking.write",
    "matching",
    "model",
    "page",
    "photo",
    "prediction.calibration",
    "prediction.preprocessing",
    "prediction.table",
    "settings",
    "storage",
    "svg",
    "training.checkpoint",
    "training.features",
    "training.feed",
    "training.keeper",
    "training.loop",
    "training.parent",
    "training.preflight",
    "tuning.analysis",
    "tuning.axes",
    "tuning.importance",
    "tuning.outcome",
    "tuning.plots",
    "tuning.publish",
    "tuning.sampler",
    "tuning.setting_plots",
    "tuning.space",
    "tuning.trials",
    "tuning.words",
    "unpickle",
    "weights",
)
"""Plain functions on arrays, tensors and files, which are tested and used without a cluster."""
RAY_ROOMS = (
    "attempts",
    "benchmarks",
    "capacity",
    "cluster",
    "evaluation.evaluate",
    "experiments.run",
    "ingest",
    "masking.stream",
    "prediction.stream",
    "submission",
    "telemetry",
    "training.departure",
    "training.stages",
    "tuning.sweep",
)
MAX_MODULE, MAX_FUNCTION = 400, 40


def imports(name: str) -> Iterator[str]:
    """Every module or name that a module imports, those within functions too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield from (f"{node.module}.{item.name}" for item in node.names)


def our_imports(name: str) -> set[str]:
    """The modules of the house that a module imports."""
    found = set(imports(name))
    return {other for other in NAMES if any(f"{item}.".startswith(f"{other}.") for item in found)} - {name, "carclass"}


def everything_below(name: str) -> set[str]:
    """The modules that come along when one is imported, itself among them."""
    found, open_ends = set(), {name}
    while open_ends:
        found |= open_ends
        open_ends = {other for one in open_ends for other in our_imports(one)} - found
    return found


def uses_ray(name: str) -> bool:
    return any(item.split(".")[0] == "ray" for item in imports(name))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_do_without_ray_and_import_no_room_of_it(name: str):
    assert [other for other in everything_below(f"carclass.{name}") if uses_ray(other)] == []


def test_ray_lives_in_its_rooms_and_nowhere_else():
    rooms = tuple(f"carclass.{room}" for room in RAY_ROOMS)
    assert [name for name in NAMES if uses_ray(name) and not name.startswith(rooms)] == []


def test_processes_that_only_read_and_write_do_without_torch():
    code = "import sys, carclass.attempts, carclass.cluster, carclass.masking.write; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE, check=False).returncode == 0


def test_the_library_knows_nothing_of_jobs_and_tests():
    library = [name for name in NAMES if name.startswith("carclass")]
    outside = {name: item for name in library for item in imports(name) if item.split(".")[0] in ("jobs", "tests")}
    assert outside == {}


def test_imports_point_downwards_and_never_round_in_a_circle():
    TopologicalSorter({name: our_imports(name) for name in NAMES}).prepare()


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_functions_are_short(name: str):
    lines = PATHS[NAMES.index(name)].read_text(encoding="utf-8").count("\n")
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert lines < MAX_MODULE
    assert {function: length for function, length in lengths.items() if length >= MAX_FUNCTION} == {}


@pytest.mark.parametrize("name", NAMES)
def test_no_error_is_swallowed_by_a_bare_except(name: str):
    handlers = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler)]
    caught = [ast.unparse(handler.type) if handler.type else "" for handler in handlers]
    assert not {"", "Exception", "BaseException"} & set(caught)


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_is_explained(name: str):
    """A script's main is explained by the page it opens with."""
    tree = TREES[name]
    if PATHS[NAMES.index(name)].name == "__init__.py" and not tree.body:
        return
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert ast.get_docstring(tree)
    assert [node.name for node in found if not ast.get_docstring(node) and node.name != "main"] == []
