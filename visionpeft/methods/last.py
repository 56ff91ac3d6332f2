"""Last: the last N stages of the body train, all before them stays as it is.  Yosinski et al. 2014, https://arxiv.org/abs/1411.1792"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy
from ..registry import METHODS
from ._stages import StagesConfig


@METHODS.register("last")
@dataclass(frozen=True)
class LastConfig(StagesConfig):
    stages: int = 2  # how many train, counted from the head; those without parameters do not count

    lr_scale: ClassVar[float] = 3.0

    def order(self, anatomy: Anatomy) -> Sequence[int]:
        return sorted({p.stage for p in anatomy.body}, reverse=True)
