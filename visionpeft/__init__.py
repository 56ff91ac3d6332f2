"""visionpeft: adapt a pretrained YOLO or timm model to your own images on the GPU you already have."""

from . import _lazy

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = _lazy.attach(__name__)
