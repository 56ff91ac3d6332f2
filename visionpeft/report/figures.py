"""A section's figures, as Vega-Lite: drawn by the browser, in the page's own colours, at the width there is.

Colours are CSS variables of the page, so that light, dark and print need no second drawing. A method has one colour and one
shape in all figures; both come from its place in the report's list, and no figure relies on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from ..tables import size
from .content import MEBI, Report, Row, Section, mean, measured, seconds

COLOURS = 8  # the page's variables --m0 (the reference) to --m7
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_BAR, _WORD = 26, 6.6  # pixels: of a bar's row; of a letter, about
_CAUSES = 5  # named; the others are summed up
_INK, _MUTED, _PAPER, _GRID = "var(--ink)", "var(--muted)", "var(--paper)", "var(--grid)"
_CONFIG = {
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
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "text": {"color": _INK, "fontSize": 12},
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        title: What it shows.
        caption: How to read it.
        spec: Vega-Lite.
        legend: Names and colours of its parts; empty where it is labelled directly.
    """

    title: str
    caption: str
    spec: dict[str, Any]
    legend: list[tuple[str, str]] = field(default_factory=list)


def figures(section: Section, report: Report) -> list[Figure]:
    """Return all figures for which a section has what they show."""
    style = {method: _style(i) for i, method in enumerate(report.methods)}
    made = [
        _against_memory(section, style),
        _against_parameters(section, style),
        _curves(section, style),
        _step_time(section),
        _by_stage(section),
        _by_cause(section),
        _state(section),
        _forgetting(section, style),
        _per_class(section, style),
    ]
    return [figure for figure in made if figure]


# --------------------------------------------------------------------------------------------------------- score against cost
def _against_memory(section: Section, style: Mapping[str, dict[str, str]]) -> Figure | None:
    front = section.front
    rows = [row for row in section.rows if section.memory.of(row) is not None]
    if not rows:
        return None
    title = f"{section.memory.name}, MB"
    return Figure(
        f"{section.metric} against {section.memory.name}",
        "Better is up and to the left. Filled marks on the line are the Pareto front: no other method has both a higher score "
        f"and less memory. Memory is {section.memory.meaning}." + _whiskers(section),
        _scatter(section, rows, lambda row: (section.memory.of(row) or 0) / MEBI, title, style, front=front),
    )


def _against_parameters(section: Section, style: Mapping[str, dict[str, str]]) -> Figure:
    return Figure(
        f"{section.metric} against trained parameters",
        "Body and head together, on a logarithmic scale." + _whiskers(section),
        _scatter(
            section,
            section.rows,
            lambda row: row.trained_body + row.trained_head,
            "trained parameters",
            style,
            log=True,
        ),
    )


def _scatter(
    section: Section,
    rows: Sequence[Row],
    cost: Callable[[Row], float],
    title: str,
    style: Mapping[str, dict[str, str]],
    log: bool = False,
    front: set[str] | None = None,
) -> dict[str, Any]:
    points = [
        {
            **style[row.method],
            "fill": style[row.method]["colour"] if front is None or row.method in front else _PAPER,
            "method": row.method,
            "x": cost(row),
            "y": row.score_mean,
            "low": row.low,
            "high": row.high,
            "said": f"{row.score_mean:.3f}" + ("" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"),
            "cost": f"{cost(row):,.0f}",
            "front": row.method in (front or ()),
        }
        for row in rows
    ]
    x = alt.X("x:Q", title=title, axis=alt.Axis(grid=False, tickCount=5), scale=alt.Scale(zero=True))
    if log:
        low, high = min(p["x"] for p in points) / 1.4, max(p["x"] for p in points) * 1.4
        x = alt.X("x:Q", title=title, scale=alt.Scale(type="log", domain=[low, high]))
        x.axis = alt.Axis(grid=False, format="~s", values=_ticks(low, high))
    y = alt.Y("y:Q", title=section.metric, scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(tickCount=5))
    tips = [alt.Tooltip(f"{k}:N", title=t) for k, t in (("method", "method"), ("said", section.metric), ("cost", title))]
    base = alt.Chart(alt.Data(values=points)).encode(x=x)
    layers = [
        base.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=1.5, opacity=0.55)
        .encode(y=alt.Y("low:Q", title=section.metric), y2="high:Q", color=alt.Color("colour:N", scale=None))
        .properties(name="whiskers"),
        base.mark_point(filled=True, size=110, strokeWidth=2, opacity=1)
        .encode(
            y=y,
            stroke=alt.Stroke("colour:N", scale=None),
            fill=alt.Fill("fill:N", scale=None),
            shape=alt.Shape("shape:N", scale=None),
            tooltip=tips,
        )
        .properties(name="points"),
        base.mark_text().encode(y="y:Q", text="method:N").properties(name="labels"),  # the page sets them apart
    ]
    if front:
        line = base.transform_filter("datum.front").mark_line(interpolate="step-after", strokeDash=[4, 3], color=_MUTED)
        layers.insert(0, line.encode(y="y:Q", order="x:Q").properties(name="front"))
    return _spec(alt.layer(*layers), 300)


def _ticks(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis: the fewest that are at least three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [s * 10**p for p in powers for s in steps if low <= s * 10**p <= high]
        if len(found) >= 3:
            break
    return found


def _whiskers(section: Section) -> str:
    return " Vertical lines are 95 % intervals." if any(row.low is not None for row in section.rows) else ""


# -------------------------------------------------------------------------------------------------------------------- curves
def _curves(section: Section, style: Mapping[str, dict[str, str]]) -> Figure | None:
    points: list[dict[str, Any]] = []
    for row in section.rows:
        runs = [_history(cell, section.metric) for cell in row.cells]
        for epoch in sorted({epoch for run in runs for epoch in run}):
            values = [run[epoch] for run in runs if epoch in run]
            y = mean(values)
            points.append({"method": row.method, "epoch": epoch, "y": y, "low": min(values), "high": max(values)})
            points[-1] |= {"said": f"{y:.3f}", "colour": style[row.method]["colour"], "dash": style[row.method]["dash"]}
    if not points:
        return None
    last = {p["method"]: p for p in points}  # epochs ascend
    most = max(p["epoch"] for p in points)
    low, high, height = min(p["low"] for p in points), max(p["high"] for p in points), 300
    gap = 15 * (high - low or 1) / height
    ends = _apart({m: p["y"] for m, p in last.items()}, gap)
    names = [{"method": m, "epoch": most, "y": y} for m, y in ends.items()]
    top, bottom = max(high, *ends.values()), min(low, *ends.values())
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, format="d", grid=False), scale=_short(ends, nice=False))
    scale = alt.Scale(domain=[bottom, top], nice=False)
    base = alt.Chart(alt.Data(values=points)).encode(x=x, detail="method:N")
    colour = alt.Color("colour:N", scale=None)
    y = alt.Y("y:Q", title=section.metric, scale=scale, axis=alt.Axis(tickCount=5))
    layers = [
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=section.metric, scale=scale), y2="high:Q", color=colour),
        base.mark_line(strokeWidth=2).encode(y=y, color=colour, strokeDash=alt.StrokeDash("dash:N", scale=None)),
        base.mark_circle(size=60, opacity=0).encode(  # what a pointer finds
            y=y,
            tooltip=[alt.Tooltip("method:N"), alt.Tooltip("epoch:Q"), alt.Tooltip("said:N", title=section.metric)],
        ),
        alt.Chart(alt.Data(values=names)).mark_text(align="left", dx=8).encode(x=x, y=y, text="method:N"),
    ]
    many = any(row.seeds > 1 for row in section.rows)
    return Figure(
        f"{section.metric} while it trains",
        "On the validation images after every epoch; epoch 0 is the model before training."
        + (" Lines are means, bands reach from the lowest to the highest seed." if many else " One seed."),
        _spec(alt.layer(*layers), height),
    )


def _history(cell: Mapping[str, Any], metric: str) -> dict[int, float]:
    """Return a run's score by epoch; epoch 0 is the model before training."""
    found = {int(r["epoch"]): r[metric] for r in cell["run"].get("history") or [] if r.get(metric) is not None}
    before = (cell["run"].get("before") or {}).get(metric)
    return {0: before, **found} if found and before is not None else found


def _apart(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move labels up or down so that they stand at least `gap` apart, in their order, near to where they are wanted."""
    order = sorted(wanted, key=lambda m: wanted[m])
    groups: list[list[str]] = []
    middles: list[float] = []
    for name in order:
        group, middle = [name], wanted[name]
        while groups and middles[-1] + gap * (len(groups[-1]) - 1) / 2 > middle - gap * (len(group) - 1) / 2 - gap:
            group = groups.pop() + group
            middles.pop()
            middle = sum(wanted[n] for n in group) / len(group)
        groups.append(group)
        middles.append(middle)
    return {
        name: middle + gap * (i - (len(group) - 1) / 2)
        for group, middle in zip(groups, middles, strict=True)
        for i, name in enumerate(group)
    }


# ---------------------------------------------------------------------------------------------------------- parts of a whole
def _step_time(section: Section) -> Figure | None:
    return _stacked(
        section,
        "Step time by part",
        "Medians over the steps after the first, one step each; mean over the seeds.",
        {row.method: _mean_of(row, "seconds_by_part") for row in section.rows},
        "seconds a step",
        1,
        seconds,
    )


def _by_stage(section: Section) -> Figure | None:
    return _stacked(
        section,
        "Bytes saved for backward, by stage",
        "From the first stage (light) to the last (dark), then the head and the loss.",
        {row.method: _mean_of(row, "saved_by_stage") for row in section.rows},
        "MB saved in a step",
        MEBI,
        size,
        ends=("head", "loss"),
    )


def _by_cause(section: Section) -> Figure | None:
    parts = {row.method: _mean_of(row, "saved_by_cause") for row in section.rows}
    total: dict[str, float] = {}
    for own in parts.values():
        for name, value in own.items():
            total[name] = total.get(name, 0) + value
    named = sorted((n for n in total if n != "other"), key=lambda n: -total[n])[:_CAUSES]
    kept = {
        m: {**{n: own.get(n, 0) for n in named}, "other": sum(v for n, v in own.items() if n not in named)} if own else {}
        for m, own in parts.items()
    }
    return _stacked(
        section,
        "Bytes saved for backward, by operation",
        "Which operations keep what they need for their gradients.",
        kept,
        "MB saved in a step",
        MEBI,
        size,
    )


def _state(section: Section) -> Figure | None:
    return _stacked(
        section,
        "Bytes that stay between steps",
        "The model's weights and buffers, gradients, the optimizer's state and the moving average.",
        {row.method: _mean_of(row, "state_bytes") for row in section.rows},
        "MB",
        MEBI,
        size,
    )


def _mean_of(row: Row, key: str) -> dict[str, float]:
    """Return the mean over the seeds of a measured split, by part; empty where no cell has it."""
    splits = [split for cell in row.cells if (split := measured(cell).get(key))]
    names = dict.fromkeys(name for split in splits for name in split)
    means = {name: mean(split.get(name) for split in splits) for name in names}
    return {name: value for name, value in means.items() if value is not None}


def _stacked(
    section: Section,
    title: str,
    caption: str,
    parts: Mapping[str, Mapping[str, float]],
    axis: str,
    unit: float,
    text: Callable[[float], str],
    ends: Sequence[str] = (),
) -> Figure | None:
    """Make a bar for each method, of parts.

    Args:
        section: Whose rows give the order.
        title: Of the figure.
        caption: Below it.
        parts: What the bars are made of, by method; methods without any are left out.
        axis: The title of the x axis.
        unit: What a value is divided by for it.
        text: How a value is said.
        ends: Parts that have colours of their own, apart from the ramp of the others; given, there is no legend.
    """
    parts = {m: p for m, p in parts.items() if sum(p.values()) > 0}
    if not parts:
        return None
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    ramp = [name for name in names if name not in ends]
    colours = {name: _ramp(i, len(ramp)) for i, name in enumerate(ramp)} | {n: f"var(--e{i})" for i, n in enumerate(ends)}
    most = max(sum(own.values()) for own in parts.values()) / unit
    bars = [
        {"method": m, "part": n, "x": own[n] / unit, "order": i, "said": text(own[n]), "share": own[n] / sum(own.values())}
        for m, own in parts.items()
        for i, n in enumerate(names)
        if own.get(n)
    ]
    totals = [{"method": m, "x": sum(own.values()) / unit, "said": text(sum(own.values()))} for m, own in parts.items()]
    order = [row.method for row in section.rows if row.method in parts]
    y = alt.Y("method:N", sort=order, title=None, scale=alt.Scale(paddingInner=0.3))
    x = alt.X(
        "x:Q",
        title=axis,
        stack="zero",
        axis=alt.Axis(tickCount=4),
        scale=_short([t["said"] for t in totals], domain=[0, most]),
    )
    tips = [
        alt.Tooltip("method:N"),
        alt.Tooltip("part:N"),
        alt.Tooltip("said:N", title="takes"),
        alt.Tooltip("share:Q", format=".0%"),
    ]
    stack = (
        alt.Chart(alt.Data(values=bars))
        .mark_bar(stroke=_PAPER, strokeWidth=0.5)
        .encode(
            y=y,
            x=x,
            order="order:Q",
            color=alt.Color("part:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None),
            tooltip=tips,
        )
    )
    ends_ = alt.Chart(alt.Data(values=totals)).mark_text(align="left", dx=5).encode(y=y, x=x, text="said:N")
    legend = list(colours.items()) if not ends else _few(colours, ends)
    return Figure(title, caption, _spec(alt.layer(stack, ends_), _BAR * len(order)), legend)


def _few(colours: Mapping[str, str], ends: Sequence[str]) -> list[tuple[str, str]]:
    """Return a legend that names the first and the last of many."""
    ramp = [name for name in colours if name not in ends]
    shown = ramp if len(ramp) < 4 else [ramp[0], ramp[len(ramp) // 2], ramp[-1]]
    return [(name, colours[name]) for name in (*shown, *(e for e in ends if e in colours))]


def _ramp(i: int, count: int) -> str:
    return f"color-mix(in oklab, var(--ramp-low), var(--ramp-high) {round(100 * i / max(count - 1, 1))}%)"


# ---------------------------------------------------------------------------------------------------------------- forgetting
def _forgetting(section: Section, style: Mapping[str, dict[str, str]]) -> Figure | None:
    rows = [row for row in section.rows if row.retained_after is not None]
    if not rows:
        return None
    metric, data = next((r["metric"], r["data"]) for row in rows for c in row.cells if (r := c.get("retained")))
    points = [
        {
            **style[row.method],
            "method": row.method,
            "before": row.retained_before,
            "after": row.retained_after,
            "said": f"{row.retained_before:.3f} → {row.retained_after:.3f}",
        }
        for row in rows
    ]
    y = alt.Y("method:N", sort=[row.method for row in rows], title=None)
    most = max(max(p["before"], p["after"]) for p in points)
    x = alt.X(
        "after:Q",
        title=f"{metric} on {data}",
        scale=_short([p["said"] for p in points], domain=[0, most]),
        axis=alt.Axis(tickCount=4),
    )
    base = alt.Chart(alt.Data(values=points)).encode(y=y)
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.6).encode(x=x, x2="before:Q", color=alt.Color("colour:N", scale=None)),
        base.mark_tick(thickness=2, size=14, color=_MUTED).encode(x="before:Q"),
        base.mark_point(filled=True, size=100, opacity=1).encode(
            x=x,
            color=alt.Color("colour:N", scale=None),
            shape=alt.Shape("shape:N", scale=None),
            tooltip=[alt.Tooltip("method:N"), alt.Tooltip("said:N", title="before → after")],
        ),
        base.transform_calculate(right="max(datum.before, datum.after)")
        .mark_text(align="left", dx=10)
        .encode(x="right:Q", text="said:N"),
    ]
    return Figure(
        "What the body forgot",
        "The base's own head on the adapted body, on the base's old classes: the upright stroke is the base before, the mark is "
        "after training. Deploying both heads takes two passes, one over each body.",
        _spec(alt.layer(*layers), _BAR * len(rows)),
    )


def _per_class(section: Section, style: Mapping[str, dict[str, str]]) -> Figure | None:
    points = [
        {
            "method": row.method,
            "class": name,
            "x": after - before,
            "said": f"{before:.3f} → {after:.3f}",
            **style[row.method],
        }
        for row in section.rows
        for name, (before, after) in per_class(row).items()
    ]
    if not points:
        return None
    order = [row.method for row in section.rows if any(p["method"] == row.method for p in points)]
    y = alt.Y("method:N", sort=order, title=None)
    base = alt.Chart(alt.Data(values=points)).encode(y=y)
    layers = [
        alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=_MUTED).encode(x="x:Q"),
        base.mark_tick(thickness=2, size=16, opacity=0.55).encode(
            x=alt.X("x:Q", title="change in score of an old class", axis=alt.Axis(tickCount=5, format="+.2~f")),
            color=alt.Color("colour:N", scale=None),
            tooltip=[alt.Tooltip("class:N"), alt.Tooltip("method:N"), alt.Tooltip("said:N", title="before → after")],
        ),
    ]
    return Figure(
        "What it forgot, class by class",
        "One stroke for each old class; those left of the line lost. The table below names them.",
        _spec(alt.layer(*layers), _BAR * len(order)),
    )


def per_class(row: Row) -> dict[str, tuple[float, float]]:
    """Return the mean over the seeds of each old class's score, before and after."""
    kept = [c["retained"].get("per_class") or {} for c in row.cells if c.get("retained")]
    names = dict.fromkeys(name for own in kept for name in own)
    made = {n: [mean(own[n][i] for own in kept if n in own) for i in (0, 1)] for n in names}
    return {n: (before, after) for n, (before, after) in made.items() if before is not None and after is not None}


# --------------------------------------------------------------------------------------------------------------------- style
def _style(index: int) -> dict[str, Any]:
    """Return the colour, shape and dash of the method at a place of the report's list; 56 places differ."""
    colour = 0 if index == 0 else 1 + (index - 1) % (COLOURS - 1)
    dash = [[1, 0], [6, 3], [2, 2]][index // COLOURS % 3]
    return {"colour": f"var(--m{colour})", "shape": _SHAPES[index % len(_SHAPES)], "dash": dash}


def _short(words: Iterable[str], **more: Any) -> alt.Scale:
    """Return a scale of x that leaves room for the longest of `words` at the right."""
    room = round(max(map(len, words)) * _WORD + 14)
    return alt.Scale(range=[0, alt.ExprRef(f"width - min({room}, width / 2)")], **more)


def _spec(chart: alt.LayerChart, height: int) -> dict[str, Any]:
    sized = chart.properties(width="container", height=height).configure(**_CONFIG)
    return sized.to_dict()
