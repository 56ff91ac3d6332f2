"""timm's image classifiers."""

from .family import Timm

__all__ = ["Timm"]
