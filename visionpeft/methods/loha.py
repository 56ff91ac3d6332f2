"""LoHa: W + (alpha / r) (A1 B1) * (A2 B2), the elementwise product of two low-rank matrices, of rank up to r^2.  FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098; LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.anatomy import Layer
from ..core.method import PeftLayer, PeftPart, Settings
from ..registry import METHODS
from ._updates import Update, UpdateConfig, matrix
from .base import computes_plainly


@METHODS.register("loha")
@dataclass(frozen=True)
class LohaConfig(UpdateConfig):
    r: int = 2  # rank of each of the two matrices; that of the update is up to r^2
    alpha: float = 4.0  # the update is scaled by alpha / r

    bn: ClassVar[str] = "frozen"
    peft_type: ClassVar[str] = "LOHA"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "init_weights"})

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Hadamard(**settings)

    def cost(self, layer: Layer) -> int:
        return 2 * self.rank(layer) * sum(matrix(layer))

    def part(self, layer: Layer) -> Settings:
        r = self.rank(layer)
        return {"shape": list(layer.shape), "r": r, "scaling": self.alpha_of(layer, self.alpha) / r}

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        if not computes_plainly(layer):
            return None
        return _peft_layer(dict(part.named_parameters()), part.scaling)

    def change_to_peft(self, layer: Any, before: Tensor) -> PeftLayer | None:
        if not computes_plainly(layer):
            return None
        change = (layer.weight - before).flatten(1)
        rows, columns = change.shape
        r = min(rows, columns)
        one = torch.zeros(r)
        one[0] = 1  # the second matrix is all ones
        first = (torch.eye(r), change) if rows == r else (change, torch.eye(r))
        factors = (*first, one.expand(rows, r), one.unsqueeze(1).expand(r, columns))
        return _peft_layer(dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), factors, strict=True)), 1.0)

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        return PeftPart(self.part_of_peft(layer, saved), saved.tensors) if computes_plainly(layer) else None


def _peft_layer(tensors: dict[str, Tensor], scaling: float) -> PeftLayer:
    r = len(tensors["hada_w1_b"])
    return PeftLayer(tensors, {"r": r, "alpha": round(scaling * r, 9), "init_weights": True})


class Hadamard(Update):
    """The update (alpha / r) (A1 B1) * (A2 B2). Drawn as HF peft draws it: B2 starts at zero, the others as FedPara's."""

    def __init__(self, shape: Sequence[int], r: int, scaling: float):
        super().__init__()
        self.scaling, self.shape = scaling, tuple(shape)
        rows, columns = shape[0], math.prod(shape[1:])
        self.hada_w1_a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, r), a=math.sqrt(5)))
        self.hada_w1_b = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, columns), a=math.sqrt(5)))
        self.hada_w2_a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, r), a=math.sqrt(5)))
        self.hada_w2_b = nn.Parameter(torch.zeros(r, columns))

    def update(self) -> Tensor:
        with torch.autocast(self.hada_w1_a.device.type, enabled=False):
            product = Product.apply(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
            return (self.scaling * product).view(self.shape)


class Product(torch.autograd.Function):
    """``(a1 @ b1) * (a2 @ b2)``, which keeps the factors alone: plain autograd would keep both matrices, large as weights."""

    @staticmethod
    def forward(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:  # type: ignore[override]
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        a1, b1, a2, b2 = ctx.saved_tensors
        g1, g2 = g * (a2 @ b2), g * (a1 @ b1)
        return g1 @ b1.t(), a1.t() @ g1, g2 @ b2.t(), a2.t() @ g2
