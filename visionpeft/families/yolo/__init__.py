"""Ultralytics YOLO."""

from .family import Yolo

__all__ = ["Yolo"]
