"""Hints for misspelled names, and the errors behind those of remote tasks."""

import pickle

import pytest

from carclass.errors import Problems, UserError, find_user_error, suggest_names, unknown_name

KEYS = ["name", "frozen.lr", "frozen.views", "unfrozen.lr"]


def test_problems_of_the_same_cause_and_remedy_are_one_with_several_places():
    problems = Problems()
    for text in (
        "a cannot be read (no key). Set one.",
        "b is wrong. Mend it.",
        "c cannot be listed (no key). Set one.",
    ):
        problems.add(text)
        problems.add(text)
    problems.add("d cannot be read (refused). Set one.")
    assert problems.texts == [
        "a cannot be read (no key). Set one. For the same reason: c cannot be listed",
        "b is wrong. Mend it.",
        "d cannot be read (refused). Set one.",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nmae", "did you mean `name`?"),
        ("unfrozen.lrr", "did you mean `unfrozen.lr`?"),
        ("lr", "did you mean `frozen.lr` or `unfrozen.lr`?"),
        ("zzz", ""),
    ],
)
def test_the_closest_names_are_suggested(name: str, hint: str):
    assert suggest_names(name, KEYS) == hint


def test_an_unknown_name_is_reported_with_the_available_ones():
    error = unknown_name("run", "EXP_01", ["EXP_001", "other"], "s3://b/root", "Run `python jobs/train.py` first.")
    assert str(error) == (
        "no run `EXP_01` in s3://b/root. Did you mean `EXP_001`? Available: EXP_001, other. "
        "Run `python jobs/train.py` first."
    )


def test_an_empty_place_has_no_available_names():
    assert str(unknown_name("sweep", "t", [], "/root")) == "no sweep `t` in /root. Available: none."


class RemoteError(UserError):
    """An error of a task: an instance of its cause's class, with the traceback as text."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause


class WorkerError(Exception):
    """An error of a group of workers."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("workers failed")
        self.worker_failures = dict(enumerate(failures))


def test_the_user_error_behind_a_remote_error_is_found():
    mistake = UserError("mistake")
    assert find_user_error(mistake) is mistake
    assert find_user_error(RemoteError(mistake)) is mistake
    assert find_user_error(WorkerError(KeyError("a"), RemoteError(mistake))) is mistake
    assert find_user_error(WorkerError(KeyError("a"))) is None


def test_an_explained_user_error_replaces_its_cause():
    explained = UserError("more")
    explained.__cause__ = UserError("less")
    assert find_user_error(explained) is explained


def test_a_user_error_keeps_its_message():
    error = UserError("mistake")
    error.args = ("mistake\nFailed to apply UDF transform",)
    assert str(pickle.loads(pickle.dumps(error))) == "mistake"
