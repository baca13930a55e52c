"""Interruptions after a step: due checkpoints and preemption, with the same result on all workers."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from carclass.training.loop import StepSignal
from carclass.training.preemption import DRAIN_CHECK_SECONDS, StepCheck, WorkerContext, checkpoint_on_interrupt

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_due", [False, True])
def test_a_checkpoint_is_due_when_the_writer_says_so(is_due: bool):
    check = StepCheck(WorkerContext(0, 1, CPU, lambda: False), lambda: is_due)
    assert check(1) == StepSignal(is_preempted=False, is_checkpoint_due=is_due)


def test_a_draining_node_is_asked_for_now_and_then():
    check = StepCheck(WorkerContext(0, 1, CPU, lambda: True))
    assert not check(1).is_preempted
    check.checked -= DRAIN_CHECK_SECONDS + 1
    assert check(1).is_preempted


def interrupt(times: int, reached: list[bool]) -> None:
    check = StepCheck(WorkerContext(0, 1, CPU, lambda: False))
    with checkpoint_on_interrupt():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        reached.append(check(1).is_preempted)


def test_the_first_interrupt_lets_a_checkpoint_be_saved():
    reached: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(1, reached)
    assert reached == [True]
    assert not StepCheck(WorkerContext(0, 1, CPU, lambda: False))(1).is_preempted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_ends_at_once():
    reached: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(2, reached)
    assert reached == []
    assert not StepCheck(WorkerContext(0, 1, CPU, lambda: False))(1).is_preempted


def test_without_an_interrupt_training_ends_as_usual():
    reached: list[bool] = []
    interrupt(0, reached)
    assert reached == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def signal_of_rank(rank: int, file: str, results: Any) -> None:
    """Put the signals of a worker, of which only rank 0 writes checkpoints, after five steps."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    is_due = iter([False, True, False, True])  # not asked while a checkpoint is saved
    check = StepCheck(WorkerContext(rank, 2, CPU, lambda: False), lambda: next(is_due) if rank == 0 else False)
    results.put((rank, [tuple(check(1)) for _ in range(5)]))
    distributed.destroy_process_group()


@pytest.mark.slow  # 15 s
def test_all_workers_save_at_the_same_step_after_the_next(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=signal_of_rank, args=(rank, f"{tmp_path}/group", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    signals = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert signals[0] == signals[1] == [(False, due) for due in (False, False, True, False, False)]
