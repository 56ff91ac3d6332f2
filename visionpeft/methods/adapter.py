"""Adapter: y + s up(act(down(y))), in sequence (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751; Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247) or beside the MLP (AdaptFormer, Chen et al. 2022, https://arxiv.org/abs/2205.13535)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.anatomy import Anatomy, Block
from ..core.method import Edit, Method
from ..registry import METHODS
from ._blocks import bottleneck, choose_blocks, zeroed

PLACEMENTS = ("adaptformer", "houlsby", "pfeiffer")


@METHODS.register("adapter")
@dataclass(frozen=True)
class AdapterConfig(Method):
    reduction_factor: int = 8  # the bottleneck is the block's channels divided by this, and at least 4
    placement: str = "adaptformer"  # in transformer blocks: "adaptformer", "houlsby" or "pfeiffer"
    scaling: float = 1.0  # s, the factor of the adapter's output
    blocks: str = "all"  # "all", or a regular expression for names or classes of blocks: "C3k2|C2PSA", "layer[34].*"

    lr_scale: ClassVar[float] = 15.0
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("reduction_factor", self.reduction_factor, 1)
        self.check_choice("placement", PLACEMENTS)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        return [edit for block in choose_blocks(anatomy, self.blocks) for edit in self._block(block)]

    def _block(self, block: Block) -> list[Edit]:
        settings = {
            "channels": block.channels,
            "bottleneck": bottleneck(self.name, block, block.channels, self.reduction_factor),
            "scaling": self.scaling,
            "parallel": self.placement == "adaptformer",
        }
        if not (block.kind == "transformer" and block.mlp):
            return [self.edit(block.name, "output", **{**settings, "conv": True, "parallel": False})]
        places = [block.attention, block.mlp] if self.placement == "houlsby" and block.attention else [block.mlp]
        return [self.edit(place, "output", conv=False, **settings) for place in places]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Bottleneck(**settings)


class Bottleneck(nn.Module):
    """A bottleneck whose last layer starts at zero: of linears on (..., C), of convolutions on (B, C, H, W)."""

    def __init__(self, channels: int, bottleneck: int, scaling: float, parallel: bool, conv: bool):
        super().__init__()
        self.scaling, self.parallel = scaling, parallel
        if conv:
            self.down: nn.Module = nn.Sequential(
                nn.Conv2d(channels, bottleneck, 1),
                nn.Conv2d(bottleneck, bottleneck, 3, padding=1, groups=bottleneck),
            )
            self.up: nn.Module = zeroed(nn.Conv2d(bottleneck, channels, 1))
        else:
            self.down, self.up = nn.Linear(channels, bottleneck), zeroed(nn.Linear(bottleneck, channels))
        self.act = nn.ReLU() if parallel else nn.GELU()

    def forward(self, output: Tensor, given: Tensor, *_: Any) -> Tensor:
        source = given if self.parallel else output  # the MLP's own (normalised) input, or what came out
        return output + self.scaling * self.up(self.act(self.down(source)))
