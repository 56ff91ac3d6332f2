"""How far the forecast of peak memory is from what PyTorch takes: `visionpeft.forecast` beside torch.profiler's record.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py                    # all nets x plans x {off, memory}, about half an hour
    OMP_NUM_THREADS=1 python benchmarks/forecast.py --only 'yolo11n .*lora'
    OMP_NUM_THREADS=1 python benchmarks/forecast.py --objects 1 100 400 --only 'yolo11n head'

Each row trains two steps for real, on the CPU, with random weights, images and labels, and adds up every allocation and
release that the profiler records; the peak of that sum, with weights and their average, is "measured". With `--validation`
it is the validation step instead. A GPU's allowance is no part of either.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "True")

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from visionpeft import lean as leanly
from visionpeft.core.attach import attach, set_requires_grad, train_mode
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.families.capabilities import DryRun, Step
from visionpeft.memory.forecast import ForecastRequest, memory_model
from visionpeft.settings import find_family

YOLO = [f"{name}.yaml" for name in ("yolo11n", "yolo11s", "yolo11m", "yolov8n", "yolo26n")]
YOLO += [f"yolo11n-{task}.yaml" for task in ("seg", "pose", "obb")]
TIMM = ["timm/resnet50", "timm/vit_small_patch16_224", "timm/convnext_tiny"]
PLANS = ("full", "full, freeze 10", "head", "lora", "bitfit")
TOP = 0.05  # the error aimed at


def case(net: str, plan: str, lean: str, objects: int, area: float, imgsz: int, gpu: bool = False) -> ForecastRequest:
    """Return what a row forecasts: in single precision, on a GPU in half. Of timm's nets, whose stages are coarser,
    "freeze 10" is half of them."""
    family = find_family(net)
    base = family.load_architecture(net, **({"num_classes": 10} if net.startswith("timm/") else {}))
    fitted = family.with_head(base, base.names, "keep")
    anatomy = family.anatomy(fitted, net)
    method, _, depth = plan.partition(", freeze ")
    frozen = 0 if not depth else int(depth) if family.name == "yolo" else len(anatomy.stages) // 2
    step = Step(1, imgsz, "AdamW", gpu, objects, area)
    return ForecastRequest(family, base, fitted, make_plan(make_method(method), anatomy, frozen), step, lean, gpu)


def rehearsed(of: ForecastRequest, step: Step, device: torch.device) -> tuple[nn.Module, DryRun]:
    """Return a row's model ready to train, and how it does."""
    model = copy.deepcopy(of.fitted)
    set_requires_grad(attach(model, of.plan), of.plan)
    train_mode(model.train(), of.plan).to(device)
    rehearsal = of.family.dry_run(model, of.base, step)
    if of.lean != "off":
        leanly.apply(model, of.lean)
    return model, rehearsal


def measured(of: ForecastRequest, step: Step, validation: bool) -> int:
    """Return the peak of what two real steps, or a validation step, take."""
    model, rehearsal = rehearsed(of, step, torch.device("cpu"))
    fixed = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + rehearsal.average

    def go() -> None:
        rehearsal.loss(filled(rehearsal.batch(), step)).backward()
        rehearsal.optimizer.step()
        rehearsal.optimizer.zero_grad()

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        if validation:
            model.eval()
            rehearsal.validate()
        else:
            go()
            go()
    live = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return fixed + peak


def filled(batch: Any, step: Step) -> Any:
    """Return a batch with random images, and labels of the area that was assumed."""
    if isinstance(batch, tuple):
        return torch.rand(batch[0].shape), *batch[1:]
    if "bboxes" in batch:
        count, side = len(batch["bboxes"]), step.area**0.5
        batch["bboxes"][:, :2] = torch.rand(count, 2) * (1 - side) + side / 2
        batch["bboxes"][:, 2:4] = side
    if "keypoints" in batch:
        shape = batch["keypoints"].shape[:2]  # all seen, within their boxes
        batch["keypoints"] += 1
        batch["keypoints"][..., :2] = batch["bboxes"][:, None, :2] + (torch.rand(*shape, 2) - 0.5) * side
    if "masks" in batch:
        batch["masks"] += 1
    return {**batch, "img": torch.rand(batch["img"].shape)}


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Measure and yield the rows of the table, with their errors."""
    for net in (*YOLO, *TIMM):
        for plan in PLANS:
            for lean in ("off", "memory"):
                name = f"{net.removesuffix('.yaml').removeprefix('timm/')} {plan} {lean}"
                if not re.search(args.only, name):
                    continue
                torch.manual_seed(0)
                for objects in args.objects:
                    of = case(net, plan, lean, objects, args.area, args.imgsz if net in YOLO else 224)
                    step = Step(args.batch, of.step.imgsz, "AdamW", False, objects, args.area)
                    began = time.perf_counter()
                    said = memory_model(of).at(args.batch)
                    seconds = time.perf_counter() - began
                    most = said.validation if args.validation else said.optimizer + said.step
                    expected, real = said.weights + said.average + most, measured(of, step, args.validation)
                    error = expected / real - 1
                    told = (f"{expected / 1e6:.1f}", f"{real / 1e6:.1f}", f"{error:+.1%}", f"{seconds:.1f}")
                    print(f"{name}, {objects} objects: {error:+.1%}", file=sys.stderr, flush=True)
                    yield name.split()[0], plan, lean, str(objects) if net in YOLO else "", *told, str(abs(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name this pattern is found in")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--imgsz", type=int, default=320, help="of YOLO's; timm's read 224")
    parser.add_argument("--objects", type=int, nargs="+", default=[10], help="labelled ones in an image")
    parser.add_argument("--area", type=float, default=0.02, help="share of an image that one covers")
    parser.add_argument("--validation", action="store_true", help="the validation step instead of training")
    args = parser.parse_args()
    names = ("net", "plan", "lean", "objects", "forecast MB", "measured MB", "error", "forecast s")
    found: list[float] = []
    errors: dict[str, dict[str, str]] = {}
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names), flush=True)
    for *cells, error in rows(args):
        found.append(float(error))
        print("| " + " | ".join(cells) + " |", flush=True)
        net, plan, lean, objects, *_, said, _ = cells
        errors.setdefault(f"{net}, {objects} objects" if len(args.objects) > 1 else net, {})[f"{plan}, {lean}"] = said
    columns = list(dict.fromkeys(c for row in errors.values() for c in row))
    print("\n| error of | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for net, row in errors.items():
        print(f"| {net} | " + " | ".join(row.get(c, "") for c in columns) + " |")
    if found:
        within = sum(e <= TOP for e in found)
        print(f"\n{within} of {len(found)} within {TOP:.0%}; the largest error is {max(found):.1%}")


if __name__ == "__main__":
    main()
