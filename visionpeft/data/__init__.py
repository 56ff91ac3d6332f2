"""Data sets: checked before training, and converted to Ultralytics' format."""

from .checking import check
from .converting import Conversion, convert
from .report import Finding, Report, Split

__all__ = ["Conversion", "Finding", "Report", "Split", "check", "convert"]
