"""What a section comes to: which method keeps most of full fine-tuning's score for the least memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..benchmark import Row
from ..tables import size
from .rows import Memory, trained
from .words import score, signed

NEAR = 0.95  # of the reference's score: what counts as near to it
_NEAR = f"{100 * NEAR:.0f} %"


@dataclass(frozen=True)
class Answer:
    """The method that is named, and why.

    Attributes:
        row: The method.
        said: Why, in a sentence or two.
        beside: The method that is set beside the reference: the one named, or else the nearest; None: there is no reference.
        shares: What that takes and gives as shares of the reference's, by name.
    """

    row: Row
    said: str
    beside: Row | None = None
    shares: list[tuple[str, float]] = field(default_factory=list)


def answer(rows: Sequence[Row], memory: Memory, against: str) -> Answer:
    """Choose a row, and say why.

    Args:
        rows: Of one model and data set, the best score first.
        memory: What stands for their memory.
        against: The label of the reference.
    """
    full = next((row for row in rows if row.names["method"] == against), None)
    others = [row for row in rows if row.names["method"] != against]
    if full is None or not others:
        missing = f"no {against}" if full is None else "nothing"
        said = f"The best score, {score(rows[0].score_mean)} {rows[0].score}; there is {missing} here to compare it with."
        return Answer(rows[0], said)
    near = [row for row in others if _kept(row, full) >= NEAR]
    least = min(near, key=lambda row: _order(row, memory), default=None)
    if least and _order(least, memory) < _order(full, memory):
        which = f"The least memory of {len(near)} that keep" if len(near) > 1 else "The only other that keeps"
        said = f"{_beside(least, full, memory)}. {which} {_NEAR} of {against}'s score."
        return Answer(least, said, least, _shares(least, full, memory))
    why = f"None that keeps {_NEAR} of its score takes less memory" if near else f"No other keeps {_NEAR} of its score"
    nearest = max(others, key=lambda row: _kept(row, full))
    said = f"{why}. Nearest is {_beside(nearest, full, memory)}."
    return Answer(full, said, nearest, _shares(nearest, full, memory))


def rule(against: str) -> str:
    """Return by what `answer` chooses."""
    which = f"{against} included, that keep {_NEAR} of {against}'s score on the seeds that both have"
    return f"Named is the method of least memory among those, {which}."


def _order(row: Row, memory: Memory) -> float:
    """Return what rows are ordered by: those whose memory is not known come last."""
    taken = memory.of(row)
    return float("inf") if taken is None else taken


def _scores(row: Row, full: Row) -> tuple[float, float]:
    """Return both rows' scores, on the seeds that both have if there are any."""
    if both := sorted(row.score_by_seed.keys() & full.score_by_seed.keys()):
        return fmean(row.score_by_seed[seed] for seed in both), fmean(full.score_by_seed[seed] for seed in both)
    return row.score_mean, full.score_mean


def _kept(row: Row, full: Row) -> float:
    """Return what share of the reference's score a row has."""
    own, whole = _scores(row, full)
    return own / whole if whole else float("inf")


def _beside(row: Row, full: Row, memory: Memory) -> str:
    own_score, whole_score = _scores(row, full)
    said = f"{row.method}: {score(own_score)} {row.score} against {score(whole_score)} of {full.method}"
    if row.difference is not None:
        ends = ""
        if row.difference_low is not None and row.difference_high is not None:
            ends = f", 95 % interval {signed(row.difference_low)} to {signed(row.difference_high)}"
        said += f" ({signed(row.difference)}{ends})"
    own, whole = memory.of(row), memory.of(full)
    return said if own is None or whole is None else f"{said}; {memory.name} {size(own)} against {size(whole)}"


def _shares(row: Row, full: Row, memory: Memory) -> list[tuple[str, float]]:
    pairs = [
        ("score", *_scores(row, full)),
        ("memory", memory.of(row), memory.of(full)),
        ("step time", row.step_seconds, full.step_seconds),
        ("trained", trained(row), trained(full)),
    ]
    return [(name, part / whole) for name, part, whole in pairs if part is not None and whole]
