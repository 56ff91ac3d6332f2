"""The folder of a run: made or found again, locked by one process, and freed of a killed one's temporary files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, schema
from ..config import TrainConfig
from ..core import delta as deltas
from ..core.anatomy import GradientStats
from ..core.method import Settings
from ..core.plan import Plan
from ..errors import ConfigError, TrainingError
from . import checkpoint
from . import trackers as tracking

_CHANGED = {
    "base": "its base {model} was replaced by other weights",
    "names": "the classes of {data} have other names, or another order",
    "data": "images or labels of {data} were added, removed or replaced",
    "plan": "what it trains is planned otherwise (its train.json was edited, or another version made it)",
}


@dataclass(frozen=True)
class Resumed:
    """A run to resume, read from its folder.

    Attributes:
        folder: Its folder.
        config: Its options.
        method_settings: All settings of its method.
        done: Whether all of its epochs are trained.
        origin: Its base, data and plan, see `origin`; None where no file has them.
        before: Metrics before training; None where they were not measured yet.
        before_apart: The same with the frozen stages run in lower precision.
        gradient_stats: The gradients that its method planned by.
    """

    folder: Path
    config: TrainConfig
    method_settings: Settings
    done: bool
    origin: str | None
    before: dict[str, float] | None
    before_apart: Mapping[str, Any] | None
    gradient_stats: GradientStats | None


@contextmanager
def new(project: Path, name: str | None, exist_ok: bool, merged: str) -> Iterator[Path]:
    """Make and lock the folder of a new run: NAME, or "train", "train2", ...; two runs never get the same one by chance.

    Raises:
        ConfigError: It is there, or another run is under way in it.
    """
    files.writable(project)
    for i in range(1, 100_000):
        folder = project / (name or f"train{i if i > 1 else ''}")
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
            break
        except FileExistsError:
            if name:
                raise taken(folder) from None
    with _locked(folder):
        tracking.clear(folder)
        for old in ("checkpoint.pt", "delta.safetensors", "run.json", merged):  # they would be taken for this run's
            (folder / old).unlink(missing_ok=True)
        yield folder


def taken(folder: Path) -> ConfigError:
    """Return the error for a folder that is there."""
    return ConfigError(f"{folder} exists; give another name, or exist_ok=True to write into it")


@contextmanager
def resumed(resume: bool | str | Path, project: Path, name: str | None) -> Iterator[Resumed]:
    """Find and lock the folder of a run to resume.

    Raises:
        TrainingError: There is none, or nothing is left to do.
        ConfigError: Another process is at it.
    """
    if resume is True:
        runs = sorted(project.glob(f"{name or '*'}/checkpoint.pt"), key=lambda f: f.stat().st_mtime)
        if not runs:
            raise TrainingError(f"there is no run to resume in {project}; name its folder with resume=...")
        folder = runs[-1].parent
    else:
        folder = Path(str(resume))
        folder = folder.parent if folder.is_file() else folder
    if not (folder / "train.json").is_file():
        raise _unreadable(folder)
    with _locked(folder):
        yield _read(folder)


def origin(header: schema.Json, plan: Plan) -> str:
    """Return base, data and plan of a run as text, which its checkpoint keeps. `header` is that of its delta."""
    values = {"base": header["base"]["sha256"], "names": header["names"], "data": header["data"]["sha256"]}
    planned = {k: v for k, v in plan.to_dict().items() if k != "model"}  # a base is known by its tensors, wherever it lies
    return json.dumps({**values, "plan": planned}, sort_keys=True)


def check_origin(folder: Path, then: str, now: str, model: str, data: str) -> None:
    """Refuse to go on with a run on a base, data or a plan that it did not begin with; `then` and `now` are of `origin`.

    Raises:
        TrainingError: One of them is another, or `then` does not say.
    """
    current = json.loads(now)
    try:
        was = schema.check(schema.Json, schema.parse(then))
        if missing := next((part for part in _CHANGED if part not in was), None):
            raise schema.Malformed(f"it has no {missing}")
    except schema.Malformed as error:
        raise TrainingError(f"the checkpoint of {folder} does not say what the run is made of; start anew") from error
    if change := next((text for part, text in _CHANGED.items() if was[part] != current[part]), None):
        reason = change.format(model=model, data=data)
        raise TrainingError(f"{folder} cannot be resumed: {reason}; put back what was there, or start anew")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with files.locked(folder, f"another run is under way in {folder}; let it end, or give another folder"):
        files.clear(folder)
        yield


def _read(folder: Path) -> Resumed:
    try:
        values = schema.check(schema.Json, schema.parse((folder / "train.json").read_bytes()))
    except (OSError, schema.Malformed) as error:
        raise _unreadable(folder) from error
    saved = checkpoint.load(folder / "checkpoint.pt")
    if saved["done"] and _complete(folder):
        raise TrainingError(f"{folder} has trained all of its epochs and is complete; nothing is left to resume")
    try:
        if "method_settings" not in values:
            raise schema.Malformed("it has no method_settings")
        kinds: dict[str, Any] = {
            "method_settings": Settings,
            "before": Mapping[str, Any],
            "before_apart": Mapping[str, Any] | None,
        }
        kinds |= {"evidence": GradientStats | None}
        known = {name: schema.check(kind, values[name], name) for name, kind in kinds.items() if name in values}
        config = TrainConfig.from_file(values)
    except schema.Malformed as error:
        raise TrainingError(f"{folder} cannot be resumed: of its train.json, {error}; start anew") from error
    return Resumed(
        folder,
        config,
        known["method_settings"],
        saved["done"],
        saved.get("origin") or _origin_of_delta(folder),
        known.get("before"),
        known.get("before_apart"),
        known.get("evidence"),
    )


def _unreadable(folder: Path) -> TrainingError:
    return TrainingError(f"{folder} is no run that can be resumed (no readable train.json); start anew")


def _origin_of_delta(folder: Path) -> str | None:
    """Return the `origin` of a run whose checkpoint is older than that field, from its delta, if it left one."""
    file = folder / "delta.safetensors"
    if not file.is_file():
        return None
    header = deltas.inspect(file)
    return origin(header, Plan.from_dict(header["plan"]))


def _complete(folder: Path) -> bool:
    """Return whether a run that has trained has also drawn its pictures, which it does last."""
    try:
        drawn = schema.parse((folder / "run.json").read_bytes())["pictures"]
        return bool(drawn) and all((folder / Path(file).name).is_file() for file in drawn.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
