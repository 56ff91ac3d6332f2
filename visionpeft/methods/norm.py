"""Norm-only: scale and shift of every normalisation train.  Frankle et al. 2020, https://arxiv.org/abs/2003.00152"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy, Unfit
from ..core.method import Method
from ..registry import METHODS


@METHODS.register("norm")
@dataclass(frozen=True)
class NormConfig(Method):
    lr_scale: ClassVar[float] = 15.0

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        norms = [p.name for p in anatomy.body if p.role.startswith("norm")]
        if not norms:
            raise Unfit("it has no normalisation with a scale or shift outside the head")
        return norms
