"""Handler of Ctrl-C around Ray Train and Ray Tune."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_interrupt_handler() -> Iterator[None]:
    """Restore the handler of SIGINT, which Ray leaves replaced: later work of this process would ignore Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
