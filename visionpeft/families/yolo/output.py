"""Messages of Ultralytics, kept off the terminal or sent to stderr."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ultralytics.utils import LOGGER

from ... import errors
from ...process import shared


class _Thread(threading.local):
    to_stderr = False


_THREAD = _Thread()


class _Split:
    """Stands for stdout: some threads print to stderr instead, the others where they did."""

    def __init__(self, stdout: Any):
        self._stdout = stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if _THREAD.to_stderr else self._stdout, name)


@shared
@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ultralytics' messages and progress bars off the terminal; its warnings go to stderr."""
    level = LOGGER.level
    LOGGER.setLevel(max(level, logging.WARNING))
    try:
        with _on_stderr():
            yield
    finally:
        LOGGER.setLevel(level)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send Ultralytics' messages, the progress of a download too, to stderr: stdout is for results."""
    with _on_stderr(), _split():
        before, _THREAD.to_stderr = _THREAD.to_stderr, True
        try:
            yield
        finally:
            _THREAD.to_stderr = before


@shared
@contextmanager
def _on_stderr() -> Iterator[None]:
    terminal = [(h, h.stream) for h in LOGGER.handlers if type(h) is logging.StreamHandler]  # and no file's
    try:
        for handler, _ in terminal:
            handler.setStream(sys.stderr)
        yield
    finally:
        for handler, stream in terminal:
            handler.setStream(stream)


@shared
@contextmanager
def _split() -> Iterator[None]:
    with redirect_stdout(_Split(sys.stdout)):  # type: ignore[type-var]
        yield


def one_line(message: object) -> str:
    """Return a message of Ultralytics for a sentence, without colours and signs."""
    return errors.one_line(re.sub("\x1b\\[[0-9;]*m", "", str(message)).replace("❌", ""))
