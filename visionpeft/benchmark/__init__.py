"""Many runs of `train` beside each other: a grid of model, data, method, freeze and seed; one JSON file per cell."""

from .. import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__)
