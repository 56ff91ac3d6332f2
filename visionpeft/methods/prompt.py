"""VPT: learned tokens join the sequence, before the first block (shallow) or anew before every block (deep).  Jia et al. 2022, https://arxiv.org/abs/2203.12119"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Unfit
from ..core.method import Edit, Method
from ..registry import METHODS
from .base import check_tokens


@METHODS.register("prompt")
@dataclass(frozen=True)
class PromptConfig(Method):
    num_virtual_tokens: int = 10  # how many tokens are added
    deep: bool = True  # new tokens before every block, not only the first

    lr_scale: ClassVar[float] = 3.3
    merges: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("num_virtual_tokens", self.num_virtual_tokens, 1, 1000)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        blocks = [b for b in anatomy.blocks if b.sequence]
        if not blocks:
            raise Unfit("it has no plain token sequence that prompts could join")
        tokens = blocks[0].leading + math.prod(blocks[0].grid)
        if all(blocks[0].grid):
            check_tokens(self.name, self.num_virtual_tokens, tokens, f"tokens that {anatomy.model} has")
        settings = {"tokens": self.num_virtual_tokens, "channels": blocks[0].channels}
        entries = [
            self.edit(b.name, "input", role="insert" if b is blocks[0] else "replace", **settings)
            for b in (blocks if self.deep else blocks[:1])
        ]
        return [*entries, self.edit(blocks[-1].name, "output", role="strip", **settings)]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Prompt(**settings)


class Prompt(nn.Module):
    """Adds tokens at the end of a (B, N, C) sequence, replaces those added before, or takes them away."""

    def __init__(self, tokens: int, channels: int, role: str):
        super().__init__()
        self.tokens, self.role = tokens, role
        if role != "strip":
            self.prompt = nn.Parameter(torch.empty(tokens, channels))
            nn.init.trunc_normal_(self.prompt, std=0.02)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        image = x if self.role == "insert" else x[:, : x.shape[1] - self.tokens]
        if self.role == "strip":
            return image
        return torch.cat([image, self.prompt.expand(x.shape[0], -1, -1)], dim=1)
