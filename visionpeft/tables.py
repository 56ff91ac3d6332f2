"""Tables for people: a plan, a run, the methods. Made with rich, as text of any width."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import printable

if TYPE_CHECKING:
    from .plan import Plan


def plan_table(plan: Plan, width: int | None = None) -> str:
    """Return a plan as text: a line per stage, then the totals."""
    names: tuple[str, ...] = ("stage", "kind", "parameters", "trained", "edits", "added", "statistics")
    rows: list[tuple[str, ...]] = [
        (r.stage, r.kind, f"{r.params:,}", _count(r.trained), _count(r.edits), _count(r.added), r.statistics)
        for r in plan.rows
    ]
    more: dict[str, list[str]] = {}
    if len({r.ranks for r in plan.rows if r.ranks}) > 1:
        more["rank"] = [r.ranks for r in plan.rows]
    if plan.opens:
        more["from"] = [f"{r.opens:.0%}" if r.trained else "" for r in plan.rows]  # the share of the epochs until all trains
    if (width := width or columns()) < 72 + 4 * len(more):  # what a narrow terminal has no room for
        names, rows = names[:2] + names[3::2], [r[:2] + r[3::2] for r in rows]
    for name, values in more.items():
        names, rows = (*names, name), [(*r, value) for r, value in zip(rows, values, strict=True)]
    settings = ", ".join(f"{k}={v}" for k, v in plan.settings.items() if v not in ("", None, {}))
    title = f"{plan.model}: {plan.method}" + (f" ({settings})" if settings else "")
    trained = plan.trained_body + plan.trained_head
    lines = (
        f"freeze={plan.freeze}, bn={plan.bn}: {trained:,} parameters train, {trained / plan.total:.2%} of {plan.total:,}",
        f"body {plan.trained_body:,} ({_share(plan.trained_body, plan.body)} of {plan.body:,}), head {plan.trained_head:,}",
    )
    return "\n".join(
        (
            text(title, names, rows, width=width, right=_indices(names, "parameters", "trained", "edits", "added")),
            *map(printable, lines),
        )
    )


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
        said = first_line(cls).partition(":")[2].strip()
        links = re.sub(r"(https://\S+?)(?=[),;.]?(\s|$|\)))", r"<\1>", said)
        links = links.replace("|", "\\|")
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


def _indices(names: Sequence[str], *wanted: str) -> list[int]:
    return [i for i, name in enumerate(names) if name in wanted]


def _count(n: int) -> str:
    return f"{n:,}" if n else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
