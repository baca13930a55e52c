"""Detectors in YAML files: parsed without running code, and identified by their content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carclass.config.schema import DetectorSettings
from carclass.errors import UserError
from carclass.masking import detectron, networks

SAMPLE = Path(detectron.__file__).parents[1] / "sample" / "detector.yaml"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def architecture_digest(uri: str) -> str:
    return networks.architecture_digest(DetectorSettings(model=uri))


def test_base_files_are_merged_and_resolved_relative_to_the_file(write: Callable[[str, str], str]):
    write("base.yaml", "{MODEL: {RESNETS: {DEPTH: 101, NORM: BN}, MASK_ON: true}}")
    write("bases/other.yaml", "{_BASE_: ../base.yaml, MODEL: {MASK_ON: false}}")
    cfg = detectron.load_config(write("nets/net.yaml", "{_BASE_: ../bases/other.yaml, MODEL: {RESNETS: {NORM: GN}}}"))
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM, cfg.MODEL.MASK_ON) == (101, "GN", False)


@pytest.mark.parametrize(
    ("uri", "other", "expected"),
    [
        ("s3://bucket/nets/a.yaml", "../base.yaml", "s3://bucket/base.yaml"),
        ("/nets/a.yaml", "b/base.yaml", "/nets/b/base.yaml"),
        ("s3://bucket/a.yaml", "s3://other/b.yaml", "s3://other/b.yaml"),
        ("/nets/a.yaml", "/other/b.yaml", "/other/b.yaml"),
    ],
)
def test_relative_paths_are_resolved_from_the_file(uri: str, other: str, expected: str):
    assert detectron.resolve_relative(uri, other) == expected


def test_the_digest_changes_with_the_file_and_its_base(write: Callable[[str, str], str]):
    write("base.yaml", "{MODEL: {MASK_ON: true}}")
    uri = write("net.yaml", "{_BASE_: base.yaml, VERSION: 2}")
    digests = [architecture_digest(uri)]
    write("base.yaml", "{MODEL: {MASK_ON: false}}")
    digests.append(architecture_digest(uri))
    write("net.yaml", "{_BASE_: base.yaml, VERSION: 2, MODEL: {RESNETS: {DEPTH: 101}}}")
    digests.append(architecture_digest(uri))
    assert len(set(digests)) == 3


def test_the_digest_ignores_formatting(write: Callable[[str, str], str]):
    compact = write("compact.yaml", "{MODEL: {MASK_ON: true, RESNETS: {DEPTH: 101}}}")
    commented = write("commented.yml", "MODEL:  # a comment\n  RESNETS: {DEPTH: 101}\n  MASK_ON: true\n")
    assert architecture_digest(compact) == architecture_digest(commented)


def test_each_named_network_has_its_own_digest():
    names = ("mask_rcnn_r50_fpn", "faster_rcnn_r101_fpn", networks.TORCHVISION, "sample")
    assert len({architecture_digest(name) for name in names}) == 4


@pytest.mark.parametrize("as_base", [False, True])
def test_yaml_that_would_run_code_is_rejected_without_running_it(
    write: Callable[[str, str], str], tmp_path: Path, as_base: bool
):
    uri = write("trap.yaml", f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    uri = write("net.yaml", "_BASE_: trap.yaml") if as_base else uri
    with pytest.raises(UserError, match=r"`mask.detector.model`: .*trap.yaml: .*os.mkdir"):
        networks.build_network(DetectorSettings(model=uri))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {ROI_HEADS: {NUM_CLASES: 80}}", "Non-existent config key: MODEL.ROI_HEADS.NUM_CLASES"),
        ("MODEL: {MASK_ON: 1}", "MODEL.MASK_ON"),
        ("MODEL: 1", "MODEL"),
        ("1: {2: 3}", "unknown to Detectron2"),
        ("- MODEL", "not a mapping"),
        ("", "not a mapping"),
        ("VERSION: 1", "has VERSION 1"),
        ("_BASE_: nothing.yaml", "nothing.yaml cannot be read"),
        ("_BASE_: net.yaml", "circle"),
        ("MODEL: {META_ARCHITECTURE: Rcnn}", "cannot be built .*Rcnn"),
        ("MODEL: {META_ARCHITECTURE: SemanticSegmentor}", "SemanticSegmentor does not detect boxes"),
        ("MODEL: {META_ARCHITECTURE: ProposalNetwork}", "ProposalNetwork does not detect boxes"),
        ("MODEL: {LOAD_PROPOSALS: true, PROPOSAL_GENERATOR: {NAME: PrecomputedProposals}}", "does not detect boxes"),
        ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [false, true, true, true]}}", "deformable convolutions"),
        ("INPUT: {FORMAT: L}", "INPUT.FORMAT is L"),
    ],
)
def test_an_unusable_file_is_named_in_the_error(write: Callable[[str, str], str], text: str, message: str):
    if "_BASE_" not in text and text[:1] == "M":
        text = f"_BASE_: {SAMPLE}\n{text}"
    with pytest.raises(UserError, match=f"`mask.detector.model`: (?s:.)*{message}"):
        networks.build_network(DetectorSettings(model=write("net.yaml", text)))


def test_a_missing_file_is_named_in_the_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"`mask.detector.model`: .*nothing.yaml cannot be read"):
        networks.build_network(DetectorSettings(model=str(tmp_path / "nothing.yaml")))


@pytest.mark.parametrize("function", [networks.build_network, networks.architecture_digest])
def test_an_unknown_name_is_rejected_with_the_known_ones(function: Callable[[DetectorSettings], Any]):
    with pytest.raises(UserError, match=r"unknown detector .*mask_rcnn_r5O_fpn\. Choose one of mask_rcnn_r50_fpn, f"):
        function(DetectorSettings(model="mask_rcnn_r5O_fpn"))
