"""The one place that swaps the class of a module.

A swapped module has the class ``class Swapped(*mixins, PlainClass)``: the same object, the same parameters, the same
state-dict keys, another behaviour. Mixins are added and removed in any order; a swapped module deep-copies and pickles
like a plain one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_COMPOSED: dict[tuple[type, tuple[type, ...]], type] = {}


class Mixin:
    """Base of all mixins."""

    _mixin_rank = 0  # the order among the mixins of one module, the outermost first


def plain(cls: type) -> type:
    """Return the class without any mixin of ours."""
    return cls.__dict__.get("_plain", cls)


def mixins(cls: type) -> tuple[type[Mixin], ...]:
    """Return the mixins that `cls` is composed of, outermost first; empty for a plain class."""
    return cls.__dict__.get("_mixins", ())


def has_mixin(module: nn.Module, mixin: type[Mixin]) -> bool:
    """Return whether the class of `module` has `mixin`."""
    return mixin in mixins(type(module))


def add_mixin(module: nn.Module, mixin: type[Mixin]) -> None:
    """Add `mixin` to the module's class; no effect where it has it already.

    Raises:
        TypeError: Python cannot swap this class; the module is then unchanged.
    """
    _swap(module, {*mixins(type(module)), mixin})


def remove_mixin(module: nn.Module, mixin: type[Mixin]) -> None:
    """Remove `mixin` from the module's class; no effect where it lacks it."""
    _swap(module, {*mixins(type(module))} - {mixin})


def _swap(module: nn.Module, wanted: set[type[Mixin]]) -> None:
    module.__class__ = _compose(plain(type(module)), tuple(sorted(wanted, key=lambda m: (m._mixin_rank, m.__qualname__))))


def _compose(base: type, mixins: tuple[type[Mixin], ...]) -> type:
    if not mixins:
        return base
    if (base, mixins) not in _COMPOSED:
        body = {"_plain": base, "_mixins": mixins, "__reduce_ex__": _reduce, "__doc__": base.__doc__}
        _COMPOSED[base, mixins] = type("".join(m.__name__ for m in mixins) + base.__name__, (*mixins, base), body)
    return _COMPOSED[base, mixins]


def _reduce(module: nn.Module, protocol: Any) -> tuple:
    reduced: Any = object.__reduce_ex__(module, 4)  # (copyreg.__newobj__, (class,), state, ...)
    _, _, *rest = reduced
    return (_rebuild, (plain(type(module)), mixins(type(module))), *rest)


def _rebuild(base: type, mixins: tuple[type[Mixin], ...]) -> nn.Module:
    cls: Any = _compose(base, mixins)
    return cls.__new__(cls)
