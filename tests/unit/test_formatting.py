"""Numbers as text, and text for a terminal."""

import pytest

from carclass import formatting


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31m\rb", r"a\x1b[31m\rb"),
        ("\udce9\u202egpj", r"\udce9\u202egpj"),
        ("one\ntwo\t8\u00a0% \u00fc", "one\ntwo\t8\u00a0% \u00fc"),
    ],
)
def test_control_characters_are_escaped_for_a_terminal(text: str, shown: str):
    assert formatting.terminal_text(text) == shown


@pytest.mark.parametrize(("value", "text"), [(1067, "1,067"), (0.93449, "0.934"), (1234.5, "1,234.500")])
def test_numbers(value: float, text: str):
    assert formatting.number_text(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 workers"), (1, "1 worker"), (1067, "1,067 workers")])
def test_counts_have_their_noun_in_the_plural(count: int, text: str):
    assert formatting.count_text(count, "worker") == text


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (180, "3 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str):
    assert formatting.duration_text(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0.842, "84.2\u00a0%"), (1, "100.0\u00a0%"), (float("nan"), "nan")])
def test_percentages(share: float, text: str):
    assert formatting.percent_text(share) == text


@pytest.mark.parametrize(("share", "digits", "text"), [(0.9996, 1, "99.9"), (0.996, 0, "99"), (0.99949, 1, "99.9")])
def test_a_percentage_is_not_rounded_up_to_all(share: float, digits: int, text: str):
    assert formatting.percent_text(share, digits) == f"{text}\u00a0%"


@pytest.mark.parametrize(
    ("rate", "text"), [(0.9996, "0.999"), (0.5, "0.500"), (1.0, "1.000"), (1 - 1e-12, "1.000"), (float("nan"), "nan")]
)
def test_a_rate_is_not_rounded_up_to_one(rate: float, text: str):
    assert formatting.rate_text(rate) == text


@pytest.mark.parametrize(("size", "text"), [(25_400_000, "25 MB"), (1_340_000_000, "1.3 GB")])
def test_sizes(size: float, text: str):
    assert formatting.bytes_text(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(30, "30.0 CPU seconds"), (12_240, "3.4 CPU hours")])
def test_device_time(seconds: float, text: str):
    assert formatting.device_time_text(seconds, "CPU") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64, "64"), (0.05, "0.05"), (3e-4, "3e-4"), (2.5e-3, "2.5e-3"), (2.0, "2"), (0.0, "0"), (True, "true"),
        (None, "null"), ("cosine", "cosine"),
    ],
)  # fmt: skip
def test_setting_values(value: formatting.Value, text: str):
    assert formatting.value_text(value) == text
