"""A training step of Ultralytics on made-up data, with its own losses: what a forecast runs. Registers nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import ultralytics.optim
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import img2label_paths
from ultralytics.utils.tal import SegTaskAlignedAssigner

from .base import Base, Data, Rehearsal, Step
from .yolo_tasks import TASKS, Task, rows_of

_PER_OBJECT = 10  # anchors that Ultralytics assigns to a labelled object at most (its tal_topk)
_SHARED = {"obb"}  # tasks whose validation batches are not twice those of training


def rehearse(model: Any, base: Base, step: Step) -> Rehearsal:
    """Return a training step on made-up data.

    Args:
        model: The network, the plan attached, in training mode.
        base: Where it comes from.
        step: How it trains.
    """
    task = TASKS[base.task]
    strides = base.model.stride.tolist()  # type: ignore[operator, union-attr]
    coarsest = max(int(max(strides)), 32)
    side = max(math.ceil(step.imgsz / coarsest), 1) * coarsest  # as Ultralytics does, and says in a warning
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    assigned, number = _PER_OBJECT, step.objects
    anchors = sum(math.ceil(side / s) ** 2 for s in strides)
    # of a smaller object, the anchors are those inside of a square as wide as the second stride
    inside = max(round(max(step.area, (sorted(strides)[:2][-1] / side) ** 2) * anchors), 1)

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

    def batch(count: int = step.batch) -> dict[str, Tensor]:
        return {
            **_labels(task, model, count, side, step.objects),
            "img": torch.zeros(count, base.facts["channels"], side, side, dtype=torch.uint8).float() / 255,
        }

    def loss(given: Mapping[str, Tensor]) -> Tensor:
        return model(given)[0].sum()

    @torch.no_grad()
    def validate() -> None:
        given = batch(step.batch * (1 if task.name in _SHARED else 2))
        predictions = model(given["img"])
        model.loss(given, predictions)

    names = {name.lower(): name for name in dir(torch.optim)}
    kinds = {"musgd": ultralytics.optim.MuSGD, **{k: getattr(torch.optim, v) for k, v in names.items()}}
    kind = kinds[step.optimizer.lower()]
    fused = {"fused": True} if kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) else {}
    momentum = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **fused, **momentum)
    average = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))  # Ultralytics copies all of the model

    def true(shape: Sequence[int]) -> int:
        """Of masks over anchors, those inside of an object (images, objects, anchors), and those assigned to one."""
        if not shape or shape[-1] != anchors:
            return math.prod(shape)
        if len(shape) == 3:
            return math.prod(shape[:2]) * inside
        # an anchor that several objects choose goes to one of them
        chosen = step.objects * min(assigned, inside)
        return math.prod(shape[:-1]) * math.ceil(anchors * (1 - math.exp(-chosen / anchors)))

    return Rehearsal(batch, loss, validate, optimizer, average, true, lambda: number, loops=task.name == "segment")


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

    With mosaic, an image holds parts of four: counted are all objects of the fullest four that a run comes across.
    """
    task = TASKS[data.task]
    if task.name == "classify":
        return 0, 0.0
    rows = [
        [[float(n) for n in row.split()[1:]] for row in rows_of(Path(f))] for f in img2label_paths(list(data.facts["train"]))
    ]
    per_image = numpy.array([len(image) for image in rows])
    if settings.get("mosaic", 1.0) > 0:
        random = numpy.random.default_rng(0)
        images = min(len(rows) * settings["epochs"], draws)
        per_image = per_image[random.integers(0, len(rows), (images, 4))].sum(1)
    return max(int(per_image.max()), 1), float(numpy.mean([_area(row, task) for image in rows for row in image]))


def _area(row: Sequence[float], task: Task) -> float:
    """Return the share of an image that the box around a labelled object covers."""
    if task.name == "pose" or len(row) == 4:
        return row[2] * row[3]
    x, y = row[::2], row[1::2]
    return (max(x) - min(x)) * (max(y) - min(y))
