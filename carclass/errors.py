"""Errors that a user can cause and fix, and hints for misspelled names."""

import difflib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what to do.

    Jobs print it as one paragraph and exit with status 2; any other exception keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message  # Ray Data appends advice of its own to `args`


SAME = "For the same reason: "
"""Start of a list of other places with a problem."""


class Problems:
    """Errors of checks that do not depend on each other."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Add a problem, unless another check has found it too; one of the same cause and remedy only by its place."""
        place, start, reason = text.partition(" (")
        for i, known in enumerate(self.texts):
            if text == known or (start and f"{start}{reason}" in known and place in known):
                return
            if start and f"{start}{reason}" in known:
                self.texts[i] = f"{known}{'; ' if SAME in known else f' {SAME}'}{place}"
                return
        self.texts.append(text)

    def result(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """Return the result of a check, or None if it raises UserError, which is added."""
        try:
            return check(*arguments)
        except UserError as error:
            self.add(str(error))
            return None

    def passes(self, check: Callable[..., object], *arguments: Any) -> bool:
        """Return False if a check raises UserError, which is added."""
        return self.result(lambda: (check(*arguments),)) is not None

    def raise_all(self) -> None:
        """Raise UserError with all problems, if there are any."""
        if len(self.texts) == 1:
            raise UserError(self.texts[0])
        if self.texts:
            lines = [f"\n  {number}. {text}" for number, text in enumerate(self.texts, start=1)]
            raise UserError(f"{len(lines)} problems, all found before the first step:{''.join(lines)}")


def find_user_error(error: BaseException) -> UserError | None:
    """Return the UserError that caused an error of a remote task or of a group of workers, or None."""
    causes = _remote_causes(error)
    if not causes and isinstance(error, UserError):
        return error
    found = (find_user_error(cause) for cause in (*causes, error.__cause__) if cause is not None)
    return next((user_error for user_error in found if user_error is not None), None)


def _remote_causes(error: BaseException) -> list[BaseException]:
    """Return the errors of the remote tasks or workers that an error reports."""
    remote = [getattr(error, name, None) for name in ("cause", "controller_failure")]  # a task's, Ray Train's
    return [cause for cause in (*remote, *getattr(error, "worker_failures", {}).values()) if cause is not None]


@contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """Exit with status 141, as programs do, if the reader of standard output has closed it: `carclass … | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno())
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            raise  # of a socket
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        sys.exit(141)


class FullDiskReport:
    """Context that raises UserError for a full disk, on this machine or in a task: a cache, TMPDIR, Ray's spilling."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None or isinstance(error, UserError) or (full := find_cause(error, _is_full_disk)) is None:
            return
        line = next(iter(str(full).splitlines()), type(full).__name__)
        raise UserError(
            f"no space left on a disk ({line}). Free some space there, or set TMPDIR, XDG_CACHE_HOME or RAY_TMPDIR to "
            "a folder on a larger disk. The same command resumes."
        ) from error


def find_cause(error: BaseException, matches: Callable[[BaseException], bool]) -> BaseException | None:
    """Return an error if it matches, or else the first match among its causes, those on other machines included."""
    if matches(error):
        return error
    causes = (find_cause(cause, matches) for cause in (*_remote_causes(error), error.__cause__) if cause is not None)
    return next((cause for cause in causes if cause is not None), None)


def _is_full_disk(error: BaseException) -> bool:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or type(error).__name__ == "OutOfDiskError"  # Ray's, which this module must not import


def suggest_names(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean `a`?" for the known names closest to an unknown one, or "" if none is close."""
    close = find_close_names(name, list(known))
    return f"did you mean {' or '.join(f'`{prefix}{match}`' for match in close)}?" if close else ""


def find_close_names(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names closest to an unknown one, up to three.

    Of dotted names some parts are enough: `lr` and `train.lr` are meant for `train.frozen.lr`, and likewise
    `train.frozen.lr` for `frozen.lr`, where the section is left out.
    """
    parts = name.split(".")
    for given in (parts, parts[1:]):
        if same := [key for key in known if given and _has_in_order(key.split("."), given)]:
            return same[:3]
    return difflib.get_close_matches(name, known, n=1)


def _has_in_order(parts: Iterable[str], given: Sequence[str]) -> bool:
    rest = iter(parts)
    return all(part in rest for part in given)


def suggest_beside(path: str | None) -> str:
    """Return "did you mean `a`?" for a local path whose first missing part is like a name beside it, or "" if none is.

    path: None for a place that is not local.
    """
    parent, name = os.path.split((path or "").rstrip("/"))
    while name and not os.path.lexists(parent):
        parent, name = os.path.split(parent)
    is_missing = name and not os.path.lexists(os.path.join(parent, name))
    beside = os.listdir(parent) if is_missing and os.path.isdir(parent) and os.access(parent, os.R_OK) else []
    close = difflib.get_close_matches(name, beside, n=1)  # a dot in a file's name has no meaning
    return f"did you mean `{close[0]}`?" if close else ""


def unknown_name(kind: str, name: str, known: Sequence[str], place: str, hint: str = "") -> UserError:
    """Return the error for an unknown name: "no dataset `x` in ROOT. Available: a, b."."""
    suggestion = suggest_names(name, known)
    sentences = [
        f"no {kind} `{name}` in {place}.",
        suggestion[:1].upper() + suggestion[1:],
        f"Available: {', '.join(known) or 'none'}.",
        hint,
    ]
    return UserError(" ".join(filter(None, sentences)))
