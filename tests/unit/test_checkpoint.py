"""Checkpoints: what is written comes back, and what is damaged is found before it does harm."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from carclass.errors import UserError
from carclass.runs.saved_model import serialise
from carclass.training import checkpoint
from carclass.training.checkpoint import INDEX, OPTIMIZER, WEIGHTS, TrainedParts


def trained(value: float) -> TrainedParts:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    nn.init.constant_(module.weight, value)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return TrainedParts(module, optimizer)


def write(folder: Path, epoch: int, samples: int = 0, *, val_accuracies: list[float] | None = None) -> Path:
    """To go on from where samples are given, else an epoch's result."""
    name = checkpoint.checkpoint_name(epoch, samples)
    state = {"epoch": epoch, "val_accuracies": val_accuracies or []}
    checkpoint.write_checkpoint(str(folder), checkpoint.take_snapshot(name, trained(epoch + samples / 100), state))
    return folder / name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    expected, found = trained(2.05), trained(7)
    state = checkpoint.restore_checkpoint(str(write(tmp_path, 2, 5)), found)
    assert state == {"epoch": 2, "val_accuracies": []}
    assert torch.equal(found.module.weight, expected.module.weight)


def test_averaged_weights_come_back_beside_those_that_are_trained(tmp_path: Path):
    written, found = (trained(value)._replace(average=trained(value + 1).module) for value in (2, 7))
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.take_snapshot("epoch-0001-00000064", written, {}))
    checkpoint.restore_checkpoint(str(tmp_path / "epoch-0001-00000064"), found)
    assert found.average is not None
    assert torch.equal(found.module.weight, written.module.weight)
    assert torch.equal(found.average.weight, trained(3).module.weight)


def test_averaged_weights_are_the_ones_to_use(tmp_path: Path):
    written = trained(2)._replace(average=trained(3).module)
    state = {"epoch": 1, "val_accuracies": [0.5]}
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.take_snapshot("epoch-0001", written, state))
    module = trained(7).module
    assert checkpoint.restore_best(str(tmp_path), module) == state
    assert torch.equal(module.weight, trained(3).module.weight)


def test_a_file_in_pieces_is_read_by_the_library():
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "weights": torch.randn(4, 3, 2, 2, generator=rng).to(memory_format=torch.channels_last),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "counter": torch.tensor(7),
    }
    found = load(b"".join(serialise(tensors)))
    assert found.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(found[name], tensors[name])] == []
    assert [name for name in tensors if found[name].dtype != tensors[name].dtype] == []


def test_moments_come_back_in_the_memory_format_of_their_parameters(tmp_path: Path):
    found = trained(7)
    checkpoint.restore_checkpoint(str(write(tmp_path, 2, 64)), found)
    module, optimizer, _ = found
    assert optimizer.state[module.weight]["exp_avg"].stride() == module.weight.stride()


def test_a_snapshot_is_not_changed_by_later_steps(tmp_path: Path):
    found = trained(1)
    before = found.module.weight.detach().clone()
    snapshot = checkpoint.take_snapshot("epoch-0001", found, {})
    found.optimizer.step()
    assert torch.equal(snapshot.tensors[WEIGHTS]["weight"], before)


def test_checkpoints_are_named_in_the_order_of_their_age(tmp_path: Path):
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
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, name: str, harm):
    write(tmp_path, 1, 64)
    harm(write(tmp_path, 2, 64) / name)
    assert checkpoint.newest_valid(str(tmp_path)) == "epoch-0001-00000064"


def test_going_back_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, 1, 64)
    flip(write(tmp_path, 2, 64) / WEIGHTS)
    checkpoint.newest_valid(str(tmp_path))
    said = capsys.readouterr().out
    assert "epoch-0002-00000064 is damaged: the sha256 of weights.safetensors" in said
    assert "going back to the checkpoint before it" in said


def test_a_damaged_checkpoint_is_met_only_once(tmp_path: Path):
    write(tmp_path, 1, 64)
    flip(write(tmp_path, 2, 64) / WEIGHTS)
    checkpoint.newest_valid(str(tmp_path))
    assert checkpoint.names(str(tmp_path)) == ["epoch-0001-00000064"]


def test_an_epochs_result_is_not_gone_on_from(tmp_path: Path):
    write(tmp_path, 1, 64)
    write(tmp_path, 2)
    assert checkpoint.newest_valid(str(tmp_path)) == "epoch-0001-00000064"


def test_an_epochs_result_holds_weights_alone(tmp_path: Path):
    assert sorted(path.name for path in write(tmp_path, 2).iterdir()) == [INDEX, WEIGHTS]


def test_a_stage_without_checkpoints_starts_anew(tmp_path: Path):
    assert checkpoint.newest_valid(str(tmp_path / "unfrozen")) is None


def test_when_no_checkpoint_is_sound_the_user_is_told_what_to_do(tmp_path: Path):
    for epoch in (1, 2):
        flip(write(tmp_path, epoch, 64) / WEIGHTS)
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound. Bring one back .* or delete this folder"):
        checkpoint.newest_valid(str(tmp_path))
    assert len(checkpoint.names(str(tmp_path))) == 2


def test_a_damaged_checkpoint_changes_nothing_in_the_network(tmp_path: Path):
    flip(write(tmp_path, 2, 64) / OPTIMIZER)
    found = trained(7)
    before = found.module.weight.detach().clone()
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.restore_checkpoint(str(tmp_path / "epoch-0002-00000064"), found)
    assert torch.equal(found.module.weight, before)


def test_the_best_epoch_is_the_first_of_the_most_accurate(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch, val_accuracies=[0.5, 0.7, 0.7][:epoch])
    write(tmp_path, 3, 64, val_accuracies=[0.5, 0.7, 0.7])
    assert checkpoint.restore_best(str(tmp_path), trained(7).module)["epoch"] == 2


def test_a_damaged_best_epoch_gives_way_to_the_next_best(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch, val_accuracies=[0.5, 0.7, 0.6][:epoch])
    flip(tmp_path / "epoch-0002" / WEIGHTS)
    assert checkpoint.restore_best(str(tmp_path), trained(7).module)["epoch"] == 3


def test_pruning_removes_all_but_what_is_kept(tmp_path: Path):
    for epoch in (1, 2, 3):
        write(tmp_path, epoch)
    (tmp_path / "epoch-0003-00000064").mkdir()  # of a killed run
    (tmp_path / "epoch-0003-00000064" / WEIGHTS).write_bytes(b"half")
    (tmp_path / "best.json").write_bytes(b"{}")
    checkpoint.prune(str(tmp_path), ["epoch-0002", "epoch-0003"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "epoch-0002", "epoch-0003"]
