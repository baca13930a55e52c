"""Checkpoints: restored exactly, and damage detected before anything is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from carclass.config.schema import FrozenSettings
from carclass.errors import UserError
from carclass.models import classifier
from carclass.runs.checkpoint_index import INDEX, WEIGHTS, checkpoint_name
from carclass.runs.saved_model import serialise
from carclass.training import checkpoint
from carclass.training.checkpoint import OPTIMIZER
from carclass.training.learner import Learner, make_learner


def learner(value: float) -> Learner:
    """Return a learner after one step from weights of a value."""
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    nn.init.constant_(module.weight, value)
    stage = FrozenSettings(lr=0.1, ema_decay=None)
    made = make_learner(module, stage, classifier.autocast("fp32", torch.device("cpu")), seed=1)
    module(torch.ones(1, 3, 8, 8)).sum().backward()
    made.optimizer.step()
    return made


def write(folder: Path, epoch: int, samples: int = 0, *, val_accuracies: list[float] | None = None) -> Path:
    """Write a checkpoint to resume from, or without samples the result of an epoch."""
    name = checkpoint_name(epoch, samples)
    state = {"epoch": epoch, "val_accuracies": val_accuracies or []}
    checkpoint.write_checkpoint(str(folder), checkpoint.take_snapshot(name, learner(epoch + samples / 100), state))
    return folder / name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_a_checkpoint_is_restored_exactly(tmp_path: Path):
    expected, restored = learner(2.05), learner(7)
    state = checkpoint.restore_checkpoint(str(write(tmp_path, 2, 5)), restored)
    assert state == {"epoch": 2, "val_accuracies": []}
    assert torch.equal(restored.module.weight, expected.module.weight)


def test_the_moving_average_is_restored_besides_the_weights(tmp_path: Path):
    written, restored = (learner(value)._replace(ema=learner(value + 1).module) for value in (2, 7))
    checkpoint.write_checkpoint(
        str(tmp_path), checkpoint.take_snapshot("epoch-0001-00000064", written, {"epoch": 1, "val_accuracies": []})
    )
    checkpoint.restore_checkpoint(str(tmp_path / "epoch-0001-00000064"), restored)
    assert restored.ema is not None
    assert torch.equal(restored.module.weight, written.module.weight)
    assert torch.equal(restored.ema.weight, learner(3).module.weight)


def test_the_result_of_an_epoch_is_the_moving_average(tmp_path: Path):
    written = learner(2)._replace(ema=learner(3).module)
    state = {"epoch": 1, "val_accuracies": [0.5]}
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.take_snapshot("epoch-0001", written, state))
    module = learner(7).module
    assert checkpoint.restore_best(str(tmp_path), module) == state
    assert torch.equal(module.weight, learner(3).module.weight)


def test_serialised_tensors_are_a_safetensors_file():
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "weights": torch.randn(4, 3, 2, 2, generator=rng).to(memory_format=torch.channels_last),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "counter": torch.tensor(7),
    }
    loaded = load(b"".join(serialise(tensors)))
    assert loaded.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(loaded[name], tensors[name])] == []
    assert [name for name in tensors if loaded[name].dtype != tensors[name].dtype] == []


def test_moments_are_restored_in_the_memory_format_of_their_parameters(tmp_path: Path):
    restored = learner(7)
    checkpoint.restore_checkpoint(str(write(tmp_path, 2, 64)), restored)
    weight = restored.module.weight
    assert restored.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_later_steps_do_not_change_a_snapshot(tmp_path: Path):
    trained = learner(1)
    before = trained.module.weight.detach().clone()
    snapshot = checkpoint.take_snapshot("epoch-0001", trained, {})
    trained.optimizer.step()
    assert torch.equal(snapshot.tensors[WEIGHTS]["weight"], before)


def test_names_of_checkpoints_sort_by_age(tmp_path: Path):
    for epoch, samples in [(1, 0), (0, 64), (1, 128), (1, 96), (10, 0), (2, 0)]:
        write(tmp_path, epoch, samples)
    assert checkpoint.names(str(tmp_path)) == [
        "epoch-0000-00000064",
        "epoch-0001",
        "epoch-0001-00000096",
        "epoch-0001-00000128",
        "epoch-0002",
        "epoch-0010",
    ]


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, INDEX])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_training_falls_back_from_a_damaged_checkpoint_to_the_previous_one(tmp_path: Path, name: str, damage):
    write(tmp_path, 1, 64)
    damage(write(tmp_path, 2, 64) / name)
    assert checkpoint.newest_valid(str(tmp_path)) == "epoch-0001-00000064"


def test_the_fallback_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, 1, 64)
    flip(write(tmp_path, 2, 64) / WEIGHTS)
    checkpoint.newest_valid(str(tmp_path))
    output = capsys.readouterr().out
    assert "epoch-0002-00000064 is damaged: the sha256 of weights.safetensors" in output
    assert "falling back to the previous checkpoint" in output


def test_a_damaged_newest_checkpoint_is_removed(tmp_path: Path):
    write(tmp_path, 1, 64)
    flip(write(tmp_path, 2, 64) / WEIGHTS)
    checkpoint.newest_valid(str(tmp_path))
    assert checkpoint.names(str(tmp_path)) == ["epoch-0001-00000064"]


def test_training_does_not_resume_from_the_result_of_an_epoch(tmp_path: Path):
    write(tmp_path, 1, 64)
    write(tmp_path, 2)
    assert checkpoint.newest_valid(str(tmp_path)) == "epoch-0001-00000064"


def test_the_result_of_an_epoch_has_only_weights(tmp_path: Path):
    assert sorted(path.name for path in write(tmp_path, 2).iterdir()) == [INDEX, WEIGHTS]


def test_a_stage_without_checkpoints_has_none_to_resume_from(tmp_path: Path):
    assert checkpoint.newest_valid(str(tmp_path / "unfrozen")) is None


def test_damage_of_all_checkpoints_is_an_error_with_a_remedy(tmp_path: Path):
    for epoch in (1, 2):
        flip(write(tmp_path, epoch, 64) / WEIGHTS)
    with pytest.raises(
        UserError, match=r"all checkpoints in .* are damaged or not finite. Restore one .* or delete this folder"
    ):
        checkpoint.newest_valid(str(tmp_path))
    assert len(checkpoint.names(str(tmp_path))) == 2


def test_no_part_of_a_damaged_checkpoint_is_loaded(tmp_path: Path):
    flip(write(tmp_path, 2, 64) / OPTIMIZER)
    restored = learner(7)
    before = restored.module.weight.detach().clone()
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.restore_checkpoint(str(tmp_path / "epoch-0002-00000064"), restored)
    assert torch.equal(restored.module.weight, before)


def test_the_best_epoch_is_the_first_with_the_highest_accuracy(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch, val_accuracies=[0.5, 0.7, 0.7][:epoch])
    write(tmp_path, 3, 64, val_accuracies=[0.5, 0.7, 0.7])
    assert checkpoint.restore_best(str(tmp_path), learner(7).module)["epoch"] == 2


def test_a_damaged_best_epoch_is_replaced_by_the_next_best(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch, val_accuracies=[0.5, 0.7, 0.6][:epoch])
    flip(tmp_path / "epoch-0002" / WEIGHTS)
    assert checkpoint.restore_best(str(tmp_path), learner(7).module)["epoch"] == 3


def test_pruning_removes_all_other_checkpoints(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch)
    (tmp_path / "epoch-0003-00000064").mkdir()  # of a killed run
    (tmp_path / "epoch-0003-00000064" / WEIGHTS).write_bytes(b"half")
    (tmp_path / "best.json").write_bytes(b"{}")
    checkpoint.prune(str(tmp_path), ["epoch-0002", "epoch-0003"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "epoch-0002", "epoch-0003"]
