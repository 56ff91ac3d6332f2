"""One file per method: formula, authors and URL in its first line, then a dataclass and at most one small module."""
