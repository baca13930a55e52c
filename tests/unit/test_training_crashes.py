"""Errors of training whose workers crash again and again."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from carclass.training.train import has_crashed_process

CRASH = WorkerHealthCheckFailedError("a health check failed", ActorDiedError())


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([CRASH], True),
        ([RuntimeError("connection closed by peer"), CRASH], True),
        ([ValueError("an error of the program")], False),
    ],
)
def test_a_worker_whose_process_crashed_differs_from_an_error_of_the_program(failures: list[Exception], expected: bool):
    assert has_crashed_process(WorkerGroupError("failed", dict(enumerate(failures)))) == expected


def test_a_process_that_crashes_at_once_fails_the_controller():
    assert has_crashed_process(ControllerError(ActorDiedError()))
