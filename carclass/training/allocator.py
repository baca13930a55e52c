"""Settings of glibc's memory allocator for training on CPUs."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of mallopt, from malloc.h."""
WORKER_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_ARENA_MAX": "1"}
"""The same settings as environment of a process that trains in another thread, as Ray Train's workers do."""
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 * 1024}
"""glibc's, but for the number of arenas, which stays."""


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep memory that a step frees for the next one; return it to the system at the end.

    By default glibc returns large tensors at once and gets cleared pages back, which takes a tenth of a step's time.
    This is for the main thread: other threads have arenas of their own, unless the process starts with WORKER_ENV.
    Without effect where the C library has no mallopt (macOS).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    for parameter, value in {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
