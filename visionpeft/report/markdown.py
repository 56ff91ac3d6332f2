"""The tables as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from .content import Report, columns, states


def render(report: Report, out: str) -> str:
    """Return the tables, with the command that makes them again.

    Args:
        report: What they say.
        out: The file they are written to, for that command.
    """
    command = shlex.join(["visionpeft", "report", *report.folders, "--markdown", out])
    lines = [f"# {_cell(report.name)}", "", f"Regenerate with `{command}`.", ""]
    for section in report.sections:
        shown = columns(section)
        lines += [f"## {_cell(section.model)} on {_cell(section.data)}", ""]
        row = section.answer.row
        if row is not None:
            lines += [f"**{_cell(row.method)}**: {_cell(section.answer.said)}", ""]
        if section.settings:
            lines += [f"{_cell(section.settings)}.", ""]
        head = ["method", *(c.name for c in shown), *states(section.rows[0])]
        rows = [[r.method, *(c.text(r) for c in shown), *states(r).values()] for r in section.rows]
        lines += [_line(head), "|---" * len(head) + "|", *map(_line, rows)]
        lines.append("")
    if report.failed:
        lines += [f"{len(report.failed)} cells failed:", ""]
        lines += [f"- {_cell(f.what)}: {_cell(f.kind)}: {_cell(f.error)}" for f in report.failed]
        lines.append("")
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Return text that stays in its cell, and is text."""
    text = " ".join(text.split())
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, "\\" + sign)
    return text
