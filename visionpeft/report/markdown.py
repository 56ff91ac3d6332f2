"""The tables as Markdown."""

from __future__ import annotations

import shlex

from ..benchmark import markdown
from .answer import rule
from .content import Report


def render(report: Report, out: str) -> str:
    """Return the tables, with the command that makes them again.

    Args:
        report: What they say.
        out: The file they are written to, for that command.
    """
    command = shlex.join(["visionpeft", "report", *report.folders, "--markdown", out])
    lines = [f"# {_text(report.name)}", "", f"Regenerate with `{command}`.", ""]
    for section in report.sections:
        lines += [f"## {_text(section.model)} on {_text(section.data)}", ""]
        if section.settings:
            lines += [f"{_text(section.settings)}.", ""]
        lines += [f"**{_text(section.answer.row.method)}**. {_text(section.answer.said)}", ""]
        lines += [markdown(section.rows, report.against), ""]
    if report.failed:
        lines += [f"{len(report.failed)} failed:", ""]
        lines += [f"- {_text(f.what)}: {_text(f.kind)}: {_text(f.error)}" for f in report.failed]
        lines.append("")
    lines += [f"- {_text(note)}" for note in (rule(report.against), *report.notes)]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Return text on one line, in which nothing is markup."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
