"""Checks of files from elsewhere: JSON without surprises, and values of the types that a class declares.

`Malformed` says what is wrong with the content; the reader of the file puts its name before it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import nearest

Json = dict[str, Any]  # an object of JSON
DEPTH = 100  # of lists and mappings in one another; ours go 8 deep
_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}


class Malformed(ValueError):
    """A fault in the content of a file, told without the file's name."""


def parse(text: str | bytes) -> Any:
    """Return the values of JSON text.

    Raises:
        Malformed: It is no JSON, names a key twice, or is nested too deeply.
    """
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise Malformed(f"it is nested more than {DEPTH} deep") from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"it is no JSON: {' '.join(str(error).split())}") from error
    level, depth = [values] if isinstance(values, dict | list) else [], 0
    while level := [v for x in level for v in _inside(x) if isinstance(v, dict | list)]:
        if (depth := depth + 1) > DEPTH:
            raise Malformed(f"it is nested more than {DEPTH} deep")
    return values


def check(kind: Any, value: Any, where: str = "it", newer: bool = True) -> Any:
    """Return `value` as a type: mappings as the dataclasses that are declared, lists as tuples where those are.

    Args:
        kind: A dataclass, a TypedDict, a class, or an annotation made of them (unions, Literal, Mapping, Sequence, tuple,
            Any). A `float` must be finite, and may be a whole number; `numbers.Real` may be NaN.
        value: After JSON, or after torch.load.
        where: The name of the value, for a sentence.
        newer: Whether to refuse fields that are not declared, for a newer version wrote them. Else they are left out.

    Raises:
        Malformed: It is something else.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (Any, object) or kind in (Sequence, Mapping) and _is(kind, value):
        return value
    if _has_fields(kind):
        return _fields(kind, value, where, newer)
    if origin in (Union, types.UnionType):
        for one in inner:
            if _is(one, value):
                return check(one, value, where, newer)
    elif origin in (Mapping, dict) or (kind is dict):
        if isinstance(value, Mapping):
            key_kind, value_kind = inner or (Any, Any)
            for key in value:
                check(key_kind, key, f"a key of {where}", newer)
            return {k: check(value_kind, v, f"{where}.{k}" if len(str(k)) < 60 else where, newer) for k, v in value.items()}
    elif origin is tuple and inner[-1:] != (...,):
        if isinstance(value, list | tuple) and len(value) == len(inner):
            return tuple(check(one, v, f"{where}[{i}]", newer) for i, (one, v) in enumerate(zip(inner, value, strict=True)))
    elif origin in (tuple, list, Sequence):
        if isinstance(value, list | tuple):
            found = [check(inner[0], v, f"{where}[{i}]", newer) for i, v in enumerate(value)]
            return tuple(found) if origin is tuple else found
    elif _is(kind, value):
        return value
    raise Malformed(f"{where} is {shown(value)}, but must be {words(kind)}")


def check_settings(cls: type, settings: Mapping[str, Any]) -> None:
    """Check keyword arguments of a class against the annotations of its constructor, or an ancestor's.

    Raises:
        Malformed: One is of another type. Of those that are not declared, numbers must be finite.
    """
    kinds: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        if isinstance(constructor := vars(ancestor).get("__init__"), types.FunctionType):
            kinds |= get_type_hints(constructor)
    for name, value in settings.items():
        check(kinds.get(name, Any), value, name)
        _refuse_infinite(value, name)


def _refuse_infinite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise Malformed(f"{where} is {value}, but must be a finite number")
    for one in value if isinstance(value, list | tuple) else value.values() if isinstance(value, Mapping) else ():
        _refuse_infinite(one, where)


def words(kind: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, inner)))
    if origin in (Mapping, dict) or kind is dict or _has_fields(kind):
        return "a mapping of names"
    if origin in (tuple, list, Sequence):
        return f"a list of {len(inner)}" if origin is tuple and inner[-1:] != (...,) else "a list"
    return _WORDS.get(kind, "a number" if kind.__name__ == "Real" else f"a {kind.__name__}")


def finite(value: Any) -> bool:
    """Return whether a value is a number that 64 bits can hold, neither NaN nor infinite."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def writable(text: Any) -> bool:
    """Return whether a value is text that every file can hold: surrogates have no UTF-8."""
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def _is(kind: Any, value: Any) -> bool:
    """Return whether the outermost type of a value is that of a kind."""
    origin = get_origin(kind)
    if kind in (Any, object):
        return True
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(kind))
    if origin in (Union, types.UnionType):
        return any(_is(one, value) for one in get_args(kind))
    if origin in (Mapping, dict) or _has_fields(kind):
        return isinstance(value, Mapping)
    if kind is Sequence:
        return isinstance(value, list | tuple)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple)
    if kind is float:
        return finite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or is_typeddict(kind)


def _fields(kind: Any, value: Any, where: str, newer: bool) -> Any:
    if not isinstance(value, Mapping):
        raise Malformed(f"{where} is {shown(value)}, but must be a mapping of names")
    kinds, needed = _kinds(kind)
    if newer and (strange := next((k for k in value if k not in kinds), None)) is not None:
        raise Malformed(unknown(where, strange, kinds))
    if (lacking := next((name for name in needed if name not in value), None)) is not None:
        raise Malformed(f"{where} has no {lacking}")
    inside = {k: f"{where}.{k}" if where != "it" else k for k in kinds}
    return kind(**{k: check(kinds[k], value[k], inside[k], newer) for k in kinds if k in value})


def unknown(where: str, name: Any, known: Iterable[str]) -> str:
    """Return the sentence for an unknown field in a file of a known format."""
    hint = nearest(str(name), known)
    return f"{where} has {shown(name)}, which was written by a newer visionpeft; upgrade visionpeft{hint and '.' + hint}"


@cache
def _kinds(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a class's fields, and which fields it needs, in their order."""
    kinds = get_type_hints(kind)
    if is_typeddict(kind):
        return kinds, [name for name in kinds if name in kind.__required_keys__]
    fields = {f.name: f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind)}
    return {name: kinds[name] for name in fields}, [name for name, needed in fields.items() if needed]


def _once(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise Malformed(f"it names {shown(next(n for n in values if names.count(n) > 1))} twice")
    return values


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def shown(value: Any) -> str:
    """Return a value as text for a sentence."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a whole number of more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:57]}..."
