"""Side tuning: a small ladder beside the frozen body, s_i = f(g z_i + (1 - g) s_(i-1)), read out before the head.  LST, Sung et al. 2022, https://arxiv.org/abs/2206.06522"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy, Unfit
from ..core.method import Edit, Method
from ..registry import METHODS
from ._blocks import zeroed


@METHODS.register("side")
@dataclass(frozen=True)
class SideConfig(Method):
    reduction_factor: int = 8  # the ladder is as wide as the widest stage divided by this, and at least 8

    lr_scale: ClassVar[float] = 6.0
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("reduction_factor", self.reduction_factor, 1)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        taps = [s for s in anatomy.stages if s.channels]
        if not any(s.to_head for s in taps):
            raise Unfit("none of its stages hands the head a feature map that a ladder could reach")
        rungs = [[s.name, s.channels, s.layout, s.to_head] for s in taps]
        width = max(max(s.channels for s in taps) // self.reduction_factor, 8)
        return [self.edit("", "forward", rungs=rungs, width=width)]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Ladder(**settings)


class Ladder(nn.Module):
    """Reads every stage without a gradient, climbs in `width` channels, and is added to the maps that the head reads."""

    def __init__(self, rungs: Sequence[Sequence[Any]], width: int):
        super().__init__()
        self.names = [name for name, *_ in rungs]
        self.rungs = nn.ModuleList(Rung(width, i == 0, *facts) for i, (_, *facts) in enumerate(rungs))

    def forward(self, model: nn.Module, run: Callable, *args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], Tensor)):  # a whole batch, whose images the forward calls itself with
            return run(*args, **kwargs)
        rungs: Any = self.rungs
        climb: list[Tensor] = []  # the ladder's state; lives as long as this call
        handles = [
            model.get_submodule(name).register_forward_hook(partial(rung.tap, climb))
            for name, rung in zip(self.names, rungs, strict=True)
        ]
        try:
            return run(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


class Rung(nn.Module):
    """One stage's step of the ladder."""

    def __init__(self, width: int, first: bool, channels: int, layout: str, to_head: bool):
        super().__init__()
        kernel = 1 if layout == "NLC" else 3
        self.layout = layout
        self.down = nn.Conv2d(channels, width, 1)
        self.gate = None if first else nn.Parameter(torch.zeros(()))  # the first rung has nothing to mix with
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.out = nn.Conv2d(width, width, 1)
        self.up = zeroed(nn.Conv2d(width, channels, 1)) if to_head else None

    def tap(self, climb: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The hook: climb one step, and add the ladder to the stage's output where the head reads it."""
        state = self.down(self._to_map(output.detach()))
        if self.gate is not None:
            gate = self.gate.sigmoid()
            state = gate * state + (1 - gate) * _resize(climb[0], state.shape[2:])
        state = state + self.out(F.gelu(self.mix(state)))
        climb[:] = [state]
        return output if self.up is None else output + self._from_map(self.up(state))

    def _to_map(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W); a sequence becomes a map one column wide."""
        if self.layout == "NLC":
            return x.transpose(1, 2).unsqueeze(3)
        return x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x

    def _from_map(self, x: Tensor) -> Tensor:
        if self.layout == "NLC":
            return x.squeeze(3).transpose(1, 2)
        return x.permute(0, 2, 3, 1) if self.layout == "NHWC" else x


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    shrinks = x.shape[2] >= size[0] and x.shape[3] >= size[1]
    return F.adaptive_avg_pool2d(x, (size[0], size[1])) if shrinks else F.interpolate(x, size=(size[0], size[1]))
