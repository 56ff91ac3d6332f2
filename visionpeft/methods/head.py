"""Head only: the body stays as it is (a linear probe where the head is linear).  Alain & Bengio 2016, https://arxiv.org/abs/1610.01644"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.method import Method
from ..registry import METHODS


@METHODS.register("head")
@dataclass(frozen=True)
class HeadConfig(Method):
    expected_gain: ClassVar[float | None] = 0.0
