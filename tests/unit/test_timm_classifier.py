"""Networks of timm as classifiers: features, names, depths, weights, and errors for wrong names and sizes."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from carclass.config import cli
from carclass.config.schema import Config, FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.errors import UserError
from carclass.models import architectures
from carclass.models.classifier import Classifier
from carclass.runs import export
from carclass.runs.model_description import ModelDescription
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import Preprocessing
from carclass.training import preflight, pretrained
from carclass.training.learner import make_optimizer

NAMES = ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]
CLASSES = ["bus", "car", "truck"]


def model(name: str, size: int = 64) -> ModelSettings:
    return ModelSettings(architecture=f"timm:{name}", image_size=size)


def build(name: str, size: int = 64) -> Classifier:
    torch.manual_seed(0)
    return architectures.build(model(name, size), len(CLASSES)).eval()


@pytest.fixture(params=NAMES)
def net(request: pytest.FixtureRequest) -> Classifier:
    """Return a small network with random weights; `name` is timm's."""
    made = build(request.param)
    made.name = request.param
    return made


def test_timm_loads_the_published_tensors_and_gives_the_same_logits(net: Classifier):
    options = {"dynamic_img_size": True} if "vit" in net.name else {}
    theirs = timm.create_model(net.name, num_classes=len(CLASSES), **options).eval()
    theirs.load_state_dict({net.published_name(name): value for name, value in net.state_dict().items()})
    photos = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(net(photos), theirs(photos), atol=1e-5, rtol=1e-5)


def test_depths_reach_from_the_last_block_to_the_first_layers(net: Classifier):
    depths = net.depths()
    first = next(name for name, _ in net.named_parameters() if name.startswith("backbone."))
    assert (depths[first], depths["fc.1.weight"]) == (4, 0)
    assert min(depths.values()) == 0
    assert [*depths] == [name for name, _ in net.named_parameters()]


def test_a_block_learns_at_its_share_of_the_rate(net: Classifier):
    stage = UnfrozenSettings()
    net.prepare_stage(stage)
    optimizer = make_optimizer(net, stage)
    scales = {group["scale"] for group in optimizer.param_groups}
    assert (max(scales), min(scales)) == (1, stage.layer_decay**4)


def test_the_frozen_stage_trains_the_head_alone(net: Classifier):
    net.prepare_stage(FrozenSettings())
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == {
        "fc.1.weight",
        "fc.1.bias",
    }


def test_the_last_blocks_may_be_trained_alone(net: Classifier):
    net.prepare_stage(UnfrozenSettings(blocks=2))
    depths = net.depths()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, depth in depths.items() if depth < 2}
    assert 2 < len(trained) < len(depths)


def test_memory_of_a_step_grows_with_its_photos(net: Classifier):
    settings = TrainSettings(name="a", model=model(net.name))
    one, two = (preflight.saved_bytes(net, settings, count, use_gpu=False) for count in (1, 2))
    assert two - one > 64 * 64 * 3 * 4


def test_photos_are_scaled_as_the_published_weights_expect():
    assert build("vit_tiny_patch16_224").normalisation.mean == (0.5, 0.5, 0.5)
    assert architectures.normalisation("timm:vit_tiny_patch16_224").std == (0.5, 0.5, 0.5)


def test_a_transformer_takes_photos_of_another_size_than_it_was_made_for():
    small = build("vit_tiny_patch16_224", 96)
    assert small(torch.zeros(1, 3, 96, 96)).shape == (1, len(CLASSES))


# Weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of a whole network with 1,000 classes, as timm publishes it."""
    torch.manual_seed(1)
    save_file(timm.create_model("convnext_atto").state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def load(file: Path, name: str) -> Classifier:
    net = build(name)
    pretrained.load_backbone(net, TrainSettings(name="a", model=model(name), parent=str(file)))
    return net


def test_a_published_file_fills_the_backbone(file: Path):
    net, tensors = load(file, "convnext_atto"), load_file(file)
    assert torch.equal(net.state_dict()["backbone.stem.0.weight"], tensors["stem.0.weight"])
    assert net.get_submodule("fc.1").out_features == len(CLASSES)


def test_the_model_of_a_run_fills_the_backbone(file: Path, tmp_path: Path):
    state = {name: value.contiguous() for name, value in build("convnext_atto").state_dict().items()}
    save_file(state, tmp_path / "best.safetensors")
    net = load(tmp_path / "best.safetensors", "convnext_atto")
    expected = build("convnext_atto").state_dict()["backbone.stem.0.weight"]
    assert torch.equal(net.state_dict()["backbone.stem.0.weight"], expected)


def test_a_file_of_another_network_is_an_error(file: Path):
    with pytest.raises(UserError, match=r"not a timm:resnet18 checkpoint: \d+ tensors missing"):
        load(file, "resnet18")


def test_published_weights_are_those_of_the_named_variant():
    assert architectures.pretrained_weights("timm:convnext_tiny.fb_in22k").endswith(
        "/timm/convnext_tiny.fb_in22k/resolve/main/model.safetensors"
    )


def test_weights_that_nobody_publishes_are_an_error():
    with pytest.raises(UserError, match=r"`train.parent`: no weights of timm:coatnet_0_224 are published"):
        architectures.pretrained_weights("timm:coatnet_0_224")


# Settings


def test_published_weights_are_the_default():
    assert TrainSettings(name="a", model={"architecture": "timm:resnet18"}).parent == "pretrained"
    assert TrainSettings(name="a", model={"architecture": "timm:resnet18"}, parent="x@best").parent == "x@best"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atoo", r"timm [\d.]+ has no model convnext_atoo; did you mean `timm:convnext_atto`\?"),
        ("resnet18.a9_in1k", r"has no model resnet18.a9_in1k; did you mean `timm:resnet18.a\d_in1k`\?"),
        ("deit_tiny_distilled_patch16_224", "has several classifiers"),
        ("pit_s_224", "does not tell the groups of layers of pit_s_224"),
    ],
)
def test_an_unusable_network_is_an_error(name: str, message: str):
    with pytest.raises(UserError, match=message):
        build(name, 224)


def test_a_size_that_a_network_cannot_take_is_an_error():
    with pytest.raises(UserError, match=r"`train.model.image_size` is 100, which .* cannot take. Set it to 224"):
        build("vit_tiny_patch16_224", 100)


def test_a_smaller_training_size_that_a_network_cannot_take_is_an_error():
    stage = UnfrozenSettings(train_size=96)
    settings = TrainSettings(name="run", model=model("mixer_s32_224", 224), frozen=None, unfrozen=stage)
    with pytest.raises(UserError, match=r"`train.unfrozen.train_size` is 96, which timm:mixer_s32_224 cannot take"):
        preflight.step_memory(settings, stage, build("mixer_s32_224", 224), use_gpu=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"architecture": "resnet51"}, r"`train.model.architecture`: must be 'resnet50', .* or 'timm:NAME'"),
        ({"architecture": "timm:"}, r"`train.model.architecture`: must be"),
        (
            {"architecture": "timm:resnet18", "stride_in_1x1": True},
            r"`model.stride_in_1x1` has no effect on networks of timm",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_an_error(tmp_path: Path, setting: dict, message: str):
    config = tmp_path / "my.yml"
    config.write_text(f"root: {tmp_path}\ntrain: {{name: a, model: {setting}}}\n")
    with pytest.raises(UserError, match=message):
        cli.load_config(config, {}, Config)


def test_weights_of_a_resnet_are_an_error(tmp_path: Path):
    config = tmp_path / "my.yml"
    config.write_text(
        f"root: {tmp_path}\ntrain: {{name: a, parent: imagenet, model: {{architecture: 'timm:resnet18'}}}}\n"
    )
    with pytest.raises(UserError, match=r"`parent: imagenet` are weights of a ResNet"):
        cli.load_config(config, {}, Config)


# Export


@pytest.mark.nightly  # 60 s: three networks are traced twice
@pytest.mark.parametrize("name", [*export.FORMATS])
def test_an_exported_file_gives_the_same_outputs(net: Classifier, name: str):
    facts = {"run": "r", "stage": "frozen", "epoch": 1, "val_accuracy": 0.5, "sha256": "0"}
    reading = {"min_side": 16, "max_pixels": 10_000_000, "max_side": 640, "quality": 90}
    statistics = [[*values] for values in net.normalisation]
    steps = Preprocessing(reading, None, None, None, 64, *statistics, CLASSES)
    description = ModelDescription({**facts, "model": model(net.name).model_dump()}, steps, 1.5)
    data = export.FORMATS[name].write(PhotoClassifier(net), description)
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert export._compare(name, data, net, description, photos) < export.TOLERANCE
