"""Ultralytics YOLO."""

import logging
import sys
from contextlib import redirect_stdout

# At its first import ever, Ultralytics says on stdout, which is for results, where it keeps its settings.
with redirect_stdout(sys.stderr):
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    from ultralytics.utils import LOGGER

    logging.disable(before)

for handler in LOGGER.handlers:
    if type(handler) is logging.StreamHandler:
        handler.setStream(sys.stdout)  # its own place

from .family import Yolo  # noqa: E402  (after what precedes the first import of Ultralytics)

__all__ = ["Yolo"]
