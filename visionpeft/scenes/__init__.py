"""Generated scenes with exact labels, and a small detector trained on them: something to train on where nothing else is."""

from . import driving, satellite
from .draw import Scene, Thing
from .sets import EMBEDDED, SETS, WEIGHTS, SceneSet, cache, find, write

__all__ = ["EMBEDDED", "SETS", "WEIGHTS", "Scene", "SceneSet", "Thing", "cache", "driving", "find", "satellite", "write"]
