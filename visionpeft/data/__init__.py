"""Data sets: checked before training, and converted to Ultralytics' format."""

from .. import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__)
