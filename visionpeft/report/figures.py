"""The figures of a section: each is there where its section has the numbers for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..benchmark import Row
from ..tables import size
from .charts import Legend, Line, Point, Spec, Style, before_after, change_ticks, curves, scatter, stacked, styles
from .formatting import interval, score, seconds
from .model import BenchmarkReport, Section
from .rows import PartsKey, front, mean, mean_parts, old_classes, scores_by_epoch, trained

_MEGA = 1e6  # bytes of a MB, as `tables.size` counts them


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        title: Its title.
        caption: How to read it.
        spec: Its drawing, as Vega-Lite.
        legend: Names and colours of parts; empty where all is named beside its mark.
    """

    title: str
    caption: str
    spec: Spec
    legend: Legend = field(default_factory=list)


@dataclass(frozen=True)
class _Parts:
    """A figure of bars, one for each method, that a measurement's parts make up."""

    key: PartsKey
    title: str
    caption: str
    axis: str = "MB"
    unit: float = _MEGA  # of the axis
    text: Callable[[float], str] = size
    most: int | None = None  # parts that are named; the others are summed up
    ends: tuple[str, ...] = ()  # parts with colours of their own


_PARTS = (
    _Parts(
        "seconds_by_part",
        "Step time by part",
        "Each part's median over the steps after the first; mean over the seeds.",
        axis="seconds a step",
        unit=1,
        text=seconds,
    ),
    _Parts(
        "saved_by_stage",
        "Bytes saved for backward, by stage",
        "From the first stage (light) to the last (dark), then the head and the loss.",
        ends=("head", "loss"),
    ),
    _Parts(
        "saved_by_cause",
        "Bytes saved for backward, by operation",
        "Which operations keep what their gradients need.",
        most=5,
    ),
    _Parts(
        "state_bytes",
        "Bytes that stay between steps",
        "The model's weights and buffers, gradients, the optimizer's state and the moving average.",
    ),
)


def figures(section: Section, report: BenchmarkReport) -> list[Figure]:
    """Return the figures for which a section has the numbers."""
    style = styles(report.methods)
    candidates = (
        _score_and_memory(section, style),
        _score_and_parameters(section, style),
        _training(section, style),
        *(_bars(section, parts) for parts in _PARTS),
        _forgotten(section, style),
        _forgotten_by_class(section, style),
    )
    return [figure for figure in candidates if figure]


def _score_and_memory(section: Section, style: Mapping[str, Style]) -> Figure | None:
    memory, best = section.memory, front(section.rows, section.memory)
    points = [
        _point(row, section, taken / _MEGA, {memory.name: size(taken)}, row.method in best)
        for row in section.rows
        if (taken := memory.of(row)) is not None
    ]
    if not points:
        return None
    caption = (
        "Better is up and to the left. Filled marks on the line are the Pareto front: no other method has both a higher "
        f"score and less memory. Memory is {memory.meaning}."
    )
    title = f"{section.metric} against {memory.name}"
    return Figure(title, caption + _whiskers(section), scatter(points, style, f"{memory.name}, MB", section.metric))


def _score_and_parameters(section: Section, style: Mapping[str, Style]) -> Figure | None:
    points = [_point(row, section, trained(row), {"trained": f"{trained(row):,}"}) for row in section.rows if trained(row)]
    if not points:
        return None
    spec = scatter(points, style, "trained parameters", section.metric, log=True)
    caption = "Of body and head together, on a logarithmic scale."
    return Figure(f"{section.metric} against trained parameters", caption + _whiskers(section), spec)


def _point(row: Row, section: Section, x: float, more: Mapping[str, str], best: bool = False) -> Point:
    shown = {section.metric: score(row.score_mean) + interval(row.low, row.high), **more}
    return Point(row.method, x, row.score_mean, row.low, row.high, shown, best)


def _whiskers(section: Section) -> str:
    return " Upright lines are 95 % intervals." if any(row.low is not None for row in section.rows) else ""


def _training(section: Section, style: Mapping[str, Style]) -> Figure | None:
    lines = []
    for row in section.rows:
        runs = [scores_by_epoch(cell, section.metric) for cell in row.cells]
        values = {epoch: [run[epoch] for run in runs if epoch in run] for epoch in {e for run in runs for e in run}}
        if values:
            lines.append(Line(row.method, {e: (mean(v) or 0.0, min(v), max(v)) for e, v in values.items()}))
    if not lines:
        return None
    seeds = "Lines are means, bands reach from the lowest to the highest seed."
    caption = "On the validation images after every epoch; epoch 0 is the model before training. "
    caption += seeds if any(row.seeds > 1 for row in section.rows) else "One seed."
    return Figure(f"{section.metric} while it trains", caption, curves(lines, style, section.metric))


def _bars(section: Section, parts: _Parts) -> Figure | None:
    splits = {row.method: mean_parts(row, parts.key) for row in section.rows}
    if parts.most is not None:
        splits = _largest(splits, parts.most)
    splits = {method: of_method for method, of_method in splits.items() if sum(of_method.values()) > 0}
    if not splits:
        return None
    spec, legend = stacked(splits, parts.axis, parts.text, parts.unit, parts.ends)
    return Figure(parts.title, parts.caption, spec, legend)


def _largest(splits: Mapping[str, Mapping[str, float]], count: int) -> dict[str, dict[str, float]]:
    """Return the parts that are the largest over all methods, and the sum of the others as "other"."""
    names = dict.fromkeys(n for parts in splits.values() for n in parts if n != "other")
    named = sorted(names, key=lambda n: -sum(parts.get(n, 0) for parts in splits.values()))[:count]
    largest = {}
    for method, parts in splits.items():
        rest = sum(value for name, value in parts.items() if name not in named)
        largest[method] = {**{name: parts.get(name, 0) for name in named}, **({"other": rest} if rest else {})}
    return largest


# ---------------------------------------------------------------------------------------------------------------- forgetting
def _forgotten(section: Section, style: Mapping[str, Style]) -> Figure | None:
    values = {
        row.method: (row.retained_before, row.retained_after)
        for row in section.rows
        if row.retained_before is not None and row.retained_after is not None
    }
    if not values:
        return None
    retained = next(scores for cell in section.cells if (scores := cell.get("retained")))
    caption = (
        "The base's own head on the adapted body: the upright stroke is the base before training, the mark is after. "
        "Deploying both heads takes two passes, one over each body."
    )
    spec = before_after(values, style, f"{retained['metric']} on {retained['data']}")
    return Figure("What the body forgot of the base's classes", caption, spec)


def _forgotten_by_class(section: Section, style: Mapping[str, Style]) -> Figure | None:
    values = {row.method: scores for row in section.rows if (scores := old_classes(row))}
    if not values:
        return None
    caption = "One stroke for each of the base's classes; those left of the line lost. The table below names them."
    return Figure("What it forgot, class by class", caption, change_ticks(values, style, "change in score"))
