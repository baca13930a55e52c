"""Placement of runs that share a cluster: fractions of devices."""

import pytest

from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.training import placement


@pytest.mark.parametrize(
    ("num_workers", "devices", "cause"),
    [
        (2, 0.5, "only runs of one worker can share a GPU, .* run `one` has up to 2"),
        ((1, 4), 0.25, "has up to 4"),
        (2, 1.5, "each with less than a whole one"),
        (1, 1.5, "each with less than a whole one"),
    ],
)
def test_ranks_of_one_run_share_no_gpu(num_workers: int | tuple[int, int], devices: float, cause: str):
    with pytest.raises(UserError, match=rf"`devices_per_worker` .*{cause}"):
        placement.check_sharing(TrainSettings(name="one", num_workers=num_workers), devices, use_gpu=True)


@pytest.mark.parametrize(("num_workers", "devices"), [(1, 0.5), (1, 1), (2, 1.0), ((1, 4), 2)])
def test_runs_of_one_worker_share_gpus_and_others_have_whole_ones(num_workers: int | tuple[int, int], devices: float):
    placement.check_sharing(TrainSettings(name="one", num_workers=num_workers), devices, use_gpu=True)


def test_workers_on_cpus_have_whole_ones():
    with pytest.raises(UserError, match=r"`devices_per_worker` is 0.5: only GPUs can be shared"):
        placement.check_sharing(TrainSettings(name="one"), 0.5, use_gpu=False)
