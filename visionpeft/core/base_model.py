"""A pretrained model and a data set, as every family hands them over."""

from __future__ import annotations

from collections.abc import Sequence
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
    facts: dict[str, Any]  # repeated by a delta: input size, mean, extra arguments, ...
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
    """A data set whose files were read once."""

    source: str  # a path
    task: str
    names: dict[int, str]
    fingerprint: str
    train: Sequence[Any] = ()  # image files, or pairs of one and the index of its class; none where it is only measured on
    val: Sequence[Any] = ()  # the same, of the part that is measured on
    channels: int = 3  # of its images
    outputs: dict[str, Any] = field(default_factory=dict)  # arguments of the head beside the classes: keypoints, ...
