"""IA3: l (W x + b), one trained factor per output.  Liu et al. 2022, https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..plan import Anatomy, Edit, Layer, Unfit
from ..registry import METHODS
from .base import Method, choose_layers


@METHODS.register("ia3")
@dataclass(frozen=True)
class Ia3Config(Method):
    target_modules: str | tuple = "all"  # "all", "attention", "conv", a regular expression, or a list of names or endings

    lr_scale: ClassVar[float] = 5.0

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        layers = [x for x in choose_layers(anatomy, self.target_modules) if x.linear]  # a normalised weight undoes a factor
        if not layers:
            raise Unfit("all the layers it would scale normalise their weights")
        return [self.edit(x.name, "weight", outputs=_outputs(x), transposed=x.kind == "conv_transpose") for x in layers]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Factors(**settings)


class Factors(nn.Module):
    """Multiplies each output's weight and bias by its factor."""

    def __init__(self, outputs: int, transposed: bool = False):
        super().__init__()
        self.transposed = transposed
        self.ia3_l = nn.Parameter(torch.ones(outputs))

    def forward(self, weight: Tensor) -> Tensor:
        ones = [1] * (weight.ndim - 2)
        if not self.transposed:
            return weight * self.ia3_l.view(-1, 1, *ones)
        groups = len(self.ia3_l) // weight.shape[1]  # a transposed convolution's weight is (in, out / groups, ...)
        factors = self.ia3_l.view(groups, 1, -1, *ones)
        return (weight.unflatten(0, (groups, -1)) * factors).flatten(0, 1)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.ia3_l


def _outputs(layer: Layer) -> int:
    return layer.shape[1] * layer.groups if layer.kind == "conv_transpose" else layer.shape[0]
