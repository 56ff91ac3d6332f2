"""The display of a run that trains: one line per epoch, and a bar over all of it; on stderr, made with rich."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..tables import size

NARROW = 72  # columns; below, the bar itself, memory and seconds are left out


class Progress:
    """Shows the progress of a run. A context manager; without `shown`, it shows nothing.

    Args:
        epochs: Their number, at most.
        score: The metric to show after each.
        shown: Whether to show anything.
    """

    def __init__(self, epochs: int, score: str, shown: bool = True):
        self._epochs, self._score, self._shown = epochs, score, shown
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        self._wide = wide = self._console.width >= NARROW
        columns: Iterable[ProgressColumn] = [
            TextColumn("epoch {task.fields[epoch]}"),
            *([BarColumn(bar_width=None)] if wide else []),
            TextColumn("{task.fields[batch]}  loss {task.fields[loss]}"),
            *([TextColumn("{task.fields[memory]}")] if wide else []),
            TimeRemainingColumn(compact=not wide),
        ]
        self._bar = Bar(*columns, console=self._console, disable=not shown, transient=True, expand=wide)
        self._batches, self._done, self._began = 1, 0, 0.0
        empty = {"epoch": f"–/{epochs}", "batch": "–", "loss": "–", "memory": ""}
        self._task = self._bar.add_task("", total=None, **empty)  # type: ignore[arg-type]

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def start(self, epoch: int, batches: int) -> None:
        """Show that an epoch begins.

        Args:
            epoch: Its number, from 0.
            batches: Their number.
        """
        self._batches, self._done, self._began = batches, 0, time.perf_counter()
        text = f"{epoch + 1}/{self._epochs}"
        self._bar.update(self._task, total=self._epochs * batches, completed=epoch * batches, epoch=text)

    def batch(self, loss: float, memory: int | None) -> None:
        """Show that a batch is done.

        Args:
            loss: Mean of the epoch so far.
            memory: Bytes to show: the GPU's peak, or those saved for backward.
        """
        self._done += 1
        shown: dict[str, Any] = {"batch": f"{self._done}/{self._batches}", "loss": f"{loss:.4g}"}
        self._bar.update(self._task, advance=1, memory=f"memory {size(memory)}" if memory else "", **shown)

    def end(self, epoch: int, loss: float, metrics: Mapping[str, float | None]) -> None:
        """Show that an epoch is done and validated."""
        if not self._shown:
            return
        value, width = metrics.get(self._score), len(str(self._epochs))
        texts = [f"epoch {epoch + 1:>{width}}/{self._epochs}", f"loss {loss:<8.4g}"]
        if value is not None and not math.isnan(value):
            texts.append(f"{self._score} {value:.4f}")
        if self._wide:
            texts.append(f"{time.perf_counter() - self._began:.1f} s")
        self._console.print(("   " if self._wide else " ").join(texts).rstrip())
