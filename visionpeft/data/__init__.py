"""Data sets: checked before training, and converted to Ultralytics' format."""

from .checking import check
from .report import Finding, Report, Split

__all__ = ["Finding", "Report", "Split", "check"]
