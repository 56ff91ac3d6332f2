"""What a section comes to: which method keeps most of full fine-tuning's score for the least memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    near = [row for row in others if row.score_mean >= NEAR * full.score_mean]
    least = min(near, key=lambda row: _order(row, memory), default=None)
    if least and _order(least, memory) < _order(full, memory):
        which = f"The least memory of {len(near)} that keep" if len(near) > 1 else "The only other that keeps"
        said = f"{_beside(least, full, memory)}. {which} {_NEAR} of {against}'s score."
        return Answer(least, said, least, _shares(least, full, memory))
    why = f"None that keeps {_NEAR} of its score takes less memory" if near else f"No other keeps {_NEAR} of its score"
    said = f"{why}. Nearest is {_beside(others[0], full, memory)}."
    return Answer(full, said, others[0], _shares(others[0], full, memory))


def rule(against: str) -> str:
    """Return by what `answer` chooses."""
    return f"Named is the method of least memory among those, {against} included, that keep {_NEAR} of {against}'s score."


def _order(row: Row, memory: Memory) -> float:
    """Return what rows are ordered by: those whose memory is not known come last."""
    taken = memory.of(row)
    return float("inf") if taken is None else taken


def _beside(row: Row, full: Row, memory: Memory) -> str:
    said = f"{row.method}: {score(row.score_mean)} {row.score} against {score(full.score_mean)} of {full.method}"
    if row.difference is not None:
        ends = ""
        if row.difference_low is not None and row.difference_high is not None:
            ends = f", 95 % interval {signed(row.difference_low)} to {signed(row.difference_high)}"
        said += f" ({signed(row.difference)}{ends})"
    own, whole = memory.of(row), memory.of(full)
    return said if own is None or whole is None else f"{said}; {memory.name} {size(own)} against {size(whole)}"


def _shares(row: Row, full: Row, memory: Memory) -> list[tuple[str, float]]:
    pairs = [
        ("score", row.score_mean, full.score_mean),
        ("memory", memory.of(row), memory.of(full)),
        ("step time", row.step_seconds, full.step_seconds),
        ("trained", trained(row), trained(full)),
    ]
    return [(name, part / whole) for name, part, whole in pairs if part is not None and whole]
