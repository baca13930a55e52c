"""Lists all that is installed beside this Python, distributions and Debian's packages, as a CycloneDX 1.6 document.

    python cluster/image/sbom.py FILE

The format: https://cyclonedx.org/docs/1.6/json/. Two builds with the same contents give the same file.
"""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def python_components() -> list[Component]:
    """This interpreter and the distributions that it can import, under their normalised names."""
    python = _component("python", platform.python_version(), f"pkg:generic/python@{platform.python_version()}")
    return [python, *(_distribution(found) for found in importlib.metadata.distributions())]


def _distribution(found: importlib.metadata.Distribution) -> Component:
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    component = _component(name, found.version, f"pkg:pypi/{name}@{quote(found.version)}")
    license_text = found.metadata["License-Expression"] or found.metadata["License"] or ""
    if license_text and "\n" not in license_text:  # some packages give the whole text
        component["licenses"] = [{"license": {"name": license_text}}]
    return component


def debian_components() -> list[Component]:
    """The packages that dpkg has installed."""
    show = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package} ${Version} ${Architecture}\n"]
    lines = subprocess.run(show, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S603 - no input
    return [_package(*line.split(" ")[1:]) for line in lines if line.startswith("installed ")]


def _package(name: str, version: str, architecture: str) -> Component:
    return _component(name, version, f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}")


def _component(name: str, version: str, purl: str) -> Component:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def document() -> dict[str, Any]:
    """The whole document; components are sorted by their package URL."""
    components = {one["purl"]: one for one in [*python_components(), *debian_components()]}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "carclass", "name": "carclass"}},
        "components": [components[purl] for purl in sorted(components)],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")
