"""IA3: l (W x + b), one trained factor per output.  Liu et al. 2022, https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Layer, Unfit
from ..core.method import Edit, Method, PeftFields, PeftLayer, PeftPart
from ..registry import METHODS
from .base import choose_layers, computes_plainly, peft_targets


@METHODS.register("ia3")
@dataclass(frozen=True)
class Ia3Config(Method):
    target_modules: str | tuple = "all"  # "all", "attention", "conv", a regular expression, or a list of names or endings

    lr_scale: ClassVar[float] = 15.0
    peft_type: ClassVar[str] = "IA3"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights"})

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
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (1, -1) if part.inputs else (-1, 1)
        fields = {"feedforward_modules": part.inputs, "init_ia3_weights": True}
        return PeftLayer({"ia3_l": part.ia3_l.view(shape)}, fields)

    @classmethod
    def from_peft(cls, fields: PeftFields) -> Method | None:
        return cls(target_modules=peft_targets(fields))

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        if not (computes_plainly(layer) and isinstance(layer, nn.Linear | nn.Conv2d)):
            return None
        rows, columns = layer._parameters["weight"].shape[:2]  # type: ignore[union-attr]
        inputs = saved.fields["feedforward_modules"]
        if inputs and getattr(layer, "groups", 1) > 1:
            return None
        settings = {"outputs": columns, "inputs": True} if inputs else {"outputs": rows}
        return PeftPart(settings, {"ia3_l": saved.tensors["ia3_l"].flatten()})


class Factors(nn.Module):
    """Multiplies each output's weight and bias by its factor; or each input's weight, as HF peft does in feed-forwards."""

    def __init__(self, outputs: int, transposed: bool = False, inputs: bool = False):
        super().__init__()
        self.transposed, self.inputs = transposed, inputs
        self.ia3_l = nn.Parameter(torch.ones(outputs))

    def forward(self, weight: Tensor) -> Tensor:
        if self.inputs:
            return weight * self.ia3_l.view(1, -1, *[1] * (weight.ndim - 2))
        return times_outputs(weight, self.ia3_l, self.transposed)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.inputs else bias * self.ia3_l


def times_outputs(weight: Tensor, factors: Tensor, transposed: bool = False) -> Tensor:
    """Return a layer's weight with every output multiplied by its factor, (O,)."""
    ones = [1] * (weight.ndim - 2)
    if not transposed:
        return weight * factors.view(-1, 1, *ones)
    groups = len(factors) // weight.shape[1]  # a transposed convolution's weight is (in, out / groups, ...)
    return (weight.unflatten(0, (groups, -1)) * factors.view(groups, 1, -1, *ones)).flatten(0, 1)


def count_outputs(layer: Layer) -> int:
    """Return the count of a layer's outputs."""
    return layer.shape[1] * layer.groups if layer.kind == "conv_transpose" else layer.shape[0]
