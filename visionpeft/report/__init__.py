"""From the results of a benchmark to one page of HTML and a table in Markdown."""

from .writing import write

__all__ = ["write"]
