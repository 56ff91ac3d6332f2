"""Generated scenes with exact labels, and a small detector trained on them: something to train on where nothing else is."""

from importlib import import_module
from typing import Any

from . import driving, satellite
from .draw import Scene, Thing
from .sets import EMBEDDED, PREFIX, SETS, VERSION, WEIGHTS, SceneSet, find_set, write

__all__ = ["EMBEDDED", "SETS", "WEIGHTS", "Scene", "SceneSet", "Thing", "driving", "satellite", "write"]
__all__ += ["PREFIX", "VERSION", "find_set"]


def __getattr__(name: str) -> Any:
    """Return `find` or `cache`, which keep their names here, from the room that uses this one."""
    if own := {"find": "find", "cache": "cache_folder"}.get(name):
        return getattr(import_module("visionpeft.sources"), own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
