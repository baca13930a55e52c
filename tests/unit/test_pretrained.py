"""Initial weights of a run from an epoch of another run, with its classifier."""

from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.models import architectures
from carclass.training import pretrained
from tests.helpers.runs import CLASSES, FROZEN, MODEL, begin, finish, publish_dataset

CHILD = {"name": "child", "model": MODEL, "frozen": None, "unfrozen": {"epochs": 2}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root with a finished run `first` of five frozen epochs, the second and the last of them kept."""
    publish_dataset(tmp_path)
    finish(begin(tmp_path, TrainSettings(name="first", **FROZEN)))
    return tmp_path


def load(root: Path, parent: str, classes: list[str] = CLASSES, **changes: object) -> tuple[torch.nn.Module, str]:
    settings = TrainSettings(**{**CHILD, "parent": parent, **changes})
    net = architectures.build(settings.model, len(classes))
    return net, pretrained.load_pretrained(net, str(root), settings, classes)


@pytest.mark.parametrize(("parent", "epoch"), [("first@2", 2), ("first@best", 5), ("first@last", 5)])
def test_a_child_starts_with_the_classifier_of_the_parent_epoch(root: Path, parent: str, epoch: int):
    net, _ = load(root, parent)
    assert net.get_submodule("fc.1").bias.tolist() == [epoch] * len(CLASSES)


def test_a_child_of_a_frozen_epoch_has_the_backbone_of_the_parent_run(root: Path):
    best = safetensors.load(storage.read_bytes(f"{root}/experiments/first/frozen/best.safetensors"))
    net, _ = load(root, "first@2")
    assert torch.equal(net.get_parameter("layer4.1.conv2.weight"), best["layer4.1.conv2.weight"])


def test_the_sha256_is_of_the_file_of_the_epoch(root: Path):
    _, sha256 = load(root, "first@2")
    assert sha256 == storage.sha256(Path(root, "experiments/first/frozen/epoch-0002/weights.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("parent", "file"),
    [("first@2", "epoch-0002/weights.safetensors"), ("first@best", "best.safetensors")],
)
def test_a_flipped_bit_in_the_parents_file_is_an_error(root: Path, parent: str, file: str):
    path = root / "experiments/first/frozen" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged.*sha256"):
        load(root, parent)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("other@best", r"no run `other` in .* Available: first"),
        ("first@9", r"`train.parent`: first@9 doesn't exist: `first` has 5 frozen epochs"),
        ("first@3", r"weights of first@3 were not kept. Add 3 to `train.frozen.keep_epochs` of `first`"),
    ],
)
def test_a_missing_parent_is_an_error(root: Path, parent: str, message: str):
    with pytest.raises(UserError, match=message):
        load(root, parent)


def test_a_parent_with_other_classes_is_an_error(root: Path):
    with pytest.raises(
        UserError, match=r"first@2 has 3 classes, dataset `v2` has 2; 3 are in only one of them \(bus, tram"
    ):
        load(root, "first@2", ["car", "tram"])


def test_a_parent_of_another_architecture_is_an_error(root: Path):
    with pytest.raises(
        UserError, match=r"`train.model.architecture` is resnet50, but first@2 was trained with resnet26"
    ):
        load(root, "first@2", model={"image_size": 32})


def test_a_parent_with_another_sha256_than_configured_is_an_error(root: Path):
    with pytest.raises(UserError, match=r"`train.parent_sha256`: first@2 has the sha256 [0-9a-f]{64}, not 0000"):
        load(root, "first@2", parent_sha256="0" * 64)


def test_an_unfinished_parent_is_an_error(root: Path):
    begin(root, TrainSettings(name="second", **FROZEN))
    with pytest.raises(UserError, match=r"the run has not finished this stage"):
        load(root, "second@best")
