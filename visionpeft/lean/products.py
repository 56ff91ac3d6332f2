"""Convolutions and linear layers that keep their input only where a weight learns from it.

PyTorch's convolution keeps its input even for a frozen weight, and a computed weight (W + s B A) is kept as large as W.
Here the weight is put together anew in backward, and a low-rank update has a backward of its own (memory.md, "LoRA").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .recipes import Kept

_backward = torch.ops.aten.convolution_backward


class Conv(NamedTuple):
    """A convolution's arguments, two numbers each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    channels = 1  # the dimension of channels

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(x, weight, bias, *self)

    def backward(
        self, g: Tensor, x: Tensor | None, weight: Tensor | None, shapes: tuple[Any, Any], mask: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and weight, where `mask` asks; what is not needed for them may be None."""
        x, weight = (t if t is not None else g.new_empty(1).expand(s) for t, s in zip((x, weight), shapes, strict=True))
        stride, padding, dilation, groups = self
        return _backward(g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*mask, False))[:2]


class Linear(NamedTuple):
    """A linear layer's arguments: none."""

    channels = -1
    groups = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def backward(
        self, g: Tensor, x: Tensor | None, weight: Tensor | None, shapes: tuple[Any, Any], mask: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `Conv.backward`."""
        gx = g @ weight if mask[0] and weight is not None else None
        gw = rows(g).t() @ rows(x) if mask[1] and x is not None else None
        return gx, gw


@dataclass(frozen=True)
class LowRank:
    """The factors of a computed weight: ``base + scaling * (up @ down)``, seen as matrices of ``len(base)`` rows."""

    base: Tensor
    up: Tensor
    down: Tensor
    scaling: float


class Product(torch.autograd.Function):
    """``op(x, weight * scale, bias)``.

    Args of apply:
        op: `Conv` or `Linear`.
        x: (B, C, H, W), or (..., C) for `Linear`.
        weight: Of the layer; with `up` and `down` its frozen part.
        bias: (O,) or None.
        up, down: (O, r) and (r, ...) factors of an update of the weight, or None.
        scale: (O,), a frozen normalisation's, or None.
        value: The weight with its update, where it is at hand.
        scaling: Of the update.
        dtype: In which to compute (autocast), or None.
        kept: How backward gets x, or None where no weight learns.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        op: Conv | Linear,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        down: Tensor | None,
        scale: Tensor | None,
        value: Tensor | None,
        scaling: float,
        dtype: torch.dtype | None,
        kept: Kept | None,
    ) -> Tensor:
        ctx.op, ctx.scaling, ctx.dtype, ctx.kept, ctx.shape = op, scaling, dtype, kept, x.shape
        ctx.only_up = up is not None and ctx.needs_input_grad[4] and not ctx.needs_input_grad[5] and op.groups == 1
        with torch.autocast(x.device.type, enabled=False):
            whole = _times(weight if value is None else value, scale)
            x, whole, bias = (t if t is None or dtype is None else t.to(dtype) for t in (x, whole, bias))
            tensors: tuple[Tensor, ...] = ()
            if ctx.only_up and down is not None:  # LoRA-FA: only A x is needed, which has r channels
                tensors, ctx.kept = (op(x, _like(down, weight).to(x.dtype)),), None
            elif kept is not None:
                tensors = kept.tensors
            ctx.save_for_backward(weight, up, down, scale, *tensors)
            return op(x, whole, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        weight, up, down, scale, *tensors = ctx.saved_tensors
        op, needs = ctx.op, ctx.needs_input_grad
        with torch.autocast(g.device.type, enabled=False):
            gx = gw = gb = gu = gd = whole = x = None
            if needs[3]:
                gb = _sum(g, op.channels)
            if needs[1]:
                whole = weight if up is None else _updated(weight, up, down, ctx.scaling)
                whole = _times(whole, scale).to(g.dtype)
            if ctx.kept is not None:
                x = ctx.kept.rebuild(tensors).to(g.dtype)
            shapes = ctx.shape, weight.shape
            factored = needs[5] and _factored(op, weight.shape)
            if up is None or factored or not needs[5]:
                gx, gw = op.backward(g, x, whole, shapes, (needs[1], needs[2]))
                gw = gw if gw is None else _times(gw, scale)
            else:  # through the gradient of the whole weight
                gx, gw = op.backward(g, x, whole, shapes, (needs[1], True))
                of_update = _times(gw, scale).flatten(1).to(up.dtype).mul_(ctx.scaling)
                gd, gu, gw = up.t() @ of_update, of_update @ down.t() if needs[4] else None, None
            if factored or ctx.only_up:
                g = g if scale is None else g * _spread(scale, op.channels).to(g.dtype)
                if factored:
                    thin = _thin(op, g, up.mul(ctx.scaling).to(g.dtype))
                    a = _like(down, weight).to(g.dtype)
                    gd = op.backward(thin, x, None, (ctx.shape, a.shape), (False, True))[1].reshape(down.shape)
                    inner = op(x, a) if needs[4] else None
                else:
                    inner = tensors[0]
                if inner is not None:  # the narrow matrix first: (h' g)' is up to four times faster than g' h
                    gu = (rows(inner, op.channels).t() @ rows(g, op.channels)).mul_(ctx.scaling).t()
            return None, gx, gw, gb, gu, gd, None, None, None, None, None


def rows(x: Tensor, channels: int = -1) -> Tensor:
    """Return x as a matrix with one column per channel."""
    return x.movedim(channels, -1).reshape(-1, x.shape[channels])


def _factored(op: Conv | Linear, shape: torch.Size) -> bool:
    """Say whether a low-rank gradient is faster through r channels than through the whole weight's gradient.

    Convolutions of few channels are so slow that the large one wins: `benchmarks/lean.py --layers` times both.
    """
    if isinstance(op, Linear):
        return True
    return op.groups == 1 and shape[2:].numel() == 1 and min(shape[0], shape[1]) >= 128


def _updated(weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    return torch.addmm(weight.flatten(1), up, down, alpha=scaling).view(weight.shape)


def _times(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.dim() - 1))


def _like(down: Tensor, weight: Tensor) -> Tensor:
    return down.view(-1, *weight.shape[1:])


def _spread(vector: Tensor, channels: int) -> Tensor:
    return vector if channels == -1 else vector.view(-1, 1, 1)


def _thin(op: Conv | Linear, g: Tensor, up: Tensor) -> Tensor:
    """Return g's channels brought down to r."""
    if isinstance(op, Linear):
        return g @ up.t().contiguous().t()  # this orientation of a skinny matrix is the fast one
    return functional.conv2d(g, up.t().reshape(up.shape[1], -1, 1, 1))


def _sum(g: Tensor, channels: int) -> Tensor:
    return g.sum((0, 2, 3)) if channels == 1 else rows(g).sum(0)
