"""LoRA: W + (alpha / r) B A.  Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: alpha / sqrt(r), Kalajdzievski 2023, https://arxiv.org/abs/2312.03732; A frozen (LoRA-FA): Zhang et al. 2023, https://arxiv.org/abs/2308.03303"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..plan import Anatomy, Edit, Layer, Param
from ..registry import METHODS
from .base import Method, PeftLayer, choose_layers, computes_plainly, matches


@METHODS.register("lora")
@dataclass(frozen=True)
class LoraConfig(Method):
    r: int = 4  # rank of the update
    lora_alpha: float = 8.0  # the update is scaled by lora_alpha / r
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead
    lora_dropout: float = 0.0  # probability with which the update's input is dropped while training
    target_modules: str | tuple = "all"  # "all", "attention", "conv", a regular expression, or a list of names or endings
    qkv: str = "qkv"  # which of q, k and v of a fused projection
    rank_pattern: dict = field(default_factory=dict)  # {regular expression: rank} for layers that differ
    alpha_pattern: dict = field(default_factory=dict)  # {regular expression: lora_alpha} for layers that differ
    oversize: str = "train"  # a layer no larger than its update: "train" the layer itself, or "skip" it
    small_layers: float = 0.055  # the smallest targets train themselves, up to this share of the body; 0: none
    lora_fa: bool = False  # only B trains, A stays as it was drawn: with lean, a layer keeps r channels instead of its input
    train_norms: bool = True  # scales and shifts of normalisations train too (0.4 % of yolov8n's body)

    bn: ClassVar[str] = "train"
    worth: ClassVar[float | None] = 0.7
    lr_scale: ClassVar[float] = 5.0
    peft_type: ClassVar[str] = "LORA"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights"})

    def __post_init__(self) -> None:
        self.check("r", self.r, 1)
        self.check("small_layers", self.small_layers, 0.0, 1.0)
        self.check("lora_dropout", self.lora_dropout, 0.0, 0.99)
        if not self.qkv or not set(self.qkv) <= set("qkv"):
            raise ConfigError(f"{self.name}: qkv='{self.qkv}' is not understood; give some of the letters q, k and v")
        if self.oversize not in ("train", "skip"):
            raise ConfigError(f"{self.name}: oversize='{self.oversize}' is not known; it is 'train' or 'skip'")

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        edited = {edit.module for edit in self.edits(anatomy)}
        small = self._small(anatomy)
        whole = [x for x in self.targets(anatomy) if x.name not in edited and (x.name in small or self.oversize == "train")]
        norms = [p.name for p in anatomy.body if p.role.startswith("norm") and self.train_norms]
        return [*(f"{layer.name}.weight" for layer in whole), *norms]

    def rate(self, param: Param) -> float:
        return self.lr_scale if param.role.startswith("norm") else 1.0  # whole layers move as in full fine-tuning

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        targets = self.targets(anatomy)
        fitting = [layer for layer in targets if self.cost(layer) < math.prod(layer.shape)]
        if not fitting:
            largest = max(math.ceil(math.prod(t.shape) / sum(_matrix(t))) - 1 for t in targets)
            raise ConfigError(
                f"{self.name}: at r={self.r} the update is as large as every layer it would edit; "
                f"r may be up to {max(largest, 1)} here, or use method='full'"
            )
        small = self._small(anatomy)
        return [self.edit(x.name, "weight", **self._settings(x)) for x in fitting if x.name not in small]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return LowRank(**settings)

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        if not _as_peft(layer):
            return None
        up, down = part.whole()
        r = len(down)
        shapes = ((r, *part.shape[1:]), (part.shape[0], r, *[1] * (len(part.shape) - 2)))
        tensors = {f"{n}.weight": t.view(s) for n, t, s in zip(("lora_A", "lora_B"), (down, up), shapes, strict=True)}
        alpha = part.scaling * (math.sqrt(r) if self.use_rslora else r)
        said = {"use_rslora": self.use_rslora, "use_dora": False, "init_lora_weights": True, "bias": "none"}
        return PeftLayer(tensors, {"r": r, "lora_alpha": round(alpha, 9), "lora_dropout": self.lora_dropout, **said})

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Method | None:
        if fields.get("use_dora", False) != (cls.name == "dora"):
            return None
        first = fields.get("init_lora_weights", True)
        if first not in _INNOCENT:
            raise ConfigError(
                f"init_lora_weights={first!r} changed the base's own weights before it was trained; save the adapter from "
                "peft with path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it"
            )
        names = ("r", "lora_alpha", "use_rslora")
        return cls(**{n: fields[n] for n in names if n in fields}, small_layers=0.0, train_norms=False, oversize="skip")

    def read_peft(self, layer: nn.Module, found: PeftLayer) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not _as_peft(layer):
            return None
        down, up = (found.tensors[f"{n}.weight"].flatten(1) for n in ("lora_A", "lora_B"))
        r = found.fields["r"]
        scaling = found.fields["lora_alpha"] / (math.sqrt(r) if self.use_rslora else r)
        shape = list(layer._parameters["weight"].shape)  # type: ignore[union-attr]
        return {"shape": shape, "r": r, "scaling": scaling}, {"lora_A": down, "lora_B": up}

    def targets(self, anatomy: Anatomy) -> list[Layer]:
        """Return the layers that `target_modules` means."""
        return choose_layers(anatomy, self.target_modules)

    def rank(self, layer: Layer) -> int:
        """Return the rank for one layer."""
        return next((r for pattern, r in self.rank_pattern.items() if matches(pattern, layer.name)), self.r)

    def cost(self, layer: Layer) -> int:
        """Return how many parameters the update of one layer has."""
        rows, columns = _matrix(layer)
        chosen = self._rows(layer)
        if chosen is None:
            return self.rank(layer) * (rows + columns)
        return self.rank(layer) * (sum(b - a for group in chosen for a, b in group) + len(chosen) * columns)

    def _small(self, anatomy: Anatomy) -> set[str]:
        """Return the smallest targets, all of a size or none, that together stay within `small_layers` of the body."""
        sizes = {layer.name: math.prod(layer.shape) for layer in self.targets(anatomy)}
        allowed = self.small_layers * sum(p.numel for p in anatomy.body)
        limit = max((n for n in sizes.values() if sum(m for m in sizes.values() if m <= n) <= allowed), default=0)
        return {name for name, n in sizes.items() if n <= limit}

    def _rows(self, layer: Layer) -> list | None:
        """Return the rows of each chosen projection of a fused qkv, or None for the whole matrix."""
        if not layer.slices or set(self.qkv) == set("qkv"):
            return None
        return [[list(span) for span in layer.slices[name]] for name in "qkv" if name in self.qkv]

    def _settings(self, layer: Layer) -> dict[str, Any]:
        r = self.rank(layer)
        alpha = next((a for pattern, a in self.alpha_pattern.items() if matches(pattern, layer.name)), self.lora_alpha)
        scaling = alpha / (math.sqrt(r) if self.use_rslora else r)
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


class LowRank(nn.Module):
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

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return (outputs, R) and (R, inputs) whose product is B A in the weight's own rows; R is r for each slice."""
        if self.index is None:
            return self.lora_B, self.lora_A
        up = self.lora_B.new_zeros(self.shape[0], len(self.lora_A))
        up[self.index] = torch.block_diag(*self.lora_B.split(self.rows))
        return up, self.lora_A

    def forward(self, weight: Tensor) -> Tensor:
        if self.index is not None or torch.is_autocast_enabled(weight.device.type):
            return weight + self.update()
        return torch.addmm(weight.flatten(1), self.lora_B, self.lora_A, alpha=self.scaling).view(self.shape)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """Return weight, U, V and s where the result is weight + s U V as matrices: a cheaper backward."""
        return None if self.index is not None else (weight, self.lora_B, self.lora_A, self.scaling)


_INNOCENT = (True, False, "gaussian", "orthogonal", "eva")  # of peft's ways to begin: those that leave the base as it is


def _as_peft(layer: nn.Module) -> bool:
    """Say whether peft's LoRA is an update of this layer's weight: its A knows neither groups nor dilation (peft 0.21)."""
    single = getattr(layer, "groups", 1) == 1 and set(getattr(layer, "dilation", (1,))) == {1}
    return computes_plainly(layer) and single


def _matrix(layer: Layer) -> tuple[int, int]:
    return layer.shape[0], math.prod(layer.shape[1:])
