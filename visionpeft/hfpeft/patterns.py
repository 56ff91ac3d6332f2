"""Regular expressions that a folder brings along: matched in a time that no pattern can stretch, unlike Python's own.

A pattern becomes a function from the places in a name where it may begin to those where it may end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

Ends = Callable[[str, set[int]], set[int]]
_CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_TOKEN = re.compile(rf"\\[dDwWsS]|\\[^0-9A-Za-z]|{_CLASS}|\(\?:|\{{(?=[\d,])\d*(?:,\d*)?\}}|.", re.DOTALL)
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_LONGEST, _DEEPEST = 10_000, 10  # characters, and groups in groups


def matches(pattern: str, name: str, given: str) -> bool:
    """Return whether a name begins with a match of a pattern, as `re.match` does.

    Args:
        pattern: With what peft puts around that which a folder gives.
        name: Of a module.
        given: What the folder gives; nearly always plain names.

    Raises:
        ValueError: It is no regular expression, or looks around, refers back, or is longer than any.
    """
    try:
        if not re.search(r"[*+?{(]", re.sub(rf"\\.|{_CLASS}", "", given, flags=re.DOTALL)):  # nothing to try again
            return re.match(pattern, name) is not None
        return bool(_compiled(pattern)(name, {0}))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


@lru_cache
def _compiled(pattern: str) -> Ends:
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} characters")
    re.compile(pattern)
    return _either([m.group() for m in reversed([*_TOKEN.finditer(pattern)])], 0)


def _either(tokens: list[str], depth: int) -> Ends:
    """Read alternatives, to the end or to the bracket that closes them; tokens are taken from the list's end."""
    if depth > _DEEPEST:
        raise ValueError(f"it nests more than {_DEEPEST} groups")
    ways = [_sequence(tokens, depth)]
    while tokens and tokens[-1] == "|":
        tokens.pop()
        ways.append(_sequence(tokens, depth))
    return lambda name, at: set().union(*(way(name, at) for way in ways))


def _sequence(tokens: list[str], depth: int) -> Ends:
    parts = []
    while tokens and tokens[-1] not in "|)":
        parts.append(_repeated(_atom(tokens, depth), tokens))

    def ends(name: str, at: set[int]) -> set[int]:
        for part in parts:
            at = part(name, at) if at else at
        return at

    return ends


def _atom(tokens: list[str], depth: int) -> Ends:
    token = tokens.pop()
    if token in ("(", "(?:"):
        if tokens[-1] == "?":
            raise ValueError("of groups that begin with (? there is only (?:")
        inside = _either(tokens, depth + 1)
        tokens.pop()
        return inside
    if token == "\\":
        raise ValueError(f"\\{tokens[-1]} has no like here")
    if token in "^$":
        return lambda name, at: at & {0 if token == "^" else len(name)}
    one = re.compile(token)  # a character, or a class of them
    return lambda name, at: {i + 1 for i in at if i < len(name) and one.match(name[i])}


def _repeated(part: Ends, tokens: list[str]) -> Ends:
    """Read how often a part may follow itself."""
    count = _COUNT.fullmatch(tokens[-1]) if tokens else None
    if not tokens or not (count or tokens[-1] in "*+?"):
        return part
    token = tokens.pop()
    least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(token, (0, None))
    if count:
        low, comma, high = count.groups()
        least, most = int(low or 0), int(high or low) if high or not comma else None
    if tokens and tokens[-1] == "+":
        raise ValueError("*+, ++ and ?+ have no like here")
    if tokens and tokens[-1] == "?":  # as few as possible: where that ends is among the places
        tokens.pop()

    def ends(name: str, at: set[int]) -> set[int]:
        longest = len(name) + 1  # after so many times, nothing changes
        for _ in range(min(least, longest)):
            at = part(name, at)
        reached, new = set(at), at
        for _ in range(longest if most is None else min(most - least, longest)):
            if not (new := part(name, new) - reached):
                break
            reached |= new
        return reached

    return ends
