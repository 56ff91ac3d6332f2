"""Activations that keep their input or its signs, and max pooling that keeps one byte per output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .recipes import Kept

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation: forward (x, in place or not), backward (of g and x), and for piecewise linear ones where it passes.

    Where `mask` is given, the slope is 1 inside of it and `slope` outside, so one bit per element is enough.
    """

    function: Callable[..., Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    mask: Callable[[Tensor], Tensor] | None = None
    slope: float = 0.0


def silu() -> Activation:
    return Activation(functional.silu, lambda g, x: _aten.silu_backward(g, x))


def gelu(approximate: str = "none") -> Activation:
    return Activation(
        lambda x, inplace=False: functional.gelu(x, approximate=approximate),
        lambda g, x: _aten.gelu_backward(g, x, approximate=approximate),
    )


def hardswish() -> Activation:
    return Activation(functional.hardswish, lambda g, x: _aten.hardswish_backward(g, x))


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    return Activation(
        lambda x, inplace=False: functional.leaky_relu(x, negative_slope, inplace),
        lambda g, x: _aten.leaky_relu_backward(g, x, negative_slope, False),
        lambda x: x > 0,
        negative_slope,
    )


def relu() -> Activation:
    return Activation(functional.relu, lambda g, x: _aten.threshold_backward(g, x, 0), lambda x: x > 0)


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    return Activation(
        lambda x, inplace=False: functional.hardtanh(x, min_val, max_val, inplace),
        lambda g, x: _aten.hardtanh_backward(g, x, min_val, max_val),
        lambda x: (x > min_val) & (x < max_val),
    )


class Pointwise(torch.autograd.Function):
    """An activation of x; `kept` is how backward gets x, None for its signs. In place, x must not be among what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Activation, kept: Kept | None, inplace: bool) -> Tensor:  # type: ignore[override]
        ctx.act, ctx.kept, ctx.shape = act, kept, x.shape
        if kept is None:
            assert act.mask is not None
            ctx.save_for_backward(pack(act.mask(x)))
        else:
            ctx.save_for_backward(*kept.tensors)
        if inplace:
            ctx.mark_dirty(x)
        return act.function(x, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        if ctx.kept is not None:
            return ctx.act.gradient(g, ctx.kept.rebuild(ctx.saved_tensors)), None, None, None
        mask = unpack(ctx.saved_tensors[0], ctx.shape)
        return torch.where(mask, g, g * ctx.act.slope) if ctx.act.slope else g * mask, None, None, None


def pack(mask: Tensor) -> Tensor:
    """Pack booleans of any shape into bytes, eight each."""
    bits = functional.pad(mask.reshape(-1), (0, -mask.numel() % 8)).view(torch.uint8)
    if type(bits) is Tensor and bits.device.type == "cpu":
        import numpy

        return torch.from_numpy(numpy.packbits(bits.numpy(), bitorder="little"))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Undo `pack`."""
    if type(packed) is Tensor and packed.device.type == "cpu":
        import numpy

        bits = numpy.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> places).bitwise_and_(1).to(torch.bool)
    return bits.view(-1)[: math.prod(shape)].view(shape)


class MaxPool(torch.autograd.Function):
    """Max pooling of (B, C, H, W) that keeps the winner's place in its window, one byte per output.

    PyTorch keeps the input and eight bytes per output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool) -> Tensor:  # type: ignore[override]
        out, winners = _aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        ctx.window = kernel, stride, padding, dilation, ceil
        ctx.shape = x.shape
        top, left = _corners(out.shape, stride, padding, x.device)
        width = x.shape[-1]
        row = winners.div(width, rounding_mode="floor").sub_(top).div_(dilation[0], rounding_mode="floor")
        column = winners.remainder(width).sub_(left).div_(dilation[1], rounding_mode="floor")
        ctx.save_for_backward(row.mul_(kernel[1]).add_(column).to(torch.uint8))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        kernel, stride, padding, dilation, ceil = ctx.window
        place = ctx.saved_tensors[0].long()
        top, left = _corners(place.shape, stride, padding, g.device)
        row = place.div(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(top)
        winners = place.remainder_(kernel[1]).mul_(dilation[1]).add_(left).add_(row.mul_(ctx.shape[-1]))
        x = g.new_empty(1).expand(ctx.shape)
        gx = _aten.max_pool2d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil, winners)
        return gx, None, None, None, None, None


def _corners(shape: torch.Size, stride: tuple, padding: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first row and column of each output's window."""
    rows = torch.arange(shape[-2], device=device).mul_(stride[0]).sub_(padding[0]).view(-1, 1)
    return rows, torch.arange(shape[-1], device=device).mul_(stride[1]).sub_(padding[1])
