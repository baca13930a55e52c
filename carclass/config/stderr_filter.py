"""Filter of misleading lines that Ray's native code writes to a job's stderr; the logs of its session keep them."""

import atexit
import os
import shutil
import subprocess
import sys
from contextlib import suppress

MISLEADING = (
    r"core_worker\.cc.*the actor restart will fail",  # Ray Data passes the arguments of its actors in this way
    r"\.cc:.*Failed to kill actor",  # of a pool that is shut down, whose actors have ended already
)
"""Patterns of lines, as of `grep`."""
WAIT_S = 0.1
"""Longest wait for the last lines when the process ends; a process of Ray's may hold the other end a little longer."""


def filter_stderr() -> None:
    """Pass all that this process writes to file descriptor 2 through `grep`, until the process ends.

    Native code does not write to `sys.stderr`, and only another process shows the last lines of one that crashes. Where
    `sys.stderr` is captured, or there is no grep, nothing is filtered.
    """
    sys.stderr.flush()
    if sys.stderr is not sys.__stderr__ or (command := shutil.which("grep")) is None:
        return
    original, patterns = os.dup(2), [f"--regexp={pattern}" for pattern in MISLEADING]
    grep = subprocess.Popen(  # noqa: S603 - constant arguments
        [command, "--line-buffered", "--text", "--invert-match", *patterns],
        stdin=subprocess.PIPE,
        stdout=original,
        stderr=subprocess.DEVNULL,
        env={"LC_ALL": "C"},
        start_new_session=True,  # Ctrl-C must not end it before the job
    )
    assert grep.stdin is not None
    os.dup2(grep.stdin.fileno(), 2)
    grep.stdin.close()
    atexit.register(_restore, original, grep)


def _restore(original: int, grep: subprocess.Popen[bytes]) -> None:
    """End the filter, which has usually shown all lines by then."""
    sys.stderr.flush()
    os.dup2(original, 2)
    with suppress(subprocess.TimeoutExpired):
        grep.wait(WAIT_S)
