"""A training step of Ultralytics on made-up data, with its own losses: what a forecast runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import img2label_paths
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.tal import SegTaskAlignedAssigner

from ...core.base_model import Base, Data
from ...measure import held
from ..base import DryRun, Step
from .output import quiet
from .tasks import TASKS, Task, rows_of

_PER_OBJECT = 10  # anchors that Ultralytics assigns to a labelled object at most (its tal_topk)
_SHARED = {"obb"}  # tasks whose validation batches are not twice those of training


def rehearse(model: Any, base: Base, step: Step) -> DryRun:
    """Return a training step on made-up data.

    Args:
        model: The network, the plan attached, in training mode.
        base: Where it comes from.
        step: How it trains.
    """
    task = TASKS[base.task]
    strides = base.model.stride.tolist()  # type: ignore[operator, union-attr]
    coarsest = max(int(max(strides)), 32)

    def side(imgsz: int) -> int:
        """Return the size that Ultralytics rounds up to, which it says in a warning."""
        return max(math.ceil(imgsz / coarsest), 1) * coarsest

    model.args = get_cfg()
    model.criterion = model.init_criterion()
    assigned, number = _PER_OBJECT, step.objects
    anchors = inside = 0  # of an image, and those inside of one object, by the size of the batch that was made last

    def noting(branch: Any) -> None:
        """Note which branch computes its loss: of a head with two, the second assigns fewer anchors to an object."""
        own = branch.loss

        def loss(*args: Any) -> Any:
            nonlocal assigned
            assigned = min(branch.assigner.topk2, _PER_OBJECT)
            return own(*args)

        branch.loss = loss

    def counting(assigner: Any) -> None:
        """Note when masks are compared: then numbers are of the anchors whose masks an image has."""
        own = assigner.pair_overlaps

        def pair_overlaps(*args: Any, **extra: Any) -> Any:
            nonlocal number
            number = min(min(3 * assigner.topk, inside) * step.objects, anchors)
            try:
                return own(*args, **extra)
            finally:
                number = step.objects

        assigner.pair_overlaps = pair_overlaps

    for branch in (getattr(model.criterion, name, None) for name in ("one2many", "one2one")):
        if branch is not None:
            noting(branch)
            if isinstance(branch.assigner, SegTaskAlignedAssigner):
                counting(branch.assigner)

    def batch(count: int = step.batch, size: int = side(step.widest or step.imgsz)) -> dict[str, Tensor]:
        nonlocal anchors, inside
        anchors = sum(math.ceil(size / s) ** 2 for s in strides)
        # of a smaller object, the anchors are those inside of a square as wide as the second stride
        inside = max(round(max(step.area, (sorted(strides)[:2][-1] / size) ** 2) * anchors), 1)
        return {
            **_labels(task, model, count, size, step.objects),
            "img": torch.zeros(count, base.facts["channels"], size, size, dtype=torch.uint8).float() / 255,
        }

    def loss(given: Mapping[str, Tensor]) -> Tensor:
        return model(given)[0].sum()

    @torch.no_grad()
    def validate() -> None:
        given = batch(step.batch * (1 if task.name in _SHARED else 2), side(step.imgsz))
        predictions = model(given["img"])
        model.loss(given, predictions)

    average = held(list(model.parameters()), list(model.buffers()))  # Ultralytics copies all of the model

    def true(shape: Sequence[int]) -> int:
        """Of masks over anchors, those inside of an object (images, objects, anchors), and those assigned to one."""
        if not shape or shape[-1] != anchors:
            return math.prod(shape)
        if len(shape) == 3:
            return math.prod(shape[:2]) * inside
        # an anchor that several objects choose goes to one of them
        chosen = step.objects * min(assigned, inside)
        return math.prod(shape[:-1]) * math.ceil(anchors * (1 - math.exp(-chosen / anchors)))

    return DryRun(
        batch, loss, validate, _optimizer(model, step.optimizer), average, true, lambda: number, loops=task.name == "segment"
    )


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return Ultralytics' own, fused where training has it so (see yolo_trainer.py)."""
    trainer = SimpleNamespace(args=model.args, data={})
    with quiet():
        made = BaseTrainer.build_optimizer(trainer, model, name, lr=1e-3, momentum=0.9, decay=5e-4)  # type: ignore[arg-type]
    for group in made.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        if type(made) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            group |= {"fused": True, "foreach": False}
    return made


def _labels(task: Task, model: Any, count: int, side: int, objects: int) -> dict[str, Tensor]:
    """Return the labels of a batch, in the form in which Ultralytics' data loaders give them."""
    if task.name == "classify":
        return {"cls": torch.zeros(count, dtype=torch.long)}
    rows, map_ = count * objects, side // 4  # masks are four times smaller than the image
    made = {
        "batch_idx": torch.arange(count, dtype=torch.float).repeat_interleave(objects),
        "cls": torch.zeros(rows, 1),
        "bboxes": torch.zeros(rows, 5 if task.name == "obb" else 4),
    }
    if task.name == "pose":
        made["keypoints"] = torch.zeros(rows, *model.model[-1].kpt_shape)
    if task.name == "segment":
        made["masks"] = torch.zeros(count, map_, map_, dtype=torch.uint8)
        made["sem_masks"] = torch.zeros(count, map_, map_, dtype=torch.uint8)
    return made


def objects(data: Data, settings: Mapping[str, Any], draws: int = 100_000) -> tuple[int, float]:
    """Return the most labelled objects of an image of a run, and the share of an image that one covers on average.

    With mosaic, an image holds parts of four, mixup and cutmix join two such, and copy_paste repeats some: counted are all
    objects of the fullest that a run comes across.
    """
    task = TASKS[data.task]
    if task.name == "classify":
        return 0, 0.0
    labels = [rows_of(Path(f), data.facts["pose"]) for f in img2label_paths(list(data.facts["train"]))]
    rows = [[[float(n) for n in row.split()[1:]] for row in image] for image in labels]
    per_image = numpy.array([len(image) for image in rows])

    def on(name: str, default: float = 0.0) -> bool:
        return settings.get(name, default) > 0

    joined = (4 if on("mosaic", 1.0) else 1) * (1 + on("mixup") + on("cutmix"))
    if joined > 1:
        random = numpy.random.default_rng(0)
        images = min(len(rows) * settings["epochs"], draws)
        per_image = per_image[random.integers(0, len(rows), (images, joined))].sum(1)
    most = max(int(per_image.max()), 1) * (2 if on("copy_paste") and task.name == "segment" else 1)
    areas = [_area(row, task) for image in rows for row in image]
    return most, float(numpy.mean(areas)) if areas else 0.0


def _area(row: Sequence[float], task: Task) -> float:
    """Return the share of an image that the box around a labelled object covers."""
    if task.name == "pose" or len(row) == 4:
        return row[2] * row[3]
    x, y = row[::2], row[1::2]
    return (max(x) - min(x)) * (max(y) - min(y))
