"""Rows of a table from the cells of a sweep: means over seeds, with intervals by bootstrap over images and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..families.predictions import ImagePredictions, unpack
from ..tables import escaped, size
from .grid import hash_of

RESAMPLES = 500
_TAILS = (2.5, 97.5)  # percentiles of a 95 % interval


@dataclass(frozen=True)
class Row:
    """One method on one model and data set, over its seeds.

    Attributes:
        names: Of model, data and method.
        method: Label, unlike any other row's of the same model and data.
        freeze: What `train` was given.
        seeds: How many.
        score: Name of the metric.
        score_mean: Over the seeds, of the adapted model on the validation images.
        score_by_seed: By seed.
        low: Of the 95 % interval of the mean: validation images and seeds are drawn again and again. None: a cell kept
            nothing of its images.
        high: Of the same.
        difference: From the row that all are compared with, on the seeds that both have; None: it is that row, or none is.
        difference_low: Of the 95 % interval of the difference, images and seeds drawn alike for both.
        difference_high: Of the same.
        epochs: That were trained, by seed.
        trained_body: Parameters outside the head, added ones included.
        trained_head: Parameters of the head.
        total: Parameters of the model.
        saved_bytes: Kept for backward in a step.
        live_bytes: The most that lived at once in a step; None: not measured.
        peak_bytes: That stand for what training takes.
        peak_measure: What `peak_bytes` measures.
        step_seconds: Median over the seeds.
        seconds: Of a cell as a whole, median over the seeds.
        delta_bytes: body, head, statistics and file, of the first seed.
        retained_before: Score of the base on its old classes; None: not measured.
        retained_after: Of the adapted body with the base's head, mean over the seeds.
        bn: "train" or "frozen".
        head: "keep" or "rebuild".
        lean: Its level.
        cells: The cells' contents.
    """

    names: dict[str, str]
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
    cells: list[dict[str, Any]] = field(repr=False)

    @property
    def peak(self) -> int | None:
        """Bytes that a step takes at most: on a GPU its allocator's peak, elsewhere what lived at once in a step."""
        on_gpu = self.cells[0]["run"]["measured"].get("cuda")
        return self.peak_bytes if on_gpu or self.live_bytes is None else self.live_bytes


def compare(cells: Iterable[Mapping[str, Any]], against: str = "full", resamples: int = RESAMPLES) -> list[Row]:
    """Return a row per model, data set and method.

    Args:
        cells: From `run` or `read`.
        against: The label of the method that all others are compared with.
        resamples: Draws of the bootstrap; the same cells always give the same intervals.

    Raises:
        DataError: What a cell says of its images cannot be read.
        ConfigError: Cells that belong together were measured on different images.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda c: (c["names"]["data"], c["names"]["model"], c["cell"]["seed"])):
        groups.setdefault(hash_of({k: v for k, v in cell["cell"].items() if k != "seed"}), []).append(dict(cell))
    labels = _labels(groups)
    tops = {key: group for key, group in groups.items() if group[0]["names"]["method"] == against}
    drawn = _Drawn(resamples)
    rows = []
    for key, group in groups.items():
        fits = [top for other, top in tops.items() if other != key and _comparable(top[0], group[0])]
        rows.append(_row(group, labels[key], fits[0] if fits and key not in tops else None, drawn))
    return sorted(rows, key=lambda r: (r.names["data"], r.names["model"], r.names["method"] != against, r.method))


def table(cells: Iterable[Mapping[str, Any]], against: str = "full", resamples: int = RESAMPLES) -> str:
    """Return the rows of `compare` as Markdown, a table per data set and model."""
    parts = []
    rows = compare(cells, against, resamples)
    for data, model in dict.fromkeys((r.names["data"], r.names["model"]) for r in rows):
        own = [r for r in rows if (r.names["data"], r.names["model"]) == (data, model)]
        parts.append(f"**{escaped(data)}, {escaped(model)}**\n\n{markdown(own, against)}")
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


def _row(group: list[dict[str, Any]], label: str, top: list[dict[str, Any]] | None, drawn: _Drawn) -> Row:
    first = group[0]
    run, measured = first["run"], first["run"]["measured"]
    scores = {c["cell"]["seed"]: _score(c) for c in group}
    low, high = drawn.interval(group)
    difference, ends = None, (None, None)
    if top is not None:
        pairs = [(c, t) for c in group for t in top if c["cell"]["seed"] == t["cell"]["seed"]]
        if pairs:
            difference = float(np.mean([_score(c) - _score(t) for c, t in pairs]))
            ends = drawn.interval([c for c, _ in pairs], [t for _, t in pairs])
    steps = [c["run"]["measured"].get("step_seconds") for c in group]
    kept = [c["retained"] for c in group if c.get("retained")]
    return Row(
        names=dict(first["names"]),
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
        trained_body=run["parameters"]["body"],
        trained_head=run["parameters"]["head"],
        total=run["parameters"]["total"],
        saved_bytes=measured.get("saved_bytes"),
        live_bytes=measured.get("live_bytes"),
        peak_bytes=measured.get("peak_bytes"),
        peak_measure=measured.get("peak_measure", ""),
        step_seconds=float(np.median(steps)) if None not in steps else None,  # type: ignore[arg-type]
        seconds=float(np.median([c["seconds"] for c in group])),
        delta_bytes=run["delta_bytes"],
        retained_before=float(np.mean([k["before"] for k in kept])) if kept else None,
        retained_after=float(np.mean([k["after"] for k in kept])) if kept else None,
        bn=first["states"]["bn"],
        head=first["states"]["head"],
        lean=first["states"]["lean"],
        cells=group,
    )


class _Drawn:
    """Scores of cells over resampled images. Cells of the same images are resampled alike, whoever asks first."""

    def __init__(self, resamples: int):
        self._resamples = resamples
        self._scores: dict[str, np.ndarray] = {}
        self._images: dict[str, tuple[str, ...]] = {}

    def scores(self, cell: Mapping[str, Any]) -> np.ndarray:
        """Return a cell's score in each resample of its images."""
        if (key := cell["hash"]) not in self._scores:
            try:
                evidence: ImagePredictions = unpack(cell["evidence"])
            except DataError as error:
                raise DataError(f"{key}.json: {error}; run its cell anew") from error
            count = len(evidence.images)
            random = np.random.default_rng(0)
            draws = random.multinomial(count, np.full(count, 1 / count), size=self._resamples)
            self._scores[key] = np.array([evidence.score(counts) for counts in draws])
            self._images[key] = tuple(evidence.images.tolist())
        return self._scores[key]

    def interval(self, group: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> Any:
        """Return the ends of the 95 % interval of the mean score over seeds; with others, of the paired difference.

        They are None where a cell kept nothing of its images.

        Raises:
            ConfigError: Two cells that are compared were measured on different images.
        """
        if not all(c.get("evidence") for c in (*group, *others)):
            return None, None
        drawn = np.stack([self.scores(c) for c in group])  # (seeds, resamples)
        if others:
            drawn = drawn - np.stack([self.scores(c) for c in others])
        images = {self._images[c["hash"]] for c in (*group, *others)}
        if len(images) > 1:
            raise ConfigError(
                f"the cells {', '.join(c['hash'] for c in (*group, *others))} were measured on different images, and cannot "
                "be compared; run them anew on the same data"
            )
        random = np.random.default_rng(1)
        picks = random.integers(0, len(drawn), size=(len(drawn), drawn.shape[1]))
        means = np.take_along_axis(drawn, picks, axis=0).mean(0)
        return tuple(float(x) for x in np.percentile(means, _TAILS))


def _score(cell: Mapping[str, Any]) -> float:
    return cell["run"]["after"][cell["score"]]


def _common(cell: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """Return a cell's options but those named: its row's own, and those of a row that it is compared with."""
    return {k: v for k, v in cell["cell"]["options"].items() if k not in without}


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Say whether two cells differ in their method's settings alone."""
    same = ("model", "model_args", "weights_sha256", "data", "data_sha256", "equal", "search", "retain_sha256")
    own = (*a["cell"]["own"], *b["cell"]["own"])
    return all(a["cell"][k] == b["cell"][k] for k in same) and _common(a, *own) == _common(b, *own)


def _labels(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return a label for each group; where two of one model and data are called alike, with the options that differ."""
    found = {}
    for key, (first, *_) in groups.items():
        alike = [_facts(g[0]) for k, g in groups.items() if k != key and g[0]["names"] == first["names"]]
        more = [f"{k} {v}" for k, v in _facts(first).items() if any(other.get(k) != v for other in alike)]
        found[key] = ", ".join([first["names"]["method"], *more])
    return found


def _range(low: float | None, high: float | None, text: Callable[[float | None], str]) -> str:
    return "–" if low is None or high is None else f"{text(low)} to {text(high)}"


def _facts(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may tell cells of one name apart, hashes as short as people write them."""
    spec = cell["cell"]
    named = {k: spec[k] for k in ("equal", "search", "retain", "model_args")}
    return {**spec["options"], **named, **{k: spec[k][:8] for k in ("data_sha256", "weights_sha256", "retain_sha256")}}


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
