"""Conv-Adapter: y + alpha * up(relu(down(.))), a grouped K x K and a pointwise convolution, of what a block reads (parallel) or puts out (sequential).  Chen et al. 2022, https://arxiv.org/abs/2208.07463"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy, Block
from ..core.method import Edit, Method
from ..errors import ConfigError
from ..registry import METHODS
from ._blocks import Layout, bottleneck, choose_maps, layout_of, zeroed

PLACEMENTS = ("parallel", "sequential")


@METHODS.register("conv_adapter")
@dataclass(frozen=True)
class ConvAdapterConfig(Method):
    reduction_factor: int = 4  # the bottleneck is the channels it reads divided by this, and at least 4
    kernel_size: int = 3  # K, odd
    placement: str = "parallel"  # "parallel": from the block's input (its output where it reads no one map), or "sequential"
    blocks: str = "all"  # "all", or a regular expression for names or classes of blocks: "C3k2|C2PSA", "layer[34].*"

    needs_token_grid: ClassVar[bool] = True
    lr_scale: ClassVar[float] = 15.0
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("reduction_factor", self.reduction_factor, 1)
        self.check("kernel_size", self.kernel_size, 1, 31)
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"{self.name}: kernel_size={self.kernel_size} is even, so maps would change size; give 3, 5 or 7"
            )
        self.check_choice("placement", PLACEMENTS)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        return [self.edit(b.name, "output", **self._settings(b)) for b in choose_maps(anatomy, self.blocks)]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return ConvAdapter(**settings)

    def _settings(self, block: Block) -> dict[str, Any]:
        parallel = self.placement == "parallel" and block.inputs > 0 and block.stride > 0
        inputs = block.inputs if parallel else block.channels
        most = bottleneck(self.name, block, inputs, self.reduction_factor)
        return {
            "inputs": inputs,
            "bottleneck": max(n for n in range(1, most + 1) if inputs % n == 0),  # as many groups, all of a size
            "outputs": block.channels,
            "kernel": self.kernel_size,
            "stride": block.stride if parallel else 1,
            "parallel": parallel,
            **layout_of(block),
        }


class ConvAdapter(nn.Module):
    """A bottleneck of two convolutions. As in the paper, alpha starts at one, but up at zero, so that nothing changes:
    up moves in the first step, for its gradient is alpha times the output of down, and the others in the second."""

    def __init__(
        self,
        inputs: int,
        bottleneck: int,
        outputs: int,
        kernel: int,
        stride: int,
        parallel: bool,
        layout: str,
        leading: int = 0,
        grid: Sequence[int] = (0, 0),
    ):
        super().__init__()
        self.parallel, self.layout = parallel, Layout(layout, leading, grid)
        self.down = nn.Conv2d(inputs, bottleneck, kernel, stride, padding=kernel // 2, groups=bottleneck)
        self.up = zeroed(nn.Conv2d(bottleneck, outputs, 1))
        self.alpha = nn.Parameter(torch.ones(outputs))

    def forward(self, output: Tensor, given: Tensor, *_: Any) -> Tensor:
        delta = self._delta(self.layout.to_map(given if self.parallel else output))
        return self.layout.over(lambda y: y + delta[..., : y.shape[2], : y.shape[3]], output)  # some blocks round sizes down

    def _delta(self, x: Tensor) -> Tensor:
        # the ReLU that the paper takes for ResNets; alpha as a factor of up's weight, so that its gradient needs no map
        weight, bias = self.up.weight * self.alpha.view(-1, 1, 1, 1), self.up.bias * self.alpha  # type: ignore[operator]
        return F.conv2d(F.relu(self.down(x)), weight, bias)
