"""Leaving in time: workers that are told to end, or whose machine will be taken away, stop together and save."""

import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import ray.train.torch
import torch
from torch import distributed

STAY, ASK, LEAVE = 0, 1, 2
ASK_SECONDS = 2.0
"""How often Ray is asked whether a node is drained; a spot instance has two minutes, a container half of one."""
_sigterm_received = threading.Event()


class WorkerContext(NamedTuple):
    """A worker's place among all of a stage."""

    rank: int
    num_workers: int
    device: torch.device
    is_drained: Callable[[], bool]  # whether its machine will be taken away, asked by all workers together


class PreemptionCheck:
    """Whether the workers leave, all at the same step: one was told to end, or its machine will be taken away.

    A spot instance is announced as a drained node, the end of a container as SIGTERM. One per worker.
    """

    def __init__(self, seat: WorkerContext) -> None:
        self.seat = seat
        # On CPUs also where gradients go from GPU to GPU: asking then doesn't wait for the GPU's work.
        self.group = distributed.new_group(backend="gloo") if seat.num_workers > 1 else None
        self.asked = time.monotonic()

    def __call__(self) -> bool:
        """Asked by every worker after every step; all get the same answer."""
        due = self.seat.rank == 0 and time.monotonic() - self.asked > ASK_SECONDS
        sign = torch.tensor(LEAVE if _sigterm_received.is_set() else ASK if due else STAY)
        if self.group is not None:
            distributed.all_reduce(sign, distributed.ReduceOp.MAX, group=self.group)
        if sign == ASK:
            self.asked = time.monotonic()
            return self.seat.is_drained()
        return bool(sign == LEAVE)


def listen_for_sigterm() -> None:
    """From now on SIGTERM means leave. Called in the main thread, where alone Python takes signals."""
    _sigterm_received.clear()
    signal.signal(signal.SIGTERM, lambda *_: _sigterm_received.set())


_TorchBackend: type = ray.train.torch.TorchConfig().backend_cls


class Backend(_TorchBackend):
    """Ray's backend for PyTorch, whose workers also listen."""

    def on_training_start(self, worker_group, backend_config):
        """Called before the training function, which runs in another thread."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(listen_for_sigterm)


class TorchConfig(ray.train.torch.TorchConfig):
    """Ray's set-up for PyTorch, with our backend."""

    @property
    def backend_cls(self) -> type:
        """What sets the workers up."""
        return Backend
