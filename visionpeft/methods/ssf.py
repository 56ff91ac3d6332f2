"""SSF: gamma y + beta after every layer and normalisation, folded into its weight and bias.  Lian et al. 2022, https://arxiv.org/abs/2210.08823

Here gamma starts at 1 and beta at 0, where the paper draws N(1, 0.02) and N(0, 0.02): neither needs noise to learn, so the
model starts as the base that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Layer, Unfit
from ..core.method import Edit, Method
from ..errors import ConfigError
from ..registry import METHODS
from .base import GROUPS, choose_layers
from .ia3 import count_outputs, times_outputs


@METHODS.register("ssf")
@dataclass(frozen=True)
class SsfConfig(Method):
    target_modules: str | tuple = "all"  # as for LoRA; with "all", every normalisation with a scale and a shift, too

    lr_scale: ClassVar[float] = 5.0

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """Return an edit of each layer that has a bias, and for one without, of the normalisation behind it.

        What scales and shifts the input of a normalisation with still statistics also scales and shifts its output, so
        nothing is lost by that. Behind a layer is the normalisation whose scale comes next among the model's parameters, if
        it is in the same module and has one number for each of the layer's outputs.
        """
        norms = _norms(anatomy)
        chosen: dict[str, dict[str, Any]] = {}
        for layer in choose_layers(anatomy, self.target_modules):
            place = _place(anatomy, layer, norms)
            if place in norms:
                chosen[place] = {"outputs": norms[place], "kind": "norm"}
            elif place:
                chosen[place] = {"outputs": count_outputs(layer), "kind": layer.kind}
            elif self.target_modules not in GROUPS:
                raise ConfigError(
                    f"{self.name}: {layer.name} has neither a bias of its own, beside a weight that is used as it is, nor a "
                    "normalisation behind it, so a scale and a shift of its output cannot be folded; leave it out of "
                    "target_modules"
                )
        if self.target_modules == "all":
            chosen |= {name: {"outputs": numel, "kind": "norm"} for name, numel in norms.items()}
        if not chosen:
            raise Unfit("it has no layers with a bias, and no normalisations with a scale and a shift, to fold into")
        return [self.edit(name, "weight", **settings) for name, settings in chosen.items()]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return ScaleShift(**settings)


class ScaleShift(nn.Module):
    """Multiplies each output's weight and bias by gamma = 1 + `scale`, and adds `shift`, beta, to the bias.

    What is learned starts at zero: weight decay leads back to the base, and half precision rounds the change alone.
    """

    def __init__(self, outputs: int, kind: str):
        super().__init__()
        self.kind = kind
        self.scale, self.shift = nn.Parameter(torch.zeros(outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, weight: Tensor) -> Tensor:
        if self.kind == "norm":
            return weight * (1 + self.scale).view(weight.shape)
        return times_outputs(weight, 1 + self.scale, self.kind == "conv_transpose")

    def bias(self, bias: Tensor) -> Tensor:
        return torch.addcmul(bias + self.shift.view(bias.shape), bias, self.scale.view(bias.shape))


def _norms(anatomy: Anatomy) -> dict[str, int]:
    """Return the normalisations with a scale and a shift, with the length of these."""
    names = {p.name for p in anatomy.body}
    scales = [p for p in anatomy.body if p.role == "norm.weight" and f"{_owner(p.name)}.bias" in names]
    return {_owner(p.name): p.numel for p in scales}


def _place(anatomy: Anatomy, layer: Layer, norms: dict[str, int]) -> str:
    """Return the module whose weight and bias can take the scale and shift of a layer's output; "" if there is none."""
    if layer.linear and any(p.name == f"{layer.name}.bias" for p in anatomy.body):
        return layer.name
    behind = next((_owner(b.name) for a, b in pairwise(anatomy.body) if a.name == f"{layer.name}.weight"), "")
    beside = behind.rpartition(".")[0] == layer.name.rpartition(".")[0]
    return behind if beside and norms.get(behind) == count_outputs(layer) else ""


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
