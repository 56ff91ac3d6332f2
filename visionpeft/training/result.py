"""What a training run leaves: numbers, files, and how it came about."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import files, tables
from ..core.plan import Plan

_LIBRARIES = ("visionpeft", "torch", "torchvision", "ultralytics", "timm")


@dataclass(frozen=True)
class Run:
    """The result of `train`. Prints as a table; lies as ``run.json`` in its folder."""

    folder: Path
    plan: Plan
    before: dict[str, float]  # metrics of the model before training
    after: dict[str, float]  # metrics of the merged model (of the delta's, where it cannot be merged)
    parameters: dict[str, int]  # total; trained: body, head; statistics that move
    seconds: float
    measured: dict[str, Any]  # what `measure.Meter.report` returns; prefix, where frozen stages ran apart
    delta: Path | None  # None: the model had no base
    delta_bytes: dict[str, int]  # of the delta's tensors: body, head, statistics; and "file"
    merged: Path | None  # None: the method cannot be merged
    history: list[dict[str, float]]  # one record per epoch
    arguments: dict[str, Any]  # of the run
    versions: dict[str, str]
    pictures: dict[str, Path] = field(default_factory=dict)  # before_after, curves

    def to_dict(self) -> dict[str, Any]:
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
        if prefix := self.measured.get("prefix"):
            facts.append(("frozen stages", _apart(prefix)))
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


def _measured(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what steps took: time by part, bytes by what holds them."""
    parts = [f"{part} {seconds:.4f} s" for part, seconds in (measured.get("seconds_by_part") or {}).items() if seconds]
    state = [f"{k} {tables.size(v)}" for k, v in (measured.get("state_bytes") or {}).items() if v]
    facts = [
        ("a step", ", ".join(parts)),
        ("saved for backward", tables.size(measured.get("saved_bytes"))),
        ("  by operation", _largest(measured.get("saved_by_cause"))),
        ("  by stage", _largest(measured.get("saved_by_stage"))),
        ("lived at most in a step", tables.size(live) if (live := measured.get("live_bytes")) else ""),
        ("held throughout", ", ".join(state)),
    ]
    if measured.get("peak_bytes") != measured.get("saved_bytes"):  # on a CPU there is no other peak than what stands above
        facts.append(("peak memory", f"{tables.size(measured.get('peak_bytes'))} ({measured.get('peak_measure')})"))
    return [(name, said) for name, said in facts if said]


def _largest(sizes: dict[str, int] | None, count: int = 3) -> str:
    """Say which are the largest of some sizes."""
    ordered = sorted(((v, k) for k, v in (sizes or {}).items() if v), reverse=True)
    return ", ".join([*(f"{k} {tables.size(v)}" for v, k in ordered[:count]), *(["..."] if ordered[count:] else [])])


def _apart(prefix: dict[str, Any]) -> str:
    """Say how the frozen stages ran, and what that did to the score of the untrained model."""
    said = f"{prefix['stages']} run in {prefix['dtype']}"
    if "views" in prefix:
        kept = f"{tables.size(prefix['stored_bytes'])}, {prefix['fill_seconds']:.1f} s to fill"
        said = f"{prefix['stages']}, {prefix['views']} views of each image kept in {prefix['dtype']} ({kept})"
    scores = f"{_number(prefix['approximate'])} instead of {_number(prefix['exact'])}"
    return f"{said}: approximate; before, {prefix['metric']} is {scores}"


def _near(path: Path) -> str:
    """Return a path as short as it can be said from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of what training runs on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
