"""The rows of a table, from the cells of a sweep: means over seeds, with intervals by bootstrap over images and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, DataError
from ..families.predictions import ImagePredictions, unpack
from ..tables import escaped, size
from .grid import hash_of
from .results import CellNames, CellResult

RESAMPLES = 500
_TAILS = (2.5, 97.5)  # percentiles of a 95 % interval
Interval = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class Row:
    """One method on one model and data set, over its seeds.

    Attributes:
        names: Names of model, data and method.
        method: Label, unlike any other row's of the same model and data.
        freeze: The option `freeze` of `train`.
        seeds: Number of seeds.
        score: Name of the metric.
        score_mean: Score of the adapted model on the validation images, mean over the seeds.
        score_by_seed: The same of each seed.
        low: Lower end of the 95 % interval of the mean: validation images and seeds are drawn again and again. None: a cell
            kept nothing of its images.
        high: Upper end of the same.
        difference: Difference from the row that all are compared with, on the seeds that both have; None: it is that row,
            or none is.
        difference_low: Lower end of the 95 % interval of the difference, images and seeds drawn alike for both.
        difference_high: Upper end of the same.
        epochs: Epochs that were trained, by seed.
        trained_body: Parameters that train outside the head, added ones included.
        trained_head: Parameters of the head that train.
        total: Parameters of the model.
        saved_bytes: Bytes kept for backward in a step.
        live_bytes: The most bytes that lived at once in a step; None: not measured.
        peak_bytes: Bytes that training takes, as far as they can be measured.
        peak_measure: The measure that `peak_bytes` is of.
        step_seconds: Time of a step, median over the seeds.
        seconds: Time of a cell as a whole, median over the seeds.
        delta_bytes: Bytes of body, head, statistics and file, of the first seed.
        retained_before: Score of the base on its old classes; None: not measured.
        retained_after: The same of the adapted body with the base's head, mean over the seeds.
        bn: "train" or "frozen".
        head: "keep" or "rebuild".
        lean: Level of lean training.
        cells: The files' contents.
    """

    names: CellNames
    method: str
    freeze: int | list[int | str]
    seeds: int
    score: str
    score_mean: float
    score_by_seed: dict[int, float]
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    epochs: dict[int, int]
    trained_body: int
    trained_head: int
    total: int
    saved_bytes: int | None
    live_bytes: int | None
    peak_bytes: int | None
    peak_measure: str
    step_seconds: float | None
    seconds: float
    delta_bytes: dict[str, int]
    retained_before: float | None
    retained_after: float | None
    bn: str
    head: str
    lean: str
    cells: list[CellResult] = field(repr=False)

    @property
    def peak(self) -> int | None:
        """Bytes that a step takes at most: on a GPU its allocator's peak, elsewhere what lived at once in a step."""
        on_gpu = self.cells[0]["run"]["measured"].get("cuda")
        return self.peak_bytes if on_gpu or self.live_bytes is None else self.live_bytes


def compare(cells: Iterable[CellResult], against: str = "full", resamples: int = RESAMPLES) -> list[Row]:
    """Return a row per model, data set and method.

    Args:
        cells: From `run` or `read`.
        against: The label of the method that all others are compared with.
        resamples: Draws of the bootstrap; the same cells always give the same intervals.

    Raises:
        DataError: The predictions that a cell kept cannot be read.
        ConfigError: Cells that belong together were measured on different images.
    """
    groups: dict[str, list[CellResult]] = {}
    for cell in sorted(cells, key=lambda c: (c["names"]["data"], c["names"]["model"], c["cell"]["seed"])):
        groups.setdefault(hash_of({k: v for k, v in cell["cell"].items() if k != "seed"}), []).append(cell)
    labels = _labels(groups)
    references = {key: group for key, group in groups.items() if group[0]["names"]["method"] == against}
    bootstrap = _Bootstrap(resamples)
    rows = []
    for key, group in groups.items():
        comparable = [r for r in references.values() if _comparable(r[0], group[0])] if key not in references else []
        rows.append(_row(group, labels[key], comparable[0] if comparable else [], bootstrap))
    return sorted(rows, key=lambda r: (r.names["data"], r.names["model"], r.names["method"] != against, r.method))


def table(cells: Iterable[CellResult], against: str = "full", resamples: int = RESAMPLES) -> str:
    """Return the rows of `compare` as Markdown, a table per data set and model."""
    parts = []
    rows = compare(cells, against, resamples)
    for data, model in dict.fromkeys((r.names["data"], r.names["model"]) for r in rows):
        group = [r for r in rows if (r.names["data"], r.names["model"]) == (data, model)]
        parts.append(f"**{escaped(data)}, {escaped(model)}**\n\n{markdown(group, against)}")
    return "\n\n".join(parts)


def markdown(rows: Sequence[Row], against: str = "full") -> str:
    """Return rows of one model and data set as a table in Markdown."""
    retained = any(r.retained_after is not None for r in rows)
    score, less = escaped(rows[0].score), f"less {escaped(against)}"
    head = ["method", score, "95 %", less, "95 %", "body", "head", "saved", "peak", "s/step", "delta"]
    head += ["old classes, before", "after"] if retained else []
    head += ["epochs", "seeds", "bn", "head", "lean"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        line = [escaped(r.method), f"{r.score_mean:.3f}", _range(r.low, r.high, _plain), _signed(r.difference)]
        line += [_range(r.difference_low, r.difference_high, _signed)]
        line += [f"{r.trained_body:,}", f"{r.trained_head:,}", size(r.saved_bytes), size(r.peak)]
        line += ["–" if r.step_seconds is None else f"{r.step_seconds:.3f}", size(r.delta_bytes.get("file"))]
        line += [_plain(r.retained_before), _plain(r.retained_after)] if retained else []
        line += ["/".join(map(str, dict.fromkeys(r.epochs.values()))), str(r.seeds), *map(escaped, (r.bn, r.head, r.lean))]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(group: list[CellResult], label: str, reference: list[CellResult], bootstrap: _Bootstrap) -> Row:
    first = group[0]
    run, measured, parameters = first["run"], first["run"]["measured"], first["run"]["parameters"]
    scores = {c["cell"]["seed"]: _score(c) for c in group}
    low, high = bootstrap.interval(group)
    difference: float | None = None
    ends: Interval = (None, None)
    if pairs := [(c, r) for c in group for r in reference if c["cell"]["seed"] == r["cell"]["seed"]]:
        difference = float(np.mean([_score(c) - _score(r) for c, r in pairs]))
        ends = bootstrap.interval([c for c, _ in pairs], [r for _, r in pairs])
    steps = [c["run"]["measured"].get("step_seconds") for c in group]
    retained = [found for c in group if (found := c.get("retained"))]
    return Row(
        names=first["names"],
        method=label,
        freeze=first["cell"]["freeze"],
        seeds=len(group),
        score=first["score"],
        score_mean=float(np.mean(list(scores.values()))),
        score_by_seed=scores,
        low=low,
        high=high,
        difference=difference,
        difference_low=ends[0],
        difference_high=ends[1],
        epochs={c["cell"]["seed"]: len(c["run"]["history"]) for c in group},
        trained_body=parameters["body"],
        trained_head=parameters["head"],
        total=parameters["total"],
        saved_bytes=measured.get("saved_bytes"),
        live_bytes=measured.get("live_bytes"),
        peak_bytes=measured.get("peak_bytes"),
        peak_measure=measured.get("peak_measure") or "",
        step_seconds=float(np.median(steps)) if None not in steps else None,  # type: ignore[arg-type]
        seconds=float(np.median([c["seconds"] for c in group])),
        delta_bytes=run["delta_bytes"] or {},
        retained_before=float(np.mean([r["before"] for r in retained])) if retained else None,
        retained_after=float(np.mean([r["after"] for r in retained])) if retained else None,
        bn=first["states"]["bn"],
        head=first["states"]["head"],
        lean=first["states"]["lean"],
        cells=group,
    )


class _Bootstrap:
    """Scores of cells over resampled images. Cells of the same images are resampled alike, in whatever order they come."""

    def __init__(self, resamples: int):
        self._resamples = resamples
        self._scores: dict[str, np.ndarray] = {}
        self._images: dict[str, tuple[str, ...]] = {}

    def scores(self, cell: CellResult) -> np.ndarray:
        """Return a cell's score in each resample of its images."""
        if (key := cell["hash"]) not in self._scores:
            try:
                predictions: ImagePredictions = unpack(cell["evidence"] or {})
            except DataError as error:
                raise DataError(f"{key}.json: {error}; run its cell anew") from error
            count = len(predictions.images)
            random = np.random.default_rng(0)
            draws = random.multinomial(count, np.full(count, 1 / count), size=self._resamples)
            self._scores[key] = np.array([predictions.score(counts) for counts in draws])
            self._images[key] = tuple(predictions.images.tolist())
        return self._scores[key]

    def interval(self, group: Sequence[CellResult], reference: Sequence[CellResult] = ()) -> Interval:
        """Return the ends of the 95 % interval of the mean score over seeds; with a reference, of the paired difference.

        They are None where a cell kept nothing of its images.

        Raises:
            ConfigError: Two cells that are compared were measured on different images.
        """
        cells = *group, *reference
        if not all(c.get("evidence") for c in cells):
            return None, None
        drawn = np.stack([self.scores(c) for c in group])  # (seeds, resamples)
        if reference:
            drawn = drawn - np.stack([self.scores(c) for c in reference])
        if len({self._images[c["hash"]] for c in cells}) > 1:
            raise ConfigError(
                f"the cells {', '.join(c['hash'] for c in cells)} were measured on different images, and cannot be "
                "compared; run them anew on the same data"
            )
        random = np.random.default_rng(1)
        picks = random.integers(0, len(drawn), size=(len(drawn), drawn.shape[1]))
        means = np.take_along_axis(drawn, picks, axis=0).mean(0)
        low, high = np.percentile(means, _TAILS)
        return float(low), float(high)


def _score(cell: CellResult) -> float:
    return cell["run"]["after"][cell["score"]]  # type: ignore[return-value]  # `read` has looked


def _comparable(one: CellResult, other: CellResult) -> bool:
    """Return whether two cells differ in their method's settings alone."""
    same = ("model", "model_args", "weights_sha256", "data", "data_sha256", "equal", "search", "retain_sha256")
    specs: list[Mapping[str, object]] = [one["cell"], other["cell"]]
    specific = {*one["cell"]["own"], *other["cell"]["own"]}  # options of their rows alone
    shared = [{k: v for k, v in cell["cell"]["options"].items() if k not in specific} for cell in (one, other)]
    return all(specs[0][k] == specs[1][k] for k in same) and shared[0] == shared[1]


def _labels(groups: Mapping[str, Sequence[CellResult]]) -> dict[str, str]:
    """Return a label for each group; where two of one model and data are called alike, with the options that differ."""
    labels = {}
    for key, (first, *_) in groups.items():
        namesakes = [_facts(g[0]) for k, g in groups.items() if k != key and g[0]["names"] == first["names"]]
        more = [f"{k} {v}" for k, v in _facts(first).items() if any(other.get(k) != v for other in namesakes)]
        labels[key] = ", ".join([first["names"]["method"], *more])
    return labels


def _range(low: float | None, high: float | None, text: Callable[[float | None], str]) -> str:
    return "–" if low is None or high is None else f"{text(low)} to {text(high)}"


def _facts(cell: CellResult) -> dict[str, object]:
    """Return the facts that may tell cells of one name apart, hashes as short as people write them."""
    spec: Mapping[str, object] = cell["cell"]
    named = {k: spec[k] for k in ("equal", "search", "retain", "model_args")}
    hashes = {k: str(spec[k])[:8] for k in ("data_sha256", "weights_sha256", "retain_sha256")}
    return {**cell["cell"]["options"], **named, **hashes}


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
