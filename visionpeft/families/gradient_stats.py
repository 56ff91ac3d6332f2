"""Statistics of the gradients of some batches before a model trains, for methods that choose by them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from ..core.anatomy import Anatomy, GradientStats
from ..core.base_model import Data
from ..core.method import Method
from ..errors import TrainingError, out_of_memory
from .base import Family
from .capabilities import SupportsGradients

BATCHES, IMAGES = 8, 16  # batches, and images in each at most


def with_gradient_stats(
    anatomy: Anatomy, method: Method, family: Family, model: nn.Module, data: Data | None, **look: Any
) -> Anatomy:
    """Return the anatomy as a method plans with it: with gradient statistics where it looks at data, and there are some.

    Args:
        anatomy: The model's facts.
        method: That is going to plan.
        family: As for `collect_gradient_stats`, like all that follow.
    """
    if not (method.needs_gradients and data):
        return anatomy
    return dataclasses.replace(anatomy, gradient_stats=collect_gradient_stats(family, model, data, anatomy, **look))


def collect_gradient_stats(
    family: Family, model: nn.Module, data: Data, anatomy: Anatomy, *, imgsz: int, batch: int, device: str = "cpu"
) -> GradientStats:
    """Return the statistics of a model's gradients; the model is not changed.

    Args:
        family: Of the model.
        model: With its head made for the data, nothing attached.
        data: What it is going to train on.
        anatomy: The model's facts.
        imgsz: Image size in pixels.
        batch: Images in a batch; 16 where they are more, or yet to be found.
        device: Where: as for `train`, but one.

    Raises:
        TrainingError: The loss is no number.
        OutOfMemory: One image's gradients do not fit into the GPU's memory.
    """
    copied = copy.deepcopy(model).to(_place(device)).train()
    for statistics in anatomy.statistics:
        copied.get_submodule(statistics.name).eval()
    wanted = {p.name for p in anatomy.params}
    for name, p in copied.named_parameters():
        p.requires_grad_(name in wanted)
    size, count = min(batch, IMAGES) if batch >= 1 else IMAGES, BATCHES
    while True:
        try:
            return _look(family, copied, data, imgsz, size, count)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise out_of_memory(error) from error
            size, count = size // 2, count * 2  # as many images, in smaller batches


def _look(family: Family, model: nn.Module, data: Data, imgsz: int, size: int, count: int) -> GradientStats:
    batches = 0
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        for loss in SupportsGradients.of(family).losses(model, data, imgsz=imgsz, batch=size, count=count):
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss on the training images of {data.source} is no number before training; look at them"
                )
            loss.backward()
            batches += 1
    with torch.no_grad():
        pairs = {n: (p.float(), p.grad.float() / batches) for n, p in model.named_parameters() if p.grad is not None}
        return GradientStats(
            images=min(size * batches, len(data.train)),
            weight={n: float(w.norm()) for n, (w, _) in pairs.items()},
            gradient={n: float(g.norm()) for n, (_, g) in pairs.items()},
            product={n: float((w * g).abs().sum()) for n, (w, g) in pairs.items()},
        )


def _place(device: str) -> torch.device:
    """Return torch's device for "cpu", "0", "cuda:0", ..., or for "" and Ultralytics' "-1", any GPU."""
    if device.isdigit():
        return torch.device("cuda", int(device))
    any_gpu = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(any_gpu if device in ("", "-1") else device)
