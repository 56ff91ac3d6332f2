"""The detector inside the package: how it was trained, and whether what it learnt on driving scenes helps on others.

    python benchmarks/embedded.py train                       # visionpeft/scenes/driving.pt anew; some 50 minutes, two cores
    python benchmarks/embedded.py check --seeds 0 1 2         # the same few epochs, frozen, in full, and from random weights
    python benchmarks/embedded.py check --data scenes/night

Seconds are those of a whole process, imports included, once the pictures are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.nn.tasks import torch_safe_load

import visionpeft
from visionpeft import files, scenes

NET = Path(__file__).with_name("yolo11n-narrow.yaml")
PARTS = {1000: 1500, 1001: 1500}  # seeds, and how many pictures each draws
TRAINING: dict[str, Any] = {
    "method": "full",
    "epochs": 22,
    "imgsz": 320,
    "batch": 16,
    "lr0": 2e-3,
    "cos_lr": True,
    "workers": 2,
    "cache": "ram",
    "plots": False,
    # more change than a camera in a car sees, for other cameras are to profit: turned, tilted, upside down, recoloured
    "mosaic": 1.0,
    "close_mosaic": 4,
    "scale": 0.6,
    "degrees": 20,
    "shear": 4,
    "flipud": 0.2,
    "hsv_h": 0.05,
}
# then, shorter, every way up: seen from above, things have no upright
TURNING = {**TRAINING, "epochs": 8, "lr0": 1e-3, "degrees": 180, "flipud": 0.5, "scale": 0.8, "close_mosaic": 2}
CELLS: dict[str, dict[str, Any]] = {
    "freeze 10": {"freeze": 10},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "full, from random weights": {"method": "full", "model": str(NET)},
}


def train() -> None:
    """Draw the pictures, train, and put the weights into the package."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with ProcessPoolExecutor(2) as pool:
            drawn = [pool.submit(_draw, str(root / str(seed)), count, seed) for seed, count in PARTS.items()]
            sets = [Path(future.result()).parent for future in drawn]
        facts = yaml.safe_load((sets[0] / "data.yaml").read_text())
        facts |= {"train": [str(s / "images/train") for s in sets], "val": str(sets[0] / "images/val")}
        (root / "data.yaml").write_text(yaml.safe_dump(facts))
        run = visionpeft.train(root / "data.yaml", model=NET, project=root / "runs", device="cpu", **TRAINING)
        run = visionpeft.train(root / "data.yaml", model=run.merged, project=root / "runs", device="cpu", **TURNING)
        print(run)
        publish(run.merged)


def publish(merged: str | Path | None) -> None:
    """Copy a merged checkpoint into the package, without the names of this machine's folders."""
    content, _ = torch_safe_load(str(merged), safe_only=True)
    keep = {"task": "detect", "imgsz": TRAINING["imgsz"], "data": "scenes/driving", "model": NET.name}
    content["train_args"] = content["model"].args = keep
    content["model"].yaml["yaml_file"] = NET.name
    files.replace(scenes.WEIGHTS, lambda temporary: torch.save(content, temporary))
    print(f"{scenes.WEIGHTS}: {scenes.WEIGHTS.stat().st_size / 1e6:.2f} MB")


def check(data: str, seeds: list[int], cells: list[str]) -> None:
    """Print one row for each way to train."""
    data = scenes.find(data)
    print(f"{data}: {scenes.EMBEDDED}\n\n| | seed | mAP50 before | mAP50 | mAP50-95 | seconds |\n|---|---|---|---|---|---|")
    for seed in seeds:
        for name in cells:
            began = time.perf_counter()
            call = [sys.executable, __file__, "one", json.dumps({**CELLS[name], "data": data, "seed": seed})]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            scores = f"{row['before']['mAP50']:.3f} | {row['after']['mAP50']:.3f} | {row['after']['mAP50-95']:.3f}"
            print(f"| {name} | {seed} | {scores} | {time.perf_counter() - began:.0f} |", flush=True)


def one(settings: str) -> None:
    """Train once in this process, with the settings of a plain `visionpeft train` but for those given as JSON."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    with tempfile.TemporaryDirectory() as folder:
        chosen = {**scenes.EMBEDDED, "device": "cpu", "plots": False, "project": folder, **json.loads(settings)}
        run = visionpeft.train(**{**chosen, "model": scenes.find(chosen["model"])})
    print(json.dumps({"before": run.before, "after": run.after}))


def _draw(root: str, count: int, seed: int) -> str:
    first = seed == min(PARTS)
    return str(scenes.write("driving", root, train=count, val=100 if first else 1, seed=seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train")
    check_parser = commands.add_parser("check")
    check_parser.add_argument("--data", default=scenes.EMBEDDED["data"])
    check_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    check_parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    commands.add_parser("one").add_argument("settings")
    given = vars(parser.parse_args())
    {"train": train, "check": check, "one": one}[given.pop("command")](**given)
