"""cluster/image/sbom.py: a CycloneDX document of this environment, validated against the standard's schema."""

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cyclonedx.schema
import jsonschema
import pytest
from packageurl import PackageURL
from packaging.requirements import Requirement
from referencing import Registry, Resource

REPO = Path(__file__).parents[2]
IMAGE = REPO / "cluster" / "image"
LOCKS = [REPO / "requirements.lock", IMAGE / "detectron2.lock"]
SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"
pytestmark = pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="needs Debian")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sbom") / "sbom.json"
    subprocess.run([sys.executable, IMAGE / "sbom.py", file, *LOCKS], check=True)
    return json.loads(file.read_text())


def validator() -> jsonschema.Draft7Validator:
    """Return a validator for CycloneDX 1.6 with the schemas that it refers to."""
    schemas = [json.loads(path.read_text()) for path in SCHEMAS.glob("*.SNAPSHOT.schema.json")]
    registry: Registry = Registry().with_resources((each["$id"], Resource.from_contents(each)) for each in schemas)
    (schema,) = (each for each in schemas if each["$id"].endswith("/bom-1.6.schema.json"))
    return jsonschema.Draft7Validator(schema, registry=registry)


def locked() -> list[tuple[str, str, str]]:
    """Return (name, version, text with hashes) of what the locks require on this machine."""
    blocks = re.findall(r"^(\S+==.*?)(?=^\S|\Z)", "".join(path.read_text() for path in LOCKS), re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        requirement = Requirement(block.split("\\")[0])
        if requirement.marker is None or requirement.marker.evaluate():
            found.append((requirement.name, str(requirement.specifier).removeprefix("=="), block))
    return found


def test_the_document_is_valid_cyclonedx(document: dict[str, Any]):
    validator().validate(document)
    references = [component["bom-ref"] for component in document["components"]]
    assert len(set(references)) == len(references)


def test_the_schema_rejects_a_mistake(document: dict[str, Any]):
    mistaken = {**document, "components": [{**document["components"][0], "sha256": "0" * 64}]}
    with pytest.raises(jsonschema.ValidationError, match="sha256"):
        validator().validate(mistaken)


def test_every_locked_package_has_its_version_package_url_and_hashes(document: dict[str, Any]):
    listed = {component["name"]: component for component in document["components"]}
    packages = locked()
    assert len(packages) > 100
    for name, version, text in packages:
        component = listed[name]
        assert (component["version"], component["purl"]) == (version, f"pkg:pypi/{name}@{version}")
        (files,) = component["externalReferences"]
        assert [each["content"] for each in files["hashes"]] == re.findall("sha256:([0-9a-f]{64})", text) != []


def test_debians_packages_name_their_release_and_source_for_scanners(document: dict[str, Any]):
    release = platform.freedesktop_os_release()
    (system,) = (each for each in document["components"] if each["type"] == "operating-system")
    assert (system["name"], system["version"]) == (release["ID"], release["VERSION_ID"])
    packages = [PackageURL.from_string(each["purl"]) for each in document["components"] if "purl" in each]
    debian = {each.name: each for each in packages if each.type == "deb"}
    assert {each.qualifiers["distro"] for each in debian.values()} == {f"{release['ID']}-{release['VERSION_ID']}"}
    assert debian["libc6"].qualifiers["upstream"] == "glibc"
    assert debian["bash"].qualifiers.get("upstream", "bash").split("@")[0] == "bash"
