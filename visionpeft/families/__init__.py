"""One file per family of models: how to load one, read its anatomy, train, check, use and export it."""

import sys
from contextlib import redirect_stdout
from logging import StreamHandler

# At its first import ever, Ultralytics says where it keeps its settings; stdout is for results.
with redirect_stdout(sys.stderr):
    from ultralytics.utils import LOGGER

for handler in LOGGER.handlers:
    if type(handler) is StreamHandler:
        handler.setStream(sys.stdout)  # its own place
