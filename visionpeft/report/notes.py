"""Notes that a reader needs to read the numbers rightly."""

from __future__ import annotations

from collections.abc import Sequence

from ..benchmark import Row
from .rows import gpu_peak

_MACHINE = ("platform", "cpu", "cores", "gpu", "threads")


def notes(rows: Sequence[Row], against: str) -> list[str]:
    """Return the notes that these rows need.

    Args:
        rows: Rows of all sections.
        against: The label of the reference.
    """
    cells = [cell for row in rows for cell in row.cells]
    machines = {tuple((cell.get("environment") or {}).get(k) for k in _MACHINE) for cell in cells}
    needed = [
        (
            any(row.low is not None for row in rows),
            "Intervals are 95 % bootstrap intervals over validation images and seeds. Differences are paired: on the same "
            f"images and seeds as {against}.",
        ),
        (
            any(row.low is None for row in rows),
            "A score without an interval is of cells that kept nothing of single images.",
        ),
        (
            any(row.seeds == 1 for row in rows),
            "A row of one seed has an interval over images only: it does not say how much another seed would differ.",
        ),
        (
            any(gpu_peak(row) is None for row in rows),
            "On a CPU there is no allocator's peak. Bytes saved and bytes alive are counted exactly and are the same on a "
            "GPU, but leave out what lives before a step, as weights and the optimizer's state do, and what CUDA takes.",
        ),
        (
            any(row.retained_after is not None for row in rows),
            "Old classes are measured with the adapted body under the base's own head. To deploy both heads takes two "
            "passes, one over each body. A detached delta gives the base back, bit for bit.",
        ),
        (
            len({row.bn for row in rows}) > 1,
            "Where bn differs, part of a difference in score and memory is due to it: statistics that move need more kept.",
        ),
        (len(machines) > 1, "Cells ran on different machines: compare times within one of them only."),
    ]
    return [note for holds, note in needed if holds]
