"""The result of a training run: numbers, files, and the run's arguments."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from .. import files, tables
from ..core.plan import Plan
from ..schema import Json

_LIBRARIES = ("visionpeft", "torch", "torchvision", "ultralytics", "timm")


@dataclass(frozen=True)
class Run:
    """The result of `train`. Prints as a table; lies as ``run.json`` in its folder."""

    folder: Path
    plan: Plan
    before: dict[str, float]  # metrics of the model before training
    after: dict[str, float]  # metrics of the merged model (of the delta's, where it cannot be merged)
    parameters: dict[str, int]  # total; trained: body, head; moving statistics
    seconds: float
    measured: Json  # of `measure.Meter.report`; and "prefix", where frozen stages ran apart
    delta: Path | None  # None: the model had no base
    delta_bytes: dict[str, int]  # of the delta's tensors: body, head, statistics; and "file"
    merged: Path | None  # None: the method cannot be merged
    history: list[dict[str, float]]  # one record per epoch
    arguments: Json  # of the run
    versions: dict[str, str]
    pictures: dict[str, Path] = field(default_factory=dict)  # before_after, curves

    def to_dict(self) -> Json:
        """Return plain JSON values."""
        paths = {k: str(v) if v else None for k, v in {"delta": self.delta, "merged": self.merged}.items()}
        pictures = {k: str(v) for k, v in self.pictures.items()}
        return {**asdict(self), "folder": str(self.folder), "plan": self.plan.to_dict(), "pictures": pictures, **paths}

    def save(self) -> Path:
        """Write ``run.json`` into the run's folder."""
        return files.write(self.folder / "run.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        scores = [(k, _number(self.before.get(k)), _number(v)) for k, v in self.after.items()]
        facts = [
            ("trained, body", f"{self.parameters['body']:,}"),
            ("trained, head", f"{self.parameters['head']:,}"),
            ("time", f"{self.seconds:.1f} s, {_number(self.measured.get('step_seconds'))} s a step"),
            *_measured(self.measured),
        ]
        if apart := self.measured.get("prefix"):
            facts.append(("frozen stages", _frozen_stages(apart)))
        if self.delta:
            parts = ", ".join(f"{k} {tables.size(v)}" for k, v in self.delta_bytes.items() if k != "file")
            facts.append(("delta", f"{_near(self.delta)}, {tables.size(self.delta_bytes['file'])} ({parts})"))
        facts.append(
            ("merged", _near(self.merged) if self.merged else f"{self.plan.method} cannot be merged; use the delta")
        )
        facts += [(k.replace("_", ", "), _near(v)) for k, v in self.pictures.items()]
        return "\n".join(
            (
                tables.text(f"{self.plan.model}: {self.plan.method}", ("metric", "before", "after"), scores, right=(1, 2)),
                tables.text("", ("", ""), facts),
            )
        )


def _measured(measured: Json) -> list[tuple[str, str]]:
    """Return the measurements of steps: time by part, and bytes."""
    parts = [f"{part} {seconds:.4f} s" for part, seconds in (measured.get("seconds_by_part") or {}).items() if seconds]
    state = [f"{k} {tables.size(v)}" for k, v in (measured.get("state_bytes") or {}).items() if v]
    facts = [
        ("step time", ", ".join(parts)),
        ("saved for backward", tables.size(measured.get("saved_bytes"))),
        ("  by operation", _largest(measured.get("saved_by_cause"))),
        ("  by stage", _largest(measured.get("saved_by_stage"))),
        ("peak of a step", tables.size(live) if (live := measured.get("live_bytes")) else ""),
        ("weights, optimizer state", ", ".join(state)),
    ]
    if measured.get("peak_bytes") != measured.get("saved_bytes"):  # a CPU has no allocator to ask
        facts.append(("peak memory", f"{tables.size(measured.get('peak_bytes'))} ({measured.get('peak_measure')})"))
    return [(name, text) for name, text in facts if text]


def _largest(sizes: Mapping[str, int] | None, count: int = 3) -> str:
    """Return the `count` largest of some sizes as text."""
    ordered = sorted(((v, k) for k, v in (sizes or {}).items() if v), reverse=True)
    return ", ".join([*(f"{k} {tables.size(v)}" for v, k in ordered[:count]), *(["..."] if ordered[count:] else [])])


def _frozen_stages(facts: Json) -> str:
    """Return how the frozen stages ran, and how far that moved the score of the untrained model."""
    text = f"{facts['stages']} run in {facts['dtype']}"
    if "views" in facts:
        size = f"{tables.size(facts['stored_bytes'])}, {facts['fill_seconds']:.1f} s to fill"
        text = f"{facts['stages']}, {facts['views']} views of each image kept in {facts['dtype']} ({size})"
    scores = f"{_number(facts['approximate'])} instead of {_number(facts['exact'])}"
    return f"{text}: approximate; before, {facts['metric']} is {scores}"


def _near(path: Path) -> str:
    """Return a path as text, relative where it lies in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that training uses."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
