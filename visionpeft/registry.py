"""Names to classes. A file dropped into methods/ or families/ registers itself. So do modules of other packages, which name
them as entry points of the groups ``visionpeft.methods`` and ``visionpeft.families``."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import ConfigError, nearest

T = TypeVar("T", bound=type)
log = logging.getLogger(__name__)


class Registry(Mapping[str, Any]):
    """The classes that the files of one package, and the entry points of its name, register: each is imported once."""

    def __init__(self, package: str, kind: str):
        self.package, self.kind = package, kind
        self._classes: dict[str, Any] = {}
        self._scanned, self._lock = False, threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Return a class decorator that files the class under `name` and sets its ``name``."""

        def add(cls: T) -> T:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(f"two {self.kind}s are called '{name}': {known} and {cls}; rename one")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def _scan(self) -> dict[str, Any]:
        with self._lock:  # another thread must not look before all are there
            if not self._scanned:
                self._scanned = True
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):  # what several of them share
                        importlib.import_module(f"{self.package}.{module.name}")
                for plugin in entry_points(group=self.package):
                    try:
                        plugin.load()
                    except Exception as error:  # somebody else's mistake, with which all that is ours still works
                        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
                        log.warning("the %s '%s' of %s cannot be used (%s)", self.kind, plugin.name, plugin.value, said)
        return self._classes

    def __getitem__(self, name: str) -> Any:
        classes = self._scan()
        if name not in classes:
            raise ConfigError(
                f"there is no {self.kind} '{name}'; there are: {', '.join(sorted(classes))}.{nearest(name, classes)}"
            )
        return classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._scan()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._scan()))

    def __len__(self) -> int:
        return len(self._scan())


METHODS = Registry("visionpeft.methods", "method")
FAMILIES = Registry("visionpeft.families", "family")
