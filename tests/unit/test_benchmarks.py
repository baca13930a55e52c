"""Training benchmarks: same photos, weights and hyperparameters on both sides, and a fair clock."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from carclass.config.schema import AugmentationSettings, FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.models import architectures
from carclass.tools.benchmarks import labelled, parts, plain_training, rows, train_in_process
from carclass.tools.benchmarks.timing import WARM_UP, ThroughputClock
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import step_rate

CPU = torch.device("cpu")
NARROW = ModelSettings(architecture="resnet26-narrow", image_size=64)


def frozen_settings(num_epochs: int = 3) -> TrainSettings:
    return TrainSettings(
        name="test", model=NARROW, frozen=FrozenSettings(epochs=num_epochs, batch_size=4), unfrozen=None
    )


# Photos


@pytest.mark.slow
def test_splits_share_no_photo_and_contain_no_test_photo(photos_folder: Path):
    splits = labelled.choose_photos(photos_folder, {"train": 20, "val": 10})
    names = [photo.path.name for photos in splits.values() for photo in photos]
    rows = [line.split(",") for line in (photos_folder / "labels.csv").read_text().splitlines()]
    assert len(set(names)) == 30
    assert not {row[0] for row in rows if row[-1] == "test"} & set(names)


def test_the_same_folder_gives_the_same_photos(photos_folder: Path):
    assert labelled.choose_photos(photos_folder, {"train": 9}) == labelled.choose_photos(photos_folder, {"train": 9})


def test_too_few_photos_are_a_user_error(photos_folder: Path):
    with pytest.raises(UserError, match="5000 are needed"):
        labelled.choose_photos(photos_folder, {"train": 5_000})


def test_a_folder_without_labels_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no labels\.csv"):
        labelled.choose_photos(tmp_path, {"train": 1})


def test_missing_weights_are_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=labelled.BACKBONE):
        labelled.backbone_file(tmp_path)


def valid_photos(folder: Path, count: int) -> list[labelled.Photo]:
    """Return photos of classes 0, 2 and 4 that PIL and carclass decode alike."""
    files = sorted((folder / "photos").glob("0000*.jpg"))[:count]
    return [labelled.Photo(path, i % 3 * 2) for i, path in enumerate(files)]


def test_class_folders_and_blocks_have_the_same_labels(photos_folder: Path, tmp_path: Path):
    splits = {"train": valid_photos(photos_folder, 8)}
    plain = plain_training.make_loader(
        labelled.link_class_folders(splits, tmp_path) / "train", 4, 32, augment=True, shuffle=True
    ).dataset
    assert {Path(path).name: label for path, label in plain.samples} == {
        photo.path.name: label
        for block in labelled.decode(splits["train"], 32)
        for photo, label in zip(splits["train"], block.labels.tolist(), strict=True)
    }


# The plain side


@pytest.mark.slow
def test_both_networks_return_the_same_features_with_the_same_weights(tmp_path: Path):
    torch.manual_seed(0)
    settings = ModelSettings(stride_in_1x1=True, image_size=64)
    ours = architectures.build(settings, 5).eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    plain = plain_training.build_network(tmp_path / "weights.safetensors", settings, 5).eval()
    plain.fc = nn.Identity()
    photos = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(photos), plain(photos), rtol=1e-3, atol=1e-3)


def test_the_timed_epoch_returns_features_with_their_labels(photos_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    splits = {"train": valid_photos(photos_folder, 6), "val": valid_photos(photos_folder, 6)}
    folder = labelled.link_class_folders(splits, tmp_path)
    net = architectures.build(NARROW, 5)
    net.fc = torch.nn.Linear(512, 5)
    trainer = plain_training.HeadTrainer(net.fc, frozen_settings(), 6, CPU)
    loaders = {
        split: plain_training.make_loader(folder / split, 4, 64, augment=False, shuffle=False) for split in splits
    }
    epoch = plain_training.train_frozen_epoch(net, trainer, loaders)
    first, label = loaders["val"].dataset[0]
    with torch.inference_mode():
        expected = net.eval()(first[None])
    assert epoch.labels["val"][0] == label
    torch.testing.assert_close(epoch.features["val"][:1], expected, rtol=0.05, atol=0.05)  # the epoch runs in bf16
    assert epoch.features["train"].shape == (6, 512)


def test_the_head_trains_all_epochs_with_the_stages_learning_rates():
    settings = frozen_settings(num_epochs=3)
    trainer = plain_training.HeadTrainer(torch.nn.Linear(8, 3), settings, 10, CPU)
    features, labels = torch.randn(10, 8), torch.arange(10) % 3
    for batch in torch.arange(10).split(4):
        trainer.step(features[batch], labels[batch])
    assert settings.frozen is not None
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(step_rate(settings.frozen, 3, 3))
    trainer.train_remaining(features, labels)
    assert trainer.steps == 9
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(step_rate(settings.frozen, 9, 3))


def test_accuracy_is_the_share_of_correct_predictions():
    head = torch.nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)
    trainer = plain_training.HeadTrainer(head, frozen_settings(), 4, CPU)
    assert trainer.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 2])) == 0.75


# A driver's steps


@pytest.mark.parametrize("step", sorted(rows.STEPS.keys() - {"mask_positions"}))  # which needs Ray
def test_a_drivers_steps_run_over_linked_parts(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "PART_ROWS", 400)
    monkeypatch.setattr(rows, "NUM_PARTS", 1)
    rows.link_dataset(tmp_path, 700, rows.write_parts(tmp_path))
    source = dataset.load_dataset(str(tmp_path), "700")
    assert source.manifest["rows"] == 800
    rows.STEPS[step](source)


# The clock


def test_the_clock_excludes_the_warm_up():
    clock = ThroughputClock(CPU)
    for step in clock.after_warm_up(range(WARM_UP + 5)):
        time.sleep(0.1 if step < WARM_UP else 0.01)
        clock.count(3)
    assert clock.photos == 15
    assert clock.rate() > 100


def timed_loader(*, repeat: bool) -> train_in_process.TimedLoader:
    rng = np.random.default_rng(0)
    count = 2 * (WARM_UP + 4)
    block = PhotoBlock(
        rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count), np.arange(count).astype(np.uint64)
    )
    samples = PhotoSamples([block], seed=0)
    return train_in_process.TimedLoader(
        PhotoLoader(samples, samples, AugmentationSettings(), UnfrozenSettings(batch_size=2), CPU),
        repeat,
        ThroughputClock(CPU),
    )


def test_a_turn_is_an_epoch_whose_steps_count_after_the_warm_up():
    batches = timed_loader(repeat=False)
    labels = torch.cat([batch.labels for batch in batches.train(1)])
    assert sorted(labels.tolist()) == list(range(2 * (WARM_UP + 4)))
    assert batches.clock.photos == 8


def test_the_on_device_loader_repeats_one_batch():
    steps = list(timed_loader(repeat=True).train(1))
    assert len(steps) == WARM_UP + 4
    assert all(step.inputs is steps[0].inputs for step in steps)


def test_the_summary_has_the_medians_of_the_turns():
    rates = {"plain": [2.0, 1.0, 4.0], "ours": [4.0, 3.0, 4.0], "on_device": [5.0, 4.0, 4.0]}
    summary = train_in_process.summarise(rates, 10, frozen_settings())
    assert (summary["ours_vs_plain"], summary["ours_vs_plain_lowest"], summary["ours_vs_plain_highest"]) == (2, 1, 3)
    assert summary["share_outside_the_model"] == pytest.approx(0.2)


def test_the_steps_of_the_benchmark_of_parts_lose_none(tmp_path: Path):
    for step in ("record", "publish", "load", "report"):  # `positions` needs Ray
        for _ in parts.STEPS[step](str(tmp_path), 600):
            pass
