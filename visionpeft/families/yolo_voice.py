"""What Ultralytics says, and where. Registers nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from ultralytics.utils import LOGGER


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
def aside() -> Iterator[None]:
    """Let Ultralytics say what it has to say, the progress of a download too, on stderr: stdout is for results."""
    with _on_stderr(), redirect_stdout(sys.stderr):
        yield


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
