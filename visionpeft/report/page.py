"""The page: one HTML file that asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .answer import rule
from .columns import columns
from .content import Report, Section
from .figures import figures
from .rows import by_seed, front, old_classes, states
from .words import count_of, percent, score, signed

_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Pictures:
    """Predictions of some validation images: a column for the labels, then one for each method."""

    columns: list[tuple[str, list[str]]]  # title, data URIs


def render(report: Report) -> str:
    """Return the page's HTML.

    Args:
        report: What it says.
    """
    environment = Environment(
        loader=PackageLoader("visionpeft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"columns": columns, "front": front, "states": states}
    environment.filters |= {"count_of": count_of, "percent": percent, "score": score, "signed": signed}
    drawn = {s.key: figures(s, report) for s in report.sections}
    specs = {f"{key}-{i}": f.spec for key, own in drawn.items() for i, f in enumerate(own)}
    return environment.get_template("page.html").render(
        report=report,
        command=shlex.join(["visionpeft", "report", *report.folders]),
        rule=rule(report.against),
        version=version("visionpeft"),
        figures=drawn,
        specs=json.loads(json.dumps(specs), parse_constant=lambda _: None),  # a browser's JSON knows no NaN
        pictures={s.key: _pictures(s) for s in report.sections},
        classes={s.key: _classes(s) for s in report.sections},
        commands={s.key: _commands(s) for s in report.sections},
        hints={c.name: c.hint for s in report.sections for c in columns(s.rows)},
        environments=_environments(report),
        vega=Markup(_vega()),
        script=Markup(_file("page.js")),
        style=Markup(_file("page.css")),
    )


@cache
def _vega() -> str:
    """Return the script that draws, for the version of Vega-Lite that Altair writes."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # 6.1, as vl-convert names it
    return vl_convert.javascript_bundle("window.draw = vegaEmbed;", vl_version=version)


def _file(name: str) -> str:
    return (resources.files("visionpeft.report") / "templates" / name).read_text(encoding="utf-8")


def _pictures(section: Section) -> Pictures | None:
    """Return the pictures of the first seed of every method that has any, beside the labels."""
    shown: list[tuple[str, list[str]]] = []
    for row in section.rows:
        own = next((p for cell in by_seed(row) if (p := cell.get("pictures")) and p.get("after")), None)
        if own:
            if not shown and own.get("labels"):
                shown.append(("labels", _uris(own["labels"])))
            shown.append((row.method, _uris(own["after"])))
    return Pictures(shown) if shown else None


def _uris(pictures: list[str]) -> list[str]:
    """Return data URIs; what is no JPEG is left out."""
    return [f"data:image/jpeg;base64,{p}" for p in pictures if _is_jpeg(p)]


def _is_jpeg(text: Any) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(_JPEG)
    except (binascii.Error, TypeError, ValueError):
        return False


def _classes(section: Section) -> tuple[list[str], list[tuple[str, float, list[float | None]]]]:
    """Return methods, and of each old class its score before and its changes, what was lost most first."""
    by_row = {row.method: found for row in section.rows if (found := old_classes(row))}
    names = dict.fromkeys(n for own in by_row.values() for n in own)
    table = []
    for name in names:
        before = next(own[name][0] for own in by_row.values() if name in own)
        table.append((name, before, [own[name][1] - own[name][0] if name in own else None for own in by_row.values()]))
    table.sort(key=lambda line: min(c for c in line[2] if c is not None))
    return list(by_row), table


def _commands(section: Section) -> list[tuple[str, str]]:
    return [(f"{c['names']['method']}, seed {c['cell']['seed']}", c["command"]) for c in section.cells if c.get("command")]


def _environments(report: Report) -> list[tuple[int, dict[str, Any]]]:
    """Return the environments that cells ran in, each with how many did, the most common first."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for cell in report.cells:
        facts = {**_flat(cell["run"].get("versions") or {}), **_flat(cell.get("environment") or {})}
        key = repr(sorted(facts.items()))
        found[key] = (found.get(key, (0, facts))[0] + 1, facts)
    return sorted(found.values(), key=lambda entry: -entry[0])


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in facts.items():
        made |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return {k: str(v) for k, v in made.items() if v is not None}
