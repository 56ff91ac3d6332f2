"""The families of models, a file each; the registry finds them."""

import sys
from contextlib import redirect_stdout
from logging import StreamHandler

with redirect_stdout(
    sys.stderr
):  # where Ultralytics makes its settings at its first import, it says so; stdout is for results
    from ultralytics.utils import LOGGER

for handler in LOGGER.handlers:
    if isinstance(handler, StreamHandler):
        handler.setStream(sys.stdout)  # its own place
