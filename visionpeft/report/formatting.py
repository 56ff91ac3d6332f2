"""The format of values in a report."""

from __future__ import annotations

from collections.abc import Callable

MISSING = "–"


def score(value: float) -> str:
    """Return a score: 0.231."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Return a difference of scores: +0.012, −0.004, 0.000."""
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else score(0)


def interval(low: float | None, high: float | None, text: Callable[[float], str] = score) -> str:
    """Return " [0.231, 0.262]", or nothing where there is none."""
    return "" if low is None or high is None else f" [{text(low)}, {text(high)}]"


def seconds(value: float | None) -> str:
    """Return a time: 0.31 s, 64 s."""
    return MISSING if value is None else f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def percent(share: float) -> str:
    """Return a share: 34.5 %, 0.2 %, 113 %."""
    return f"{100 * share:.1f} %" if share < 0.9995 else f"{100 * share:.0f} %"


def count_of(number: int, thing: str) -> str:
    """Return a number of things: 1 run, 2 runs."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
