"""The loop: a stage that is interrupted after any step and goes on ends as one that nothing happened to, to the bit."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from carclass.config.schema import AugmentationSettings, ModelSettings, UnfrozenSettings
from carclass.models import resnet
from carclass.training import checkpoint, loop
from carclass.training.dataloader import FeatureLoader, PhotoBlock, PhotoLoader, PhotoSamples

SIDE, EPOCHS = 32, 3
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=SIDE, dropout=0.3)
FP32 = resnet.autocast("fp32", torch.device("cpu"))


def feed_of(count: int, seed: int) -> PhotoSamples:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    return PhotoSamples(
        [PhotoBlock(pixels, rng.integers(0, 4, count), rng.integers(0, 2**63, count, np.uint64))], seed=1
    )


class Stage:
    """A stage on storage, run by one process after another."""

    def __init__(self, uri: str, kind: str, **settings: object) -> None:
        self.uri, self.kind = uri, kind
        self.settings = UnfrozenSettings(
            **{"epochs": EPOCHS, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 1, **settings}
        )
        self.told: list[loop.EpochResult] = []
        self.trainee: loop.Trainee | None = None

    def begin(self) -> tuple[loop.Trainee, loop.Loader]:
        torch.manual_seed(0)
        net = resnet.build(MODEL, 4)
        resnet.prepare_stage(net, "frozen" if self.kind == "features" else "unfrozen")
        train, val = feed_of(29, 1), feed_of(9, 2)
        if self.kind == "photos":
            batches: loop.Loader = PhotoLoader(train, val, AugmentationSettings(), self.settings, torch.device("cpu"))
        else:
            features = torch.rand(2, 29, 512), torch.rand(1, 9, 512)
            batches = FeatureLoader(train, val, features, 8, torch.device("cpu"))
        module = net if self.kind == "photos" else net.fc
        trained = loop.make_trained(module, self.settings)
        return loop.Trainee(trained, module, self.settings, FP32, 1, self.settings.micro_batch_size), batches

    def run(self, *, leave_after: int | None = None, every: int | None = None) -> bool:
        """A process's part: to the end, or until it is told to leave after some steps. Whether the end was reached."""
        trainee, batches = self.begin()
        self.trainee = trainee
        found = checkpoint.newest_valid(self.uri)
        at = f"{self.uri}/{found}"
        state = loop.TrainState(**checkpoint.restore_checkpoint(at, trainee.trained)) if found else loop.TrainState()
        steps = iter(range(1, 10**6))

        def save(state: loop.TrainState, must: bool) -> None:
            name = checkpoint.checkpoint_name(state.epoch, state.samples)
            checkpoint.write_checkpoint(self.uri, checkpoint.take_snapshot(name, trainee.trained, asdict(state)))

        def finish(state: loop.TrainState, finished: loop.EpochResult) -> None:
            self.told.append(finished)

        return loop.train_epochs(
            trainee, batches, state, loop.Callbacks(save, finish, lambda: next(steps) == leave_after, every)
        )

    def losses(self) -> list[tuple[int, float, float, float]]:
        """Of every step, with its epoch and lr."""
        return [
            (told.metrics["epoch"], row["step"], row["loss"], row["lr"]) for told in self.told for row in told.steps
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """With the optimizer's moments, as the last process left them."""
        assert self.trainee is not None
        trained = self.trainee.trained
        moments = trained.optimizer.state_dict()["state"]
        return {
            **trained.module.state_dict(),
            **{f"best.{name}": tensor for name, tensor in trained.best.state_dict().items()},
            **{f"{i}.{name}": m for i, s in moments.items() for name, m in s.items()},
        }


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Stage]:
    return lambda name, kind="features", **settings: Stage(str(tmp_path / name), kind, **settings)


def assert_same(one: Stage, other: Stage) -> None:
    assert one.losses() == other.losses()
    ours, theirs = one.weights(), other.weights()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", ["features", "photos"])
@pytest.mark.parametrize("leave_after", [1, 3, 4, 6, 11])  # an epoch has four steps
def test_a_stage_that_left_and_goes_on_is_the_undisturbed_one(stage: Callable[..., Stage], kind: str, leave_after: int):
    undisturbed, left = stage("undisturbed", kind), stage("left", kind)
    assert undisturbed.run()
    assert not left.run(leave_after=leave_after)
    assert left.run()
    assert_same(left, undisturbed)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_optimizer_goes_on_where_it_was(stage: Callable[..., Stage], optimizer: str):
    undisturbed, left = stage("undisturbed", optimizer=optimizer), stage("left", optimizer=optimizer)
    undisturbed.run()
    left.run(leave_after=6)
    left.run()
    assert_same(left, undisturbed)


def test_a_stage_that_leaves_after_every_step_comes_to_the_same_end(stage: Callable[..., Stage]):
    undisturbed, left = stage("undisturbed"), stage("left")
    undisturbed.run()
    while not left.run(leave_after=1):
        pass
    assert_same(left, undisturbed)


def test_the_average_goes_on_where_it_was(stage: Callable[..., Stage]):
    undisturbed, left = stage("undisturbed", ema_decay=0.9), stage("left", ema_decay=0.9)
    undisturbed.run()
    left.run(leave_after=6)
    left.run()
    assert_same(left, undisturbed)


def test_the_average_follows_the_weights_from_where_they_began(stage: Callable[..., Stage]):
    trainee, batches = stage("one", ema_decay=0.5).begin()
    trained = trainee.trained
    expected = trained.module[1].weight.detach().clone()
    for step, batch in enumerate(batches.train(1), 1):
        loop.train_step(trainee, batch, step, batches.num_steps)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trained.module[1].weight.detach()
    assert trained.average is not None
    torch.testing.assert_close(trained.average[1].weight, expected)


def test_what_is_validated_is_the_average(stage: Callable[..., Stage]):
    trainee, batches = stage("one", ema_decay=0.5).begin()
    assert trainee.trained.average is not None
    torch.nn.init.zeros_(trainee.trained.average[1].weight)
    assert loop.validate(trainee, batches)["val_loss"] == pytest.approx(np.log(4))


def test_checkpoints_change_nothing(stage: Callable[..., Stage]):
    plain, often = stage("plain"), stage("often")
    plain.run()
    often.run(every=3)
    assert_same(often, plain)


def test_checkpoints_come_every_so_many_steps_and_say_how_many_samples_were_seen(stage: Callable[..., Stage]):
    often = stage("often", epochs=3)  # of four steps each, the last with five samples
    often.run(every=3)
    assert checkpoint.names(often.uri) == [
        "epoch-0000-00000024",
        "epoch-0001-00000016",
        "epoch-0002-00000008",
        "epoch-0002-00000029",
    ]


def test_the_epochs_loss_is_the_mean_over_its_samples(stage: Callable[..., Stage]):
    one = stage("one", epochs=1)
    one.run()
    (told,) = one.told
    losses, counts = [row["loss"] for row in told.steps], [8, 8, 8, 5]
    assert told.metrics["train_loss"] == pytest.approx(np.average(losses, weights=counts))


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_gradients_summed_over_pieces_are_those_of_the_whole_batch(stage: Callable[..., Stage], size: int):
    whole, pieces = stage("whole", optimizer="sgd"), stage("pieces", optimizer="sgd", micro_batch_size=size)
    whole.run()
    pieces.run()
    np.testing.assert_allclose(pieces.losses(), whole.losses(), rtol=1e-5)


def test_patience_counts_on_after_a_restart(stage: Callable[..., Stage]):
    whole, left = stage("whole", epochs=20, lr=1e-9, patience=2), stage("left", epochs=20, lr=1e-9, patience=2)
    whole.run()
    left.run(leave_after=7)
    left.run()
    assert [told.metrics["epoch"] for told in left.told] == [told.metrics["epoch"] for told in whole.told] == [1, 2, 3]


def test_patience_waits_for_the_epochs_that_other_runs_start_from(stage: Callable[..., Stage]):
    waited = stage("waited", epochs=20, lr=1e-9, patience=2, keep_epochs=(6,))
    waited.run()
    assert [told.metrics["epoch"] for told in waited.told] == [1, 2, 3, 4, 5, 6]


def test_a_finished_stage_trains_no_more(stage: Callable[..., Stage]):
    trainee, batches = stage("one").begin()
    state = loop.TrainState()
    assert loop.train_epochs(trainee, batches, state, loop.Callbacks())
    seen = list(state.val_accuracies)
    assert loop.train_epochs(trainee, batches, state, loop.Callbacks())
    assert state.val_accuracies == seen


# Learning rates


def test_each_block_learns_at_its_share_of_the_rate_of_the_block_above(stage: Callable[..., Stage]):
    trainee, batches = stage("one", "photos", layer_decay=0.5, warmup_epochs=0, schedule="constant", lr=0.08).begin()
    loop.train_step(trainee, next(iter(batches.train(1))), 1, batches.num_steps)
    rates = {id(p): group["lr"] for group in trainee.trained.optimizer.param_groups for p in group["params"]}
    found = {name.split(".")[0]: rates[id(p)] for name, p in trainee.trained.module.named_parameters()}
    assert found == pytest.approx(
        {"conv1": 0.005, "bn1": 0.005, "layer1": 0.01, "layer2": 0.02, "layer3": 0.04, "layer4": 0.08, "fc": 0.08}
    )


def test_only_weights_of_several_dimensions_are_decayed(stage: Callable[..., Stage]):
    trainee, _ = stage("one", "photos", weight_decay=0.3).begin()
    for group in trainee.trained.optimizer.param_groups:
        assert {group["weight_decay"]} == {0.3 if p.ndim > 1 else 0.0 for p in group["params"]}


# Dropout


def kept(ids: np.ndarray, *, seed: int = 1, epoch: int = 1, p: float = 0.3) -> torch.Tensor:
    dropout = resnet.SampleDropout(p, 300)
    dropout.draw(seed, epoch, ids, torch.device("cpu"))
    return dropout(torch.ones(len(ids), 300))


IDS = np.random.default_rng(3).integers(0, 2**63, 40, np.uint64)


def test_what_a_sample_drops_does_not_depend_on_the_others_of_its_batch():
    assert torch.equal(kept(IDS)[::3], kept(IDS[::3]))


def test_every_epoch_and_seed_drops_something_else():
    assert not torch.equal(kept(IDS), kept(IDS, epoch=2))
    assert not torch.equal(kept(IDS), kept(IDS, seed=2))


def test_dropout_drops_its_share_and_keeps_the_mean():
    found = kept(IDS)
    assert (found == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert found.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("p", "mean"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_or_everything_may_be_dropped(p: float, mean: float):
    assert kept(IDS, p=p).mean() == mean


def test_nothing_is_dropped_in_evaluation():
    dropout = resnet.SampleDropout(0.5, 300).eval()
    assert torch.equal(dropout(torch.ones(4, 300)), torch.ones(4, 300))


def test_the_classifier_keeps_its_names():
    assert {"fc.1.weight", "fc.1.bias"} <= resnet.build(MODEL, 4).state_dict().keys()
