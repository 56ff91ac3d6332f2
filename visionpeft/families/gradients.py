"""What the gradients of some batches say of a model before it trains, for methods that choose by it. Registers nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..errors import TrainingError
from ..plan import Anatomy, Evidence
from .base import Data, Family

BATCHES, IMAGES = 8, 16  # batches, and images in each at most


def gather(
    family: Family, model: nn.Module, data: Data, anatomy: Anatomy, *, imgsz: int, batch: int, device: str = "cpu"
) -> Evidence:
    """Return the evidence of a fitted model's gradients; the model is not changed.

    Args:
        family: Of the model.
        model: With its head made for the data, nothing attached.
        data: What it is going to train on.
        anatomy: The model's facts.
        imgsz: Image size in pixels.
        batch: Images in a batch; of more than 16, 16.
        device: Where, "cpu" or the number of a GPU.

    Raises:
        TrainingError: The loss is no number.
    """
    own = copy.deepcopy(model).to("cpu" if device == "cpu" else f"cuda:{device}" if device.isdigit() else device).train()
    for statistics in anatomy.statistics:
        own.get_submodule(statistics.name).eval()
    wanted = {p.name for p in anatomy.params}
    parameters = {name: p.requires_grad_(name in wanted) for name, p in own.named_parameters()}
    size, count = max(min(batch, IMAGES), 1), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        for loss in family.losses(own, data, imgsz=imgsz, batch=size, count=BATCHES):
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss on the training images of {data.source} is no number before training; look at them"
                )
            loss.backward()
            count += 1
    with torch.no_grad():
        pairs = {n: (p.float(), p.grad.float() / count) for n, p in parameters.items() if p.grad is not None}
        return Evidence(
            images=size * count,
            weight={n: float(w.norm()) for n, (w, _) in pairs.items()},
            gradient={n: float(g.norm()) for n, (_, g) in pairs.items()},
            product={n: float((w * g).abs().sum()) for n, (w, g) in pairs.items()},
        )
