"""The tables as Markdown."""

from __future__ import annotations

import shlex

from ..benchmark import markdown
from ..tables import escaped
from .model import BenchmarkReport
from .summary import rule


def render(report: BenchmarkReport, out: str) -> str:
    """Return the tables, with the command that makes them again.

    Args:
        report: The report.
        out: The file that they are written to, for that command.
    """
    command = shlex.join(["visionpeft", "report", *report.folders, "--markdown", out])
    lines = [f"# {escaped(report.name)}", "", f"Regenerate with `{command}`.", ""]
    for section in report.sections:
        lines += [f"## {escaped(section.model)} on {escaped(section.data)}", ""]
        if section.settings:
            lines += [f"{escaped(section.settings)}.", ""]
        lines += [f"**{escaped(section.summary.row.method)}**. {escaped(section.summary.reason)}", ""]
        lines += [markdown(section.rows, report.against), ""]
    if report.failed:
        lines += [f"{len(report.failed)} failed:", ""]
        lines += [f"- {escaped(f.cell)}: {escaped(f.kind)}: {escaped(f.error)}" for f in report.failed]
        lines.append("")
    lines += [f"- {escaped(note)}" for note in (rule(report.against), *report.notes)]
    return "\n".join(lines) + "\n"
