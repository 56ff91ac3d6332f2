"""Makes a folder of benchmark results as a sweep would leave it, from nothing: every number follows from the arguments."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visionpeft.benchmark.grid import hash_of
from visionpeft.families.predictions import Answers

MODELS = {"yolov8n": 3_157_200, "yolo11n": 2_624_080}  # parameters
DATA = {"aerial_airport": 0.25, "road_signs": 0.70}  # what full fine-tuning reaches
# share of the body that trains; score, bytes saved, step time and what is left of the old classes relative to full
METHODS: dict[str, tuple[float, float, float, float, float]] = {
    "full": (1.0, 1.0, 1.0, 1.0, 0.35),
    "lora": (0.09, 0.97, 0.82, 0.90, 0.60),
    "norm": (0.004, 0.80, 0.50, 0.70, 0.85),
    "head": (0.0, 0.45, 0.18, 0.45, 0.99),
}
OLD = ("person", "car", "bus", "dog", "kite", "boat")
IMAGES = 400
STAGES = [*(f"model.{i}" for i in range(22)), "head", "loss"]


def make_results(
    out: Path,
    models: Iterable[str] = tuple(MODELS),
    data: Iterable[str] = tuple(DATA),
    methods: Mapping[str, tuple[float, float, float, float, float]] = METHODS,
    seeds: Iterable[int] = (0, 1),
    classes: Iterable[str] = OLD,
    cuda: bool = False,
    without: Iterable[str] = (),
) -> Path:
    """Write RESULTS/benchmark.json and a cell for each combination; returns RESULTS.

    Args:
        out: The folder to make.
        models: Of MODELS.
        data: Of DATA.
        methods: As METHODS.
        seeds: One cell each.
        classes: Old classes, whose scores are kept.
        cuda: As if it had run on a GPU.
        without: Keys of a cell ("pictures", "evidence", ...) or of run.measured ("saved_by_stage", ...) that are null.
    """
    (out / "cells").mkdir(parents=True)
    given = {"model": list(models), "data": list(data), "method": list(methods), "seed": list(seeds)}
    about = {"name": "synthetic", "created": "2026-11-22T06:00:00", "grid": given, "defaults": {"against": "full"}}
    (out / "benchmark.json").write_text(json.dumps(about))
    for model in given["model"]:
        for name in given["data"]:
            for method, facts in methods.items():
                for seed in given["seed"]:
                    cell = make_cell(model, name, method, facts, seed, list(classes), cuda)
                    for key in without:
                        owner = cell if key in cell else cell["run"]["measured"]
                        owner[key] = None
                    (out / "cells" / f"{cell['hash']}.json").write_text(json.dumps(cell))
    return out


def make_cell(
    model: str, data: str, method: str, facts: tuple[float, ...], seed: int, classes: list[str], cuda: bool = False
) -> dict[str, Any]:
    """Return one cell as plain JSON values."""
    spec = {
        "model": f"weights/{model}.pt",
        "model_args": {},
        "data": f"{data}/data.yaml",
        "method": method.partition(",")[0],
        "freeze": int(method.rpartition("freeze ")[2]) if "freeze" in method else 0,
        "seed": seed,
        "options": {"epochs": 6, "imgsz": 256},
        "own": [],
        "retain": "coco128_640/data.yaml",
        "equal": "epochs",
        "search": {},
        **dict.fromkeys(("weights_sha256", "data_sha256", "retain_sha256"), "0" * 64),
    }
    random = np.random.default_rng(int(hash_of(spec), 16))
    share, near, memory, speed, left = facts
    goal = DATA[data] * near + 0.01 * (model == "yolo11n") + 0.006 * (seed - 0.5) + 0.002 * float(random.standard_normal())
    luck = np.random.default_rng(0).random(IMAGES)  # images are mostly as hard for one method as for another
    luck = np.where(random.random(IMAGES) < 0.1, random.random(IMAGES), luck)
    seen = Answers(
        np.array([f"{i:04}.jpg" for i in range(IMAGES)]), np.zeros(IMAGES, np.int32), (luck > goal).astype(np.int32)
    )
    score = seen.score()
    total = MODELS[model]
    body, head, saved = round(0.72 * total * share), round(0.28 * total), round(780e6 * memory)
    metric = "mAP50-95"
    history = [
        {
            "epoch": e,
            "train/box_loss": 1 + 2 * math.exp(-e / 3),
            "train/cls_loss": 1 + math.exp(-e / 2) / near,
            metric: round(score * (1 - math.exp(-e / 1.8)) / (1 - math.exp(-6 / 1.8)), 5),
        }
        for e in range(1, 7)
    ]
    weights = np.exp(-np.arange(len(STAGES)) / 8) * (np.arange(len(STAGES)) / len(STAGES) >= 1 - memory - 0.2)
    by_stage = dict(zip(STAGES, (int(b) for b in saved * weights / weights.sum()), strict=True))
    by_stage["loss"] += saved - sum(by_stage.values())
    by_cause = {"conv2d": saved // 2, "batch_norm": saved // 4, "silu": saved // 5, "cat": saved // 50}
    by_cause["other"] = saved - sum(by_cause.values())
    step = 1.2 * speed + 0.02 * seed
    parts = {"data": 0.05, "forward": 0.35 * step, "backward": 0.65 * step, "optimizer": 0.004 + 0.03 * share}
    live = saved + 4 * (body + head)
    before = {name: 0.3 + 0.4 * (i % 3) / 3 for i, name in enumerate(classes)}
    after = {n: round(b * min(left + 0.1 * float(random.random()), 1), 4) for n, b in before.items()}
    return {
        "format": 1,
        "hash": hash_of(spec),
        "cell": spec,
        "names": {"model": model, "data": data, "method": method},
        "task": "detect",
        "score": metric,
        "run": {
            "folder": f"runs/{model}",
            "before": {metric: 0.0, "mAP50": 0.0},
            "after": {metric: round(score, 5), "mAP50": round(min(score * 1.6, 1), 5)},
            "parameters": {"total": total, "body": body, "head": head, "statistics": 11136},
            "measured": {
                "saved_bytes": saved,
                "saved_by_stage": by_stage,
                "saved_by_cause": by_cause,
                "live_bytes": live,
                "state_bytes": {
                    "weights": 4 * total,
                    "buffers": 44_000,
                    "gradients": 4 * (body + head),
                    "optimizer": 8 * (body + head),
                    "average": 4 * (body + head),
                },
                "peak_bytes": round(1.3 * live) if cuda else saved,
                "peak_measure": "CUDA allocator's peak" if cuda else "bytes saved for backward",
                "cuda": {"allocated": round(1.3 * live), "reserved": round(1.5 * live)} if cuda else None,
                "step_seconds": parts["forward"] + parts["backward"],
                "seconds_by_part": parts,
                "first_step_seconds": 2 * step,
            },
            "history": history,
            "delta_bytes": {"body": 2 * body, "head": 2 * head, "statistics": 44_544, "file": 2 * (body + head) + 60_000},
            "plan": {"method": method, "freeze": 0, "bn": "train"},
            "arguments": {"epochs": 6, "imgsz": 256, "batch": 16, "optimizer": "AdamW", "lr0": 0.001},
            "versions": {"python": "3.11.7", "visionpeft": "0.1.0", "torch": "2.15.0"},
            "seconds": 60 * speed,
        },
        "states": {"bn": "train" if share > 0.05 else "frozen", "head": "keep", "lean": "auto"},
        "retained": {
            "data": "coco128_640",
            "metric": metric,
            "before": sum(before.values()) / max(len(before), 1),
            "after": sum(after.values()) / max(len(after), 1),
            "detached": sum(before.values()) / max(len(before), 1),
            "per_class": {n: [before[n], after[n]] for n in before},
        },
        "evidence": seen.pack(),
        "interval": None,
        "pictures": {"labels": [picture(i, "") for i in range(4)], "after": [picture(i, method) for i in range(4)]},
        "command": f"visionpeft train --data {data}/data.yaml --model weights/{model}.pt --method {method} --seed {seed}",
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "cpu": "x86_64",
            "cores": 2,
            "gpu": "H200" if cuda else None,
        },
        "seconds": 64 * speed + seed,
    }


def make_failed(out: Path, error: str, method: str = "dora", seed: int = 1) -> Path:
    """Write a cell that failed; returns its file."""
    cell = make_cell("yolov8n", "road_signs", method, (0.1, 1.0, 1.0, 1.0, 1.0), seed, [])
    said = {k: cell[k] for k in ("format", "hash", "cell", "names")}
    (out / "failed").mkdir(exist_ok=True)
    file = out / "failed" / f"{cell['hash']}.json"
    file.write_text(json.dumps({**said, "error": error, "kind": "OutOfMemory", "log": "", "seconds": 3.0}))
    return file


def picture(which: int, said: str) -> str:
    """Return a JPEG in base64."""
    image = Image.new("RGB", (320, 240), (60 + 40 * which, 90, 120))
    ImageDraw.Draw(image).rectangle((80, 60, 200 + 20 * which, 180), outline=(250, 220, 60), width=4)
    ImageDraw.Draw(image).text((84, 64), said, fill=(255, 255, 255))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
