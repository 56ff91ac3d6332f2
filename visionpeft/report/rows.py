"""What is read off the rows of a benchmark, and off the cells behind them. Cells of older runs lack some of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..benchmark import Row

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Memory:
    """What stands for the peak memory of some rows."""

    name: str  # of an axis
    meaning: str
    of: Callable[[Row], float | None]


def memory_of(rows: Sequence[Row]) -> Memory:
    """Return the strictest measure of memory that all rows have."""
    if all(gpu_peak(row) is not None for row in rows):
        return Memory("peak GPU memory", "the CUDA allocator's peak in training steps", gpu_peak)
    if all(row.live_bytes is not None for row in rows):
        meaning = "the most bytes that lived at once in a training step, above the model and what else lived before it"
        return Memory("peak live bytes", meaning, lambda row: row.live_bytes)
    return Memory("bytes saved", "what a training step keeps for backward", lambda row: row.saved_bytes)


def front(rows: Sequence[Row], memory: Memory) -> set[str]:
    """Return the methods that no other equals or beats in score and memory, and beats in one of them."""
    placed = [(row, taken) for row in rows if (taken := memory.of(row)) is not None]

    def beaten(row: Row, taken: float) -> bool:
        return any(
            other.score_mean >= row.score_mean and theirs <= taken and (other.score_mean > row.score_mean or theirs < taken)
            for other, theirs in placed
        )

    return {row.method for row, taken in placed if not beaten(row, taken)}


def trained(row: Row) -> int:
    """Return how many parameters train, of body and head."""
    return row.trained_body + row.trained_head


def share(row: Row) -> float:
    """Return the share of all parameters that trains."""
    return trained(row) / max(row.total, 1)


def gpu_peak(row: Row) -> float | None:
    """Return the mean over the seeds of the CUDA allocator's peak; None on a CPU."""
    return mean((measured(cell).get("cuda") or {}).get("allocated") for cell in row.cells)


def delta_size(row: Row) -> float | None:
    """Return the bytes of the delta file; None: the model has no base."""
    return (row.delta_bytes or {}).get("file")


def states(row: Row) -> dict[str, str]:
    """Return what a row must say of itself beside its numbers."""
    frozen = ", ".join(map(str, row.freeze)) if isinstance(row.freeze, list | tuple) else row.freeze
    epochs = "/".join(map(str, dict.fromkeys(row.epochs.values())))
    said = {"bn": row.bn, "head": row.head, "lean": row.lean, "freeze": frozen, "epochs": epochs, "seeds": row.seeds}
    return {name: str(value) for name, value in said.items()}


def split_of(row: Row, key: str) -> dict[str, float]:
    """Return the mean over the seeds of a measured split, such as "saved_by_stage", by part; empty where no cell has it."""
    splits = [split for cell in row.cells if (split := measured(cell).get(key))]
    means = {name: mean(split.get(name) for split in splits) for name in dict.fromkeys(n for s in splits for n in s)}
    return {name: value for name, value in means.items() if value is not None}


def history_of(cell: Cell, metric: str) -> dict[int, float]:
    """Return a run's score by epoch; epoch 0 is the model before training."""
    found = {int(r["epoch"]): r[metric] for r in cell["run"].get("history") or [] if r.get(metric) is not None}
    before = (cell["run"].get("before") or {}).get(metric)
    return {0: before, **found} if found and before is not None else found


def old_classes(row: Row) -> dict[str, tuple[float, float]]:
    """Return the mean over the seeds of each old class's score, before and after."""
    kept = [retained.get("per_class") or {} for cell in row.cells if (retained := cell.get("retained"))]
    names = dict.fromkeys(name for own in kept for name in own)
    return {n: (fmean(o[n][0] for o in kept if n in o), fmean(o[n][1] for o in kept if n in o)) for n in names}


def by_seed(row: Row) -> list[dict[str, Any]]:
    """Return a row's cells, in the order of their seeds."""
    return sorted(row.cells, key=lambda cell: cell["cell"]["seed"])


def measured(cell: Cell) -> Mapping[str, Any]:
    """Return what a cell's run measured."""
    return cell["run"].get("measured") or {}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are there, or None."""
    there = [v for v in values if v is not None]
    return fmean(there) if there else None
