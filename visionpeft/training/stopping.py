"""Signals that end a run: it saves at its next step, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Stopped

_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1")  # of schedulers, closed terminals, and SLURM before a job's time is over


class _Asked(BaseException):
    """Raised where a signal comes while nothing looks for it, as KeyboardInterrupt is."""


@dataclass
class Stop:
    """The signals that ask a run to end.

    Attributes:
        asked: The name of the first signal; empty while there was none.
        checkpoint: The file to resume the run from, once there is one.
    """

    asked: str = ""
    checkpoint: Path | None = None
    _awaited: bool = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Let a loop look at `asked` between its steps: a signal does then not interrupt a step."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False
        if self.asked:
            raise _Asked

    def error(self) -> Stopped:
        """Return the error that ends the run."""
        code = signal.Signals[self.asked].value
        if self.checkpoint and self.checkpoint.is_file():
            return Stopped(f"stopped by {self.asked}", self.checkpoint.parent, code)
        return Stopped(f"stopped by {self.asked} before anything was saved; start anew", None, code)

    def handle(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.asked = signal.Signals(number).name
        if not self._awaited:
            raise _Asked


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let signals end the code inside, and restore their handlers afterwards. Has an effect in the main thread only.

    Raises:
        Stopped: There was one.
    """
    stop, earlier = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        known = {n: signal.getsignal(n) for n in (getattr(signal, name, None) for name in _SIGNALS) if n is not None}
        earlier = {n: handler for n, handler in known.items() if handler not in (None, signal.SIG_IGN)}  # as nohup has it
    for number in earlier:
        signal.signal(number, stop.handle)
    try:
        yield stop
    except _Asked:
        raise stop.error() from None
    except RuntimeError as error:
        if stop.asked and "DataLoader worker" in str(error):  # the signal has ended processes that load images, too
            raise stop.error() from error
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
