"""Activations that keep their input or its signs, and max pooling that keeps one byte per output."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from .backward import first_order
from .recompute import Kept, rebuild

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation: forward (x, in place or not), backward (of g and x), and for piecewise linear ones where it passes.

    Where `mask` is given, the slope is 1 inside of it and `slope` outside, so one bit per element is enough.
    """

    function: Callable[..., Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    mask: Callable[[Any], Any] | None = None  # of a tensor or an array
    slope: float = 0.0


@cache
def silu() -> Activation:
    return Activation(functional.silu, lambda g, x: _aten.silu_backward(g, x))


@cache
def gelu(approximate: str = "none") -> Activation:
    return Activation(
        lambda x, inplace=False: functional.gelu(x, approximate=approximate),
        lambda g, x: _aten.gelu_backward(g, x, approximate=approximate),
    )


@cache
def hardswish() -> Activation:
    return Activation(functional.hardswish, lambda g, x: _aten.hardswish_backward(g, x))


@cache
def leaky_relu(negative_slope: float = 0.01) -> Activation:
    return Activation(
        lambda x, inplace=False: functional.leaky_relu(x, negative_slope, inplace),
        lambda g, x: _aten.leaky_relu_backward(g, x, negative_slope, False),
        lambda x: x > 0,
        negative_slope,
    )


@cache
def relu() -> Activation:
    return Activation(functional.relu, lambda g, x: _aten.threshold_backward(g, x, 0), lambda x: x > 0)


@cache
def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    return Activation(
        lambda x, inplace=False: functional.hardtanh(x, min_val, max_val, inplace),
        lambda g, x: _aten.hardtanh_backward(g, x, min_val, max_val),
        lambda x: (x > min_val) & (x < max_val),
    )


class Pointwise(torch.autograd.Function):
    """An activation of x. Backward gets x from `kept`, or its signs where that is None. In place, x must not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Activation, kept: Kept | None, inplace: bool) -> Tensor:  # type: ignore[override]
        ctx.act, ctx.steps = act, kept and kept.steps
        if kept is None:
            ctx.order = _order(x)
            ctx.save_for_backward(pack(act, x.permute(ctx.order)))
        else:
            ctx.save_for_backward(*kept.tensors)
        if inplace:
            ctx.mark_dirty(x)
        return act.function(x, inplace)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        if ctx.steps is not None:
            return ctx.act.gradient(g, rebuild(ctx.steps, ctx.saved_tensors)), None, None, None
        back = sorted(range(g.dim()), key=ctx.order.__getitem__)
        return gate(ctx.act, ctx.saved_tensors[0], g.permute(ctx.order)).permute(back), None, None, None


def _order(x: Tensor) -> list[int]:
    """Return the dimensions in the order in which they lie in memory."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda i: (-strides[i], i))


def pack(act: Activation, x: Tensor) -> Tensor:
    """Return where a piecewise linear activation passes x, eight elements a byte."""
    assert act.mask is not None
    if _numpy(x):  # several times faster than torch here
        return torch.from_numpy(numpy.packbits(act.mask(x.detach().numpy()), bitorder="little"))
    bits = act.mask(x).reshape(-1).view(torch.uint8)
    bits = functional.pad(bits, (0, -x.numel() % 8)) if x.numel() % 8 else bits
    places = torch.arange(8, dtype=torch.uint8, device=x.device)  # made there: a copy from the host would wait for the GPU
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def gate(act: Activation, packed: Tensor, g: Tensor) -> Tensor:
    """Return the gradient g where `packed` says that the activation passes, `slope` times g elsewhere."""
    if _numpy(g):
        mask: Any = numpy.unpackbits(packed.numpy(), count=g.numel(), bitorder="little").reshape(g.shape)
        out = torch.empty_like(g)
        if act.slope:
            numpy.multiply(g.numpy(), numpy.where(mask, 1.0, act.slope).astype(g.numpy().dtype), out=out.numpy())
        else:  # as integers, for an infinite gradient times zero is no number; numpy.where is ten times slower
            whole = f"i{g.itemsize}"
            numpy.multiply(g.numpy().view(whole), mask, out=out.numpy().view(whole))
        return out
    places = torch.arange(8, dtype=torch.uint8, device=g.device)
    mask = (packed.unsqueeze(1) >> places).bitwise_and_(1).view(-1)[: g.numel()].view(g.shape).view(torch.bool)
    return torch.where(mask, g, g * act.slope if act.slope else 0)


def _numpy(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class MaxPool(torch.autograd.Function):
    """Max pooling of (B, C, H, W) that keeps the winner's place in its window, one byte per output.

    PyTorch keeps the input and eight bytes per output. The window must not be wider than the input.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, ceil: bool
    ) -> Tensor:
        out, winners = _aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        ctx.window = kernel, stride, padding, dilation, ceil
        ctx.shape = x.shape
        # a winner lies r rows and c columns from its window's corner: r * width + c, where c is less than width
        away = winners.sub_(_corners(out.shape, x.shape[-1], stride, padding, x.device)).float()
        row = away.add(0.5).div_(x.shape[-1]).floor_()
        column = away.sub_(row, alpha=x.shape[-1])
        place = row.mul_(kernel[1] / dilation[0]).add_(column, alpha=1 / dilation[1])
        ctx.save_for_backward(place.add_(0.5).to(torch.uint8))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        kernel, stride, padding, dilation, ceil = ctx.window
        place, width = ctx.saved_tensors[0], ctx.shape[-1]
        rows, columns = (torch.arange(n, device=g.device) * d for n, d in zip(kernel, dilation, strict=True))
        away = (rows.unsqueeze(1) * width + columns).view(-1)
        winners = away[place.int()].add_(_corners(place.shape, width, stride, padding, g.device))
        x = g.new_empty(1).expand(ctx.shape)
        gx = _aten.max_pool2d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil, winners)
        return gx, None, None, None, None, None


def _corners(shape: torch.Size, width: int, stride: tuple, padding: tuple, device: torch.device) -> Tensor:
    """Return the index of the first element of each output's window, as if the padding were there."""
    rows, columns = (
        torch.arange(n, device=device).mul_(s).sub_(p) for n, s, p in zip(shape[-2:], stride, padding, strict=True)
    )
    return rows.unsqueeze(1) * width + columns
