"""The defaults of every method, searched on training images held back by the hash of their names.

    python benchmarks/defaults.py run RESULTS --root DATA [--only lora,ssf]    # DATA holds the sets and weights/
    python benchmarks/defaults.py table RESULTS > benchmarks/defaults.md

Every method, full fine-tuning included, has as many trials on every set: three learning rates of what it trains in the body
(`Method.lr_scale`: times lr0, and the family's `body_lr_scale`), then at the best of them another setting (`OTHER`). What is
best is the mean over the sets of its score, each divided by the best that full fine-tuning had there in its own trials. No
validation image is looked at. Several processes may share a folder, and one that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from visionpeft import files
from visionpeft.benchmark.cell import run_trial
from visionpeft.benchmark.grid import make_grid
from visionpeft.errors import ConfigError
from visionpeft.registry import METHODS

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
DETECTOR = {"model": "weights/yolov8n.pt", "imgsz": 192, "batch": 16}
CLASSIFIER = {"data": "eurosat_rgb_2000", "imgsz": 64, "batch": 32, "epochs": 2}
SETS: dict[str, dict[str, Any]] = {
    "aerial_airport": {**DETECTOR, "data": "aerial_airport/data.yaml", "epochs": 4},
    "road_signs": {**DETECTOR, "data": "road_signs/data.yaml", "epochs": 3},
    "eurosat, mobilenetv2": {
        **CLASSIFIER,
        "model": "timm/mobilenetv2_100",
        "model_args": {
            "checkpoint_path": "weights/mobilenetv2_100.tf2_in1k_dequant.safetensors",
            "pad_type": "same",
            "pretrained_cfg_overlay": HALF,
        },
    },
    "eurosat, vit_tiny": {
        **CLASSIFIER,
        "model": "timm/vit_tiny_patch16_224",
        "model_args": {
            "checkpoint_path": "weights/vit_tiny_patch16_224.tinyimagenet200.safetensors",
            "num_classes": 200,
            "img_size": 64,
            "pretrained_cfg_overlay": HALF,
        },
    },
}
FACTORS = (1 / 3, 1.0, 3.0)
CENTRE = {
    "full": 1.0,
    "last": 1.0,
    "surgical": 1.0,
    "gradual": 1.0,
    "side": 2.0,
    "prefix": 10.0,
    "prompt": 10.0,
}  # others: 5
OTHER: dict[str, dict[str, Any]] = {  # what is tried beside the default, at the best rate
    "adapter": {"reduction_factor": 4},
    "bitfit": {"bn": "train"},
    "conv_adapter": {"reduction_factor": 8},
    "dora": {"bn": "frozen"},
    "full": {"bn": "frozen"},
    "gradual": {"decay": 1.0},
    "ia3": {"bn": "train"},
    "last": {"stages": 4},
    "loha": {"bn": "frozen"},
    "lokr": {"bn": "frozen"},
    "lora": {"bn": "frozen"},
    "mona": {"reduction_factor": 4},
    "norm": {"bn": "train"},
    "prefix": {"num_virtual_tokens": 20},
    "prompt": {"num_virtual_tokens": 5},
    "side": {"reduction_factor": 4},
    "ssf": {"bn": "train"},
    "surgical": {"stages": 4},
}
MOVING = {"dora", "full", "gradual", "last", "loha", "lokr", "lora", "surgical"}  # statistics, where OTHER says nothing
BEFORE: dict[str, dict[str, Any]] = {"mona": {"reduction_factor": 8}}  # what the search started from, where it is not so now
Trials = dict[str, dict[tuple[float, str], dict[str, float]]]  # scores by method, (rate, other setting) and set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--root", default=".")
    parser.add_argument("--only", default=",".join(OTHER), help="methods, joined by commas")
    given = parser.parse_args()
    if given.verb == "table":
        return print(table(read(given.results)))
    torch.set_num_threads(1)
    files.writable(given.results / "trials")
    methods = given.only.split(",")
    for method in ["full", *(m for m in methods if m != "full")]:  # by whose scores the others' are divided
        for factor in FACTORS:
            for name in SETS:
                run(given.results, given.root, name, method, CENTRE.get(method, 5.0) * factor, {})
    for method in methods:
        rate = best_rate(read(given.results), method)
        for name in SETS:
            run(given.results, given.root, name, method, rate, OTHER[method])


def run(out: Path, root: str, name: str, method: str, rate: float, other: Mapping[str, Any]) -> None:
    """Run one trial, unless it is there, another process is at it, or the method does not fit the model."""
    METHODS[method].lr_scale = rate  # not train's lr_scale, which also scales layers that LoRA and its kin train whole
    bn = "train" if method in MOVING else "frozen"
    point = {k: [v] for k, v in {"bn": bn, **BEFORE.get(method, {}), **other}.items()}
    shared = {**SETS[name], "method": method, "workers": 0, "device": "cpu", "search": point}
    setting = "".join(f", {k}={v}" for k, v in other.items())
    file = out / "trials" / f"{name}, {method}, {rate:.3g}{setting}.json".replace(" ", "")
    try:
        with FileLock(f"{file}.lock", timeout=0):
            if file.is_file():
                return
            grid = make_grid(shared, name, root)
            try:
                made = run_trial(grid.trials(grid.cells[0])[0], out)
            except ConfigError as error:
                made = {"score": None, "error": str(error)}
            said = {"set": name, "method": method, "rate": rate, "other": setting.removeprefix(", ")}
            files.write(file, json.dumps({**said, "score": made["score"], "error": made["error"]}) + "\n")
            print(f"{file.stem}: {made['score']} {made['error']}", flush=True)
    except Timeout:
        return


def read(out: Path) -> Trials:
    """Return the scores of all trials; of one that diverged 0."""
    found: Trials = defaultdict(lambda: defaultdict(dict))
    for file in sorted((out / "trials").glob("*.json")):
        said = json.loads(file.read_text())
        if "does not fit" not in said["error"]:
            found[said["method"]][round(said["rate"], 4), said["other"]][said["set"]] = said["score"] or 0.0
    return found


def relative(trials: Trials, method: str, point: tuple[float, str]) -> float:
    """Return the mean over the sets of a trial's score, divided by the best that full fine-tuning had there."""
    full = {name: max(scores.get(name, 0.0) for scores in trials["full"].values()) for name in SETS}
    return statistics.mean(score / full[name] for name, score in trials[method][point].items())


def best_rate(trials: Trials, method: str) -> float:
    """Return the learning rate of the best trial without another setting."""
    return max((p for p in trials[method] if not p[1]), key=lambda p: relative(trials, method, p))[0]


def table(trials: Trials) -> str:
    """Return the page."""
    names = list(SETS)
    lines = [
        "# How the defaults were found",
        "",
        *(line.strip() for line in (__doc__ or "").split("\n\n")[2].splitlines()),
        "",
        "```",
        *(line.strip() for line in (__doc__ or "").split("\n\n")[1].splitlines()),
        "```",
        "",
        "Seed 0; YOLO at 192 pixels, 4 and 3 epochs; the classifiers at 64 pixels, 2 epochs: so short that what suits many "
        "epochs may be a lower rate (`lr_scale=0.3` makes it so). Scores are mAP50-95 and top1 on what was held back; "
        "**bold** is what the method's default is now.",
        "",
        "Taken was the best of each method, but for three. `full` keeps Ultralytics' own rate, so that `freeze=10` is what "
        "it is there. The side network keeps its width, for half the parameters. And whether BatchNorm's statistics move is "
        "not the method's alone: on small images, MobileNetV2 is far better where they stay still and the detector is not, "
        "so they stay still in timm's classifiers with every method, whatever stands in the rows without `bn` below.",
        "",
        f"| method | rate | other setting | mean, of full's best | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    order = sorted(trials, key=lambda m: -max(relative(trials, m, p) for p in trials[m]))
    for method in order:
        for point in sorted(trials[method]):
            rate, other = point
            is_default = abs(rate / METHODS[method].lr_scale - 1) < 0.02 and _is_default(method, other)
            mean = f"{relative(trials, method, point):.3f}"
            scores = (trials[method][point].get(name) for name in names)
            cells = [method, f"{rate:.3g}", other, f"**{mean}**" if is_default else mean]
            lines.append("| " + " | ".join([*cells, *("–" if s is None else f"{s:.3f}" for s in scores)]) + " |")
    return "\n".join(lines)


def _is_default(method: str, other: str) -> bool:
    """Say whether a method's default is now as it was with this other setting; without one, as it was without."""
    wanted = OTHER[method].items()
    now = all((METHODS[method].bn if k == "bn" else getattr(METHODS[method](), k)) == v for k, v in wanted)
    return now == bool(other)


if __name__ == "__main__":
    main()
