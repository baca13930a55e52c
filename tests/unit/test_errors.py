"""Hints for misspelled names."""

import pytest

from carclass.errors import suggest_names, unknown_name

KEYS = ["name", "frozen.lr", "frozen.views", "unfrozen.lr"]


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
    error = unknown_name("run", "EXP_01", ["EXP_001", "other"], "s3://b/root", "Run jobs/train.py first.")
    assert str(error) == (
        "no run `EXP_01` in s3://b/root. Did you mean `EXP_001`? Available: EXP_001, other. Run jobs/train.py first."
    )


def test_an_empty_place_has_no_available_names():
    assert str(unknown_name("sweep", "t", [], "/root")) == "no sweep `t` in /root. Available: none."
