"""Classes of a data set that is converted: which are written, in which order, under which name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import ConfigError, nearest
from ..sources import packaged
from .formats.base import letters_of
from .layout import read_names


def order_classes(
    classes: Sequence[str], names: Sequence[str] | str | Path | None, without: Iterable[str]
) -> tuple[list[str], dict[str, int], frozenset[str]]:
    """Choose the classes to write.

    Args:
        classes: The source's.
        names: The classes wanted, in order: a list, text with commas, a data YAML or the name of a packaged one; None: all.
        without: The classes to leave out.

    Returns:
        Their names in order; the index of each class of the source that is written; and those left out on request.

    Raises:
        ConfigError: A class to leave out is none of them, or nothing would be left.
    """
    dropped = set()
    for name in without:
        if (match := _match(name, classes)) is None:
            raise ConfigError(f"without={name} is no class here; there are {', '.join(classes)}.{nearest(name, classes)}")
        dropped.add(match)
    wanted = list(classes) if names is None else _named(names)
    matched = {name: _match(name, wanted) for name in classes if name not in dropped}
    order = [n for n in wanted if names is not None or n not in dropped]
    numbers = {name: order.index(match) for name, match in matched.items() if match is not None}
    if not numbers:
        raise ConfigError(f"none of the classes {', '.join(order[:5])} is in the set; it has {', '.join(classes[:20])}")
    return order, numbers, frozenset(dropped)


def _match(name: str, names: Sequence[str]) -> str | None:
    """Return the name among `names`: itself, or the only one that is the same but for case, spaces and marks."""
    if name in names:
        return name
    same = [n for n in names if letters_of(n) == letters_of(name) != ""]
    return same[0] if len(same) == 1 else None


def _named(names: Sequence[str] | str | Path) -> list[str]:
    """Return class names from a list, from text with commas, from a data YAML, or from a packaged one by its name."""
    if isinstance(names, str) and (yamls := packaged("datasets")).get(names):
        names = yamls[names]
    if isinstance(names, str | Path) and Path(names).suffix in (".yaml", ".yml"):
        return list(read_names(Path(names)).values())
    words = names.split(",") if isinstance(names, str) else [str(n) for n in names] if not isinstance(names, Path) else []
    classes = [w.strip() for w in words if w.strip()]
    if not classes:
        raise ConfigError(f"names={names} names no classes; give car,bus,..., or a data YAML")
    return classes
