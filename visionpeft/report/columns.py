"""The columns of a section's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..benchmark import Row
from ..tables import size
from .formatting import MISSING, interval, percent, score, seconds, signed
from .rows import delta_size, gpu_peak, share


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: Its heading.
        hint: Its meaning.
        value: Returns the number to sort a row by; None: the row has none.
        text: Returns the text for a row.
    """

    name: str
    hint: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that at least one of the rows fills."""
    return [c for c in _columns(rows[0].score) if any(c.value(row) is not None for row in rows)]


def _columns(metric: str) -> list[Column]:
    return [
        Column(metric, "after training, mean over the seeds [95 % interval]", lambda r: r.score_mean, _score),
        Column(
            "difference",
            "from the reference, on the same images and seeds [95 % interval]",
            lambda r: r.difference,
            _difference,
        ),
        Column("body", "parameters of the body that train", lambda r: r.trained_body, lambda r: f"{r.trained_body:,}"),
        Column("head", "parameters of the head that train", lambda r: r.trained_head, lambda r: f"{r.trained_head:,}"),
        Column("share", "of all parameters that train, body and head", share, lambda r: percent(share(r))),
        Column("saved", "bytes that a step keeps for backward", lambda r: r.saved_bytes, lambda r: size(r.saved_bytes)),
        Column("live", "most bytes alive at once in a step", lambda r: r.live_bytes, lambda r: size(r.live_bytes)),
        Column("GPU peak", "of the CUDA allocator in training steps", gpu_peak, lambda r: size(gpu_peak(r))),
        Column("step", "forward and backward, median", lambda r: r.step_seconds, lambda r: seconds(r.step_seconds)),
        Column("wall", "of a whole cell, its measuring included", lambda r: r.seconds, lambda r: seconds(r.seconds)),
        Column("delta", "size of the delta file", delta_size, lambda r: size(delta_size(r))),
        Column("old classes", "score under the base's own head, before → after", lambda r: r.retained_after, _retained),
    ]


def _score(row: Row) -> str:
    return score(row.score_mean) + interval(row.low, row.high)


def _difference(row: Row) -> str:
    if row.difference is None:
        return MISSING
    return signed(row.difference) + interval(row.difference_low, row.difference_high, signed)


def _retained(row: Row) -> str:
    if row.retained_before is None or row.retained_after is None:
        return MISSING
    return f"{score(row.retained_before)} → {score(row.retained_after)}"
