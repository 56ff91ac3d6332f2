"""The page: one HTML file that asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .columns import columns
from .figures import figures
from .formatting import count_of, percent, score, signed
from .model import BenchmarkReport, Section
from .rows import by_seed, front, old_classes, states
from .summary import rule

_JPEG = b"\xff\xd8\xff"


def render(report: BenchmarkReport) -> str:
    """Return the page's HTML.

    Args:
        report: The report.
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


def _pictures(section: Section) -> list[tuple[str, list[str]]]:
    """Return columns of predictions on the same images: title and data URIs, of the labels, then of every method's first
    seed that has any."""
    shown: list[tuple[str, list[str]]] = []
    for row in section.rows:
        pictures = next((p for cell in by_seed(row) if (p := cell.get("pictures")) and p.get("after")), None)
        if pictures:
            if not shown and pictures.get("labels"):
                shown.append(("labels", _data_uris(pictures["labels"])))
            shown.append((row.method, _data_uris(pictures["after"])))
    return shown


def _data_uris(pictures: Sequence[str] | None) -> list[str]:
    """Return data URIs; what is no JPEG is left out."""
    return [f"data:image/jpeg;base64,{p}" for p in pictures or () if _is_jpeg(p)]


def _is_jpeg(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(_JPEG)
    except (binascii.Error, TypeError, ValueError):
        return False


def _classes(section: Section) -> tuple[list[str], list[tuple[str, float, list[float | None]]]]:
    """Return methods, and of each old class its score before and its changes, what was lost most first."""
    by_method = {row.method: scores for row in section.rows if (scores := old_classes(row))}
    table = []
    for name in dict.fromkeys(n for scores in by_method.values() for n in scores):
        pairs = [scores.get(name) for scores in by_method.values()]
        before = next(pair[0] for pair in pairs if pair)
        table.append((name, before, [pair[1] - pair[0] if pair else None for pair in pairs]))
    table.sort(key=lambda line: min(c for c in line[2] if c is not None))
    return list(by_method), table


def _commands(section: Section) -> list[tuple[str, str]]:
    commands = [(f"{c['names']['method']}, seed {c['cell']['seed']}", c.get("command")) for c in section.cells]
    return [(label, command) for label, command in commands if command]


def _environments(report: BenchmarkReport) -> list[tuple[int, dict[str, str]]]:
    """Return the environments that cells ran in, each with how many did, the most common first."""
    counted: dict[str, tuple[int, dict[str, str]]] = {}
    for cell in report.cells:
        facts = {**_flat(cell["run"].get("versions") or {}), **_flat(cell.get("environment") or {})}
        key = repr(sorted(facts.items()))
        counted[key] = (counted.get(key, (0, facts))[0] + 1, facts)
    return sorted(counted.values(), key=lambda entry: -entry[0])


def _flat(facts: Mapping[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in facts.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {} if value is None else {name: str(value)}
    return flat
