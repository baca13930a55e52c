"""Numbers as text: percentages, durations, sizes and settings."""

import math


def number_text(value: int | float) -> str:
    """A figure for a person: 1,067 or 0.934."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def duration_text(seconds: float) -> str:
    """'42 s', '3 min' or '2.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def percent_text(fraction: float, digits: int = 1) -> str:
    """Write 0.842 as "84.2 %", with a space that does not break; NaN and infinity as they are."""
    return f"{fraction * 100:.{digits}f}\u00a0%" if math.isfinite(fraction) else str(fraction)


def bytes_text(size: float) -> str:
    """A number of bytes for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def time_unit(seconds: float) -> tuple[float, str]:
    """In what such a time is told: seconds of the unit, and its name."""
    return next((one for one in ((3600.0, "hours"), (60.0, "minutes")) if seconds >= one[0]), (1.0, "seconds"))


def device_time_text(seconds: float, device: str) -> str:
    """Device-seconds in words: '3.4 GPU hours'."""
    size, unit = time_unit(seconds)
    amount = seconds / size
    return f"{amount:.{0 if amount >= 100 else 1}f} {device} {unit}"


Value = bool | int | float | str | None


def value_text(value: Value) -> str:
    """How a setting's value is written, three digits of it: 64, 0.05, 3e-4, true, null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {None: "null", True: "true", False: "false"}.get(value, str(value))  # type: ignore[arg-type]
    if isinstance(value, int) or value == int(value):
        return str(int(value))
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
