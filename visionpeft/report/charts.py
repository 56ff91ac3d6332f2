"""The kinds of figures, as Vega-Lite: drawn by the browser, in the page's own colours, at the width there is.

Colours are variables of the page's style, so that light, dark and print need no drawing anew. A method has one colour and
one shape in all figures; figures name the methods beside their marks, so that none is told by its colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Spec = dict[str, Any]
Legend = list[tuple[str, str]]  # names and colours

HEIGHT, BAR = 300, 26  # pixels: of a plane; of a bar with its gap
COLOURS = 8  # --m0, of the reference, to --m7
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_DASHES = ([1, 0], [6, 3], [2, 2])
_LETTER = 6.6  # pixels, about: text is measured where it is drawn, which is not here
_INK, _MUTED, _PAPER, _GRID = "var(--ink)", "var(--muted)", "var(--paper)", "var(--grid)"
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": _MUTED,
        "gridColor": _GRID,
        "labelColor": _MUTED,
        "labelFontSize": 12,
        "labelLimit": 140,
        "tickColor": _GRID,
        "titleColor": _MUTED,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 10},
    "text": {"color": _INK, "fontSize": 12},
}
_COLOUR = alt.Color("colour:N", scale=None)  # rows bring their own
_SHAPE = alt.Shape("shape:N", scale=None)


# --------------------------------------------------------------------------------------------------------------------- style
@dataclass(frozen=True)
class Style:
    """The look of a method."""

    colour: str
    shape: str
    dash: list[int]

    def to_dict(self) -> dict[str, object]:
        """Return the values that a row of a figure's data carries."""
        return {"colour": self.colour, "shape": self.shape, "dash": self.dash}


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Return a style for each method; the first, the reference, is in ink."""
    result = {}
    for i, method in enumerate(methods):
        colour = 0 if i == 0 else 1 + (i - 1) % (COLOURS - 1)
        dash = _DASHES[(i - 1) // (COLOURS - 1) % len(_DASHES)] if i else _DASHES[0]
        result[method] = Style(f"var(--m{colour})", _SHAPES[i % len(_SHAPES)], dash)
    return result


# --------------------------------------------------------------------------------------------------------------- two numbers
@dataclass(frozen=True)
class Point:
    """A method among others in a plane."""

    method: str
    x: float
    y: float
    low: float | None
    high: float | None
    tips: Mapping[str, str]  # shown under a pointer
    front: bool = False


def scatter(points: Sequence[Point], style: Mapping[str, Style], x: str, y: str, log: bool = False) -> Spec:
    """Return points with their intervals, and a line through those of the front.

    Args:
        points: One for each method.
        style: The look of each method.
        x: Title of the axis.
        y: Title of the axis.
        log: Whether x is logarithmic.
    """
    fronts = any(p.front for p in points)
    rows: list[dict[str, object]] = []
    for p in points:
        look = style[p.method].to_dict()
        row = {"method": p.method, "x": p.x, "y": p.y, "low": p.low, "high": p.high, "front": p.front}
        row |= {f"said{i}": text for i, text in enumerate(p.tips.values())}
        rows.append({**row, **look, "fill": look["colour"] if p.front or not fronts else _PAPER})
    base = alt.Chart(alt.Data(values=rows)).encode(x=_logarithmic(points, x) if log else _linear(x))
    height = alt.Y("y:Q", title=y, scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(tickCount=5))
    tips = [alt.Tooltip("method:N"), *(alt.Tooltip(f"said{i}:N", title=name) for i, name in enumerate(points[0].tips))]
    line = base.transform_filter("datum.front").mark_line(interpolate="step-after", strokeDash=[4, 3], color=_MUTED)
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.55)
    marks = base.mark_point(filled=True, size=110, strokeWidth=2, opacity=1)
    fill, stroke = alt.Fill("fill:N", scale=None), alt.Stroke("colour:N", scale=None)
    layers = [
        line.encode(y=height, order="x:Q").properties(name="front"),
        whiskers.encode(y=alt.Y("low:Q", title=y), y2="high:Q", color=_COLOUR).properties(name="whiskers"),
        marks.encode(y=height, stroke=stroke, fill=fill, shape=_SHAPE, tooltip=tips).properties(name="points"),
        base.mark_text().encode(y=height, text="method:N").properties(name="labels"),  # page.js finds them places
    ]
    return _spec(layers if fronts else layers[1:], HEIGHT)


def _linear(title: str) -> alt.X:
    return alt.X("x:Q", title=title, axis=alt.Axis(grid=False, tickCount=5), scale=alt.Scale(zero=True))


def _logarithmic(points: Sequence[Point], title: str) -> alt.X:
    low, high = min(p.x for p in points) / 1.4, max(p.x for p in points) * 1.4
    axis = alt.Axis(grid=False, format="~s", values=_ticks(low, high))
    return alt.X("x:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=[low, high]))


def _ticks(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis: the fewest that are at least three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10**power for power in powers for step in steps if low <= step * 10**power <= high]
        if len(ticks) >= 3:
            break
    return ticks


# --------------------------------------------------------------------------------------------------------------- over epochs
@dataclass(frozen=True)
class Line:
    """A method's score by epoch: the mean over its seeds, the lowest and the highest."""

    method: str
    values: Mapping[int, tuple[float, float, float]]


def curves(lines: Sequence[Line], style: Mapping[str, Style], y: str) -> Spec:
    """Return lines with bands, named at their ends.

    Args:
        lines: At least one.
        style: The look of each method.
        y: Title of the axis.
    """
    rows = [
        {"method": line.method, "epoch": epoch, "y": mean, "low": low, "high": high, "said": f"{mean:.3f}"}
        | style[line.method].to_dict()
        for line in lines
        for epoch, (mean, low, high) in sorted(line.values.items())
    ]
    values = [value for line in lines for value in line.values.values()]
    bottom, top = min(low for _, low, _ in values), max(high for _, _, high in values)
    gap = 15 * ((top - bottom) or 1) / HEIGHT
    last = max(epoch for line in lines for epoch in line.values)
    ends = spread_labels({line.method: line.values[max(line.values)][0] for line in lines}, gap)
    names = [{"method": method, "epoch": last, "y": at} for method, at in ends.items()]
    x = alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1, format="d", grid=False), scale=_leaving_room(ends, nice=False))
    domain = alt.Scale(domain=[min(bottom, *ends.values()), max(top, *ends.values())], nice=False)
    height = alt.Y("y:Q", title=y, scale=domain, axis=alt.Axis(tickCount=5))
    tips = [alt.Tooltip("method:N"), alt.Tooltip("epoch:Q"), alt.Tooltip("said:N", title=y)]
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, detail="method:N")
    layers = [
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=y, scale=domain), y2="high:Q", color=_COLOUR),
        base.mark_line(strokeWidth=2).encode(y=height, color=_COLOUR, strokeDash=alt.StrokeDash("dash:N", scale=None)),
        base.mark_circle(size=60, opacity=0).encode(y=height, tooltip=tips),  # for the pointer
        alt.Chart(alt.Data(values=names)).mark_text(align="left", dx=8).encode(x=x, y=height, text="method:N"),
    ]
    return _spec(layers, HEIGHT)


def spread_labels(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return places for labels that are at least `gap` apart, in the same order as those wanted, and as near to them as can
    be."""
    groups: list[tuple[list[str], float]] = []  # of labels that touch, and the middle of each group
    for name in sorted(wanted, key=lambda n: wanted[n]):
        group, middle = [name], wanted[name]
        while groups and middle - groups[-1][1] < gap * (len(group) + len(groups[-1][0])) / 2:
            group = groups.pop()[0] + group
            middle = sum(wanted[n] for n in group) / len(group)
        groups.append((group, middle))
    return {n: middle + gap * (i - (len(group) - 1) / 2) for group, middle in groups for i, n in enumerate(group)}


# --------------------------------------------------------------------------------------------------------- a line per method
def stacked(
    parts: Mapping[str, Mapping[str, float]],
    x: str,
    text: Callable[[float], str],
    unit: float = 1,
    ends: Sequence[str] = (),
) -> tuple[Spec, Legend]:
    """Return a bar for each method, of parts, and the legend of the parts.

    Args:
        parts: The parts of each bar.
        x: Title of the axis.
        text: Returns a value as text.
        unit: Unit of the axis.
        ends: Parts with colours of their own, not of the ramp that the others are on; then the legend names few of those.
    """
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    ramp = [name for name in names if name not in ends]
    colours = {name: _ramp(i, len(ramp)) for i, name in enumerate(ramp)} | {n: f"var(--e{i})" for i, n in enumerate(ends)}
    totals = {method: sum(own.values()) for method, own in parts.items()}
    rows = [
        {"method": m, "part": n, "x": own[n] / unit, "order": i, "takes": text(own[n]), "share": own[n] / totals[m]}
        | {"colour": colours[n]}
        for m, own in parts.items()
        for i, n in enumerate(names)
        if own.get(n)
    ]
    sums = [{"method": method, "x": total / unit, "said": text(total)} for method, total in totals.items()]
    y = alt.Y("method:N", sort=list(parts), title=None, scale=alt.Scale(paddingInner=0.3))
    room = _leaving_room((str(row["said"]) for row in sums), domain=[0, max(totals.values()) / unit])
    width = alt.X("x:Q", title=x, stack="zero", axis=alt.Axis(tickCount=4), scale=room)
    tips = [alt.Tooltip("method:N"), alt.Tooltip("part:N"), alt.Tooltip("takes:N"), alt.Tooltip("share:Q", format=".0%")]
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(stroke=_PAPER, strokeWidth=0.5)
    layers = [
        bars.encode(y=y, x=width, order="order:Q", detail="part:N", color=_COLOUR, tooltip=tips),
        alt.Chart(alt.Data(values=sums)).mark_text(align="left", dx=5).encode(y=y, x=width, text="said:N"),
    ]
    shown = [ramp[0], ramp[len(ramp) // 2], ramp[-1]] if ends and len(ramp) > 3 else ramp
    return _spec(layers, BAR * len(parts)), [(n, colours[n]) for n in (*shown, *(e for e in ends if e in names))]


def _ramp(place: int, count: int) -> str:
    return f"color-mix(in oklab, var(--ramp-low), var(--ramp-high) {round(100 * place / max(count - 1, 1))}%)"


def before_after(values: Mapping[str, tuple[float, float]], style: Mapping[str, Style], x: str) -> Spec:
    """Return a line for each method, from a value before to one after.

    Args:
        values: Before and after, by method.
        style: The look of each method.
        x: Title of the axis.
    """
    rows = [
        {"method": method, "before": before, "after": after, "said": f"{before:.3f} → {after:.3f}"}
        | {"right": max(before, after)}
        | style[method].to_dict()
        for method, (before, after) in values.items()
    ]
    room = _leaving_room((str(row["said"]) for row in rows), domain=[0, max(map(max, values.values()))])
    width = alt.X("after:Q", title=x, axis=alt.Axis(tickCount=4), scale=room)
    tips = [alt.Tooltip("method:N"), alt.Tooltip("said:N", title="before → after")]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("method:N", sort=list(values), title=None))
    marks = base.mark_point(filled=True, size=100, opacity=1)
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.6).encode(x=width, x2="before:Q", color=_COLOUR),
        base.mark_tick(thickness=2, size=14, color=_MUTED).encode(x="before:Q"),
        marks.encode(x=width, color=_COLOUR, shape=_SHAPE, tooltip=tips),
        base.mark_text(align="left", dx=10).encode(x="right:Q", text="said:N"),
    ]
    return _spec(layers, BAR * len(rows))


def change_ticks(values: Mapping[str, Mapping[str, tuple[float, float]]], style: Mapping[str, Style], x: str) -> Spec:
    """Return a row of strokes for each method, one for the change of each value.

    Args:
        values: Before and after, by method and name.
        style: The look of each method.
        x: Title of the axis.
    """
    rows = [
        {"method": method, "class": name, "x": after - before, "said": f"{before:.3f} → {after:.3f}"}
        | style[method].to_dict()
        for method, own in values.items()
        for name, (before, after) in own.items()
    ]
    width = alt.X("x:Q", title=x, axis=alt.Axis(tickCount=5, format="+.2~f"))
    tips = [alt.Tooltip("class:N"), alt.Tooltip("method:N"), alt.Tooltip("said:N", title="before → after")]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("method:N", sort=list(values), title=None))
    layers = [
        alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=_MUTED).encode(x=width),
        base.mark_tick(thickness=2, size=16, opacity=0.55).encode(x=width, color=_COLOUR, tooltip=tips),
    ]
    return _spec(layers, BAR * len(values))


# ----------------------------------------------------------------------------------------------------------------------- all
def _leaving_room(words: Iterable[str], **more: Any) -> alt.Scale:
    """Return a scale of x that ends before the right edge, for the longest of `words` to stand there."""
    room = round(max(map(len, words)) * _LETTER + 14)
    return alt.Scale(range=[0, alt.ExprRef(f"width - min({room}, width / 2)")], **more)


def _spec(layers: Sequence[alt.Chart], height: int) -> Spec:
    return alt.layer(*layers).properties(width="container", height=height).configure(**_CONFIG).to_dict()
