"""The feature cache: same training as on photos, and a key of all dependencies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from carclass.config.schema import AugmentationSettings, FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.data import formats
from carclass.data.photo import decode_photos
from carclass.errors import UserError
from carclass.models import architectures, classifier
from carclass.runs.run import Run
from carclass.training import feature_cache, loop, pretrained, worker
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import make_learner
from carclass.training.preemption import WorkerContext

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
def splits(photos_folder: Path) -> tuple[PhotoSamples, PhotoSamples]:
    """Return drawn cars: train and val."""
    photos = sorted((photos_folder / "photos").glob("*.jpg"))[:60]
    pixels = decode_photos([path.read_bytes() for path in photos], 64)
    labels, ids = np.arange(len(photos)) % 4, np.arange(len(photos)).astype(np.uint64)
    train, val = (PhotoSamples([PhotoBlock(pixels[i::2], labels[i::2], ids[i::2])], seed=1) for i in range(2))
    return train, val


def train(loader: loop.Loader, module: torch.nn.Module) -> list[loop.Metrics]:
    """Train a whole stage and return its metrics by epoch."""
    assert SETTINGS.frozen is not None
    epochs: list[loop.Metrics] = []
    learner = make_learner(module, SETTINGS.frozen, classifier.autocast("fp32", CPU), seed=1)
    callbacks = loop.Callbacks(on_epoch_end=lambda _state, metrics, _steps: epochs.append(metrics))
    loop.train_epochs(learner, loader, loop.TrainState(), callbacks)
    return epochs


@pytest.mark.parametrize("damage", [b"", b"\0" * 100])
def test_damaged_features_are_named_with_a_way_out(tmp_path: Path, damage: bytes):
    (tmp_path / "features.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"features.safetensors is damaged .* Delete it and run the same command again"):
        feature_cache.open_cache(str(tmp_path / "features.safetensors"), 8, CPU, seed=1)


def test_features_with_a_changed_bit_are_damaged(splits: tuple[PhotoSamples, PhotoSamples], tmp_path: Path):
    uri, net = str(tmp_path / "features.safetensors"), architectures.build(SETTINGS.model, 4)
    feature_cache.write_cache(uri, net, splits, Run("", SETTINGS), CPU)
    data = bytearray(Path(uri).read_bytes())
    data[-1] ^= 0x80  # a sign: the value stays finite
    Path(uri).write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged .other bytes than those that were written.* Delete it"):
        feature_cache.open_cache(uri, 8, CPU, seed=1)


def test_training_on_cached_features_equals_training_on_photos(
    splits: tuple[PhotoSamples, PhotoSamples], tmp_path: Path
):
    assert SETTINGS.frozen is not None
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = architectures.build(SETTINGS.model, 4)
        pretrained.load_backbone(net, SETTINGS)
        net.prepare_stage(FrozenSettings())
        nets.append(net)
    uri = str(tmp_path / "features.safetensors")
    feature_cache.write_cache(uri, nets[0], splits, Run("", SETTINGS), CPU)
    cached = train(feature_cache.open_cache(uri, 8, CPU, seed=1), nets[0].fc)
    stage = UnfrozenSettings(batch_size=8, appearance=False)
    uncached = train(PhotoLoader(*splits, SETTINGS.augmentation, stage, CPU), nets[1])
    for metrics, expected in zip(cached, uncached, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_worker_draws_features_as_its_run_is_set(root: Path, sampling: str):
    run = Run(str(root), SETTINGS.model_copy(update={"sampling": sampling}))
    net = architectures.build(SETTINGS.model, 2)
    pixels, ids = np.zeros((12, 64, 64, 3), np.uint8), np.arange(12).astype(np.uint64)
    splits = [PhotoSamples([PhotoBlock(pixels, np.repeat([0, 1], [2, 10]), ids.copy())], seed=1) for _ in range(2)]
    feature_cache.write_cache(feature_cache.cache_uri(run, "digest"), net, splits, run, CPU)
    job = worker.StageJob(run, "frozen", ["a", "b"], "digest", {}, 1)
    loader = worker._make_loader(job, net, WorkerContext(0, 1, CPU, lambda: False))
    drawn = torch.cat([batch.labels for batch in loader.train(1)])
    assert drawn.bincount().tolist() == ([6, 6] if sampling == "balanced" else [2, 10])


def test_features_do_not_depend_on_the_sampling(root: Path):
    assert uri_of(root, 3) == uri_of(root, 3, sampling="balanced")


def uri_of(root: Path, views: int, **changes: object) -> str:
    settings = TrainSettings(**{**SETTINGS.model_dump(), "frozen": {"views": views}, **changes})
    return feature_cache.cache_uri(Run(str(root), settings), "digest of the dataset")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "x"
    folder.mkdir(parents=True)
    lineage = dict.fromkeys(("parent", "parent_sha256", "dataset", "dataset_digest", "code", "started"), "0")
    formats.write(f"{folder}/lineage.json", "lineage", {**lineage, "environments": []})
    return tmp_path


def test_unchanged_photos_share_features_across_seeds_and_augmentations(root: Path):
    assert uri_of(root, 1) == uri_of(root, 1, seed=7, augmentation={"flip": "horizontal", "rotation": 0.2})


def test_mirrored_and_never_mirrored_photos_have_different_features(root: Path):
    uris = [uri_of(root, 2, augmentation={"flip": flip}) for flip in ("none", "horizontal", "horizontal+vertical")]
    assert uris[0] != uris[1] == uris[2]


def test_augmented_views_depend_on_the_augmentation(root: Path):
    assert uri_of(root, 3) != uri_of(root, 3, augmentation={"rotation": 0.2})


def test_augmented_views_are_shared_across_seeds(root: Path):
    assert uri_of(root, 3) == uri_of(root, 3, seed=7)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"model": {"image_size": 96}}])
def test_features_depend_on_precision_and_image_size(root: Path, changes: dict[str, object]):
    assert uri_of(root, 1) != uri_of(root, 1, **changes)


def test_features_do_not_depend_on_dropout(root: Path):
    model_settings = SETTINGS.model.model_dump()
    assert uri_of(root, 1) == uri_of(root, 1, model={**model_settings, "dropout": 0.7})
