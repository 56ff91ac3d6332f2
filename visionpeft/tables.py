"""Tables for people: a plan, a run, the methods. Made with rich, as text of any width."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import printable


def text(
    title: str, names: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None, right: Iterable[int] = ()
) -> str:
    """Return a table as plain text.

    Args:
        title: Said above it.
        names: Of the columns.
        rows: Cells, turned into text.
        width: Columns; by default those of the terminal, from 40 to 120.
        right: Indices of the columns that are aligned to the right.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    numbers = set(right)
    for i, name in enumerate(names):
        table.add_column(printable(name), justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    plain: dict[str, Any] = {"color_system": None, "force_jupyter": False, "markup": False, "emoji": False}
    console = Console(file=io.StringIO(), width=width or columns(), **plain)
    if title:
        console.print(printable(title))
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")  # type: ignore[attr-defined]


def columns() -> int:
    """Return how many columns text may take: the terminal's, from 40 to 120."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)


def first_line(cls: type) -> str:
    """Return the first line of the module that a class is from: a method's formula, authors and URL."""
    return _first_line(inspect.getmodule(cls))


def summary(cls: type) -> str:
    """Return the first line of a class's own docstring."""
    return _first_line(cls)


def _first_line(thing: Any) -> str:
    """Return the first line of a docstring, from the source, for ``python -OO`` drops it; "" where there is none."""
    try:
        tree = ast.parse(inspect.getsource(thing))
    except (OSError, TypeError):
        return ""
    where: Any = tree if inspect.ismodule(thing) else tree.body[0]
    return (ast.get_docstring(where) or "").partition("\n")[0]


def escaped(text: object) -> str:
    """Return text on one line, in which nothing is markup of Markdown."""
    return printable(" ".join(re.sub(r"([\\`*_<>\[\]|&])", r"\\\1", str(text)).split()))


def methods_markdown(methods: Mapping[str, Any]) -> str:
    """Return the README's table of methods."""
    lines = ["| `method=` | what it does | merges | statistics |", "|---|---|---|---|"]
    for name, cls in methods.items():
        formula = first_line(cls).partition(":")[2].strip()
        links = re.sub(r"(https://\S+?)(?=[),;.]?(\s|$|\)))", r"<\1>", formula).replace("|", "\\|")
        lines.append(
            f"| `{name}` | {links} | {'yes' if cls.merges else 'no'} | {'moving' if cls.bn == 'train' else 'still'} |"
        )
    return "\n".join(lines)


def size(count: float | None) -> str:
    """Return bytes for people: 1.5 MB."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
