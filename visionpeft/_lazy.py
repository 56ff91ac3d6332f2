"""Names of a package that are imported when they are first asked for, as its ``__init__.pyi`` says where they are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's ``__getattr__``, ``__dir__`` and ``__all__`` (PEP 562), from the imports of its stub.

    Args:
        package: Its ``__name__``.
    """
    module = sys.modules[package]
    stub = str(module.__file__).replace("__init__.py", "__init__.pyi")
    source = module.__loader__.get_data(stub)  # type: ignore[union-attr]  # of a zip file, too
    homes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            homes.update({alias.asname or alias.name: (home, alias.name) for alias in node.names})

    def get(name: str) -> Any:
        if name not in homes and (name.startswith("_") or find_spec(f"{package}.{name}") is None):
            raise AttributeError(f"module {package} has no attribute {name}")
        home, own = homes.get(name, (".", name))  # a module of the package is an attribute, too
        found = getattr(import_module(home, package), own) if home.strip(".") else import_module(home + own, package)
        setattr(module, name, found)
        return found

    class Package(ModuleType):
        """Keeps a public name that is no module where the import of a module of that name would put it in its place."""

        def __setattr__(self, name: str, value: Any) -> None:
            verb = homes.get(name, (".", ""))[0].strip(".")
            if not (verb and isinstance(value, ModuleType) and not callable(value)):
                super().__setattr__(name, value)

    module.__class__ = Package
    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)
