"""Resources of this machine: CPUs, memory and GPUs, found without Ray and PyTorch, whose imports take seconds."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container, `max` for none."""
QUERY = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")
QUERY_SECONDS = 10


class Machine(NamedTuple):
    """Resources that jobs can use."""

    cpus: int
    memory: int  # bytes
    gpus: tuple[int, ...] = ()  # bytes of memory of each, 0 if unknown
    note: str = ""  # about a cluster whose size changes
    node_cpus: int = 0  # of a cluster's largest node; 0: this is one node

    @property
    def text(self) -> str:
        """Return the resources in words."""
        gpus = f"{len(self.gpus)} GPU(s)" if self.gpus else "no GPU"
        if any(self.gpus):
            gpus += f" of {min(self.gpus) / 1e9:.0f} GB"
        note = f" ({self.note})" if self.note else ""
        return f"{self.cpus} CPUs, {self.memory / 1e9:.0f} GB of memory, {gpus}{note}"

    def cpus_of(self, num_processes: int) -> int:
        """Return the CPUs that a number of processes can use, none spanning two nodes."""
        return min(self.cpus, num_processes * (self.node_cpus or self.cpus))


def this_machine() -> Machine:
    """Return the resources of this machine, or of the container that this process is in."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdecimal():
        memory = min(memory, int(limit))
    return Machine(cpus, memory, _gpus())


def _gpus() -> tuple[int, ...]:
    """Return the memory of each GPU in bytes; of CUDA's visible devices, as far as they are given by number."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        done = subprocess.run([command, *QUERY], capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # no driver, or one that does not answer
        return ()
    sizes = [int(line) * 2**20 for line in done.stdout.split() if line.isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and all(part.strip().isdecimal() for part in visible.split(",") if part):
        sizes = [sizes[int(part)] for part in visible.split(",") if part and int(part) < len(sizes)]
    return tuple(sizes)
