"""Names of Ray Train's runs on the dashboard."""

import pytest

from carclass.config.schema import TrainSettings
from carclass.runs.run import Run
from carclass.training.train import ray_run_name


@pytest.mark.parametrize(
    ("folder", "run", "name"),
    [
        ("experiments", "first", "first-frozen"),
        ("sweeps/head/trials", "007_lr=3e-4", "head-007_lr=3e-4-frozen"),
    ],
)
def test_a_ray_train_run_has_the_name_of_its_run_and_stage(folder, run, name):
    assert ray_run_name(Run("/root", TrainSettings(name=run), folder), "frozen") == name
