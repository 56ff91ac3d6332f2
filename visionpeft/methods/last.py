"""Last: the last N stages of the body train, all before them stays as it is.  Yosinski et al. 2014, https://arxiv.org/abs/1411.1792"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..plan import Anatomy
from ..registry import METHODS
from .base import Method


@METHODS.register("last")
@dataclass(frozen=True)
class LastConfig(Method):
    stages: int = 2  # how many train, counted from the head; those without parameters do not count

    bn: ClassVar[str] = "train"
    lr_scale: ClassVar[float] = 3.0

    def __post_init__(self) -> None:
        self.check("stages", self.stages, 1)

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [p.name for p in anatomy.body if p.stage in chosen]

    def moving(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [s.name for s in anatomy.statistics if s.stage in chosen]

    def _chosen(self, anatomy: Anatomy) -> set[int]:
        stages = sorted({p.stage for p in anatomy.body})  # those with parameters that are not frozen
        if self.stages > len(stages):
            raise ConfigError(
                f"last: stages={self.stages} is more than the {len(stages)} stages that could train here; "
                "give fewer, freeze less, or use method='full'"
            )
        return set(stages[-self.stages :])
