"""How the rows of new classes should start: as `head="keep"` draws them, smaller, at zero, or with the whole head anew.

    python benchmarks/head_start.py run RESULTS --root DATA [--seeds 0 1]    # DATA holds the sets and weights/
    python benchmarks/head_start.py table RESULTS                            # benchmarks/head_start.md has what it prints

On training images held back, as benchmarks/defaults.py holds them back: no validation image is looked at. Runs that are
there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import defaults
import torch
from torch import Tensor, nn

import visionpeft
from visionpeft import files
from visionpeft.benchmark.cell import HOLDOUT_SHARE
from visionpeft.families.timm import loading
from visionpeft.families.timm.anatomy import classifiers
from visionpeft.families.yolo import family as yolo
from visionpeft.families.yolo import trainer as yolo_trainer
from visionpeft.settings import find_family

DETECTOR = {"model": "weights/yolov8n.pt", "batch": 16, "val": False}
SETS: dict[str, dict[str, Any]] = {
    "road_signs": {**DETECTOR, "data": "road_signs/data.yaml", "epochs": 3, "imgsz": 128},
    "aerial_airport": {**DETECTOR, "data": "aerial_airport/data.yaml", "epochs": 4, "imgsz": 192},
    "road_signs, 10 epochs": {**DETECTOR, "data": "road_signs/data.yaml", "epochs": 10, "imgsz": 128},
    "eurosat, mobilenetv2": defaults.SETS["eurosat, mobilenetv2"],
    "eurosat, mobilenetv2, 4 epochs": {**defaults.SETS["eurosat, mobilenetv2"], "epochs": 4},
    "eurosat, vit_tiny": defaults.SETS["eurosat, vit_tiny"],
}
METHODS = ("full", "lora", "conv_adapter")
SCALES = {"small": 0.1, "zero": 0.0, "level": None}  # of random rows; None: see `level`. Biases: the prior, in classifiers 0
OWN = {"yolo": "keep", "timm": "rebuild"}  # what a family does by default; all else is compared with it
STARTS = {"yolo": ("keep", "level", "small", "zero", "rebuild"), "timm": ("rebuild", "small", "zero")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    if given.verb == "table":
        return print(table([json.loads(file.read_text()) for file in sorted(given.results.glob("*.json"))]))
    torch.set_num_threads(1)
    files.writable(given.results)
    for seed in given.seeds:
        for name in given.only:
            for method in given.methods:
                for start in STARTS[find_family(SETS[name]["model"]).name]:
                    run(given.results, given.root, name, method, start, seed)


def run(out: Path, root: Path, name: str, method: str, start: str, seed: int) -> None:
    """Run one of them, unless it is there."""
    file = out / f"{name}, {method}, {start}, {seed}.json".replace(" ", "")
    if file.is_file():
        return
    arguments = {**SETS[name], "method": method, "seed": seed, "workers": 0, "device": "cpu", "quiet": True}
    arguments["head"] = start if start in ("keep", "rebuild") else OWN[find_family(arguments["model"]).name]
    if "model_args" in arguments:
        weights = str(root / arguments["model_args"]["checkpoint_path"])
        arguments["model_args"] = {**arguments["model_args"], "checkpoint_path": weights}
    else:
        arguments |= {"model": str(root / arguments["model"]), "plots": False}
    family = find_family(arguments["model"])
    base = family.load(arguments["model"], **arguments.get("model_args", {}))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = family.read_data(str(root / arguments["data"]), base)
        arguments["data"] = family.holdout_split(data, Path(folder), HOLDOUT_SHARE)
        if start in SCALES:
            start_rows(stack, SCALES[start])
        made = visionpeft.train(**arguments, project=folder)
    said = {
        "set": name,
        "method": method,
        "start": start,
        "seed": seed,
        "score": made.after[family.primary_metric(base.task)],
    }
    files.write(file, json.dumps({**said, "history": made.history}) + "\n")
    print(f"{file.stem}: {said['score']}", flush=True)


def level(tower: nn.Module) -> Tensor:
    """Return a class tower's rows, changed so that their scores have mean 0 and variance 1, by what the last normalisation
    says of what they read: of a channel, silu(shift + scale z) with z normal."""
    norm = [m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    z = torch.linspace(-4, 4, 81)
    share = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    values = nn.functional.silu(norm.bias[:, None] + norm.weight.abs()[:, None] * z)  # (channels, z)
    mean, square = (values * share).sum(1), (values**2 * share).sum(1)
    rows = tower[-1].weight.flatten(1)
    rows = rows - (rows @ mean)[:, None] * mean / (mean @ mean)
    return (rows / (rows**2 @ (square - mean**2)).sqrt()[:, None]).view_as(tower[-1].weight)


def start_rows(stack: ExitStack, scale: float | None) -> None:
    """Let new heads start with rows so many times as large, or level; detectors' with the prior of a class as bias."""
    towers, classifier = yolo.with_head, loading.with_head

    @torch.no_grad()
    def fit_towers(source: Any, names: dict[int, str], *more: Any) -> nn.Module:
        model: Any = towers(source, names, *more)
        for tower, stride in zip(model.model[-1].cv3, model.stride.tolist(), strict=True):
            tower[-1].weight.copy_(level(tower) if scale is None else tower[-1].weight * scale)
            tower[-1].bias.fill_(math.log(5 / len(names) / (640 / stride) ** 2))
        return model

    @torch.no_grad()
    def fit_classifier(*given: Any) -> nn.Module:
        model = classifier(*given)
        for head in map(model.get_submodule, classifiers(model)):
            head.weight.mul_(scale)
            head.bias.zero_()
        return model

    stack.enter_context(patch.object(yolo, "with_head", fit_towers))
    stack.enter_context(patch.object(yolo_trainer, "with_head", fit_towers))
    stack.enter_context(patch.object(loading, "with_head", fit_classifier))


def table(runs: list[dict[str, Any]]) -> str:
    """Return every score, and what a start gives more than the family's own on the same set, method and seed."""
    found = {(r["start"], r["set"], r["method"], r["seed"]): r for r in runs}
    lines = []
    for kind, (own, *others) in STARTS.items():
        rows = [k for start, *k in found if start == own and find_family(SETS[k[0]]["model"]).name == kind]
        lines += [f"| set | method | seed | {own} | {' | '.join(others)} |", f"|---|---|---|---|{'---|' * len(others)}"]
        for row in rows:
            lines.append("| " + " | ".join([*map(str, row), *(_cell(found.get((s, *row))) for s in (own, *others))]) + " |")
        lines += [
            "",
            f"| instead of {own} | pairs | mean difference | standard error | better in |",
            "|---|---|---|---|---|",
        ]
        for start in others:
            both = [(found[(start, *row)], found[(own, *row)]) for row in rows if (start, *row) in found]
            more = [a["score"] - b["score"] for a, b in both]
            if len(more) > 1:
                mean, error = statistics.mean(more), statistics.stdev(more) / math.sqrt(len(more))
                lines.append(f"| {start} | {len(more)} | {mean:+.3f} | {error:.3f} | {sum(d > 0 for d in more)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _cell(run: dict[str, Any] | None) -> str:
    """Return a run's score; of a detector, also the class loss on the training images in its last epoch."""
    if run is None:
        return "–"
    loss = run["history"][-1].get("train/cls_loss")
    return f"{run['score']:.3f}" + (f" ({loss:.2f})" if loss is not None else "")


if __name__ == "__main__":
    main()
