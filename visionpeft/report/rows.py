"""Facts read off the rows of a benchmark, and off the cells behind them. Cells of older runs lack some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ..benchmark import Row
from ..benchmark.results import CellResult

PartsKey = Literal["seconds_by_part", "saved_by_stage", "saved_by_cause", "state_bytes"]


@dataclass(frozen=True)
class Memory:
    """The measure of memory by which some rows are compared."""

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
    return mean((cell["run"]["measured"].get("cuda") or {}).get("allocated") for cell in row.cells)


def delta_size(row: Row) -> float | None:
    """Return the bytes of the delta file; None: the model has no base."""
    return row.delta_bytes.get("file")


def states(row: Row) -> dict[str, str]:
    """Return the settings that are shown with a row's numbers."""
    frozen = ", ".join(map(str, row.freeze)) if isinstance(row.freeze, list | tuple) else row.freeze
    epochs = "/".join(map(str, dict.fromkeys(row.epochs.values())))
    settings = {"bn": row.bn, "head": row.head, "lean": row.lean, "freeze": frozen, "epochs": epochs, "seeds": row.seeds}
    return {name: str(value) for name, value in settings.items()}


def mean_parts(row: Row, key: PartsKey) -> dict[str, float]:
    """Return the mean over the seeds of a measurement, by part; empty where no cell has it."""
    splits = [split for cell in row.cells if (split := cell["run"]["measured"].get(key))]
    means = {name: mean(split.get(name) for split in splits) for name in dict.fromkeys(n for s in splits for n in s)}
    return {name: value for name, value in means.items() if value is not None}


def scores_by_epoch(cell: CellResult, metric: str) -> dict[int, float]:
    """Return a run's score by epoch; epoch 0 is the model before training."""
    scores = {int(r["epoch"] or 0): value for r in cell["run"]["history"] if (value := r.get(metric)) is not None}
    before = (cell["run"].get("before") or {}).get(metric)
    return {0: before, **scores} if scores and before is not None else scores


def old_classes(row: Row) -> dict[str, tuple[float, float]]:
    """Return the mean over the seeds of each old class's score, before and after."""
    of_cells = [retained.get("per_class") or {} for cell in row.cells if (retained := cell.get("retained"))]
    means = {}
    for name in dict.fromkeys(name for scores in of_cells for name in scores):
        pairs = [scores[name] for scores in of_cells if name in scores]
        means[name] = fmean(before for before, _ in pairs), fmean(after for _, after in pairs)
    return means


def by_seed(row: Row) -> list[CellResult]:
    """Return a row's cells, in the order of their seeds."""
    return sorted(row.cells, key=lambda cell: cell["cell"]["seed"])


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None."""
    there = [v for v in values if v is not None]
    return fmean(there) if there else None
