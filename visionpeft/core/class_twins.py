"""The one place that composes and peels class twins.

A twin is a module whose class was swapped for ``class Twin(*mixins, PlainClass)``: the same object, the same
parameters, the same state-dict keys, another behaviour. Mixins are put on and taken off in any order; a twin deep-copies
and pickles like the module it is made from.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_COMPOSED: dict[tuple[type, tuple[type, ...]], type] = {}


def plain(cls: type) -> type:
    """Return the class without any mixin of ours."""
    return cls.__dict__.get("_plain", cls)


def mixins(cls: type) -> tuple[type, ...]:
    """Return the mixins that `cls` is composed of, outermost first; empty for a plain class."""
    return cls.__dict__.get("_mixins", ())


def has_mixin(module: nn.Module, mixin: type) -> bool:
    """Say whether `module` is a twin with `mixin`."""
    return mixin in mixins(type(module))


def put_on(module: nn.Module, mixin: type) -> None:
    """Add `mixin` to the module's class; no effect where it is on already.

    Raises:
        TypeError: Python cannot swap this class; the module is then unchanged.
    """
    worn = mixins(type(module))
    if mixin not in worn:
        _dress(module, (*worn, mixin))


def take_off(module: nn.Module, mixin: type) -> None:
    """Remove `mixin` from the module's class; no effect where it is not on."""
    _dress(module, tuple(m for m in mixins(type(module)) if m is not mixin))


def _dress(module: nn.Module, worn: tuple[type, ...]) -> None:
    module.__class__ = _compose(plain(type(module)), tuple(sorted(worn, key=lambda m: m.__qualname__)))


def _compose(base: type, worn: tuple[type, ...]) -> type:
    if not worn:
        return base
    if (base, worn) not in _COMPOSED:
        body = {"_plain": base, "_mixins": worn, "__reduce_ex__": _reduce, "__doc__": base.__doc__}
        _COMPOSED[base, worn] = type("".join(m.__name__ for m in worn) + base.__name__, (*worn, base), body)
    return _COMPOSED[base, worn]


def _reduce(module: nn.Module, protocol: Any) -> tuple:
    reduced: Any = object.__reduce_ex__(module, 4)  # (copyreg.__newobj__, (class,), state, ...)
    _, _, *rest = reduced
    return (_rebuild, (plain(type(module)), mixins(type(module))), *rest)


def _rebuild(base: type, worn: tuple[type, ...]) -> nn.Module:
    cls: Any = _compose(base, worn)
    return cls.__new__(cls)
