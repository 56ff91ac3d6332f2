"""What a step of every recipe keeps in memory, and of every method on a net: the figures in configs/ and docs/memory.md.

    python benchmarks/recipes.py                        # every recipe in configs/train against the card it is named for
    python benchmarks/recipes.py --methods yolo11n.pt   # every method that fits one net, per 640-pixel image

Bytes saved for backward are counted, not estimated (`visionpeft.measure.SavedBytes`): two and three images go forward
through the net with random weights and on to its loss with ten objects each, in bf16 autocast as on a GPU; the difference
is what every image keeps, the rest what a step keeps once (without lean: LoRA's updated weights). A recipe is counted at
its own level of lean, which is "auto" where it names none, and at "memory". The sum adds weights, gradients, optimizer,
moving average, and an allowance for the CUDA context and tensors in passing. It runs on a CPU: no figure was taken on a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional

os.environ.setdefault("YOLO_VERBOSE", "False")

from visionpeft import lean as leanly
from visionpeft.core import attach
from visionpeft.core.method import make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.errors import ConfigError
from visionpeft.measure import SavedBytes
from visionpeft.registry import METHODS
from visionpeft.settings import find_family

ROOT = Path(__file__).resolve().parents[1]
NAMES = {i: f"class {i}" for i in range(10)}
ALLOWANCE = 0.7e9  # CUDA context, cuDNN workspaces and tensors in passing; an assumption
LEVELS = ("off", *leanly.LEVELS)
OWN = {"model", "model_args", "method", "freeze", "bn", "head", "epochs", "imgsz", "batch", "lean"}


def saved(
    model: str, imgsz: int, *, amp: bool = True, head: str = "keep", lean: str = "auto", **given: Any
) -> tuple[int, int, Plan]:
    """Return the bytes that a step saves for backward for every image, those that it saves once, and the plan.

    Args:
        model: As for `train`; the net is made with random weights, for they do not matter here.
        imgsz: Size of the image in pixels.
        amp: In bf16 autocast, or else in fp32.
        head: As for `train`.
        lean: As for `train`.
        **given: method, freeze, bn, and the method's fields.
    """
    family = find_family(model)
    timm = model.startswith("timm/")
    source, arguments = (model, {"pretrained": False}) if timm else (model.replace(".pt", ".yaml"), {})
    base = family.load(source, **arguments)
    method = make_method(given.pop("method", None), {k: v for k, v in given.items() if k not in OWN}, given.get("freeze", 0))
    fitted = family.with_head(base, NAMES, head)
    plan = make_plan(method, family.anatomy(fitted, model), given.get("freeze", 0), given.get("bn"))
    attach.train_mode(attach.attach(fitted, plan), plan)
    if lean != "off":
        leanly.apply(fitted, lean)
    two, three = (_step(fitted, torch.rand(n, 3, imgsz, imgsz), base.task, amp) for n in (2, 3))
    return three - two, max(3 * two - 2 * three, 0), plan


def _step(model: Any, x: torch.Tensor, task: str, amp: bool) -> int:
    """Return the bytes that are kept when a batch has gone forward to its loss."""
    with SavedBytes(model) as kept, torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        if task == "classify":
            functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))
        else:
            _loss(model, x, task)
    return kept.bytes


def _loss(model: Any, x: torch.Tensor, task: str) -> torch.Tensor:
    """Return Ultralytics' own loss for ten boxes an image."""
    from ultralytics.cfg import get_cfg

    model.args = get_cfg()
    count = 10 * len(x)
    boxes = torch.rand(count, 4) * 0.2 + 0.2
    batch = {
        "img": x,
        "batch_idx": torch.arange(len(x)).repeat_interleave(10),
        "cls": torch.randint(len(NAMES), (count, 1)).float(),
        "bboxes": torch.cat([boxes, torch.rand(count, 1)], 1) if task == "obb" else boxes,
        "masks": torch.ones(len(x), x.shape[2] // 4, x.shape[3] // 4),
    }
    return model.loss(batch)[0].sum()


def resident(plan: Plan) -> int:
    """Return the bytes that stay between steps: weights and their average in fp32, gradient and AdamW's two moments."""
    trained = plan.trained_body + plan.trained_head
    return 8 * plan.total + 12 * trained


def recipes(folder: Path) -> list[tuple[str, ...]]:
    """Return a row of the table for every recipe."""
    rows = []
    for path in sorted(folder.rglob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        fields = {f for part in make_method(given["method"]).parts for f in part.settings()}
        own = {k: v for k, v in given.items() if k in (OWN | fields) - {"epochs", "batch", "model_args"}}
        card = float(re.search(r"(\d+)gb", path.stem).group(1)) * 1e9  # type: ignore[union-attr]
        sizes: list[str] = []
        for arguments in (own, {**own, "lean": "memory"}):
            one, once, plan = saved(**arguments)
            total = one * given["batch"] + once + resident(plan) + ALLOWANCE
            sizes += (f"{one / 1e6:.0f} MB", f"{total / 1e9:.1f} GB", f"{total / card:.0%}")
        rows.append((path.stem, str(given["model"]), str(given["imgsz"]), str(given["batch"]), *sizes))
    return rows


def methods(net: str, imgsz: int) -> list[tuple[str, ...]]:
    """Return a row of the table for every method that fits, for two depths of freezing, and for LoRA on frozen norms."""
    rows = []
    cases: list[tuple[str, dict]] = [(n, {"method": n}) for n in METHODS]
    cases += [(f"full, freeze {n}", {"method": "full", "freeze": n}) for n in (5, 10)]
    still = {"method": "lora", "bn": "frozen", "train_norms": False}
    cases += [("lora, norms still", still), ("lora, norms still, lora_fa", {**still, "lora_fa": True})]
    for name, given in cases:
        try:
            counts = [saved(net, imgsz, amp=amp, lean=level, **given) for amp in (False, True) for level in LEVELS]
        except ConfigError:  # it does not fit this net
            continue
        plan = counts[0][2]
        trained = plan.trained_body + plan.trained_head
        rows.append((name, f"{trained:,}", *(f"{one / 1e6:.0f}" for one, *_ in counts), f"{counts[0][1] / 1e6:.0f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", metavar="NET", help="a table of the methods on this net")
    parser.add_argument("--imgsz", type=int, default=640)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.methods:
        sizes = tuple(f"{precision} {level}" for precision in ("fp32", "bf16") for level in LEVELS)
        head: tuple[str, ...] = ("method", "trained", *sizes, "once, fp32 off")
        rows = methods(args.methods, args.imgsz)
    else:
        sizes = ("saved per image", "sum", "of the card")
        head = ("recipe", "model", "imgsz", "batch", *sizes, *(f"memory: {x}" for x in sizes))
        rows = recipes(ROOT / "configs" / "train")
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)))


if __name__ == "__main__":
    main()
