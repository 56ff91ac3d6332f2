"""The writing of a report: a page of HTML, Markdown, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..errors import ConfigError, need
from .markdown import render as render_markdown
from .model import read_report

_NEEDS = ("altair", "vl_convert", "jinja2")  # of the extra "report"


def write(
    results: str | Path | Sequence[str | Path], out: str | Path | None = None, markdown: str | Path | None = None
) -> list[Path]:
    """Write what a benchmark found as a page of HTML, as Markdown, or both.

    The page is one file that needs no network. For each model and data set it has a table against full fine-tuning, score
    against memory and trained parameters, curves, step time and bytes by their parts, what was forgotten, predictions, and
    the commands that run the cells again.

    Args:
        results: The folder that `visionpeft benchmark` wrote into, or several.
        out: The page; by default RESULTS/report.html, or report.html here where there are several folders. With `markdown`
            alone, no page is written.
        markdown: A file for the tables in Markdown; by default none.

    Returns:
        The files written.

    Raises:
        ConfigError: There are no results, a file in them is truncated or of something else, the extra is missing, or the
            file cannot be written.

    >>> visionpeft.report.write("RESULTS", markdown="table.md")
    """
    folders = [results] if isinstance(results, str | Path) else list(results)
    if not folders:
        raise ConfigError("no results are given; name the folder that a benchmark wrote into")
    page = None
    if out is not None or markdown is None:
        page = Path(out) if out is not None else (Path(folders[0]) if len(folders) == 1 else Path()) / "report.html"
        for package in _NEEDS:
            need(package, "report", "the page (not Markdown)")
    if folder := next((file for file in (page, markdown) if file is not None and Path(file).is_dir()), None):
        raise ConfigError(f"{folder} is a folder; name the file to write, such as {Path(folder) / 'report.html'}")
    report = read_report(folders)
    written = []
    if page is not None:
        from .page import render  # altair takes half a second

        written.append(files.write(page, render(report)))
    if markdown is not None:
        written.append(files.write(markdown, render_markdown(report, str(markdown))))
    return written
