"""A training step of a classifier on made-up data, for forecasts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.base_model import Base
from ...measure import storage_bytes
from ...training import checkpoint
from ..capabilities import DryRun, Step, SupportsDryRun
from .arguments import make_optimizer
from .data import check_size


class DryRuns(SupportsDryRun):
    """Steps of cross-entropy."""

    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
        if step.imgsz != base.facts["imgsz"]:
            check_size(base.model, step.imgsz, base.facts["imgsz"])
        criterion = nn.CrossEntropyLoss()

        def batch() -> tuple[Tensor, Tensor]:
            return torch.zeros(step.batch, 3, step.imgsz, step.imgsz), torch.zeros(step.batch, dtype=torch.long)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return criterion(model(batch[0]), batch[1])

        @torch.no_grad()
        def validate() -> None:
            loss(batch())

        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        average = storage_bytes(checkpoint.live(model))
        return DryRun(batch, loss, validate, make_optimizer(step.optimizer, groups, lr=1e-3), average)
