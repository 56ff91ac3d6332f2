"""Full fine-tuning: every parameter trains; with freeze=N, layer freezing.  Yosinski et al. 2014, https://arxiv.org/abs/1411.1792"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy
from ..core.method import Method
from ..registry import METHODS


@METHODS.register("full")
@dataclass(frozen=True)
class FullConfig(Method):
    expected_gain: ClassVar[float | None] = 1.0
    search_freeze_depths: ClassVar[bool] = True
    bn: ClassVar[str] = "train"

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        return [p.name for p in anatomy.body]
