"""The frozen stage on cached features is the frozen stage on photos, only faster."""

from pathlib import Path

import numpy as np
import pytest
import torch

from carclass.config.schema import AugmentationSettings, FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.models import resnet
from carclass.models.preprocessing import decode_photos
from carclass.runs.run import Run
from carclass.training import feature_cache, loop, pretrained
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    name="x",
    parent="sample",
    precision="fp32",
    model=ModelSettings(architecture="resnet26-narrow", image_size=64),
    augmentation=AugmentationSettings(flip="none", rotation=0, zoom_height=0, zoom_width=0),
    frozen=FrozenSettings(epochs=5, views=1, batch_size=8),
)


@pytest.fixture(scope="module")
def feeds(photos_folder: Path) -> tuple[PhotoSamples, PhotoSamples]:
    """Drawn cars: train and val."""
    photos = sorted((photos_folder / "photos").glob("*.jpg"))[:60]
    pixels = decode_photos([path.read_bytes() for path in photos], 64)
    labels, ids = np.arange(len(photos)) % 4, np.arange(len(photos)).astype(np.uint64)
    train, val = (PhotoSamples([PhotoBlock(pixels[i::2], labels[i::2], ids[i::2])], seed=1) for i in range(2))
    return train, val


def epochs(batches: loop.Loader, net: torch.nn.Module, module: torch.nn.Module) -> list[dict[str, float]]:
    """The metrics of a whole stage."""
    assert SETTINGS.frozen is not None
    told: list[loop.EpochResult] = []
    trained = loop.make_trained(module, SETTINGS.frozen)
    trainee = loop.Trainee(trained, module, SETTINGS.frozen, resnet.autocast("fp32", CPU), seed=1)
    loop.train_epochs(
        trainee, batches, loop.TrainState(), loop.Callbacks(finish=lambda state, finished: told.append(finished))
    )
    return [finished.metrics for finished in told]


def test_the_stage_on_cached_features_equals_the_one_on_photos(
    feeds: tuple[PhotoSamples, PhotoSamples], tmp_path: Path
):
    assert SETTINGS.frozen is not None
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = resnet.build(SETTINGS.model, 4)
        pretrained.load_backbone(net, SETTINGS)
        resnet.prepare_stage(net, "frozen")
        nets.append(net)
    uri = str(tmp_path / "features.safetensors")
    feature_cache.write_cache(uri, nets[0], feeds, Run("", SETTINGS), CPU)
    cached = epochs(feature_cache.open_cache(uri, 8, CPU, seed=1), nets[0], nets[0].fc)
    plain = epochs(
        PhotoLoader(*feeds, SETTINGS.augmentation, UnfrozenSettings(batch_size=8, appearance=False), CPU),
        nets[1],
        nets[1],
    )
    for ours, theirs in zip(cached, plain, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def place(root: Path, views: int, **changes: object) -> str:
    settings = TrainSettings(**{**SETTINGS.model_dump(), "frozen": {"views": views}, **changes})
    return feature_cache.cache_uri(Run(str(root), settings), "digest of the dataset")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "x"
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text('{"parent_sha256": "0"}')
    return tmp_path


def test_photos_as_they_are_have_the_same_features_whatever_the_seed_and_the_augmentation(root: Path):
    assert place(root, 1) == place(root, 1, seed=7, augmentation={"flip": "horizontal", "rotation": 0.2})


def test_mirrored_photos_have_other_features_than_photos_that_are_never_mirrored(root: Path):
    places = [place(root, 2, augmentation={"flip": flip}) for flip in ("none", "horizontal", "horizontal+vertical")]
    assert places[0] != places[1] == places[2]


def test_photos_augmented_otherwise_have_features_of_their_own(root: Path):
    assert place(root, 3) != place(root, 3, augmentation={"rotation": 0.2})


def test_runs_that_differ_in_their_seed_share_augmented_views(root: Path):
    assert place(root, 3) == place(root, 3, seed=7)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"model": {"image_size": 96}}])
def test_features_depend_on_how_they_are_computed(root: Path, changes: dict[str, object]):
    assert place(root, 1) != place(root, 1, **changes)


def test_dropout_comes_after_the_features(root: Path):
    model_settings = SETTINGS.model.model_dump()
    assert place(root, 1) == place(root, 1, model={**model_settings, "dropout": 0.7})
