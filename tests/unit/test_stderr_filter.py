"""Filter of stderr: misleading lines of Ray are left out, all others are shown, also those of a crash."""

import subprocess
import sys

import pytest

RESTART = (
    "[2026-01-01 00:00:00,000 E 1 1] core_worker.cc:2465: Actor with class name: 'MapWorker(A)' and ID: '01' has "
    "constructor arguments in the object store and max_restarts > 0. If the arguments in the object store go out of "
    "scope or are lost, the actor restart will fail. See the documentation."
)
KILL = "[2026-01-01 00:00:00,000 E 1 1] core_worker.cc:100: Failed to kill actor 01"


def stderr_of(code: str, **environment: str) -> str:
    """Return the stderr of a process that filters it and then runs code."""
    start = "import os, signal, sys\nfrom carclass.config.stderr_filter import filter_stderr\nfilter_stderr()\n"
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, env=environment or None).stderr


@pytest.mark.parametrize("line", [RESTART, KILL])
def test_misleading_lines_are_left_out(line: str):
    assert stderr_of(f"os.write(2, {line.encode()!r} + b'\\nother\\n')") == "other\n"


def test_lines_of_python_and_of_native_code_keep_their_order():
    assert stderr_of("print('a', file=sys.stderr)\nos.write(2, b'b\\n')\nprint('c', file=sys.stderr)") == "a\nb\nc\n"


def test_the_last_lines_of_a_process_that_is_killed_are_shown():
    assert stderr_of("os.write(2, b'last\\n')\nos.kill(os.getpid(), signal.SIGKILL)") == "last\n"


def test_an_exception_is_shown():
    assert stderr_of("raise ValueError('wrong')").endswith("ValueError: wrong\n")


def test_lines_that_are_no_text_are_shown():
    assert stderr_of("os.write(2, b'\\x00binary\\n')") == "\x00binary\n"


def test_without_grep_all_lines_are_shown():
    assert KILL in stderr_of(f"os.write(2, {KILL.encode()!r} + b'\\n')", PATH="")
