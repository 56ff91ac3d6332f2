"""Which figures a section has, and what they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..benchmark import Row
from ..tables import size
from .charts import Legend, Line, Point, Spec, Style, changes, curves, scatter, stacked, strokes, styles
from .content import Report, Section
from .rows import front, history_of, mean, old_classes, split_of, trained
from .words import interval, score, seconds

_MEGA = 1e6  # bytes of a MB, as `tables.size` counts them
_CAUSES = 5  # operations that are named; the others are summed up


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        title: What it shows.
        caption: How to read it.
        spec: Vega-Lite.
        legend: Names and colours of parts; empty where all is named beside its mark.
    """

    title: str
    caption: str
    spec: Spec
    legend: Legend = field(default_factory=list)


def figures(section: Section, report: Report) -> list[Figure]:
    """Return the figures for which a section has what they show."""
    style = styles(report.methods)
    made = (
        _score_and_memory(section, style),
        _score_and_parameters(section, style),
        _training(section, style),
        _step_time(section),
        _saved_by_stage(section),
        _saved_by_operation(section),
        _state(section),
        _forgotten(section, style),
        _forgotten_by_class(section, style),
    )
    return [figure for figure in made if figure]


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


def _point(row: Row, section: Section, x: float, said: Mapping[str, str], best: bool = False) -> Point:
    shown = {section.metric: score(row.score_mean) + interval(row.low, row.high), **said}
    return Point(row.method, x, row.score_mean, row.low, row.high, shown, best)


def _whiskers(section: Section) -> str:
    return " Upright lines are 95 % intervals." if any(row.low is not None for row in section.rows) else ""


def _training(section: Section, style: Mapping[str, Style]) -> Figure | None:
    lines = []
    for row in section.rows:
        runs = [history_of(cell, section.metric) for cell in row.cells]
        values = {epoch: [run[epoch] for run in runs if epoch in run] for epoch in {e for run in runs for e in run}}
        if values:
            lines.append(Line(row.method, {e: (mean(v) or 0.0, min(v), max(v)) for e, v in values.items()}))
    if not lines:
        return None
    seeds = "Lines are means, bands reach from the lowest to the highest seed."
    caption = "On the validation images after every epoch; epoch 0 is the model before training. "
    caption += seeds if any(row.seeds > 1 for row in section.rows) else "One seed."
    return Figure(f"{section.metric} while it trains", caption, curves(lines, style, section.metric))


# ----------------------------------------------------------------------------------------------------------- time and memory
def _step_time(section: Section) -> Figure | None:
    caption = "Each part's median over the steps after the first; mean over the seeds."
    return _parts(section, "Step time by part", caption, "seconds_by_part", "seconds a step", seconds)


def _saved_by_stage(section: Section) -> Figure | None:
    caption = "From the first stage (light) to the last (dark), then the head and the loss."
    return _bytes(section, "Bytes saved for backward, by stage", caption, "saved_by_stage", ends=("head", "loss"))


def _saved_by_operation(section: Section) -> Figure | None:
    caption = "Which operations keep what their gradients need."
    splits = {row.method: split_of(row, "saved_by_cause") for row in section.rows}
    totals = {n: sum(own.get(n, 0) for own in splits.values()) for own in splits.values() for n in own if n != "other"}
    named = sorted(totals, key=lambda n: -totals[n])[:_CAUSES]

    def few(own: Mapping[str, float]) -> dict[str, float]:
        rest = sum(value for name, value in own.items() if name not in named)
        return {**{name: own.get(name, 0) for name in named}, **({"other": rest} if rest else {})}

    return _bytes(section, "Bytes saved for backward, by operation", caption, "saved_by_cause", few)


def _state(section: Section) -> Figure | None:
    caption = "The model's weights and buffers, gradients, the optimizer's state and the moving average."
    return _bytes(section, "Bytes that stay between steps", caption, "state_bytes")


def _bytes(
    section: Section,
    title: str,
    caption: str,
    key: str,
    few: Callable[[Mapping[str, float]], dict[str, float]] = dict,
    ends: tuple[str, ...] = (),
) -> Figure | None:
    return _parts(section, title, caption, key, "MB", size, _MEGA, few, ends)


def _parts(
    section: Section,
    title: str,
    caption: str,
    key: str,
    x: str,
    text: Callable[[float], str],
    unit: float = 1,
    few: Callable[[Mapping[str, float]], dict[str, float]] = dict,
    ends: tuple[str, ...] = (),
) -> Figure | None:
    splits = {row.method: few(split_of(row, key)) for row in section.rows}
    splits = {method: own for method, own in splits.items() if sum(own.values()) > 0}
    if not splits:
        return None
    spec, legend = stacked(splits, x, text, unit, ends)
    return Figure(title, caption, spec, legend)


# ---------------------------------------------------------------------------------------------------------------- forgetting
def _forgotten(section: Section, style: Mapping[str, Style]) -> Figure | None:
    values = {
        row.method: (row.retained_before, row.retained_after)
        for row in section.rows
        if row.retained_before is not None and row.retained_after is not None
    }
    if not values:
        return None
    retained = next(kept for cell in section.cells if (kept := cell.get("retained")))
    caption = (
        "The base's own head on the adapted body: the upright stroke is the base before training, the mark is after. "
        "Deploying both heads takes two passes, one over each body."
    )
    spec = changes(values, style, f"{retained['metric']} on {retained['data']}")
    return Figure("What the body forgot of the base's classes", caption, spec)


def _forgotten_by_class(section: Section, style: Mapping[str, Style]) -> Figure | None:
    values = {row.method: own for row in section.rows if (own := old_classes(row))}
    if not values:
        return None
    caption = "One stroke for each of the base's classes; those left of the line lost. The table below names them."
    return Figure("What it forgot, class by class", caption, strokes(values, style, "change in score"))
