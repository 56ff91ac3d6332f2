"""The first tables: our runs beside Ultralytics' own on two detection sets, outlines and oriented boxes on generated
scenes, and methods on EuroSAT.

    python benchmarks/show.py --root ../shared/data --out /tmp/show            # run what is missing, then print the tables
    python benchmarks/show.py --root ../shared/data --out /tmp/show --only aerial --jobs 2

One JSON per cell; existing ones are kept. Each cell is a process of its own with one thread, so that `--jobs 2` suits two
cores; seconds are comparable within one invocation only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DETECT = {"epochs": 12, "imgsz": 320, "seed": 0, "device": "cpu", "plots": False}
CLASSIFY = {"epochs": 4, "seed": 0, "device": "cpu", "workers": 0}
OFF = {"lean": "off"}  # bytes are then those of the method alone, and of Ultralytics; benchmarks/lean.py has the others
TASKS = {"seg": "yolo11n-seg.pt", "obb": "yolo11n-det-from-seg.pt"}  # the latter's body under a new head
TIMM = {
    "mobilenetv2_100": ("mobilenetv2_100.tf2_in1k_dequant.safetensors", {"pad_type": "same"}, {"imgsz": 96}),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224.tinyimagenet200.safetensors", {"num_classes": 200, "img_size": 112}, {}),
}


def cells() -> dict[str, dict[str, Any]]:
    """Every cell by name."""
    found: dict[str, dict[str, Any]] = {}
    ours: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "full, freeze 10": {"method": "full", "freeze": 10},
        "head": {"method": "head"},
        "lora": {"method": "lora"},
    }
    for data in ("aerial_airport", "road_signs"):
        for settings in ("defaults", "our settings"):
            for freeze in (0, 10):
                name = f"Ultralytics, {settings}{', freeze 10' if freeze else ''}"
                more = {"freeze": freeze} if freeze else {}
                cell = {
                    "kind": "ultralytics",
                    "data": data,
                    "weights": "yolov8n.pt",
                    "ours": settings == "our settings",
                    **more,
                }
                found[f"{data} | yolov8n | {name}"] = cell
        for name, more in ours.items():
            found[f"{data} | yolov8n | {name}"] = {"kind": "detect", "data": data, "weights": "yolov8n.pt", **more}
    for name in ("full", "lora"):
        cell = {"kind": "detect", "data": "aerial_airport", "weights": "yolo11n-det-from-seg.pt", **ours[name]}
        found[f"aerial_airport | yolo11n | {name}"] = cell
    for task, weights in TASKS.items():
        for name, more in ours.items():
            cell = {"kind": "scenes", "data": f"scenes/satellite-{task}", "weights": weights, **more}
            found[f"scenes/satellite-{task} | yolo11n-{task} | {name}"] = cell
    for net in TIMM:
        tokens = ("prompt", "prefix") if net.startswith("vit") else ()
        for method in ("head", "bitfit", "lora", "adapter", *tokens, "full"):
            found[f"eurosat | {net} | {method}"] = {"kind": "classify", "net": net, "method": method}
        wide = {"r": 16, "lora_alpha": 32.0, "small_layers": 0.2}
        found[f"eurosat | {net} | lora, r 16, small layers 20 %"] = {
            "kind": "classify",
            "net": net,
            "method": "lora",
            **wide,
        }
    return found


def measure(root: Path, kind: str, **cell: Any) -> dict[str, Any]:
    """Run one cell in this process."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        row = {"ultralytics": _ultralytics, "detect": _detect, "scenes": _scenes, "classify": _classify}[kind](
            root, folder, **cell
        )
    return {**row, "seconds": round(time.time() - began, 1)}


def _ultralytics(root: Path, folder: str, data: str, weights: str, ours: bool, **more: Any) -> dict[str, Any]:
    from ultralytics.models.yolo.detect import DetectionTrainer

    import visionpeft
    from visionpeft.measure import Meter

    class Metered(DetectionTrainer):
        meter = None

        def preprocess_batch(self, batch: dict) -> dict:
            self.meter = self.meter or Meter(self.model, self.device)
            self.meter.start("forward")
            return super().preprocess_batch(batch)

        def optimizer_step(self) -> None:
            self.meter.start("optimizer")
            super().optimizer_step()

        def run_callbacks(self, event: str) -> None:
            if event == "on_train_batch_end" and self.meter:
                self.meter.start("data")
            super().run_callbacks(event)

    args: dict[str, Any] = {
        "model": str(root / "weights" / weights),
        "data": str(root / data / "data.yaml"),
        **DETECT,
        **more,
    }
    if ours:
        family = visionpeft.api.find_family(weights)
        own = {k: family.defaults[k] for k in ("lr0", "optimizer", "batch")}
        args = {**args, **own, "nbs": own["batch"], "warmup_epochs": DETECT["epochs"] / 10, "warmup_bias_lr": 0.0}
    trainer = Metered(overrides={**args, "save_dir": folder})
    trainer.train()
    scores = {"mAP50": "metrics/mAP50(B)", "mAP50-95": "metrics/mAP50-95(B)"}
    trained = {True: 0, False: 0}
    for name, p in trainer.model.named_parameters():
        trained[name.startswith("model.22.")] += p.numel() if p.requires_grad else 0
    numbers = {k: float(trainer.metrics[v]) for k, v in scores.items()}
    return {**numbers, "body": trained[False], "head": trained[True], **trainer.meter.report(), "delta": None}


def _detect(root: Path, folder: str, data: str, weights: str, **more: Any) -> dict[str, Any]:
    import visionpeft

    run = visionpeft.train(
        root / data / "data.yaml", model=root / "weights" / weights, project=folder, **{**DETECT, **OFF, **more}
    )
    check = _plain_val(run.merged, root / data / "data.yaml") if run.merged else {}
    return {**_row(run), "plain val": check, "merged bytes": run.merged.stat().st_size if run.merged else None}


def _scenes(root: Path, folder: str, data: str, weights: str, **more: Any) -> dict[str, Any]:
    from ultralytics import YOLO

    import visionpeft

    model = root / "weights" / weights
    if data.endswith("-obb"):
        model, given = Path(folder) / "base.pt", model
        YOLO("yolo11n-obb.yaml").load(str(given)).save(str(model))
    return _row(visionpeft.train(data, model=model, project=folder, **{**DETECT, **OFF, **more}))


def _plain_val(merged: Path, data: Path) -> dict[str, float]:
    """What Ultralytics measures on the merged file where visionpeft cannot be imported."""
    code = (
        "import sys, json; sys.modules['visionpeft'] = None\n"
        "from ultralytics import YOLO\n"
        f"s = YOLO({str(merged)!r}).val(data={str(data)!r}, imgsz=320, device='cpu', plots=False, verbose=False)\n"
        "print('RESULT', json.dumps({'mAP50': s.box.map50, 'mAP50-95': s.box.map}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=merged.parent).stdout
    return json.loads(next(line for line in said.splitlines() if line.startswith("RESULT"))[7:])


def _classify(root: Path, folder: str, net: str, method: str, **more: Any) -> dict[str, Any]:
    import visionpeft

    weights, model_args, settings = TIMM[net]
    half = (0.5, 0.5, 0.5)
    model_args = {
        **model_args,
        "checkpoint_path": str(root / "weights" / weights),
        "pretrained_cfg_overlay": {"mean": half, "std": half},
    }
    run = visionpeft.train(
        root / "eurosat_rgb_2000", model=f"timm/{net}", method=method, model_args=model_args, project=folder,
        **{**CLASSIFY, **OFF, **settings, **more},
    )  # fmt: skip
    return _row(run)


def _row(run: Any) -> dict[str, Any]:
    return {
        **run.after,
        "before": run.before,
        "body": run.parameters["body"],
        "share": run.plan.trained_body / run.plan.body,
        "head": run.parameters["head"],
        **run.measured,
        "delta": run.delta_bytes,
        "settings": {"bn": run.plan.bn, **{k: run.arguments[k] for k in ("head", "lr0", "lr_scale", "optimizer", "batch")}},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines, last = [], ""
    for name, row in results.items():
        data, net, what = name.split(" | ")
        scores = [k for k in ("mAP50", "mAP50-95", "mAP50(M)", "mAP50-95(M)", "top1") if k in row]
        if (data, net) != last:
            last = (data, net)
            columns = ["trained body", "share of body", "trained head", "saved MB", "s/step", "delta kB (body, head, stats)"]
            heads = [f"{data}, {net}", *scores, *columns, "s"]
            lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        delta = row.get("delta") or {}
        parts = ", ".join(f"{delta[k] / 1e3:.0f}" for k in ("body", "head", "statistics")) if delta else "–"
        share = f"{row['share']:.1%}" if "share" in row else "–"
        row = {**row, **row.get("plain val", {})}  # detection: what `yolo val` measures on the merged file
        numbers = [f"{row[k]:.3f}" for k in scores]
        cost = [f"{row['saved_bytes'] / 1e6:.0f}", f"{row['step_seconds']:.2f}", parts, f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join([what, *numbers, f"{row['body']:,}", share, f"{row['head']:,}", *cost]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the data sets and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON per cell")
    parser.add_argument("--only", default="", help="regular expression that a cell's name must match")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        content = measure(args.root.resolve(), **cells()[args.cell])
        path = args.out / f"{_slug(args.cell)}.json"
        path.with_suffix(".part").write_text(json.dumps({"name": args.cell, **content}, indent=1))
        path.with_suffix(".part").rename(path)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in cells() if re.search(args.only, name)]
    missing = [name for name in wanted if not (args.out / f"{_slug(name)}.json").exists()]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "YOLO_OFFLINE": "True",
        "YOLO_VERBOSE": "False",
        "HF_HUB_OFFLINE": "1",
    }

    def start(name: str) -> None:
        command = [sys.executable, __file__, "--root", str(args.root), "--out", str(args.out), "--cell", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(name, "failed:\n" + done.stderr[-2000:] if done.returncode else "done", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, missing))
    paths = {name: args.out / f"{_slug(name)}.json" for name in wanted}
    print(table({name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}))


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


if __name__ == "__main__":
    main()
