"""Shared by methods that add modules to blocks: choice of blocks, width of a bottleneck, maps (B, C, H, W) in all layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Block, Unfit
from ..errors import ConfigError, ModelError
from .base import matches

NARROWEST = 4  # channels of a bottleneck


def choose_blocks(anatomy: Anatomy, wanted: str) -> list[Block]:
    """Return the blocks that the field `blocks` selects.

    Args:
        anatomy: The model's facts.
        wanted: "all", or a regular expression for whole names ("layer3.*") or for classes ("C3k2|C2PSA").

    Raises:
        Unfit: It selects none.
    """
    if not anatomy.blocks:
        raise Unfit("it has no residual or transformer blocks outside the head")
    chosen = [b for b in anatomy.blocks if wanted == "all" or matches(wanted, b.name) or matches(wanted, b.cls)]
    if not chosen:
        classes = sorted({b.cls for b in anatomy.blocks})
        names = [b.name for b in anatomy.blocks]
        raise Unfit(
            f"blocks='{wanted}' matches none of its {len(names)} blocks, e.g. {', '.join(names[:3])}, "
            f"nor their classes, {', '.join(classes)}"
        )
    return chosen


def bottleneck(method: str, block: Block, channels: int, reduction_factor: int) -> int:
    """Return the channels of the bottleneck of an adapter on a block, which reads so many `channels`.

    Raises:
        ConfigError: There are too few channels to narrow.
    """
    if (fewest := min(channels, block.channels)) < NARROWEST:
        raise ConfigError(
            f"{method}: {block.name} has {fewest} channel{'s' * (fewest > 1)}, but the bottleneck of an adapter has at "
            f"least {NARROWEST}; freeze that stage, or choose other blocks with blocks='...'"
        )
    return max(channels // reduction_factor, NARROWEST)


@dataclass(frozen=True)
class Layout:
    """The layout of features, with conversions to a map (B, C, H, W) and back."""

    kind: str  # "NCHW", "NHWC" or "NLC"
    leading: int = 0  # tokens of a sequence that come before the image's
    grid: Sequence[int] = (0, 0)  # rows and columns of the image's tokens, at the size that the model was made for

    def to_map(self, x: Tensor) -> Tensor:
        """Return features as a map (B, C, H, W), without leading tokens."""
        if self.kind == "NLC":
            image = x[:, self.leading :]  # (B, H * W, C)
            return image.transpose(1, 2).unflatten(2, self._size(image.shape[1]))
        return x.permute(0, 3, 1, 2) if self.kind == "NHWC" else x

    def over(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function of maps to features; leading tokens stay as they are."""
        out = run(self.to_map(x))
        if self.kind == "NLC":
            image = out.flatten(2).transpose(1, 2)
            return torch.cat([x[:, : self.leading], image], 1) if self.leading else image
        return out.permute(0, 2, 3, 1) if self.kind == "NHWC" else out

    def _size(self, count: int) -> tuple[int, int]:
        """Return rows and columns of `count` tokens, for an image of the same shape but any size."""
        rows, columns = self.grid
        if count != rows * columns:
            scale = math.sqrt(count / (rows * columns))
            rows, columns = round(rows * scale), round(columns * scale)
            if rows * columns != count or rows * self.grid[1] != columns * self.grid[0]:
                raise ModelError(
                    f"{count} tokens are no map of the shape {self.grid[0]} x {self.grid[1]} that this model was planned "
                    "with; give images of the shape that it was made for"
                )
        return rows, columns


def choose_maps(anatomy: Anatomy, wanted: str) -> list[Block]:
    """Return those of `choose_blocks` whose output is a map, or a sequence made from one.

    Raises:
        Unfit: There are none.
    """
    if chosen := [b for b in choose_blocks(anatomy, wanted) if b.layout != "NLC" or all(b.grid)]:
        return chosen
    raise Unfit("none of its blocks puts out a feature map")


Projection = TypeVar("Projection", nn.Linear, nn.Conv2d)


def zeroed(layer: Projection) -> Projection:
    """Return a layer whose weight and bias are set to zero, so that an adapter that ends with it changes nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def layout_of(block: Block) -> dict[str, Any]:
    """Return the arguments of a block's `Layout`, as plain values."""
    if block.layout != "NLC":
        return {"layout": block.layout}
    return {"layout": block.layout, "leading": block.leading, "grid": list(block.grid)}
