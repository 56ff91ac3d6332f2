"""Mona: y + up(gelu(conv(down(s1 LN(y) + s2 y)))), conv the mean of depthwise 3 x 3, 5 x 5 and 7 x 7, then a pointwise one, both with a skip.  Yin et al. 2023, https://arxiv.org/abs/2408.08345"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy, Block
from ..core.method import Edit, Method
from ..registry import METHODS
from ._blocks import Layout, bottleneck, choose_maps, layout_of, zeroed


@METHODS.register("mona")
@dataclass(frozen=True)
class MonaConfig(Method):
    reduction_factor: int = 4  # the bottleneck is the block's channels divided by this, and at least 4 (64 in the paper)
    mona_dropout: float = 0.1  # probability with which the bottleneck's values are dropped while training
    blocks: str = "all"  # "all", or a regular expression for names or classes of blocks: "C3k2|C2PSA", "layers.[23].*"

    needs_token_grid: ClassVar[bool] = True
    lr_scale: ClassVar[float] = 5.0
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("reduction_factor", self.reduction_factor, 1)
        self.check("mona_dropout", self.mona_dropout, 0.0, 0.99)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        return [self._edit(block) for block in choose_maps(anatomy, self.blocks)]

    def _edit(self, block: Block) -> Edit:
        settings = {
            "channels": block.channels,
            "bottleneck": bottleneck(self.name, block, block.channels, self.reduction_factor),
            "dropout": self.mona_dropout,
            **layout_of(block),
        }
        if block.norm and (block.inputs, block.stride) == (block.channels, 1):
            return self.edit(block.name, "forward", norm=block.norm.removeprefix(f"{block.name}."), **settings)
        return self.edit(block.name, "output", **settings)

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Twice(**settings) if "norm" in settings else Mona(**settings)


class Mona(nn.Module):
    """One adapter. Its up projection starts at zero, so that nothing changes, and moves first: its gradient is not zero."""

    def __init__(
        self,
        channels: int,
        bottleneck: int,
        dropout: float,
        layout: str,
        leading: int = 0,
        grid: Sequence[int] = (0, 0),
    ):
        super().__init__()
        self.first, self.dropout = layout == "NCHW", dropout  # whether channels come first
        self.layout = Layout("NLC" if layout == "NLC" else "NHWC", leading, grid)  # of what is inside
        self.norm = nn.LayerNorm(channels)
        self.s1 = nn.Parameter(torch.full((channels,), 1e-6))
        self.s2 = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, bottleneck)
        self.convs = nn.ModuleList(
            nn.Conv2d(bottleneck, bottleneck, k, padding=k // 2, groups=bottleneck) for k in (3, 5, 7)
        )
        self.projector = nn.Conv2d(bottleneck, bottleneck, 1)
        self.up = zeroed(nn.Linear(bottleneck, channels))

    def forward(self, output: Tensor, *_: Any) -> Tensor:
        return output + self.delta(output)

    def delta(self, x: Tensor) -> Tensor:
        """Return the addition to x."""
        x = x.permute(0, 2, 3, 1) if self.first else x
        h = F.gelu(self.layout.over(self._filter, self._narrow(x)))  # leading tokens pass by the convolutions
        y = self.up(F.dropout(h, self.dropout, self.training))
        return y.permute(0, 3, 1, 2) if self.first else y

    def _narrow(self, x: Tensor) -> Tensor:
        """Return down(s1 LN(x) + s2 x). The scales are factors of the weights, so that backward needs x and x̂ alone."""
        normal, down = F.layer_norm(x, self.norm.normalized_shape, eps=self.norm.eps), self.down.weight
        bias = self.down.bias + (down * (self.s1 * self.norm.bias)).sum(1)
        return F.linear(x, down * self.s2, bias) + F.linear(normal, down * (self.s1 * self.norm.weight))

    def _filter(self, h: Tensor) -> Tensor:
        """Apply the convolutions to (B, C, H, W); the mean of three is one 7 x 7, with smaller kernels in its middle."""
        convs: list[Any] = list(self.convs)
        kernels = [F.pad(conv.weight, [(7 - conv.weight.shape[-1]) // 2] * 4) for conv in convs]
        kernel = torch.stack(kernels).mean(0).view(convs[-1].weight.shape)  # a shape that torch.onnx must be told
        bias = torch.stack([conv.bias for conv in convs]).mean(0)
        h = h + F.conv2d(h, kernel, bias, padding=3, groups=h.shape[1])
        return h + self.projector(h)


class Twice(nn.Module):
    """Two adapters in a transformer block, after attention and after the MLP: x + attn(..) -> x', x' + f(x') -> x'',
    x'' + mlp(norm(x'')) -> y, y + g(y). `norm` reads x', so a hook adds f(x') there, and to the output again."""

    def __init__(self, norm: str, **settings: Any):
        super().__init__()
        self.norm = norm
        self.attn, self.mlp = Mona(**settings), Mona(**settings)

    def forward(self, block: nn.Module, run: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        deltas: list[Tensor] = []  # live as long as this call

        def add(module: nn.Module, given: tuple) -> tuple:
            inside, *more = given  # of Swin (B, H * W, C)
            deltas.append(self.attn.delta(inside.reshape(x.shape)))
            return inside + deltas[-1].reshape(inside.shape), *more

        handle = block.get_submodule(self.norm).register_forward_pre_hook(add)
        try:
            y = run(x, *args, **kwargs)
        finally:
            handle.remove()
        return self.mlp(y + deltas[-1])
