"""From the results of a benchmark to one page of HTML and a table in Markdown."""

from .. import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__)
