"""Preemption: on SIGTERM or node drain, all workers checkpoint at the same step and exit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import ray.train
import ray.train.torch
import torch
from torch import distributed

from carclass.progress import print_line
from carclass.training.loop import StepSignal

DRAIN_CHECK_SECONDS = 2.0
"""Interval between queries to Ray for draining nodes; a spot instance has two minutes' notice, a container 30 s."""
_sigterm_received = threading.Event()


class WorkerContext(NamedTuple):
    """A worker's rank, world size and device."""

    rank: int
    num_workers: int
    device: torch.device
    is_node_draining: Callable[[], bool]  # True if a node will be taken away; called on all workers at once


class StepCheck:
    """Check for preemption and for a due checkpoint, with the same result on all workers at the same step.

    A spot instance is announced by a draining node, the end of a container by SIGTERM. Of several workers, each step's
    check is agreed on during the next step, which no worker waits for.
    """

    def __init__(self, worker: WorkerContext, is_checkpoint_due: Callable[[], bool] = lambda: False) -> None:
        self.worker, self.is_checkpoint_due = worker, is_checkpoint_due
        # On CPUs even if gradients are reduced between GPUs, so that a check doesn't wait for a GPU.
        self.group = distributed.new_group(backend="gloo") if worker.num_workers > 1 else None
        self.checked = time.monotonic()
        self.reduction: tuple[torch.Tensor, distributed.Work] | None = None

    def __call__(self, _step: int) -> StepSignal:
        """Return the interruptions that any worker asks for; called by every worker after every step."""
        if self.group is None:
            is_preempted, asks_ray, is_due = self._requests(is_saving=False)
        else:
            is_preempted, asks_ray, is_due = self._agreed()
            signals = torch.tensor(self._requests(is_saving=is_due), dtype=torch.uint8)
            work = distributed.all_reduce(signals, distributed.ReduceOp.MAX, group=self.group, async_op=True)
            self.reduction = signals, work
        if asks_ray and not is_preempted:
            is_preempted = self.worker.is_node_draining()
        return StepSignal(is_preempted, is_due)

    def _requests(self, *, is_saving: bool) -> list[bool]:
        """Return the worker's own requests: to be preempted, to ask Ray for draining nodes, to save a checkpoint.

        is_saving: a checkpoint is being saved after this step.
        """
        asks_ray = self.worker.rank == 0 and time.monotonic() - self.checked > DRAIN_CHECK_SECONDS
        if asks_ray:
            self.checked = time.monotonic()
        return [_sigterm_received.is_set(), asks_ray, not is_saving and self.is_checkpoint_due()]

    def _agreed(self) -> list[bool]:
        """Return the requests that any worker made after the previous step."""
        if self.reduction is None:
            return [False] * 3
        signals, work = self.reduction
        work.wait()
        return signals.bool().tolist()


def is_node_draining() -> bool:
    """Return True if Ray will take away a node of the run, as before a spot interruption."""
    return ray.train.get_preemption_info() is not None


def listen_for_sigterm() -> None:
    """Treat SIGTERM as preemption from now on. For the main thread, the only one in which Python handles signals."""
    _sigterm_received.clear()
    signal.signal(signal.SIGTERM, lambda *_: _sigterm_received.set())


@contextmanager
def checkpoint_on_interrupt() -> Iterator[None]:
    """Treat the first Ctrl-C as preemption, and raise KeyboardInterrupt at the end; a second one raises it at once.

    In another thread than the main one, such as a worker's of Ray Train, do nothing: it gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def preempt(*_: object) -> None:
        print_line("train: interrupted; a checkpoint is saved after this step (Ctrl-C again: end at once)")
        _sigterm_received.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, preempt)
    try:
        yield
    finally:
        was_interrupted = signal.getsignal(signal.SIGINT) is not preempt
        signal.signal(signal.SIGINT, previous)
        if was_interrupted:
            _sigterm_received.clear()
    if was_interrupted:
        raise KeyboardInterrupt


_TorchBackend: type = ray.train.torch.TorchConfig().backend_cls


class Backend(_TorchBackend):
    """Ray's backend for PyTorch with workers that listen for SIGTERM."""

    def on_training_start(self, worker_group, backend_config):
        """Set the workers up before the training function, which runs in another thread."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(listen_for_sigterm)


class TorchConfig(ray.train.torch.TorchConfig):
    """Ray's configuration of PyTorch, with this module's backend."""

    @property
    def backend_cls(self) -> type:
        """Return the class that sets the workers up."""
        return Backend
