"""What was renamed keeps its old name for two minor versions, and warns."""

from __future__ import annotations

import warnings
from typing import Any


class Renamed(FutureWarning):
    """Something is used by its old name. (A `FutureWarning`, which Python shows to users, unlike a `DeprecationWarning`.)"""


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say that something has another name now.

    Args:
        old: As it was called.
        new: As it is called.
        stacklevel: As for `warnings.warn`; 3 is whoever called the caller.
    """
    warnings.warn(f"{old} is now called {new}; the old name will go with visionpeft 0.3", Renamed, stacklevel)


def alias(old: str, new: str) -> Any:
    """Return a property that is the attribute `new` under its old name.

    Args:
        old: The old name, with its class: "Plan.opened".
        new: The attribute.
    """

    def read(self: Any) -> Any:
        warn(old, new)
        return getattr(self, new)

    return property(read)
