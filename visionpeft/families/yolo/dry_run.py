"""A training step of Ultralytics on made-up data, with its own losses, for forecasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.tal import SegTaskAlignedAssigner

from ...core.base_model import Base, Data
from ...measure import storage_bytes
from ..base import Arguments
from ..capabilities import DryRun, Step, SupportsDryRun
from .data import LabelledImages
from .output import quiet
from .tasks import TASKS

_PER_OBJECT = 10  # anchors that Ultralytics assigns to a labelled object at most (its tal_topk)
_OBJECTS, _AREA = 40, 0.02  # of the fullest image, and the share each covers, where there are no data to count in
_DRAWS = 100_000  # images that augmentation joins, of which the fullest is looked for


class DryRuns(SupportsDryRun):
    """Ultralytics' steps, on as many objects as the fullest image holds."""

    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
        made_up = _MadeUp(model, base, step)
        average = storage_bytes(list(model.parameters()), list(model.buffers()))  # Ultralytics copies all of the model
        return DryRun(
            made_up.batch,
            made_up.loss,
            made_up.validate,
            _optimizer(model, step.optimizer),
            average,
            made_up.true,
            lambda: made_up.number,
            loops=TASKS[base.task].loops,
        )

    def max_objects(self, base: Base, data: Data | None, settings: Arguments) -> tuple[int, float]:
        """Return the most objects of an image of a run, and the share of an image that one covers on average.

        With mosaic, an image holds parts of four, mixup and cutmix join two such, and copy_paste repeats some: counted are
        all objects of the fullest that a run comes across.
        """
        task = TASKS[base.task]
        if not task.labels:
            return 0, 0.0
        if not isinstance(data, LabelledImages):
            return _OBJECTS, _AREA
        rows = [[[float(n) for n in row.split()[1:]] for row in image] for image in data.rows(data.train)]
        per_image = numpy.array([len(image) for image in rows])

        def on(name: str, default: float = 0.0) -> bool:
            return settings.get(name, default) > 0

        joined = (4 if on("mosaic", 1.0) else 1) * (1 + on("mixup") + on("cutmix"))
        if joined > 1:
            random = numpy.random.default_rng(0)
            images = min(len(rows) * settings["epochs"], _DRAWS)
            per_image = per_image[random.integers(0, len(rows), (images, joined))].sum(1)
        most = max(int(per_image.max()), 1) * (2 if on("copy_paste") and task.pastes else 1)
        areas = [task.labels.area(row) for image in rows for row in image]
        return most, float(numpy.mean(areas)) if areas else 0.0

    def max_size(self, imgsz: int, settings: Arguments) -> int:
        return math.ceil(imgsz * (1 + (settings.get("multi_scale") or 0.0)))


class _MadeUp:
    """Batches of made-up images, and the numbers that Ultralytics' losses read from tensors without content.

    Attributes:
        number: A whole number that is read from a tensor: the objects of an image, or while masks are compared, the anchors
            whose masks it has.
    """

    def __init__(self, model: Any, base: Base, step: Step):
        self._model, self._step, self._task = model, step, TASKS[base.task]
        self._channels = base.facts["channels"]
        self._strides: list[float] = base.model.stride.tolist()  # type: ignore[operator, union-attr, assignment]
        self._assigned, self.number = _PER_OBJECT, step.objects
        self._anchors = self._inside = 0  # of an image, and inside of one object, of the batch that was made last
        model.args = get_cfg()
        model.criterion = model.init_criterion()
        for branch in (getattr(model.criterion, name, None) for name in ("one2many", "one2one")):
            if branch is not None:
                branch.loss = self._noting(branch, branch.loss)
                assigner: Any = branch.assigner
                if isinstance(assigner, SegTaskAlignedAssigner):
                    vars(assigner)["pair_overlaps"] = self._counting(assigner, assigner.pair_overlaps)

    def _noting(self, branch: Any, loss: Callable) -> Callable:
        """Return a loss that notes its branch: of a head with two, the second assigns fewer anchors to an object."""

        def noting(*args: Any) -> Any:
            self._assigned = min(branch.assigner.topk2, _PER_OBJECT)
            return loss(*args)

        return noting

    def _counting(self, assigner: Any, pair_overlaps: Callable) -> Callable:
        """Return a comparison of masks that notes when it runs."""

        def counting(*args: Any, **extra: Any) -> Any:
            self.number = min(min(3 * assigner.topk, self._inside) * self._step.objects, self._anchors)
            try:
                return pair_overlaps(*args, **extra)
            finally:
                self.number = self._step.objects

        return counting

    def _side(self, imgsz: int) -> int:
        """Return the size that Ultralytics rounds up to, which it says in a warning."""
        coarsest = max(int(max(self._strides)), 32)
        return max(math.ceil(imgsz / coarsest), 1) * coarsest

    def batch(self) -> dict[str, Tensor]:
        """Return a training batch of the largest images."""
        return self._batch(self._step.batch, self._side(self._step.widest or self._step.imgsz))

    def _batch(self, count: int, side: int) -> dict[str, Tensor]:
        self._anchors = sum(math.ceil(side / s) ** 2 for s in self._strides)
        # of a smaller object, the anchors are those inside of a square as wide as the second stride
        share = max(self._step.area, (sorted(self._strides)[:2][-1] / side) ** 2)
        self._inside = max(round(share * self._anchors), 1)
        labels = {"cls": torch.zeros(count, dtype=torch.long)}
        if self._task.labels:
            labels = self._task.labels.made_up(self._model, count, self._step.objects, side)
        images = torch.zeros(count, self._channels, side, side, dtype=torch.uint8).float() / 255
        return {**labels, "img": images}

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return self._model(batch)[0].sum()

    @torch.no_grad()
    def validate(self) -> None:
        """Compute the loss of a batch of validation."""
        batch = self._batch(self._step.batch * (2 if self._task.halved else 1), self._side(self._step.imgsz))
        self._model.loss(batch, self._model(batch["img"]))

    def true(self, shape: Sequence[int]) -> int:
        """Return how many elements of a mask over anchors are true: those inside of an object (images, objects, anchors), or
        those assigned to one."""
        if not shape or shape[-1] != self._anchors:
            return math.prod(shape)
        if len(shape) == 3:
            return math.prod(shape[:2]) * self._inside
        # an anchor that several objects choose goes to one of them
        chosen = self._step.objects * min(self._assigned, self._inside)
        return math.prod(shape[:-1]) * math.ceil(self._anchors * (1 - math.exp(-chosen / self._anchors)))


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return Ultralytics' own, fused where training has it so (see trainer.py)."""
    trainer = SimpleNamespace(args=model.args, data={})
    with quiet():
        optimizer = BaseTrainer.build_optimizer(trainer, model, name, lr=1e-3, momentum=0.9, decay=5e-4)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            group |= {"fused": True, "foreach": False}
    return optimizer
