"""Links, paths and commands named in the documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from carclass.config import cli
from carclass.config.schema import Config
from carclass.config.section import list_settings

REPO = Path(__file__).parents[2]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPO_PATH = re.compile(r"(?<![\w/.:=$~-])(?:jobs|carclass|cluster|tests|docs)/[\w./-]*\w")
"""A path from the repository's root, not one within a longer path or URI."""
BENCHMARK = re.compile(r"jobs/benchmark\.py\s+(\w+)")
COMMAND = re.compile(r"jobs/(\w+)\.py((?:(?!jobs/\w+\.py|#| -- )[^`\n|])*)")
"""A job and its arguments, on one line."""
FLAG = re.compile(r"(?<=\s)--([a-z][\w.-]*)")
SETTING = re.compile(r"`((?:ingest|mask|train|evaluate|predict)\.(?!py\b)[a-z][\w.]*)`")
MAX_LINES = 150
UNLIMITED = ("CHANGELOG.md", "configuration.md")
"""Pages that grow: the latter is generated from the schema."""


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_to_files_and_headings(page: Path):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_paths_of_the_repository_exist(page: Path):
    named = set(REPO_PATH.findall(page.read_text(encoding="utf-8")))
    assert {path for path in named if not (REPO / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_named_benchmarks_exist(page: Path):
    named = set(BENCHMARK.findall(page.read_text(encoding="utf-8")))
    assert {name for name in named if not (REPO / f"carclass/tools/benchmarks/{name}.py").exists()} == set()


@pytest.mark.parametrize("job", sorted(path.stem for path in (REPO / "jobs").glob("*.py")))
def test_options_in_commands_exist(job: str):
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES)
    used = {flag for name, arguments in COMMAND.findall(text) if name == job for flag in FLAG.findall(arguments)}
    command = [sys.executable, REPO / "jobs" / f"{job}.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout
    assert used - set(FLAG.findall(shown)) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_settings_in_prose_exist(page: Path):
    known = [setting.key for setting in list_settings(Config)]
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    text = page.read_text(encoding="utf-8") if page.name != "CHANGELOG.md" else ""  # which names former ones
    assert set(SETTING.findall(text)) - {*known, *sections} == set()


def test_the_config_in_the_readme_is_complete(tmp_path: Path):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    (tmp_path / "my.yml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    config = cli.load_config(tmp_path / "my.yml", {}, Config)
    assert None not in (config.ingest, config.mask, config.train)


def test_every_page_is_in_the_index():
    linked = set(LINK.findall((REPO / "docs" / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in (REPO / "docs").glob("*.md")} - {"README.md"}


def test_every_benchmark_is_documented():
    modules = {path.stem for path in (REPO / "carclass/tools/benchmarks").glob("*.py")}
    named = set(BENCHMARK.findall((REPO / "docs/benchmarks.md").read_text(encoding="utf-8")))
    plain = {name for name in modules if name.startswith(("plain_", "timm_", "_")) or name.endswith("_in_process")}
    assert modules - plain - {"labelled", "timing"} == named


def test_every_page_is_of_readable_length():
    lengths = {page: page.read_text(encoding="utf-8").count("\n") for page in PAGES if page.name not in UNLIMITED}
    assert {page: lines for page, lines in lengths.items() if lines > MAX_LINES} == {}
