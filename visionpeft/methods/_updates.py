"""Shared by methods that give layers an update of few parameters: the layers that get one, and those that train themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.anatomy import Anatomy, Layer, Param
from ..core.method import Edit, Method, PeftFields, PeftLayer, Settings
from ..errors import ConfigError
from .base import choose_layers, matches, peft_targets


@dataclass(frozen=True)
class UpdateConfig(Method):
    """Layers with an update of rank `r` on their weight; small ones, and normalisations, train themselves."""

    r: int = 4  # rank of the update
    target_modules: str | tuple = "all"  # "all", "attention", "conv", a regular expression, or a list of names or endings
    rank_pattern: dict = field(default_factory=dict)  # {regular expression: rank} for layers that differ
    alpha_pattern: dict = field(default_factory=dict)  # {regular expression: alpha} for layers that differ
    oversize: str = "train"  # a layer no larger than its update: "train" the layer itself, or "skip" it
    small_layers: float = 0.055  # the smallest targets train themselves, up to this share of the body; 0: none
    train_norms: bool = True  # scales and shifts of normalisations train too (0.4 % of yolov8n's body)

    bn: ClassVar[str] = "train"
    lr_scale: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        self.check("r", self.r, 1)
        self.check("small_layers", self.small_layers, 0.0, 1.0)
        self.check_choice("oversize", ("train", "skip"))
        for pattern, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{self.name}: rank_pattern gives '{pattern}' rank {rank!r}; it must be a number from 1")

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        edited = {edit.module for edit in self.edits(anatomy)}
        small = self._small(anatomy)
        whole = [x for x in self.targets(anatomy) if x.name not in edited and (x.name in small or self.oversize == "train")]
        norms = [p.name for p in anatomy.body if p.role.startswith("norm") and self.train_norms]
        return [*(f"{layer.name}.weight" for layer in whole), *norms]

    def rate(self, param: Param, anatomy: Anatomy) -> float:
        return self.lr_scale if param.role.startswith("norm") else 1.0  # whole layers move as in full fine-tuning

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        targets = self.targets(anatomy)
        possible = [layer for layer in targets if self.fits(layer)]
        if not possible:
            raise ConfigError(
                f"{self.name}: at r={self.r} the update is as large as every layer it would edit, or its rank above theirs; "
                f"r may be up to {self._most(targets)} here, or use method='full'"
            )
        for pattern in self.rank_pattern:
            meant = [layer for layer in targets if self._pattern(self.rank_pattern, layer) == pattern]
            if meant and not any(map(self.fits, meant)):
                raise ConfigError(
                    f"{self.name}: rank_pattern gives '{pattern}' rank {self.rank_pattern[pattern]}, which is above what "
                    f"{meant[0].name} allows; it may be up to {self._most(meant)} there"
                )
        small = self._small(anatomy)
        return [self.edit(x.name, "weight", **self.part(x)) for x in possible if x.name not in small]

    def part(self, layer: Layer) -> Settings:
        """Return the settings of one layer's part."""
        raise NotImplementedError

    @classmethod
    def from_peft(cls, fields: PeftFields) -> Method | None:
        values = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in cls.peft_fields & fields.keys()}
        updates_alone: dict[str, Any] = {"small_layers": 0.0, "train_norms": False, "oversize": "skip"}
        return cls(**values, **updates_alone, target_modules=peft_targets(fields))

    def part_of_peft(self, layer: nn.Module, saved: PeftLayer) -> Settings:
        """Return the settings of the part that an adapter of HF peft has on one layer."""
        values = {name: saved.fields[name] for name in ("r", "alpha", "lora_alpha") if hasattr(self, name)}
        shape, groups = tuple(layer._parameters["weight"].shape), getattr(layer, "groups", 1)  # type: ignore[union-attr]
        return replace(self, **values).part(Layer("", "linear" if len(shape) == 2 else "conv", shape, groups, stage=0))

    def cost(self, layer: Layer) -> int:
        """Return the count of parameters of one layer's update."""
        raise NotImplementedError

    def targets(self, anatomy: Anatomy) -> list[Layer]:
        """Return the layers that `target_modules` selects."""
        return choose_layers(anatomy, self.target_modules)

    def rank(self, layer: Layer) -> int:
        """Return the rank for one layer."""
        pattern = self._pattern(self.rank_pattern, layer)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def alpha_of(self, layer: Layer, otherwise: float) -> float:
        """Return the alpha for one layer."""
        pattern = self._pattern(self.alpha_pattern, layer)
        alpha = otherwise if pattern is None else self.alpha_pattern[pattern]
        if not (isinstance(alpha, int | float) and alpha > 0):
            raise ConfigError(
                f"{self.name}: alpha={alpha!r} (of {layer.name}) cannot scale an update; give a number above 0"
            )
        return alpha

    def fits(self, layer: Layer) -> bool:
        """Return whether the update of a layer is smaller than the layer, and of a rank that its matrix can have."""
        return self.rank(layer) <= min(matrix(layer)) and self.cost(layer) < math.prod(layer.shape)

    def _most(self, layers: Sequence[Layer]) -> int:
        """Return the highest rank at which the update of one of the layers fits it."""
        alike = replace(self, rank_pattern={})
        highest = max(min(matrix(layer)) for layer in layers)
        return next((r for r in range(highest, 1, -1) if any(map(replace(alike, r=r).fits, layers))), 1)

    def _small(self, anatomy: Anatomy) -> set[str]:
        """Return the smallest targets that together stay within `small_layers` of the body: all of a size, or none."""
        sizes = {layer.name: math.prod(layer.shape) for layer in self.targets(anatomy)}
        allowed = self.small_layers * sum(p.numel for p in anatomy.body)
        limit = max((n for n in sizes.values() if sum(m for m in sizes.values() if m <= n) <= allowed), default=0)
        return {name for name, n in sizes.items() if n <= limit}

    def _pattern(self, patterns: Mapping[str, object], layer: Layer) -> str | None:
        """Return the first of the patterns that a layer's name matches."""
        return next((pattern for pattern in patterns if matches(pattern, layer.name)), None)


class Update(nn.Module):
    """A part that adds to a weight of any shape, seen as a matrix of `shape[0]` rows."""

    def update(self) -> Tensor:
        """Return the update in the weight's own shape; full precision, under autocast too."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update()


def matrix(layer: Layer) -> tuple[int, int]:
    """Return the rows and columns of a layer's weight, seen as a matrix."""
    return layer.shape[0], math.prod(layer.shape[1:])
