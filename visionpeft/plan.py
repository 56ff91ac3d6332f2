"""Where `Anatomy`, `Edit` and `Plan` were before `visionpeft.core`; methods of users import them from here."""

from __future__ import annotations

from typing import Any

from . import deprecation
from .core import anatomy, method, plan


def __getattr__(name: str) -> Any:
    for home in (anatomy, method, plan):
        if name in vars(home) and not name.startswith("_"):
            deprecation.warn(f"visionpeft.plan.{name}", f"{home.__name__}.{name}")
            return vars(home)[name]
    raise AttributeError(f"module visionpeft.plan has no attribute {name}")
