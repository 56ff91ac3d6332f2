"""The summary of a section: which method keeps most of full fine-tuning's score for the least memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..benchmark import Row
from ..tables import size
from .formatting import score, signed
from .rows import Memory, trained

NEAR = 0.95  # share of the reference's score that counts as near to it
_NEAR = f"{100 * NEAR:.0f} %"


@dataclass(frozen=True)
class Summary:
    """The method that is named, and why.

    Attributes:
        row: The method.
        reason: Why it is named, in a sentence or two.
        compared: The method that is set beside the reference: the one named, or else the nearest; None: there is none.
        shares: Score, memory and the like of that method as shares of the reference's, by name.
    """

    row: Row
    reason: str
    compared: Row | None = None
    shares: list[tuple[str, float]] = field(default_factory=list)


def summarise(rows: Sequence[Row], memory: Memory, against: str) -> Summary:
    """Choose the method to name.

    Args:
        rows: Rows of one model and data set, the best score first.
        memory: The measure of their memory.
        against: The label of the reference.
    """
    reference = next((row for row in rows if row.names["method"] == against), None)
    others = [row for row in rows if row.names["method"] != against]
    if reference is None or not others:
        missing = f"no {against}" if reference is None else "nothing"
        best = f"The best score, {score(rows[0].score_mean)} {rows[0].score}"
        return Summary(rows[0], f"{best}; there is {missing} here to compare it with.")
    near = [row for row in others if _score_share(row, reference) >= NEAR]
    least = min(near, key=lambda row: _order(row, memory), default=None)
    if least and _order(least, memory) < _order(reference, memory):
        which = f"The least memory of {len(near)} that keep" if len(near) > 1 else "The only other that keeps"
        reason = f"{_comparison(least, reference, memory)}. {which} {_NEAR} of {against}'s score."
        return Summary(least, reason, least, _shares(least, reference, memory))
    why = f"None that keeps {_NEAR} of its score takes less memory" if near else f"No other keeps {_NEAR} of its score"
    nearest = max(others, key=lambda row: _score_share(row, reference))
    reason = f"{why}. Nearest is {_comparison(nearest, reference, memory)}."
    return Summary(reference, reason, nearest, _shares(nearest, reference, memory))


def rule(against: str) -> str:
    """Return the rule that `summarise` follows, for readers."""
    which = f"{against} included, that keep {_NEAR} of {against}'s score on the seeds that both have"
    return f"Named is the method of least memory among those, {which}."


def _order(row: Row, memory: Memory) -> float:
    """Return a row's memory to order by: rows whose memory is not known come last."""
    taken = memory.of(row)
    return float("inf") if taken is None else taken


def _scores(row: Row, reference: Row) -> tuple[float, float]:
    """Return both rows' scores, on the seeds that both have if there are any."""
    if both := sorted(row.score_by_seed.keys() & reference.score_by_seed.keys()):
        return fmean(row.score_by_seed[seed] for seed in both), fmean(reference.score_by_seed[seed] for seed in both)
    return row.score_mean, reference.score_mean


def _score_share(row: Row, reference: Row) -> float:
    own, whole = _scores(row, reference)
    return own / whole if whole else float("inf")


def _comparison(row: Row, reference: Row, memory: Memory) -> str:
    own_score, whole_score = _scores(row, reference)
    text = f"{row.method}: {score(own_score)} {row.score} against {score(whole_score)} of {reference.method}"
    if row.difference is not None:
        ends = ""
        if row.difference_low is not None and row.difference_high is not None:
            ends = f", 95 % interval {signed(row.difference_low)} to {signed(row.difference_high)}"
        text += f" ({signed(row.difference)}{ends})"
    own, whole = memory.of(row), memory.of(reference)
    return text if own is None or whole is None else f"{text}; {memory.name} {size(own)} against {size(whole)}"


def _shares(row: Row, reference: Row, memory: Memory) -> list[tuple[str, float]]:
    pairs = [
        ("score", *_scores(row, reference)),
        ("memory", memory.of(row), memory.of(reference)),
        ("step time", row.step_seconds, reference.step_seconds),
        ("trained", trained(row), trained(reference)),
    ]
    return [(name, part / whole) for name, part, whole in pairs if part is not None and whole]
