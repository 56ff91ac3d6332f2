"""One cell of a sweep, in a process of its own: ``python -m visionpeft.benchmark.cell``, its task on stdin.

The sweep that started the process holds its stdin open; when that closes, however the sweep ended, the process ends, too.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from .. import api, files, sources
from ..config import TrainConfig
from ..core.base_model import Base, Data
from ..errors import ConfigError, Interrupted, OutOfMemory, Stopped, TrainingError, VisionpeftError
from ..families.base import Family
from ..families.capabilities import SupportsHoldout
from ..settings import find_family
from ..training.plots import Picture
from ..training.result import Run
from .grid import Cell, below, command
from .results import FORMAT, CellFailure, CellNames, CellResult, CellSpec, Retained, RunRecord, TrialResult

DONE, FAILED, FULL = 0, 3, 4  # exit codes; FULL: the disk is
HOLDOUT_SHARE = 0.2  # of the training images, where an option is searched
_PROBE_EPOCHS = 2  # to see how long one takes
_PICTURES, _WIDTH = 4, 320  # validation images shown, pixels


def run_cell(cell: Cell, out: Path, chosen: Mapping[str, Any], seconds: float | None) -> CellResult:
    """Run a cell and return the content of its file.

    Args:
        cell: The cell.
        out: The folder of results.
        chosen: Options that a search settled.
        seconds: Time that its training steps may take; None: as many epochs as the configuration says.
    """
    began = time.perf_counter()
    arguments = {**cell.arguments(), **chosen}
    family, base, data = _load(arguments)
    images = len(data.train)
    if seconds is not None:
        arguments["epochs"] = _PROBE_EPOCHS
        probe = api.train(**arguments, project=out / "runs" / cell.hash, name="probe", quiet=True)
        chosen = {**chosen, "epochs": _epochs_within(seconds, probe, images)}
        shutil.rmtree(probe.folder)
        arguments |= chosen
    run = api.train(**arguments, project=out / "runs", name=cell.hash, exist_ok=True, quiet=True)
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)  # the run is complete, and this the largest of its files
    loading = {k: arguments[k] for k in ("model", "model_args") if k in arguments}
    adapted = api.load(run.delta, **loading) if run.delta else None
    model = adapted.model if adapted and not run.merged else family.open_merged(Path(str(run.merged)))
    use = family.evaluation_options(TrainConfig.from_file(run.arguments).settled({}))
    evaluated = family.evaluate(model, data, **use)
    drawing = {k: use[k] for k in ("imgsz", "device")}
    retained = None
    if adapted and (old := cell.spec["retain"]):
        retained = cast(Retained, {**api.forgetting(adapted, below(cell.root, old), **use).to_dict(), "data": old})
    epoch_seconds = _epoch_seconds(run, images)
    return {
        "format": FORMAT,
        "hash": cell.hash,
        "cell": cast(CellSpec, cell.spec),
        "names": cast(CellNames, cell.names),
        "task": base.task,
        "score": family.primary_metric(base.task),
        "run": cast(RunRecord, run.to_dict()),
        "chosen": chosen,
        "states": {"bn": run.plan.bn, "head": run.arguments["head"], "lean": run.arguments["lean"]},
        "retained": retained,
        "evidence": evaluated.predictions.pack(),
        "interval": None,
        "pictures": {
            "labels": [_jpeg(p) for p in family.draw(None, data, _PICTURES)],
            "after": [_jpeg(p) for p in family.draw(model, data, _PICTURES, **drawing)],
        },
        "command": command(arguments),
        "environment": _environment(run),
        "train_seconds": epoch_seconds and round(epoch_seconds * len(run.history), 3),
        "seconds": round(time.perf_counter() - began, 2),
    }


def run_trial(cell: Cell, out: Path) -> TrialResult:
    """Run one trial of a search, on the training images alone, and return the content of its file."""
    began = time.perf_counter()
    arguments = {**cell.arguments(), **cell.spec["trial"]}
    family, base, data = _load(arguments)
    with tempfile.TemporaryDirectory() as folder:
        arguments["data"] = SupportsHoldout.of(family).holdout_split(data, Path(folder), HOLDOUT_SHARE)
        score: float | None = None
        error = ""
        try:
            run = api.train(**arguments, project=out / "runs", name=cell.hash, exist_ok=True, quiet=True)
            score = run.after[family.primary_metric(base.task)]
        except (OutOfMemory, Interrupted):
            raise
        except TrainingError as diverged:  # a rate that diverges is a result, the worst
            error = str(diverged)
    shutil.rmtree(out / "runs" / cell.hash, ignore_errors=True)
    seconds = round(time.perf_counter() - began, 2)
    return {"format": FORMAT, "hash": cell.hash, "cell": cell.spec, "score": score, "error": error, "seconds": seconds}


def main() -> int:
    """Do the task that stands on stdin; returns the exit code."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_sweep, daemon=True).start()
    out, cell = Path(task["out"]), Cell(task["spec"], task["names"], task["root"])
    trial = "trial" in cell.spec
    began = time.perf_counter()
    try:
        result = run_trial(cell, out) if trial else run_cell(cell, out, task["chosen"], task["seconds"])
        files.write(out / ("trials" if trial else "cells") / f"{cell.hash}.json", json.dumps(result) + "\n")
        return DONE
    except Stopped as stopped:  # ends as if nothing had held the signal up: the sweep files it, or has ended, too
        signal.raise_signal(stopped.signal)
        return FAILED
    except Exception as error:
        if files.full(error, out):
            return FULL
        if not isinstance(error, VisionpeftError):
            traceback.print_exc()
        file_failure(cell, out, error_kind(error), str(error), time.perf_counter() - began)
        return FAILED


def file_failure(cell: Cell, out: Path, kind: str, error: str, seconds: float, started: bool = True) -> None:
    """Write the file of a cell that failed, with the last lines of its log where it has started."""
    log = out / "runs" / cell.hash / "log.txt"
    last = log.read_text(errors="replace").splitlines()[-30:] if started and log.is_file() else []
    failure: CellFailure = {
        "format": FORMAT,
        "hash": cell.hash,
        "cell": cell.spec,
        "names": cell.names,
        "error": " ".join(error.split()) or kind,
        "kind": kind,
        "log": "\n".join(last),
        "seconds": round(seconds, 2),
    }
    files.write(out / "failed" / f"{cell.hash}.json", json.dumps(failure, indent=1) + "\n")


def error_kind(error: Exception) -> str:
    """Return the name that an error is filed under."""
    full = any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))
    return "OutOfMemory" if full or isinstance(error, MemoryError | torch.OutOfMemoryError) else type(error).__name__


def _load(arguments: Mapping[str, Any]) -> tuple[Family, Base, Data]:
    """Return the family, the base and the data of a run."""
    family = find_family(arguments["model"])
    base = family.load(arguments["model"], **arguments.get("model_args", {}))
    return family, base, family.read_data(sources.find(arguments["data"]), base)


def _exit_with_sweep() -> None:
    sys.stdin.read()
    os._exit(1)


def _epoch_seconds(run: Run, images: int) -> float | None:
    """Return how long the training steps of an epoch take, their data included; None: there was one step only."""
    if run.measured["step_seconds"] is None:
        return None
    step = sum(v for v in run.measured["seconds_by_part"].values() if v)
    batch = run.arguments["batch"]
    return step * (math.ceil(images / batch) if batch >= 1 else 1)


def _epochs_within(seconds: float, run: Run, images: int) -> int:
    """Return how many epochs of a run's own speed fit into so many seconds, at least one."""
    each = _epoch_seconds(run, images)
    if each is None:
        raise ConfigError(f"{_PROBE_EPOCHS} epochs have one step only, too few to measure its time; give a smaller batch")
    return max(int(seconds / each), 1)


def _environment(run: Run) -> dict[str, object]:
    cuda = run.arguments["device"] != "cpu" and torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        **run.versions,
    }


def _cpu() -> str:
    """Return the processor's name; Linux says it in a file only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _jpeg(picture: Picture) -> str:
    image = Image.fromarray(picture).convert("RGB")
    image.thumbnail((_WIDTH, 10 * _WIDTH))
    image.save(buffer := io.BytesIO(), "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at the interpreter's own end, threads of torch's that still run may abort the process
