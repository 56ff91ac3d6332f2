"""visionpeft: adapt a pretrained YOLO or timm model to your own images on the GPU you already have."""

from . import _lazy

__version__ = "0.1.0"
_get, __dir__, __all__ = _lazy.attach(__name__)


def __getattr__(name: str) -> object:
    if name.endswith("Config") and name not in __all__:  # of a method that the stub does not list
        from .registry import METHODS

        for cls in METHODS.values():
            if cls.__name__ == name:
                return cls
    return _get(name)
