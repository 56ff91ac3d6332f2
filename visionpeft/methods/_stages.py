"""Shared by methods that train some stages of the body whole, and leave the others as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy
from ..core.method import Method
from ..errors import ConfigError


@dataclass(frozen=True)
class StagesConfig(Method):
    """The first `stages` of an order train, their statistics included."""

    stages: int = 2  # how many train

    bn: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        self.check("stages", self.stages, 1)

    def order(self, anatomy: Anatomy) -> Sequence[int]:
        """Return the stages that have parameters to train, in the order in which they are chosen."""
        raise NotImplementedError

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [p.name for p in anatomy.body if p.stage in chosen]

    def moving(self, anatomy: Anatomy) -> Iterable[str]:
        chosen = self._chosen(anatomy)
        return [s.name for s in anatomy.statistics if s.stage in chosen]

    def _chosen(self, anatomy: Anatomy) -> set[int]:
        order = self.order(anatomy)
        if self.stages > len(order):
            raise ConfigError(
                f"{self.name}: stages={self.stages} is more than the {len(order)} stages that could train here; "
                "give fewer, freeze less, or use method='full'"
            )
        return set(order[: self.stages])
