"""Rules of the code base that a program can check: layers, where Ray may be, length, documentation."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
PATHS = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("carclass", "jobs")
    for path in sorted((REPO / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
LAYERS = (
    {"__main__"},
    {"tools"},
    {"prediction", "experiments", "tuning", "audit"},
    {"evaluation", "training"},
    {"masking", "runs"},
    {"ingestion", "models"},
    {"data", "cluster"},
    {"sample"},
    {"storage", "config"},
    {"s3"},
    {"reporting", "progress"},
    {"formatting", "errors"},
)
"""Packages and modules of carclass from the top layer down: each imports from lower layers only."""
RAY_MODULES = {
    "cluster.actor_pools",
    "cluster.address",
    "cluster.autoscaler",
    "cluster.connection",
    "cluster.job_submission",
    "cluster.resources",
    "cluster.shared_paths",
    "cluster.tasks",
    "cluster.telemetry",
    "data.crash_guard",
    "data.streaming",
    "evaluation.classification",
    "experiments.run",
    "ingestion.collect",
    "ingestion.ingest",
    "prediction.classify",
    "training.photo_store",
    "training.preemption",
    "training.train",
    "training.worker",
    "tuning.searcher",
    "tuning.trial",
    "tuning.tune",
}
PLAIN = (
    "config", "models", "reporting", "data.photo", "data.dataset", "data.inventory", "masking.cutout",
    "masking.selection", "masking.detector", "masking.writer", "masking.report", "evaluation.metrics",
    "evaluation.report", "training.loop", "training.dataloader", "training.checkpoint", "runs", "tuning.report",
    "tuning.search_space", "tuning.collect", "experiments.report", "experiments.tree", "experiments.status",
    "evaluation.calibration", "prediction.predictions", "prediction.loaded_run", "prediction.named_photos",
    "prediction.collect", "prediction.report", "ingestion.labels", "ingestion.listing", "ingestion.reading",
    "ingestion.survey", "experiments.estimate", "experiments.first_config", "experiments.machine",
    "experiments.survey_text", "experiments.pipeline_places", "evaluation.target",
)  # fmt: skip
"""Packages and modules that work on arrays, tensors and files, without Ray."""
MAX_MODULE, MAX_FUNCTION = 400, 40
MAX_MODULES, MAX_PACKAGES, MAX_README = 6, 16, 150


def imports(name: str) -> Iterator[str]:
    """Yield every module or name that a module imports, those within functions too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield from (f"{node.module}.{item.name}" for item in node.names)


@cache
def our_imports(name: str) -> set[str]:
    """Return the modules of carclass and jobs that a module imports; not the packages that hold them."""
    found = {item for item in imports(name) if item.split(".")[0] in ("carclass", "jobs")}
    modules = {item if item in TREES else item.rpartition(".")[0] for item in found}
    return modules - {name, "carclass"}


def closure(name: str) -> set[str]:
    """Return the modules that come along when one is imported, itself among them."""
    found, to_visit = set(), {name}
    while to_visit:
        found |= to_visit
        to_visit = {other for one in to_visit for other in our_imports(one)} - found
    return found


def nodes_of(kinds: Any) -> list[tuple[str, Any]]:
    """Return all nodes of these kinds, with their modules' names."""
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]


def package(name: str) -> str:
    return name.split(".")[1]


def layer(name: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if package(name) in packages)


def uses_ray(name: str) -> bool:
    return any(item.split(".")[0] == "ray" for item in imports(name))


LIBRARY = [name for name in TREES if name.startswith("carclass.")]
PLAIN_MODULES = [name for name in LIBRARY if f"{name}.".startswith(tuple(f"carclass.{one}." for one in PLAIN))]


def test_every_package_has_its_layer():
    assert {package(name) for name in LIBRARY} == set().union(*LAYERS)


def test_the_top_level_stays_small():
    folder = REPO / "carclass"
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_MODULES
    assert len([path for path in folder.iterdir() if path.is_dir() and list(path.glob("*.py"))]) <= MAX_PACKAGES


def test_imports_point_to_lower_layers():
    pairs = [(name, other) for name in LIBRARY for other in our_imports(name) if package(other) != package(name)]
    assert [(name, other) for name, other in pairs if layer(other) <= layer(name)] == []


def test_imports_have_no_cycle():
    TopologicalSorter({name: our_imports(name) for name in TREES}).prepare()


def test_the_library_imports_nothing_from_outside_of_it():
    pairs = [(name, item) for name in LIBRARY for item in imports(name)]
    assert [(name, item) for name, item in pairs if item.split(".")[0] in ("jobs", "tests", "docs")] == []


def test_the_library_opens_nothing_outside_of_it():
    names = {*LIBRARY} - {"carclass.config.installation"}  # a wheel holds the jobs within the package
    nodes = [(name, node) for name in names for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)]
    assert [(name, node.lineno) for name, node in nodes if node.value in ("jobs", "tests", "docs")] == []


def test_ray_is_imported_by_its_modules_alone():
    found = {name.removeprefix("carclass.") for name in LIBRARY if uses_ray(name)}
    assert {name for name in found if not name.startswith("tools.")} == RAY_MODULES


def test_plain_modules_come_without_ray():
    with_ray = {name for name in TREES if uses_ray(name)}
    assert [(name, other) for name in PLAIN_MODULES for other in closure(name) & with_ray] == []


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(
            "carclass.data.crash_guard, carclass.data.streaming, carclass.masking.writer", id="reading and writing"
        ),
        pytest.param("carclass.training.block_columns", id="reading for training"),
        pytest.param("carclass.experiments.tree_view", id="the tree of experiments"),
        pytest.param("carclass.experiments.first_config, carclass.experiments.survey_text", id="a first config file"),
    ],
)
def test_processes_without_networks_come_without_torch_and_scikit_learn(modules: str):
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('torch', 'sklearn')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False)
    assert done.returncode == 0


def test_modules_are_short():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in PATHS.items()}
    assert {name: number for name, number in lines.items() if number > MAX_MODULE} == {}


def test_functions_are_short():
    functions = nodes_of(ast.FunctionDef | ast.AsyncFunctionDef)
    lengths = [(name, node.name, (node.end_lineno or 0) - node.lineno + 1) for name, node in functions]
    assert [one for one in lengths if one[2] > MAX_FUNCTION] == []


def test_no_bare_except():
    handlers = nodes_of(ast.ExceptHandler)
    caught = [(name, ast.unparse(node.type) if node.type else "") for name, node in handlers]
    assert [pair for pair in caught if pair[1] in ("", "Exception", "BaseException")] == []


def test_public_names_have_docstrings():
    """Except a script's main, which its module's docstring covers."""
    nodes = [(name, node) for name, tree in TREES.items() for node in (tree, *tree.body)]
    documented = [(name, node) for name, node in nodes if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    bare = [(name, getattr(node, "name", "")) for name, node in documented if not ast.get_docstring(node)]
    assert [pair for pair in bare if not pair[1].startswith("_") and pair[1] != "main"] == []


def test_docstrings_open_with_a_noun_phrase_or_a_verb():
    nodes = nodes_of(ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    opened = [(name, ast.get_docstring(node) or "") for name, node in nodes]
    assert [pair for pair in opened if re.match(r"(What|How|Whether|Where|Which|Who)\b", pair[1])] == []


def test_no_test_imports_another():
    """Code that tests share is in tests/helpers."""
    modules = {".".join(path.relative_to(REPO).with_suffix("").parts) for path in (REPO / "tests").rglob("test_*.py")}
    for name in modules:
        tree = ast.parse((REPO / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        names: set[str | None] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {item.name for item in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{item.name}" for item in node.names)}
        assert names & modules == set(), name


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README
