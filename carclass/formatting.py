"""Numbers as text: counts, percentages, durations, sizes and settings; text for a terminal."""

import math
import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def terminal_text(text: str) -> str:
    """Return text whose control characters, as in the names of photos, are escaped; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def number_text(value: int | float) -> str:
    """Return 1,067 for an integer and 0.934 for a float."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def count_text(count: int, noun: str) -> str:
    """Return "1 worker" or "1,067 workers". noun: whose plural ends with s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """Return "42 s", "3 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def percent_text(fraction: float, digits: int = 1) -> str:
    """Return "84.2 %" for 0.842, with a non-breaking space; NaN and infinity unchanged. 0.9996 is 99.9 %, not 100 %."""
    return f"{_round_below(fraction * 100, 100, digits)}\u00a0%" if math.isfinite(fraction) else str(fraction)


def rate_text(rate: float, digits: int = 3) -> str:
    """Return an accuracy, F1 or another rate with its decimals; 1.000 only if it is 1: 0.9996 is 0.999."""
    return _round_below(rate, 1, digits)


def _round_below(value: float, whole: int, digits: int) -> str:
    """Return a number with its decimals, rounded, but not up to the whole."""
    text = f"{value:.{digits}f}"
    is_rounded_up = text == f"{whole:.{digits}f}" and value < whole * (1 - 1e-9)
    return f"{whole - 10**-digits:.{digits}f}" if is_rounded_up else text


def bytes_text(size: float) -> str:
    """Return "1.3 GB" or "25 MB", in powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the largest unit that fits a duration: its length in seconds, and its name in the plural."""
    units = ((3600.0, "hours"), (60.0, "minutes"))
    return next((unit for unit in units if seconds >= unit[0]), (1.0, "seconds"))


def device_time_text(seconds: float, device: str) -> str:
    """Return device-seconds as "3.4 GPU hours"."""
    size, unit = time_unit(seconds)
    amount = seconds / size
    return f"{amount:.{0 if amount >= 100 else 1}f} {device} {unit}"


Value = bool | int | float | str | None


def value_text(value: Value) -> str:
    """Return a setting's value as in YAML, floats with three digits: 64, 0.05, 3e-4, true, null."""
    if value is None:
        return "null"
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, int) or value == int(value):
        return str(int(value))
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
