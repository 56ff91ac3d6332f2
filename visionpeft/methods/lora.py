"""LoRA: W + (alpha / r) B A.  Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: alpha / sqrt(r), Kalajdzievski 2023, https://arxiv.org/abs/2312.03732; A frozen (LoRA-FA): Zhang et al. 2023, https://arxiv.org/abs/2308.03303"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Layer
from ..registry import METHODS
from .updates import Update, UpdateConfig, matrix


@METHODS.register("lora")
@dataclass(frozen=True)
class LoraConfig(UpdateConfig):
    lora_alpha: float = 8.0  # the update is scaled by lora_alpha / r
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead
    lora_dropout: float = 0.0  # probability with which the update's input is dropped while training
    qkv: str = "qkv"  # which of q, k and v of a fused projection
    lora_fa: bool = False  # only B trains, A stays as it was drawn: with lean, a layer keeps r channels instead of its input

    worth: ClassVar[float | None] = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lora_dropout", self.lora_dropout, 0.0, 0.99)
        if not self.qkv or not set(self.qkv) <= set("qkv"):
            raise ConfigError(f"{self.name}: qkv='{self.qkv}' is not understood; give some of the letters q, k and v")

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return LowRank(**settings)

    def cost(self, layer: Layer) -> int:
        """Return how many parameters the update of one layer has."""
        rows, columns = matrix(layer)
        chosen = self._rows(layer)
        if chosen is None:
            return self.rank(layer) * (rows + columns)
        return self.rank(layer) * (sum(b - a for group in chosen for a, b in group) + len(chosen) * columns)

    def _rows(self, layer: Layer) -> list | None:
        """Return the rows of each chosen projection of a fused qkv, or None for the whole matrix."""
        if not layer.slices or set(self.qkv) == set("qkv"):
            return None
        return [[list(span) for span in layer.slices[name]] for name in "qkv" if name in self.qkv]

    def part(self, layer: Layer) -> dict[str, Any]:
        r = self.rank(layer)
        scaling = self.alpha_of(layer, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)
        settings: dict[str, Any] = {"shape": list(layer.shape), "r": r, "scaling": scaling}
        if self.lora_fa:
            settings["fixed"] = True
        if rows := self._rows(layer):
            settings["rows"] = rows
        if self.lora_dropout:
            if not layer.linear:
                raise ConfigError(f"{layer.name} normalises its weight, so lora_dropout has no meaning there; use 0")
            settings["dropout"] = self.lora_dropout
        return settings


class LowRank(Update):
    """The update (alpha / r) B A of a weight of any shape, seen as a matrix of `shape[0]` rows."""

    def __init__(
        self,
        shape: Sequence[int],
        r: int,
        scaling: float,
        rows: Sequence | None = None,
        dropout: float = 0.0,
        fixed: bool = False,
    ):
        super().__init__()
        self.scaling, self.dropout, self.shape = scaling, dropout, tuple(shape)
        chosen = [[i for a, b in group for i in range(a, b)] for group in rows or ()]
        self.rows = [len(group) for group in chosen] or [shape[0]]  # how many rows each B has
        index = torch.tensor(sum(chosen, [])) if chosen else None  # where those rows stand in the weight
        self.register_buffer("index", index, persistent=False)
        self.index: Tensor | None
        down = nn.init.kaiming_uniform_(torch.empty(len(self.rows) * r, math.prod(shape[1:])), a=math.sqrt(5))
        if fixed:  # LoRA-FA
            self.register_buffer("lora_A", down)
        else:
            self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(torch.zeros(sum(self.rows), r))

    lora_A: Tensor

    def update(self) -> Tensor:
        """Return the update in the weight's own shape; full precision, under autocast too."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            if self.index is None:
                return (self.scaling * self.lora_B @ self.lora_A).view(self.shape)
            factors = zip(self.lora_B.split(self.rows), self.lora_A.chunk(len(self.rows)), strict=True)
            update = torch.cat([b @ a for b, a in factors])
            whole = update.new_zeros(self.shape[0], update.shape[1])
            return whole.index_copy(0, self.index, self.scaling * update).view(self.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if self.index is not None or torch.is_autocast_enabled(weight.device.type):
            return super().forward(weight)
        return torch.addmm(weight.flatten(1), self.lora_B, self.lora_A, alpha=self.scaling).view(self.shape)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """Return weight, U, V and s where the result is weight + s U V as matrices: a cheaper backward."""
        return None if self.index is not None else (weight, self.lora_B, self.lora_A, self.scaling)
