"""The training loop: a stage that is preempted after any step and resumed equals an uninterrupted one to the bit."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from carclass.config.schema import AugmentationSettings, FrozenSettings, ModelSettings, StageSettings, UnfrozenSettings
from carclass.models import architectures, classifier
from carclass.runs.checkpoint_index import checkpoint_name
from carclass.training import checkpoint, learner, loop
from carclass.training.dataloader import FeatureLoader, PhotoBlock, PhotoLoader, PhotoSamples

SIDE, EPOCHS = 32, 3
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=SIDE, dropout=0.3)
FP32 = classifier.autocast("fp32", torch.device("cpu"))


def make_samples(count: int, seed: int, *, balanced: bool = False) -> PhotoSamples:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    block = PhotoBlock(pixels, rng.integers(0, 4, count), rng.integers(0, 2**63, count, np.uint64))
    return PhotoSamples([block], seed=1, balanced=balanced)


class Stage:
    """A stage on storage, trained by one process after another."""

    def __init__(self, uri: str, kind: str, **settings: object) -> None:
        self.uri, self.kind = uri, kind
        self.settings: StageSettings = UnfrozenSettings(
            **{"epochs": EPOCHS, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 1, **settings}
        )
        self.loader_batch_size, self.balanced = 8, False
        self.epochs: list[loop.Metrics] = []
        self.steps: list[tuple[float, loop.Metrics]] = []  # with their epoch
        self.learner: learner.Learner | None = None

    def begin(self) -> tuple[learner.Learner, loop.Loader]:
        """Return the learner before its first step, and the loader."""
        torch.manual_seed(0)
        net = architectures.build(MODEL, 4)
        net.prepare_stage(FrozenSettings() if self.kind == "features" else UnfrozenSettings())
        train, val = make_samples(29, 1, balanced=self.balanced), make_samples(9, 2)
        if self.kind == "photos":
            loader: loop.Loader = PhotoLoader(train, val, AugmentationSettings(), self.settings, torch.device("cpu"))
        else:
            features = torch.rand(2, 29, 512), torch.rand(1, 9, 512)
            loader = FeatureLoader(train, val, features, self.loader_batch_size, torch.device("cpu"))
        module = net if self.kind == "photos" else net.fc
        return learner.make_learner(module, self.settings, FP32, seed=1), loader

    def run(self, *, preempt_after: int | None = None, every: int | None = None) -> bool:
        """Resume the stage in a new process, with a checkpoint after `every` steps.

        Return False if it is preempted, after preempt_after steps.
        """
        trained, loader = self.begin()
        self.learner = trained
        newest = checkpoint.newest_valid(self.uri)
        state = loop.TrainState()
        if newest is not None:
            state = loop.TrainState(**checkpoint.restore_checkpoint(f"{self.uri}/{newest}", trained))
        steps = iter(range(1, 10**6))

        def save(state: loop.TrainState) -> None:
            name = checkpoint_name(state.epoch, state.samples)
            checkpoint.write_checkpoint(self.uri, checkpoint.take_snapshot(name, trained, asdict(state)))

        def on_epoch_end(state: loop.TrainState, metrics: loop.Metrics, steps: list[loop.Metrics]) -> None:
            self.epochs.append(metrics)
            self.steps += [(metrics["epoch"], row) for row in steps]

        def after_step(_step: int) -> loop.StepSignal:
            step = next(steps)
            return loop.StepSignal(step == preempt_after, every is not None and step % every == 0)

        return loop.train_epochs(trained, loader, state, loop.Callbacks(save, on_epoch_end, after_step))

    def losses(self) -> list[tuple[float, float, float, float]]:
        """Return (epoch, step, loss, lr) of all steps."""
        return [(epoch, row["step"], row["loss"], row["lr"]) for epoch, row in self.steps]

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the module and its average, and the optimizer's moments, of the last process."""
        assert self.learner is not None
        trained = self.learner
        moments = trained.optimizer.state_dict()["state"]
        return {
            **trained.module.state_dict(),
            **{f"eval.{name}": tensor for name, tensor in trained.eval_module.state_dict().items()},
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
@pytest.mark.parametrize("preempt_after", [1, 3, 4, 6, 11])  # an epoch has four steps
def test_a_resumed_stage_equals_an_uninterrupted_one(stage: Callable[..., Stage], kind: str, preempt_after: int):
    uninterrupted, resumed = stage("uninterrupted", kind), stage("resumed", kind)
    assert uninterrupted.run()
    assert not resumed.run(preempt_after=preempt_after)
    assert resumed.run()
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("kind", ["features", "photos"])
def test_a_stage_with_balanced_sampling_is_resumed(stage: Callable[..., Stage], kind: str):
    uninterrupted, resumed = stage("uninterrupted", kind), stage("resumed", kind)
    uninterrupted.balanced = resumed.balanced = True
    uninterrupted.run()
    resumed.run(preempt_after=6)
    resumed.run()
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_optimizer_is_resumed(stage: Callable[..., Stage], optimizer: str):
    uninterrupted, resumed = stage("uninterrupted", optimizer=optimizer), stage("resumed", optimizer=optimizer)
    uninterrupted.run()
    resumed.run(preempt_after=6)
    resumed.run()
    assert_same(resumed, uninterrupted)


def test_a_stage_preempted_after_every_step_equals_an_uninterrupted_one(stage: Callable[..., Stage]):
    uninterrupted, resumed = stage("uninterrupted"), stage("resumed")
    uninterrupted.run()
    while not resumed.run(preempt_after=1):
        pass
    assert_same(resumed, uninterrupted)


def test_the_moving_average_is_resumed(stage: Callable[..., Stage]):
    uninterrupted, resumed = stage("uninterrupted", ema_decay=0.9), stage("resumed", ema_decay=0.9)
    uninterrupted.run()
    resumed.run(preempt_after=6)
    resumed.run()
    assert_same(resumed, uninterrupted)


def test_the_moving_average_starts_at_the_initial_weights(stage: Callable[..., Stage]):
    trained, loader = stage("one", ema_decay=0.5).begin()
    expected = trained.module[1].weight.detach().clone()
    for step, batch in enumerate(loader.train(1), 1):
        loop.train_step(trained, batch, step, loader.num_steps)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trained.module[1].weight.detach()
    assert trained.ema is not None
    torch.testing.assert_close(trained.ema[1].weight, expected)


def test_validation_uses_the_moving_average(stage: Callable[..., Stage]):
    trained, loader = stage("one", ema_decay=0.5).begin()
    assert trained.ema is not None
    torch.nn.init.zeros_(trained.ema[1].weight)
    assert loop.validate(trained, loader)["val_loss"] == pytest.approx(np.log(4))


def test_checkpoints_do_not_affect_training(stage: Callable[..., Stage]):
    plain, checkpointed = stage("plain"), stage("checkpointed")
    plain.run()
    checkpointed.run(every=3)
    assert_same(checkpointed, plain)


def test_checkpoints_have_the_number_of_samples_in_their_name(stage: Callable[..., Stage]):
    checkpointed = stage("checkpointed", epochs=3)  # of four steps each, the last with five samples
    checkpointed.run(every=3)
    assert checkpoint.names(checkpointed.uri) == [
        "epoch-0000-00000024",
        "epoch-0001-00000016",
        "epoch-0002-00000008",
        "epoch-0002-00000029",
    ]


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(stage: Callable[..., Stage]):
    one = stage("one", epochs=1)
    one.run()
    losses = [row["loss"] for _, row in one.steps]
    assert one.epochs[0]["train_loss"] == pytest.approx(np.average(losses, weights=[8, 8, 8, 5]))


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole_batch(stage: Callable[..., Stage], size: int):
    whole, split = stage("whole", optimizer="sgd"), stage("split", optimizer="sgd", micro_batch_size=size)
    whole.run()
    split.run()
    np.testing.assert_allclose(split.losses(), whole.losses(), rtol=1e-5)


def test_patience_is_resumed(stage: Callable[..., Stage]):
    settings = {"epochs": 20, "lr": 1e-9, "patience": 2}
    uninterrupted, resumed = stage("uninterrupted", **settings), stage("resumed", **settings)
    uninterrupted.run()
    resumed.run(preempt_after=7)
    resumed.run()
    assert [row["epoch"] for row in resumed.epochs] == [row["epoch"] for row in uninterrupted.epochs] == [1, 2, 3]


def test_patience_does_not_end_a_stage_before_its_kept_epochs(stage: Callable[..., Stage]):
    one = stage("one", epochs=20, lr=1e-9, patience=2, keep_epochs=(6,))
    one.run()
    assert [row["epoch"] for row in one.epochs] == [1, 2, 3, 4, 5, 6]


def test_a_finished_stage_is_not_trained_further(stage: Callable[..., Stage]):
    trained, loader = stage("one").begin()
    state = loop.TrainState()
    assert loop.train_epochs(trained, loader, state, loop.Callbacks())
    accuracies = list(state.val_accuracies)
    assert loop.train_epochs(trained, loader, state, loop.Callbacks())
    assert state.val_accuracies == accuracies


# Divergence

DIVERGING = {"optimizer": "sgd", "lr": 1e30, "warmup_epochs": 0, "schedule": "constant"}


def diverge(one: Stage, **options: int) -> str:
    with pytest.raises(loop.DivergedError) as caught:
        one.run(**options)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["features", "photos"])
def test_a_loss_that_is_not_finite_ends_the_stage_with_a_remedy(stage: Callable[..., Stage], kind: str):
    one = stage("one", kind, **DIVERGING)
    message = diverge(one)
    for part in (
        "in the unfrozen stage: loss not finite in epoch 1, step", "of 4 (learning rate 1e+30)", "`train.name`",
        "`train.unfrozen.lr`", "`warmup_epochs`", "`clip_grad_norm: 1`", "`train.precision: fp32`",
    ):  # fmt: skip
        assert part in message
    assert one.epochs == []


def test_the_frozen_stage_is_not_advised_a_precision_that_it_has(stage: Callable[..., Stage]):
    one = stage("one", **DIVERGING)
    one.settings = FrozenSettings(**one.settings.model_dump(include=FrozenSettings.model_fields.keys()))
    message = diverge(one)
    assert "`train.frozen.lr`" in message
    assert "precision" not in message


def test_weights_after_the_last_step_are_checked(stage: Callable[..., Stage]):
    """The loss of the only step is of the weights before it."""
    one = stage("one", **{**DIVERGING, "lr": 1e39, "epochs": 1, "batch_size": 29})
    one.loader_batch_size = 29
    assert "weights not finite in epoch 1, step 1 of 1" in diverge(one)


def test_a_val_loss_that_is_not_finite_ends_the_stage(stage: Callable[..., Stage]):
    one = stage("one")
    trained, loader = one.begin()
    loader.val_features = torch.full_like(loader.val_features, 3e38)
    state = loop.TrainState()
    with pytest.raises(loop.DivergedError, match=r"val loss not finite in epoch 1, step 4 of 4"):
        loop.train_epochs(trained, loader, state, loop.Callbacks())
    assert state.val_accuracies == []


@pytest.mark.parametrize("options", [{"every": 1}, {"preempt_after": 4}])
def test_a_diverged_state_is_not_saved(stage: Callable[..., Stage], options: dict[str, int]):
    one = stage("one", **DIVERGING)
    diverge(one, **options)
    for name in checkpoint.names(one.uri):
        assert all(tensor.isfinite().all() for tensor in checkpoint.read_weights(f"{one.uri}/{name}")[0].values())


def test_a_moving_average_that_is_not_finite_ends_the_stage(stage: Callable[..., Stage]):
    trained, loader = stage("one", ema_decay=0.9).begin()
    assert trained.ema is not None
    torch.nn.init.constant_(trained.ema[1].weight, float("inf"))
    with pytest.raises(loop.DivergedError, match="weights not finite"):
        loop.train_epochs(trained, loader, loop.TrainState(), loop.Callbacks())


def test_gradients_are_clipped_to_a_norm(stage: Callable[..., Stage]):
    trained, loader = stage("one", optimizer="sgd", clip_grad_norm=1e-3, weight_decay=0, warmup_epochs=0).begin()
    before = [parameter.detach().clone() for parameter in trained.module.parameters()]
    loop.train_step(trained, next(iter(loader.train(1))), 1, loader.num_steps)
    changes = [(after - start).flatten() for after, start in zip(trained.module.parameters(), before, strict=True)]
    rate = trained.optimizer.param_groups[0]["lr"]
    assert (torch.cat(changes).norm() / rate).item() == pytest.approx(1e-3, rel=1e-3)


# Learning rates


@pytest.mark.parametrize("num_steps", [1, 4])
def test_every_step_trains(num_steps: int):
    stage = UnfrozenSettings(epochs=2, warmup_epochs=0, lr=1.0)
    rates = [learner.step_rate(stage, step, num_steps) for step in range(1, 2 * num_steps + 1)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.5 * (1 + np.cos(np.pi * (1 - 0.25 / num_steps))))


def test_layer_decay_lowers_the_learning_rate_from_block_to_block(stage: Callable[..., Stage]):
    trained, loader = stage("one", "photos", layer_decay=0.5, warmup_epochs=0, schedule="constant", lr=0.08).begin()
    loop.train_step(trained, next(iter(loader.train(1))), 1, loader.num_steps)
    rates = {id(p): group["lr"] for group in trained.optimizer.param_groups for p in group["params"]}
    rates_by_block = {name.split(".")[0]: rates[id(p)] for name, p in trained.module.named_parameters()}
    assert rates_by_block == pytest.approx(
        {"conv1": 0.005, "bn1": 0.005, "layer1": 0.01, "layer2": 0.02, "layer3": 0.04, "layer4": 0.08, "fc": 0.08}
    )


def test_biases_and_normalisation_have_no_weight_decay(stage: Callable[..., Stage]):
    trained, _ = stage("one", "photos", weight_decay=0.3).begin()
    for group in trained.optimizer.param_groups:
        assert {group["weight_decay"]} == {0.3 if p.ndim > 1 else 0.0 for p in group["params"]}


# Dropout


def apply_dropout(ids: np.ndarray, *, seed: int = 1, epoch: int = 1, p: float = 0.3) -> torch.Tensor:
    dropout = classifier.SampleDropout(p, 300)
    dropout.draw(seed, epoch, ids, torch.device("cpu"))
    return dropout(torch.ones(len(ids), 300))


IDS = np.random.default_rng(3).integers(0, 2**63, 40, np.uint64)


def test_dropout_of_a_sample_does_not_depend_on_its_batch():
    assert torch.equal(apply_dropout(IDS)[::3], apply_dropout(IDS[::3]))


def test_dropout_differs_between_epochs_and_seeds():
    assert not torch.equal(apply_dropout(IDS), apply_dropout(IDS, epoch=2))
    assert not torch.equal(apply_dropout(IDS), apply_dropout(IDS, seed=2))


def test_dropout_keeps_the_mean():
    outputs = apply_dropout(IDS)
    assert (outputs == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert outputs.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("p", "mean"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_everything(p: float, mean: float):
    assert apply_dropout(IDS, p=p).mean() == mean


def test_dropout_is_off_in_evaluation():
    dropout = classifier.SampleDropout(0.5, 300).eval()
    assert torch.equal(dropout(torch.ones(4, 300)), torch.ones(4, 300))


def test_names_of_the_classifiers_tensors_are_stable():
    assert {"fc.1.weight", "fc.1.bias"} <= architectures.build(MODEL, 4).state_dict().keys()
