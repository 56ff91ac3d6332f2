"""IA3: l (W x + b), one trained factor per output.  Liu et al. 2022, https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Anatomy, Edit, Layer, Unfit
from ..registry import METHODS
from .base import Method, PeftLayer, choose_layers, computes_plainly, peft_targets


@METHODS.register("ia3")
@dataclass(frozen=True)
class Ia3Config(Method):
    target_modules: str | tuple = "all"  # "all", "attention", "conv", a regular expression, or a list of names or endings

    lr_scale: ClassVar[float] = 5.0
    peft_type: ClassVar[str] = "IA3"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"feedforward_modules", "init_ia3_weights"})

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        layers = [x for x in choose_layers(anatomy, self.target_modules) if x.linear]  # a normalised weight undoes a factor
        if not layers:
            raise Unfit("all the layers it would scale normalise their weights")
        return [self.edit(x.name, "weight", outputs=count_outputs(x), transposed=x.kind == "conv_transpose") for x in layers]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Factors(**settings)

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        if not (computes_plainly(layer) and isinstance(layer, nn.Linear | nn.Conv2d)):
            return None
        shape = (-1, 1) if isinstance(layer, nn.Linear) else (1, -1, 1, 1)
        return PeftLayer({"ia3_l": part.ia3_l.view(shape)}, {"feedforward_modules": [], "init_ia3_weights": True})

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Method | None:
        if fields.get("feedforward_modules"):
            raise ConfigError("feedforward_modules scale what a layer reads, but ia3 here scales what it puts out")
        return cls(target_modules=peft_targets(fields))

    def read_peft(self, layer: nn.Module, found: PeftLayer) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not (computes_plainly(layer) and isinstance(layer, nn.Linear | nn.Conv2d)):
            return None
        return {"outputs": layer._parameters["weight"].shape[0]}, {"ia3_l": found.tensors["ia3_l"].flatten()}  # type: ignore[union-attr]


class Factors(nn.Module):
    """Multiplies each output's weight and bias by its factor."""

    def __init__(self, outputs: int, transposed: bool = False):
        super().__init__()
        self.transposed = transposed
        self.ia3_l = nn.Parameter(torch.ones(outputs))

    def forward(self, weight: Tensor) -> Tensor:
        return times_outputs(weight, self.ia3_l, self.transposed)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.ia3_l


def times_outputs(weight: Tensor, factors: Tensor, transposed: bool = False) -> Tensor:
    """Return a layer's weight with every output multiplied by its factor, (O,)."""
    ones = [1] * (weight.ndim - 2)
    if not transposed:
        return weight * factors.view(-1, 1, *ones)
    groups = len(factors) // weight.shape[1]  # a transposed convolution's weight is (in, out / groups, ...)
    return (weight.unflatten(0, (groups, -1)) * factors.view(groups, 1, -1, *ones)).flatten(0, 1)


def count_outputs(layer: Layer) -> int:
    """Return how many outputs a layer has."""
    return layer.shape[1] * layer.groups if layer.kind == "conv_transpose" else layer.shape[0]
