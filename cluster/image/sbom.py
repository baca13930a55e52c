"""Software bill of materials: Python distributions and Debian packages as a CycloneDX 1.6 document.

    python cluster/image/sbom.py FILE LOCK ...

Format: https://cyclonedx.org/docs/1.6/json/. The file is reproducible: it depends only on the installed packages and on
the lock files, which give the hashes.
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
Hashes = dict[tuple[str, str], list[str]]
"""SHA-256 of all files that a lock admits for a package, wheels and source, by name and version."""


def read_locks(paths: list[str]) -> Hashes:
    """Return the hashes of lock files as uv writes them."""
    text = "".join(Path(path).read_text(encoding="utf-8") for path in paths)
    blocks = re.finditer(r"^([\w.-]+)==([^\s\\]+)((?:.*\\\n)*.*)", text, re.MULTILINE)
    return {(match[1], match[2]): re.findall(r"--hash=sha256:(\w+)", match[3]) for match in blocks}


def python_components(hashes: Hashes) -> list[Component]:
    """Return this interpreter and its importable distributions, by their normalised names."""
    python = _component("python", platform.python_version(), f"pkg:generic/python@{platform.python_version()}")
    return [python, *(_python_package(each, hashes) for each in importlib.metadata.distributions())]


def _python_package(distribution: importlib.metadata.Distribution, hashes: Hashes) -> Component:
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    component = _component(name, distribution.version, f"pkg:pypi/{name}@{quote(distribution.version)}")
    license_text = distribution.metadata["License-Expression"] or distribution.metadata["License"] or ""
    if license_text and "\n" not in license_text:  # some packages have the full license text here
        component["licenses"] = [{"license": {"name": license_text}}]
    if files := hashes.get((name, distribution.version)):
        listed = [{"alg": "SHA-256", "content": each} for each in files]
        reference = {"type": "distribution", "url": component["purl"], "comment": "files that the lock admits"}
        component["externalReferences"] = [{**reference, "hashes": listed}]
    return component


def debian_components() -> list[Component]:
    """Return Debian and the packages installed by dpkg; scanners look up advisories by release and source package."""
    release = platform.freedesktop_os_release()
    system = {"type": "operating-system", "bom-ref": "os", "name": release["ID"], "version": release["VERSION_ID"]}
    fields = ["db:Status-Status", "Package", "Version", "Architecture", "source:Package", "source:Version"]
    query = ["dpkg-query", "--show", f"--showformat={' '.join(f'${{{field}}}' for field in fields)}\n"]
    lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()  # noqa: S603 - no input
    distro = f"{release['ID']}-{release['VERSION_ID']}"
    packages = [line.split(" ")[1:] for line in lines if line.startswith("installed ")]
    return [system, *(_debian_package(distro, *package) for package in packages)]


def _debian_package(
    distro: str, name: str, version: str, architecture: str, source: str, source_version: str
) -> Component:
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}&distro={distro}"
    if (source, source_version) != (name, version):
        purl += f"&upstream={quote(source)}" + (f"%40{quote(source_version)}" if source_version != version else "")
    return _component(name, version, purl)


def _component(name: str, version: str, purl: str) -> Component:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def document(hashes: Hashes) -> dict[str, Any]:
    """Return the document, components sorted by their package URL."""
    found = [*python_components(hashes), *debian_components()]
    components = {component["bom-ref"]: component for component in found}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "carclass", "name": "carclass"}},
        "components": [components[reference] for reference in sorted(components)],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(document(read_locks(sys.argv[2:])), indent=1) + "\n", encoding="utf-8")
