"""Surgical: the N stages whose gradient is longest for their weights, mean of |g| / |w|, train (Auto-RGN).  Lee et al. 2022, https://arxiv.org/abs/2210.11466"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..plan import Anatomy
from ..registry import METHODS
from .base import Method


@METHODS.register("surgical")
@dataclass(frozen=True)
class SurgicalConfig(Method):
    stages: int = 2  # how many train: chosen by the gradients of a few batches of training images

    bn: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        self.check("stages", self.stages, 1)

    @property
    def looks(self) -> bool:
        return True

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [p.name for p in anatomy.body if p.stage in chosen]

    def moving(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [s.name for s in anatomy.statistics if s.stage in chosen]

    def _chosen(self, anatomy: Anatomy) -> set[int]:
        assert anatomy.evidence  # make_plan sees to it
        ratios: dict[int, list[float]] = {s.index: [] for s in anatomy.stages}
        for p in anatomy.body:
            if length := anatomy.evidence.weight.get(p.name):  # of what is zero, no ratio says anything
                ratios[p.stage].append(anatomy.evidence.gradient[p.name] / length)
        if self.stages > len(ratios):
            raise ConfigError(
                f"surgical: stages={self.stages} is more than the {len(ratios)} stages that could train here; "
                "give fewer, freeze less, or use method='full'"
            )
        return set(sorted(ratios, key=lambda stage: -statistics.mean(ratios[stage] or [0.0]))[: self.stages])
