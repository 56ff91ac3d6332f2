"""Where `Anatomy`, `Edit` and `Plan` were before `visionpeft.core`; methods of users import them from here."""

from __future__ import annotations

import sys
import types
from typing import Any

from .core import anatomy, method, plan


class _Module(types.ModuleType):
    """Also the verb of the same name, in whose place the import of this module puts it."""

    def __getattr__(self, name: str) -> Any:
        for home in (anatomy, method, plan):
            if name in vars(home) and not name.startswith("_"):
                return vars(home)[name]
        raise AttributeError(f"visionpeft.plan has no {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .planning import plan as verb

        return verb(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
