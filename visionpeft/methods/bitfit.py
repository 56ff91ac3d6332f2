"""BitFit: b -> b + db, every bias trains, those of normalisations included.  Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..core.anatomy import Anatomy, Unfit
from ..core.method import Method
from ..registry import METHODS


@METHODS.register("bitfit")
@dataclass(frozen=True)
class BitFitConfig(Method):
    expected_gain: ClassVar[float | None] = 0.43
    lr_scale: ClassVar[float] = 5.0

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        biases = [p.name for p in anatomy.body if p.role.endswith("bias")]
        if not biases:
            raise Unfit("it has no biases outside the head")
        return biases
