"""Surgical: the N stages whose gradient is longest for their weights, mean of |g| / |w|, train (Auto-RGN).  Lee et al. 2022, https://arxiv.org/abs/2210.11466"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.anatomy import Anatomy
from ..registry import METHODS
from ._stages import StagesConfig


@METHODS.register("surgical")
@dataclass(frozen=True)
class SurgicalConfig(StagesConfig):
    stages: int = 2  # how many train: chosen by the gradients of a few batches of training images

    @property
    def needs_gradients(self) -> bool:
        return True

    def order(self, anatomy: Anatomy) -> Sequence[int]:
        assert anatomy.gradient_stats  # make_plan sees to it
        ratios: dict[int, list[float]] = {stage: [] for stage in sorted({p.stage for p in anatomy.body})}
        for p in anatomy.body:
            if length := anatomy.gradient_stats.weight.get(p.name):  # of what is zero, no ratio says anything
                ratios[p.stage].append(anatomy.gradient_stats.gradient[p.name] / length)
        return sorted(ratios, key=lambda stage: -statistics.mean(ratios[stage] or [0.0]))
