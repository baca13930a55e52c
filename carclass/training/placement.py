"""Placement of runs that share a cluster: devices per worker, number of concurrent runs, memory of each run."""

from carclass.cluster import resources
from carclass.config.schema import TrainSettings
from carclass.errors import UserError


def device_name(use_gpu: bool) -> str:
    """Return Ray's name of the resource that a worker trains on."""
    return "GPU" if use_gpu else "CPU"


def check_sharing(settings: TrainSettings, devices_per_worker: float, *, use_gpu: bool) -> None:
    """Raise UserError if a worker would get a fraction of a CPU, or one of several workers a fraction of a GPU."""
    _, num_workers = settings.workers
    if float(devices_per_worker).is_integer():
        return
    if not use_gpu:
        raise UserError(f"`devices_per_worker` is {devices_per_worker:g}: only GPUs can be shared; use whole CPUs.")
    if num_workers > 1 or devices_per_worker > 1:
        # Ray packs fractions onto one GPU, and NCCL refuses two ranks on the same one.
        raise UserError(
            f"`devices_per_worker` is {devices_per_worker:g}: only runs of one worker can share a GPU, each with less "
            f"than a whole one, and run `{settings.name}` has up to {num_workers}. Use whole GPUs, or set "
            "`train.num_workers: 1`."
        )


def count_slots(num_workers: int, devices_per_worker: float, *, use_gpu: bool) -> int:
    """Return how many workers fit on the cluster at once. Raise UserError if there is no room for num_workers."""
    device = device_name(use_gpu)
    slots = resources.count_slots(device, devices_per_worker)
    if slots < num_workers:
        raise UserError(
            f"`devices_per_worker`: a run needs {num_workers} worker(s) of {devices_per_worker:g} {device}(s), the "
            f"cluster has room for {slots}. Lower it, lower `train.num_workers` of the experiment, or add nodes."
        )
    return slots


def count_concurrent_runs(
    settings: TrainSettings, devices_per_worker: float, max_runs: int | None, *, use_gpu: bool
) -> int:
    """Return how many runs of the same settings fit on the cluster at once, at most max_runs.

    Raise UserError as check_sharing and count_slots do.
    """
    check_sharing(settings, devices_per_worker, use_gpu=use_gpu)
    _, num_workers = settings.workers
    room = count_slots(num_workers, devices_per_worker, use_gpu=use_gpu) // num_workers
    return min(room, max_runs or room)


def memory_per_run(settings: TrainSettings, devices_per_worker: float, num_slots: int, *, use_gpu: bool) -> int | None:
    """Return the bytes a run can use, as preflight.check_memory counts them; None if the size of a GPU is unknown.

    On GPUs a worker's share of its GPU, on CPUs the share of all nodes' memory of the run's workers. num_slots: number
    of workers that all concurrent runs have together.
    """
    memory = resources.memory_bytes(use_gpu)
    if memory is None:
        return None
    return int(memory * min(1.0, devices_per_worker)) if use_gpu else memory // num_slots * settings.workers[1]
