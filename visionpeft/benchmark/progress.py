"""The progress of a sweep, on stderr: a line per cell, and a bar over all of them."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import printable
from .grid import Cell


class SweepProgress:
    """The lines and the bar; the bar is shown while `bar` is entered."""

    def __init__(self, quiet: bool):
        self._quiet, self._total, self._done = quiet, 0, 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        columns = TextColumn("{task.fields[count]}"), BarColumn(), TextColumn("{task.description}")
        self.bar = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=quiet, transient=True)
        self._task = self.bar.add_task("", total=None, count="")
        self._running: list[str] = []
        self._lock = threading.Lock()

    def set_total(self, total: int) -> None:
        """Set how many cells and trials there are."""
        self._total = total
        self.bar.update(self._task, total=total, count=f"0/{total}")

    def start(self, cell: Cell) -> None:
        """Show that a cell has started."""
        with self._lock:
            self._running.append(str(cell))
            self.bar.update(self._task, description=self._running[0])

    def finish(self, cell: Cell, seconds: float | None, outcome: str) -> None:
        """Print the line of a cell that has ended.

        Args:
            cell: The cell.
            seconds: Time that it took; None: it was there before.
            outcome: Its score, or why it failed.
        """
        with self._lock:
            if str(cell) in self._running:
                self._running.remove(str(cell))
            self._done += 1
            running = self._running[0] if self._running else ""
            self.bar.update(self._task, advance=1, description=running, count=f"{self._done}/{self._total}")
            if not self._quiet:
                count = f"{self._done:>{len(str(self._total))}}/{self._total}"
                took = "there already" if seconds is None else f"{seconds:.0f} s"
                self._console.print(printable("   ".join((count, str(cell), outcome, took))), markup=False)
