"""The installation: folders of the repository that a wheel holds within the package, and packages that are missing."""

import importlib.util
import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType

from carclass.errors import UserError, find_cause

PACKAGE = Path(__file__).parents[1]


def find_folder(name: str) -> Path:
    """Return a folder of the repository: within an installed package, otherwise beside the package."""
    return PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE.parent / name


JOBS = find_folder("jobs")
IS_CHECKOUT = JOBS.parent != PACKAGE


def find_config(path: str | Path) -> Path:
    """Return a config file that exists in the working directory, or else in the installed package's jobs/."""
    bundled = PACKAGE / path
    return bundled if not IS_CHECKOUT and bundled.is_file() and not Path(path).exists() else Path(path)


def resolve_path(path: Path, base: Path) -> Path:
    """Return the absolute path of a path in a config file. base: folder of the file.

    The installed package's jobs/ is read as if it lay in the working directory: its results do not belong among the
    packages.
    """
    full = Path(os.path.normpath(base / path))
    if IS_CHECKOUT or path.is_absolute() or not base.is_relative_to(JOBS) or full.is_relative_to(JOBS):
        return full
    return Path(os.path.normpath(Path.cwd() / os.path.relpath(full, PACKAGE)))


class MissingPackageReport:
    """Context that raises UserError, with the command to install it, for a Python package that is missing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None or isinstance(error, UserError) or (cause := find_cause(error, _is_missing_package)) is None:
            return
        name = str(getattr(cause, "name", "")).split(".")[0]
        if name == "detectron2":
            raise UserError(
                "Detectron2 is missing, which finds the vehicles in photos. It is no dependency that pip can build by "
                f"itself; run this once: {detectron2_command()}"
            ) from error
        raise UserError(
            f"the Python package `{name}` is missing. Install what carclass needs: "
            f"{pip_command(*(_missing_requirements() or [name]))}"
        ) from error


def _is_missing_package(error: BaseException) -> bool:
    name = error.name if isinstance(error, ModuleNotFoundError) else None  # None: Ray's copy, which has the error
    return name is not None and name.split(".")[0] != "carclass"


def pip_command(*requirements: str) -> str:
    """Return the command that installs requirements into this Python's environment, by uv where pip is missing."""
    has_pip = importlib.util.find_spec("pip") is not None
    pip = [sys.executable, "-m", "pip", "install"] if has_pip else ["uv", "pip", "install", "--python", sys.executable]
    return shlex.join([*pip, *requirements])


def detectron2_command() -> str:
    """Return the command of cluster/image/install.sh that installs Detectron2 without its compiled extension."""
    image = find_folder("cluster/image")
    options = ("--no-deps", "--no-build-isolation", "--require-hashes", "-r", str(image / "detectron2.lock"))
    return f"PYTHONPATH={shlex.quote(str(image / 'torch_stub'))} {pip_command(*options)}"


def _missing_requirements() -> list[str]:
    """Return the requirements of carclass that are not installed; those of a checkout that is not: the checkout."""
    if not _is_installed("carclass"):
        return [str(PACKAGE.parent)] if IS_CHECKOUT else []
    requirements = [each for each in metadata.requires("carclass") or [] if ";" not in each]
    return [each for each in requirements if not _is_installed(re.split(r"[^\w.-]", each, maxsplit=1)[0])]


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
