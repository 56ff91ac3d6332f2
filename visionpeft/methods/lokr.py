"""LoKr: W + (alpha / r) kron(W1, W2), W2 of rank r where it is large.  KronA, Edalati et al. 2022, https://arxiv.org/abs/2212.10650; LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Layer
from ..core.method import PeftLayer, PeftPart, Settings
from ..errors import ConfigError
from ..registry import METHODS
from ._updates import Update, UpdateConfig
from .base import computes_plainly


@METHODS.register("lokr")
@dataclass(frozen=True)
class LokrConfig(UpdateConfig):
    r: int = 8  # rank of a factor; one whose larger side is at most 2 r stays whole
    alpha: float = 8.0  # the update is scaled by alpha / r
    decompose_both: bool = False  # the first factor may be of rank r, too
    decompose_factor: int = -1  # divides the layer's sides in two, this one first; -1: as near to their roots as can be

    bn: ClassVar[str] = "frozen"
    peft_type: ClassVar[str] = "LOKR"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "decompose_both", "decompose_factor", "init_weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(
                f"{self.name}: decompose_factor={self.decompose_factor} divides nothing; give a number from 1, or -1 for "
                "factors as square as can be"
            )

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Kronecker(**settings)

    def cost(self, layer: Layer) -> int:
        part = self.part(layer)
        sizes = zip(part["sizes"], part["low"], strict=True)
        return sum(part["r"] * (rows + columns) if low else rows * columns for (rows, columns), low in sizes)

    def part(self, layer: Layer) -> Settings:
        r, kernel = self.rank(layer), math.prod(layer.shape[2:])
        (rows1, rows2), (columns1, columns2) = (divide(side, self.decompose_factor) for side in layer.shape[:2])
        low = [self.decompose_both and 2 * r < max(rows1, columns1), 2 * r < max(rows2, columns2)]
        sizes = [[rows1, columns1], [rows2, columns2 * kernel]]
        scaling = self.alpha_of(layer, self.alpha) / r
        return {"shape": list(layer.shape), "r": r, "scaling": scaling, "sizes": sizes, "low": low}

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        if not computes_plainly(layer):
            return None
        tensors = dict(part.named_parameters())
        if "lokr_w2" in tensors and len(part.shape) > 2:  # a whole one has the kernel's dimensions in peft
            w2 = tensors["lokr_w2"]
            tensors["lokr_w2"] = w2.view(len(w2), -1, *part.shape[2:])
        sides = {"decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor}
        return PeftLayer(tensors, {"r": part.r, "alpha": round(part.scaling * part.r, 9), **sides, "init_weights": True})

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        if not computes_plainly(layer):
            return None
        tensors = {name: tensor.flatten(1) for name, tensor in saved.tensors.items()}
        return PeftPart(self.part_of_peft(layer, saved), tensors)


class Kronecker(Update):
    """The update (alpha / r) kron(W1, W2), of two matrices of these sizes, where `low` as the product of two of rank r.

    Laid out and drawn as in HF peft, but for a whole W2 of a convolution, whose kernel's dimensions peft keeps apart: W1, or
    the first factor of it, starts at zero.
    """

    def __init__(self, shape: Sequence[int], r: int, scaling: float, sizes: Sequence[Sequence[int]], low: Sequence[bool]):
        super().__init__()
        self.r, self.scaling, self.shape = r, scaling, tuple(shape)
        for name, (rows, columns), thin in zip(("lokr_w1", "lokr_w2"), sizes, low, strict=True):
            factors = {f"{name}_a": (rows, r), f"{name}_b": (r, columns)} if thin else {name: (rows, columns)}
            for key, size in factors.items():
                self.register_parameter(key, nn.Parameter(nn.init.kaiming_uniform_(torch.empty(size), a=math.sqrt(5))))
        nn.init.zeros_(self.get_parameter("lokr_w1_a" if low[0] else "lokr_w1"))

    def update(self) -> Tensor:
        w1, w2 = self._factor("lokr_w1"), self._factor("lokr_w2")
        return (self.scaling * torch.kron(w1, w2)).view(self.shape)

    def _factor(self, name: str) -> Tensor:
        """Return one of the two matrices, put together where it is of low rank; full precision, under autocast too."""
        whole = self._parameters.get(name)
        if whole is not None:
            return whole
        a, b = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        with torch.autocast(a.device.type, enabled=False):
            return a @ b


def divide(side: int, factor: int = -1) -> tuple[int, int]:
    """Return two numbers whose product is `side`, as HF peft and LyCORIS choose them: `factor` first where it divides,
    else the largest divisor up to it and up to the root."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor == -1 else min(math.isqrt(side), factor)
    small = max(d for d in range(1, most + 1) if side % d == 0)
    return small, side // small
