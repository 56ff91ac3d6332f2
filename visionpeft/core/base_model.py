"""A pretrained model, and a data set that was looked at, as families hand them over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

LARGEST_IMAGE = 4096  # pixels; a file that says more is not believed, for it would fill the memory


@dataclass(frozen=True)
class Base:
    """A pretrained model before any head is rebuilt."""

    source: str  # as the user gave it
    model: nn.Module  # on the CPU, floats as fp32
    task: str
    names: dict[int, str]  # of its classes
    facts: dict[str, Any]  # what a delta must repeat to use it: input size, mean, extra arguments, ...
    pretrained: bool = True  # False: random weights, so there is no base and no delta

    def __post_init__(self) -> None:
        values = (*self.model.named_parameters(), *self.model.named_buffers())
        if bad := next((name for name, v in values if v.is_floating_point() and torch.isnan(v).any()), None):
            raise ModelError(f"{self.source} has values in {bad} that are no numbers (NaN); give another checkpoint")

    @property
    def state(self) -> dict[str, Tensor]:
        """Its tensors, by key."""
        return self.model.state_dict()


@dataclass(frozen=True)
class Data:
    """A data set that was looked at."""

    source: str  # a path
    task: str
    names: dict[int, str]
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)  # the family's own
    outputs: dict[str, Any] = field(default_factory=dict)  # what the head must be made for beside the classes
