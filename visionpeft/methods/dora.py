"""DoRA: m V / norm(V) with V = W + dW, a trained length per output times a LoRA direction.  Liu et al. 2024, https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Layer
from ..core.method import PeftLayer, PeftPart, Settings
from ..errors import ConfigError
from ..registry import METHODS
from .lora import LoraConfig, LowRank


@METHODS.register("dora")
@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    expected_gain: ClassVar[float | None] = None
    peft_dora: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout:
            raise ConfigError("dora: lora_dropout has no meaning for a normalised weight; use 0, or method='lora'")

    def cost(self, layer: Layer) -> int:
        return super().cost(layer) + layer.shape[_output(layer.kind)] * _groups(layer)

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Magnitude(**settings)

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        lora = super().to_peft(part, layer)
        if lora is None or not part.has_directions(layer._parameters["weight"]):
            return None
        return _with_length(lora, part.magnitude)

    def change_to_peft(self, layer: Any, before: Tensor) -> PeftLayer | None:
        lora, length = super().change_to_peft(layer, before), layer.weight.flatten(1).norm(dim=1)
        return _with_length(lora, length) if lora is not None and length.all() else None

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        if (read := super().read_peft(layer, saved)) is None:
            return None
        return PeftPart(read.settings, {**read.tensors, "magnitude": saved.tensors["lora_magnitude_vector"].flatten()})

    def part(self, layer: Layer) -> Settings:
        return {**super().part(layer), "output": _output(layer.kind), "groups": _groups(layer)}


class Magnitude(LowRank):
    """LoRA's weight with every output's length trained apart. The length in the denominator gets no gradient (4.3)."""

    def __init__(self, shape: Any, output: int, groups: int = 1, **settings: Any):
        super().__init__(shape, **settings)
        self.output, self.groups = output, groups
        self.magnitude = nn.Parameter(torch.ones(shape[output] * groups))

    def start(self, layer: nn.Module) -> None:
        """Set the lengths to those of the layer's own weight, so that its output is unchanged."""
        super().start(layer)
        self.magnitude = nn.Parameter(self._length(layer.weight.detach()).clone())  # type: ignore[operator, arg-type]

    def forward(self, weight: Tensor) -> Tensor:
        direction = super().forward(weight)
        scale = self.magnitude / self._length(direction).detach()
        return (
            (self._by_output(direction) * scale.view(-1, 1)).view_as(direction)
            if self.output == 0
            else (
                direction.unflatten(0, (self.groups, -1))  # (G, in / G, out / G, ...)
                * scale.view(self.groups, 1, -1, *[1] * (weight.ndim - 2))
            ).flatten(0, 1)
        )

    def factors(self, weight: Tensor) -> None:
        """Return None: the result is no sum of the weight and a product of two factors."""

    def has_directions(self, weight: Any) -> bool:
        """Return whether every output has weights other than zero: HF peft (0.21) divides by their length."""
        return self.magnitude.is_meta or bool((weight + self.update()).flatten(1).norm(dim=1).all())

    def _by_output(self, weight: Tensor) -> Tensor:
        """Return the weight as (outputs, everything else)."""
        if self.output == 0:
            return weight.flatten(1)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def _length(self, weight: Tensor) -> Tensor:
        return self._by_output(weight).norm(dim=1).clamp_min(1e-12)


def _with_length(lora: PeftLayer, length: Tensor) -> PeftLayer:
    more = [1] * (lora.tensors["lora_A.weight"].ndim - 2)  # dimensions of a kernel
    shaped = length.view(1, -1, *more) if more else length
    return PeftLayer({**lora.tensors, "lora_magnitude_vector": shaped}, lora.fields)


def _output(kind: str) -> int:
    return 1 if kind == "conv_transpose" else 0  # a transposed convolution's weight is (in, out / groups, ...)


def _groups(layer: Layer) -> int:
    return layer.groups if layer.kind == "conv_transpose" else 1
