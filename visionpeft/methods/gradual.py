"""Gradual unfreezing: first the head, then the stages before it, group after group, each at a lower rate than the one behind it.  ULMFiT, Howard & Ruder 2018, https://arxiv.org/abs/1801.06146; fastai, https://docs.fast.ai/callback.schedule.html"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy, Param
from ..core.method import Method
from ..registry import METHODS


@METHODS.register("gradual")
@dataclass(frozen=True)
class GradualConfig(Method):
    groups: int = 3  # equal groups of stages (at least 1) that begin to train in turn, the one nearest the head first
    unfrozen: float = 0.5  # the share of the epochs after which all of them train
    decay: float = 2.6  # a group learns this many times more slowly than the one behind it

    bn: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        self.check("groups", self.groups, 1)
        self.check("unfrozen", self.unfrozen, 0.0, 0.99)
        self.check("decay", self.decay, 1.0, 100.0)

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        return [p.name for p in anatomy.body]

    def rate(self, param: Param, anatomy: Anatomy) -> float:
        return self.lr_scale / self.decay ** (self._group_of(param.stage, anatomy) - 1)

    def opens(self, anatomy: Anatomy) -> Mapping[str, float]:
        stages = {p.name: p.stage for p in anatomy.body} | {s.name: s.stage for s in anatomy.statistics if s.stage >= 0}
        return {
            name: self.unfrozen * self._group_of(stage, anatomy) / self._count(anatomy) for name, stage in stages.items()
        }

    def _count(self, anatomy: Anatomy) -> int:
        return min(self.groups, len(anatomy.stages) or 1)

    def _group_of(self, stage: int, anatomy: Anatomy) -> int:
        """Return the number of the group that a stage is in: 1 for those before the head, which train first."""
        behind, groups = sum(s.index > stage for s in anatomy.stages), self._count(anatomy)
        return min(1 + behind * groups // (len(anatomy.stages) or 1), groups)  # a stage may have statistics alone
