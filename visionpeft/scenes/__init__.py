"""Generated scenes with exact labels, and a small detector trained on them: something to train on where nothing else is."""

from .. import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__)
