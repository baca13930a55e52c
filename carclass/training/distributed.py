"""Sums over the workers of a process group; a single process, which has no group, is its own sum."""

from torch import Tensor, distributed


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all workers, on the CPU; without a process group, the tensor itself."""
    if not distributed.is_initialized():
        return tensor
    total = tensor.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(total)
    return total.cpu()


def wait_for_workers() -> None:
    """Block until all workers have called this."""
    if distributed.is_initialized():
        distributed.barrier()
