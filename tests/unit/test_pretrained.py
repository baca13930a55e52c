"""Where a run starts: another run's epoch, with its classifier, checked before it is used."""

from pathlib import Path

import pytest
import torch

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.models import resnet
from carclass.training import pretrained
from tests.helpers.runs import CLASSES, FROZEN, MODEL, begin, finish, publish_dataset

CHILD = {"name": "child", "model": MODEL, "frozen": None, "unfrozen": {"epochs": 2}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Has a finished run `first` of five frozen epochs, of which the second and the last are kept."""
    publish_dataset(tmp_path)
    finish(begin(tmp_path, TrainSettings(name="first", **FROZEN)))
    return tmp_path


def load(root: Path, start: str, classes: list[str] = CLASSES, **changes: object) -> tuple[torch.nn.Module, str]:
    settings = TrainSettings(**{**CHILD, "parent": start, **changes})
    net = resnet.build(settings.model, len(classes))
    return net, pretrained.load_pretrained(net, str(root), settings, classes)


@pytest.mark.parametrize(("start", "epoch"), [("first@2", 2), ("first@best", 5), ("first@last", 5)])
def test_a_child_starts_with_the_classifier_of_the_epoch_it_names(root: Path, start: str, epoch: int):
    net, _ = load(root, start)
    assert net.get_submodule("fc.1").bias.tolist() == [epoch] * len(CLASSES)


def test_a_child_of_a_frozen_epoch_has_the_backbone_of_its_run(root: Path):
    expected = storage.read_bytes(f"{root}/experiments/first/frozen/best.safetensors")
    net, _ = load(root, "first@2")
    from safetensors.torch import load as read

    assert torch.equal(net.get_parameter("layer4.1.conv2.weight"), read(expected)["layer4.1.conv2.weight"])


def test_the_hash_is_that_of_the_epochs_file(root: Path):
    _, sha256 = load(root, "first@2")
    assert sha256 == storage.sha256(Path(root, "experiments/first/frozen/epoch-0002/weights.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("start", "file"),
    [("first@2", "epoch-0002/weights.safetensors"), ("first@best", "best.safetensors")],
)
def test_a_checkpoint_with_one_flipped_byte_is_refused_by_its_hash(root: Path, start: str, file: str):
    path = root / "experiments/first/frozen" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged.*sha256"):
        load(root, start)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("other@best", r"no run `other` in .* There: first"),
        ("first@9", r"`train.parent`: first@9 isn't there: `first` ended after 5 frozen epochs"),
        ("first@3", r"weights of first@3 weren't kept. Add 3 to `train.frozen.keep_epochs` of `first`"),
    ],
)
def test_a_parent_that_is_not_there_is_named(root: Path, start: str, said: str):
    with pytest.raises(UserError, match=said):
        load(root, start)


def test_a_parent_with_other_classes_is_refused(root: Path):
    with pytest.raises(UserError, match=r"first@2 knows 3 classes, dataset `v2` has 2; 3 are in one alone \(bus, tram"):
        load(root, "first@2", ["car", "tram"])


def test_a_parent_of_another_architecture_is_refused(root: Path):
    with pytest.raises(
        UserError, match=r"`train.model.architecture` is resnet50, and first@2 was trained with resnet26"
    ):
        load(root, "first@2", model={"image_size": 32})


def test_a_parent_is_held_to_its_pinned_hash(root: Path):
    with pytest.raises(UserError, match=r"`train.parent_sha256`: first@2 has the sha256 [0-9a-f]{64}, not 0000"):
        load(root, "first@2", parent_sha256="0" * 64)


def test_a_parent_that_is_not_finished_is_refused(root: Path):
    begin(root, TrainSettings(name="second", **FROZEN))
    with pytest.raises(UserError, match=r"the run has not finished this stage"):
        load(root, "second@best")
