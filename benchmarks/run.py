"""A short run as a whole: how long `visionpeft.train` takes, and Ultralytics' own `YOLO(...).train` with the same settings.

    OMP_NUM_THREADS=1 python benchmarks/run.py                    # three times each, in turn, every time a fresh process
    OMP_NUM_THREADS=1 python benchmarks/run.py --profile          # where the seconds of ours go
    OMP_NUM_THREADS=1 python benchmarks/run.py --model yolo11n.pt # other weights; by default the packaged detector
    OMP_NUM_THREADS=1 python benchmarks/run.py --model yolo11n.yaml   # random weights, 80 classes

Both adapt the same checkpoint to the same generated scenes, draw their pictures, measure on the validation images after each
epoch and on the best weights at the end; ours measures before training, too. "call" is the call that trains, from the
checkpoint's path to the last picture, right after `import visionpeft` or `from ultralytics import YOLO`, which leave most
imports to it; "process" is all of a fresh process, and "CPU" its seconds of computing, which other work on the machine
changes less.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visionpeft import scenes

SETTINGS: dict[str, Any] = {"epochs": 2, "imgsz": 320, "freeze": 10, "optimizer": "AdamW", "lr0": 1e-3, "device": "cpu"}
CALLS = ("visionpeft", "ultralytics")
_FAMILY, _TRAINER = "visionpeft.families.yolo.family:Yolo", "visionpeft.families.yolo.trainer:PeftTrainerMixin"
PHASES = {  # of ours: where in the code each is, without what others inside it take
    "load the base": f"{_FAMILY}.load",
    "read the data": f"{_FAMILY}.read_data",
    "fit and plan": f"{_FAMILY}.with_head {_FAMILY}.anatomy visionpeft.session:make_plan",
    "measure before and after": f"{_FAMILY}.evaluate",
    "train: set up": f"{_TRAINER}.__init__ ultralytics.engine.trainer:BaseTrainer._setup_train",
    "train: steps, their data": f"{_TRAINER}.train",
    "train: measure epochs": f"{_TRAINER}.validate",
    "train: save": f"{_TRAINER}.save_model",
    "delta and merged file": "visionpeft.session:put_together visionpeft.core.delta:read "
    f"{_FAMILY}.save_merged {_FAMILY}.open_merged visionpeft.core.delta:fingerprint",
    "pictures": f"{_FAMILY}.draw visionpeft.training.plots:sheet visionpeft.training.plots:curves",
}


def main(model: str, images: int, batch: int, rounds: int, profile: bool) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = scenes.write("satellite", root / "data", train=images, val=images)
        if model.endswith((".yaml", ".yml")):
            model = str(_random(model, root))
        shared = {**SETTINGS, "data": str(data), "model": str(Path(scenes.find(model)).resolve()), "batch": batch}
        if profile:
            return _profile({**shared, "project": str(root / "profile")})
        for call in CALLS:  # the first one of each fills the caches, on disk too, and is not counted
            _timed(call, {**shared, "project": str(root / "first")})
        took: dict[str, list[tuple[float, float, float]]] = {call: [] for call in CALLS}
        for i in range(rounds):
            for call in CALLS:
                took[call].append(_timed(call, {**shared, "project": str(root / f"{i}")}))
    print("| | call, s | process, s | CPU, s |\n|---|---|---|---|")
    seconds = {call: list(zip(*took[call], strict=True)) for call in CALLS}
    for call in CALLS:
        print(f"| {call} | {' | '.join(f'{statistics.median(x):.2f} ({min(x):.2f}–{max(x):.2f})' for x in seconds[call])} |")
    ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"| ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


def _random(design: str, root: Path) -> Path:
    """Write a checkpoint with random weights."""
    import torch
    from ultralytics import YOLO

    torch.manual_seed(0)
    YOLO(design).save(root / f"{Path(design).stem}.pt")
    return root / f"{Path(design).stem}.pt"


def _timed(call: str, settings: dict[str, Any]) -> tuple[float, float, float]:
    began, computed = time.perf_counter(), _children()
    done = subprocess.run([sys.executable, __file__, "--one", call, json.dumps(settings)], capture_output=True, text=True)
    whole = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1]), whole, _children() - computed


def _children() -> float:
    """Return the CPU seconds of all processes that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def one(call: str, settings: dict[str, Any]) -> None:
    """Train once in this process; print the seconds."""
    train = {"visionpeft": _ours, "ultralytics": _theirs}[call]()
    began = time.perf_counter()
    train(settings)
    print(time.perf_counter() - began)


def _ours() -> Callable[[dict[str, Any]], object]:
    import visionpeft

    return lambda settings: visionpeft.train(**settings)


def _theirs() -> Callable[[dict[str, Any]], object]:
    from ultralytics import YOLO

    def train(settings: dict[str, Any]) -> object:
        more = {"nbs": settings["batch"], "warmup_epochs": min(3.0, settings["epochs"] / 10), "warmup_bias_lr": 0.0}
        return YOLO(settings["model"]).train(**{k: v for k, v in settings.items() if k != "model"}, **more)

    return train


def _profile(settings: dict[str, Any]) -> None:
    """Print the seconds of each phase of ours, in this process."""
    began = time.perf_counter()
    train = _ours()
    importlib.import_module("visionpeft").list_families()  # imports them
    seconds = {"imports": time.perf_counter() - began, **dict.fromkeys(PHASES, 0.0)}
    inner = [0.0]  # of the phases within each phase that is under way
    for phase, places in PHASES.items():
        for place in places.split():
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            setattr(owner, name, _watched(getattr(owner, name), phase, seconds, inner))
    began = time.perf_counter()
    train({**settings, "quiet": True})
    whole = time.perf_counter() - began + seconds["imports"]
    print("| phase | s |\n|---|---|")
    for phase, value in seconds.items():
        print(f"| {phase} | {value:.2f} |")
    print(f"| the rest | {whole - sum(seconds.values()):.2f} |\n| call | {whole:.2f} |")
    print(f"\ntorch._inductor was {'' if 'torch._inductor' in sys.modules else 'not '}imported")


def _watched(function: Callable, phase: str, seconds: dict[str, float], inner: list[float]) -> Callable:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        inner.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            took = time.perf_counter() - began
            seconds[phase] += took - inner.pop()
            inner[-1] += took

    return watched


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=scenes.EMBEDDED["model"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("CALL", "JSON"), help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if chosen := given.pop("one"):
        one(chosen[0], json.loads(chosen[1]))
    else:
        main(**given)
