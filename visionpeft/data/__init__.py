"""Data sets: checked before training, and converted to Ultralytics' format."""

from typing import Any

from .. import _lazy, deprecation

_get, __dir__, __all__ = _lazy.attach(__name__)


def __getattr__(name: str) -> Any:
    if name == "Report":
        deprecation.warn("visionpeft.data.Report", "visionpeft.data.CheckReport")
        name = "CheckReport"
    return _get(name)
