"""Many runs of `train` beside each other: a grid of model, data, method, freeze and seed; one JSON file per cell."""

from .compare import Row, compare, markdown, table
from .results import read
from .sweep import run

__all__ = ["Row", "compare", "markdown", "read", "run", "table"]
