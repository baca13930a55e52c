"""The environment that a stage is trained in: code version, library versions and device, as lineage.json has them."""

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carclass import storage
from carclass.data import formats

if TYPE_CHECKING:
    import torch

    from carclass.models.precision import Precision

CODE_VERSION = "CARCLASS_CODE_VERSION"
"""Variable with the code version of a submitted job, whose copy of the code has no commits."""
PACKAGE = Path(__file__).resolve().parents[1]


def code_version() -> str:
    """Return the commit of the checkout, with + if files are modified; outside a checkout the package's version."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")) == PACKAGE.parent:  # not a checkout around the package
            return _git("describe", "--always", "--dirty=+", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get(CODE_VERSION) or (metadata.version("carclass") if _is_installed() else "unknown")


def record_environment(run_uri: str, stage: str, device: "torch.device", precision: "Precision") -> None:
    """Add the environment of a stage to the run's lineage, unless it is the latest there.

    precision: as in the settings; the one in which the device computes is recorded.
    """
    import torch  # imported late: whoever lists runs needs no PyTorch

    from carclass.models.precision import uses_bf16

    environment = {
        "stage": stage,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": "bf16" if uses_bf16(precision, device) else "fp32",
        "code": code_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ray": metadata.version("ray"),
    }
    uri = storage.join(run_uri, "lineage.json")
    lineage = formats.read(uri, "lineage")
    if lineage["environments"][-1:] != [environment]:
        formats.write(uri, "lineage", {**lineage, "environments": [*lineage["environments"], environment]})


def environment_text(environment: dict[str, Any]) -> str:
    """Return an environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None and name != "stage")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def _is_installed() -> bool:
    return any(distribution.name == "carclass" for distribution in metadata.distributions())
