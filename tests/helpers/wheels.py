"""The wheel of this checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[2]
SOURCES = ("carclass", "jobs", "cluster", "pyproject.toml", "requirements.in", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Build the wheel, from a copy as setuptools leaves files beside its sources, and return its file: 2 s."""
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(REPO / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder / "dist"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder / "source"], check=True, timeout=120)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def unpack_wheel(folder: Path) -> Path:
    """Build the wheel and return the folder of its files: the packages and their metadata."""
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"
