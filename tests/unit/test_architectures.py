"""Detectors described by a YAML file at any URI: read without running code in it, and known by their content."""

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


def digest(uri: str) -> str:
    return networks.architecture_digest(DetectorSettings(model=uri))


def test_a_file_stands_on_others_which_it_names_relative_to_itself(write: Callable[[str, str], str]):
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
def test_places_are_named_relative_to_a_file_on_storage(uri: str, other: str, expected: str):
    assert detectron.beside(uri, other) == expected


def test_the_digest_changes_with_a_file_and_with_what_it_stands_on(write: Callable[[str, str], str]):
    write("base.yaml", "{MODEL: {MASK_ON: true}}")
    uri = write("net.yaml", "{_BASE_: base.yaml, VERSION: 2}")
    digests = [digest(uri)]
    write("base.yaml", "{MODEL: {MASK_ON: false}}")
    digests.append(digest(uri))
    write("net.yaml", "{_BASE_: base.yaml, VERSION: 2, MODEL: {RESNETS: {DEPTH: 101}}}")
    digests.append(digest(uri))
    assert len(set(digests)) == 3


def test_the_digest_is_of_the_content_not_of_how_it_is_written(write: Callable[[str, str], str]):
    one = write("one.yaml", "{MODEL: {MASK_ON: true, RESNETS: {DEPTH: 101}}}")
    other = write("other.yml", "MODEL:  # a comment\n  RESNETS: {DEPTH: 101}\n  MASK_ON: true\n")
    assert digest(one) == digest(other)


def test_each_known_network_has_a_digest_of_its_own():
    names = ("mask_rcnn_r50_fpn", "faster_rcnn_r101_fpn", networks.TORCHVISION, "sample")
    assert len({digest(name) for name in names}) == 4


@pytest.mark.parametrize("as_base", [False, True])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(
    write: Callable[[str, str], str], tmp_path: Path, as_base: bool
):
    uri = write("trap.yaml", f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    uri = write("net.yaml", "_BASE_: trap.yaml") if as_base else uri
    with pytest.raises(UserError, match=r"`mask.detector.model`: .*trap.yaml is not plain YAML: .*os.mkdir"):
        networks.build_network(DetectorSettings(model=uri))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {ROI_HEADS: {NUM_CLASES: 80}}", "Non-existent config key: MODEL.ROI_HEADS.NUM_CLASES"),
        ("MODEL: {MASK_ON: 1}", "MODEL.MASK_ON"),
        ("MODEL: 1", "MODEL"),
        ("1: {2: 3}", "hasn't"),
        ("- MODEL", "holds no settings"),
        ("", "holds no settings"),
        ("VERSION: 1", "version 1"),
        ("_BASE_: nothing.yaml", "nothing.yaml cannot be read"),
        ("_BASE_: net.yaml", "circle"),
        ("MODEL: {META_ARCHITECTURE: Rcnn}", "no network that can be built .*Rcnn"),
        ("MODEL: {META_ARCHITECTURE: SemanticSegmentor}", "SemanticSegmentor like this finds no boxes"),
        ("MODEL: {META_ARCHITECTURE: ProposalNetwork}", "ProposalNetwork like this finds no boxes"),
        ("MODEL: {LOAD_PROPOSALS: true, PROPOSAL_GENERATOR: {NAME: PrecomputedProposals}}", "finds no boxes"),
        ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [false, true, true, true]}}", "deformable convolutions"),
        ("INPUT: {FORMAT: L}", "INPUT.FORMAT is L"),
    ],
)
def test_a_file_that_describes_no_usable_network_is_named(write: Callable[[str, str], str], text: str, message: str):
    if "_BASE_" not in text and text[:1] == "M":
        text = f"_BASE_: {SAMPLE}\n{text}"
    with pytest.raises(UserError, match=f"`mask.detector.model`: (?s:.)*{message}"):
        networks.build_network(DetectorSettings(model=write("net.yaml", text)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"`mask.detector.model`: .*nothing.yaml cannot be read"):
        networks.build_network(DetectorSettings(model=str(tmp_path / "nothing.yaml")))


@pytest.mark.parametrize("job", [networks.build_network, networks.architecture_digest])
def test_an_unknown_name_is_answered_with_those_known(job: Callable[[DetectorSettings], Any]):
    with pytest.raises(UserError, match=r"mask_rcnn_r5O_fpn is no detector\. Choose one of mask_rcnn_r50_fpn, faster_"):
        job(DetectorSettings(model="mask_rcnn_r5O_fpn"))
