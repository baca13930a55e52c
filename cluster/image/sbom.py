"""Software bill of materials: Python distributions and Debian packages as a CycloneDX 1.6 document.

    python cluster/image/sbom.py FILE

Format: https://cyclonedx.org/docs/1.6/json/. The file is reproducible: it depends on the installed packages only.
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
    """Return this interpreter and its importable distributions, by their normalised names."""
    python = _component("python", platform.python_version(), f"pkg:generic/python@{platform.python_version()}")
    return [python, *map(_python_package, importlib.metadata.distributions())]


def _python_package(distribution: importlib.metadata.Distribution) -> Component:
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    component = _component(name, distribution.version, f"pkg:pypi/{name}@{quote(distribution.version)}")
    license_text = distribution.metadata["License-Expression"] or distribution.metadata["License"] or ""
    if license_text and "\n" not in license_text:  # some packages have the full license text here
        component["licenses"] = [{"license": {"name": license_text}}]
    return component


def debian_components() -> list[Component]:
    """Return the packages installed by dpkg."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package} ${Version} ${Architecture}\n"]
    lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S603 - no input
    return [_debian_package(*line.split(" ")[1:]) for line in lines if line.startswith("installed ")]


def _debian_package(name: str, version: str, architecture: str) -> Component:
    return _component(name, version, f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}")


def _component(name: str, version: str, purl: str) -> Component:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def document() -> dict[str, Any]:
    """Return the document, components sorted by their package URL."""
    components = {component["purl"]: component for component in [*python_components(), *debian_components()]}
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
