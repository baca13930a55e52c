"""The benchmarks of training: both sides get the same photos, weights and recipe, and the clock is fair."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from carclass.config.schema import AugmentationSettings, FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.errors import UserError
from carclass.models import resnet
from carclass.tools.benchmarks import labelled, plain_training, train_in_process
from carclass.tools.benchmarks.timing import WARM_UP, Clock
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.loop import learning_rate

CPU = torch.device("cpu")
NARROW = ModelSettings(architecture="resnet26-narrow", image_size=64)


def frozen_settings(num_epochs: int = 3) -> TrainSettings:
    return TrainSettings(
        name="test", model=NARROW, frozen=FrozenSettings(epochs=num_epochs, batch_size=4), unfrozen=None
    )


# Photos


def test_splits_share_no_photo_and_leave_test_photos_alone(photos_folder: Path):
    chosen = labelled.choose(photos_folder, {"train": 20, "val": 10})
    names = [photo.path.name for photos in chosen.values() for photo in photos]
    rows = [line.split(",") for line in (photos_folder / "labels.csv").read_text().splitlines()]
    assert len(set(names)) == 30
    assert not {row[0] for row in rows if row[-1] == "test"} & set(names)


def test_the_same_folder_gives_the_same_photos(photos_folder: Path):
    assert labelled.choose(photos_folder, {"train": 9}) == labelled.choose(photos_folder, {"train": 9})


def test_too_few_photos_are_the_users_error(photos_folder: Path):
    with pytest.raises(UserError, match="5000 are needed"):
        labelled.choose(photos_folder, {"train": 5_000})


def test_a_folder_without_labels_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no labels\.csv"):
        labelled.choose(tmp_path, {"train": 1})


def test_missing_weights_are_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match=labelled.BACKBONE):
        labelled.backbone_file(tmp_path)


def sound(folder: Path, count: int) -> list[labelled.Photo]:
    """Photos of classes 0, 2 and 4 that PIL and we read alike."""
    files = sorted((folder / "photos").glob("0000*.jpg"))[:count]
    return [labelled.Photo(path, i % 3 * 2) for i, path in enumerate(files)]


def test_folders_of_classes_say_the_labels_that_blocks_say(photos_folder: Path, tmp_path: Path):
    chosen = {"train": sound(photos_folder, 8)}
    plain = plain_training.loader(
        labelled.lay_out(chosen, tmp_path) / "train", 4, 32, changed=True, shuffle=True
    ).dataset
    assert {Path(path).name: label for path, label in plain.samples} == {
        photo.path.name: label
        for block in labelled.decode(chosen["train"], 32)
        for photo, label in zip(chosen["train"], block.labels.tolist(), strict=True)
    }


# The plain side


def test_both_networks_say_the_same_with_the_same_weights(tmp_path: Path):
    torch.manual_seed(0)
    settings = ModelSettings(stride_in_1x1=True, image_size=64)
    ours = resnet.build(settings, 5).eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    theirs = plain_training.network(tmp_path / "weights.safetensors", settings, 5).eval()
    theirs.fc = nn.Identity()
    photos = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(photos), theirs(photos), rtol=1e-3, atol=1e-3)


def test_the_timed_epoch_gives_each_photos_features_with_its_label(photos_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    chosen = {"train": sound(photos_folder, 6), "val": sound(photos_folder, 6)}
    folder = labelled.lay_out(chosen, tmp_path)
    net = resnet.build(NARROW, 5)
    net.fc = torch.nn.Linear(512, 5)
    trainer = plain_training.HeadTrainer(net.fc, frozen_settings(), 6, CPU)
    loaders = {split: plain_training.loader(folder / split, 4, 64, changed=False, shuffle=False) for split in chosen}
    epoch = plain_training.frozen_epoch(net, trainer, loaders)
    first, label = loaders["val"].dataset[0]
    with torch.inference_mode():
        expected = net.eval()(first[None])
    assert epoch.labels["val"][0] == label
    torch.testing.assert_close(epoch.features["val"][:1], expected, rtol=0.05, atol=0.05)  # the epoch's is bf16
    assert epoch.features["train"].shape == (6, 512)


def test_the_head_takes_all_epochs_at_the_stages_rates():
    settings = frozen_settings(num_epochs=3)
    trainer = plain_training.HeadTrainer(torch.nn.Linear(8, 3), settings, 10, CPU)
    features, labels = torch.randn(10, 8), torch.arange(10) % 3
    for batch in torch.arange(10).split(4):
        trainer.step(features[batch], labels[batch])
    assert settings.frozen is not None
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(settings.frozen, 1))
    trainer.go_on(features, labels)
    assert trainer.steps == 9
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_accuracy_is_the_share_of_hits():
    head = torch.nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)
    trainer = plain_training.HeadTrainer(head, frozen_settings(), 4, CPU)
    assert trainer.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 2])) == 0.75


# The clock


def test_the_clock_leaves_out_the_warm_up():
    clock = Clock(CPU)
    for step in clock.after_warm_up(range(WARM_UP + 5)):
        time.sleep(0.1 if step < WARM_UP else 0.01)
        clock.count(3)
    assert clock.photos == 15
    assert clock.rate() > 100


def timed(*, repeat: bool) -> train_in_process.Timed:
    rng = np.random.default_rng(0)
    count = 2 * (WARM_UP + 4)
    block = PhotoBlock(
        rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count), np.arange(count).astype(np.uint64)
    )
    feed = PhotoSamples([block], seed=0)
    return train_in_process.Timed(
        PhotoLoader(feed, feed, AugmentationSettings(), UnfrozenSettings(batch_size=2), CPU), repeat, Clock(CPU)
    )


def test_a_turn_is_an_epoch_of_which_the_steps_after_the_warm_up_count():
    batches = timed(repeat=False)
    labels = torch.cat([batch.labels for batch in batches.train(1)])
    assert sorted(labels.tolist()) == list(range(2 * (WARM_UP + 4)))
    assert batches.clock.photos == 8


def test_on_the_device_it_is_the_same_batch_over_and_over():
    steps = list(timed(repeat=True).train(1))
    assert len(steps) == WARM_UP + 4
    assert all(step.inputs is steps[0].inputs for step in steps)


def test_figures_are_medians_of_the_turns():
    rates = {"plain": [2.0, 1.0, 4.0], "ours": [4.0, 3.0, 4.0], "on_device": [5.0, 4.0, 4.0]}
    found = train_in_process.figures(rates, 10, frozen_settings())
    assert (found["ours_vs_plain"], found["ours_vs_plain_lowest"], found["ours_vs_plain_highest"]) == (2, 1, 3)
    assert found["share_outside_the_model"] == pytest.approx(0.2)
