"""Convolutions and linear layers that keep their input only where a weight learns from it.

PyTorch's convolution keeps its input even for a frozen weight, and a computed weight (W + s B A) is kept as large as W.
Here the weight is put together anew in backward, and a low-rank update has a backward of its own: docs/lean.md, "Low-rank
updates".
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .backward import first_order
from .recompute import Kept, rebuild

_backward = torch.ops.aten.convolution_backward


class Conv(NamedTuple):
    """A convolution of (B, C, H, W), by its arguments, two numbers each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(x, weight, bias, *self)

    def backward(
        self, g: Tensor, x: Tensor | None, weight: Tensor | None, shapes: tuple[Any, Any], mask: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        """Return the gradients of x and weight, each where `mask` is true; tensors that they do not need may be None."""
        if shapes[1][2:].numel() == 1 and self == _POINTWISE and not all(mask):
            gx = self.pointwise(g, weight.flatten(1).t()) if mask[0] else None  # type: ignore[union-attr]
            return gx, self.outer(g, x).reshape(shapes[1]) if mask[1] else None  # type: ignore[arg-type]
        if x is None:  # only its shape is needed; of a tensor without strides, the CPU's kernels would make a copy
            cpu = g.device.type == "cpu"
            x = torch.empty(shapes[0], dtype=g.dtype, memory_format=layout(g)) if cpu else g.new_empty(1).expand(shapes[0])
        if weight is None:
            weight = g.new_empty(1).expand(shapes[1])
        stride, padding, dilation, groups = self
        return _backward(g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*mask, False))[:2]

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return x with its channels multiplied by `matrix`."""
        if layout(x) is torch.channels_last:
            return (x.movedim(1, -1) @ matrix.t()).movedim(-1, 1)
        return torch.matmul(matrix, x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the products of a's and b's channels, summed over images and places."""
        if layout(a) is layout(b) is torch.channels_last:
            return _rows(a.movedim(1, -1)).t() @ _rows(b.movedim(1, -1))
        return torch.matmul(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(0)

    def work(self, shape: torch.Size) -> float:
        """Return the multiplications per element of the input, for a weight of this shape."""
        return shape[0] / self.groups * shape[2:].numel() / (self.stride[0] * self.stride[1])

    def total(self, g: Tensor) -> Tensor:
        """Return the sum of each channel, at least in single precision: in half it would soon be infinite."""
        return g.sum((0, 2, 3), dtype=torch.promote_types(g.dtype, torch.float32))


_POINTWISE = Conv((1, 1), (0, 0), (1, 1), 1)


class Linear:
    """A linear layer of (..., C)."""

    groups = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def backward(
        self, g: Tensor, x: Tensor | None, weight: Tensor | None, shapes: tuple[Any, Any], mask: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        """As `Conv.backward`."""
        return g @ weight if mask[0] else None, self.outer(g, x) if mask[1] else None  # type: ignore[operator, arg-type]

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """As `Conv.pointwise`."""
        return x @ matrix.contiguous().t()  # this orientation of a narrow matrix is the fast one

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """As `Conv.outer`."""
        return _rows(a).t() @ _rows(b)

    def work(self, shape: torch.Size) -> float:
        """As `Conv.work`."""
        return shape[0]

    def total(self, g: Tensor) -> Tensor:
        """As `Conv.total`."""
        return _rows(g).sum(0, dtype=torch.promote_types(g.dtype, torch.float32))


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
        value: The weight with its update, or None.
        scaling: Of the update.
        dtype: The type to compute in (autocast), or None.
        kept: The tensors and steps that give x in backward, or None where no weight learns.
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
        ctx.op, ctx.scaling, ctx.shape, ctx.steps = op, scaling, x.shape, None
        ctx.only_up = up is not None and ctx.needs_input_grad[4] and not ctx.needs_input_grad[5] and op.groups == 1
        with exactly(x):
            whole = times(weight if value is None else value, scale)
            if dtype is not None:
                x, whole, bias = x.to(dtype), whole.to(dtype), None if bias is None else bias.to(dtype)
            tensors: tuple[Tensor, ...] = ()
            if ctx.only_up and down is not None:  # LoRA-FA: only A x is needed, which has r channels
                tensors = (op(x, _like(down, weight).to(x.dtype)),)
            elif kept is not None:
                tensors, ctx.steps = kept
            ctx.save_for_backward(weight, up, down, scale, *tensors)
            out = op(x, whole, bias)
            ctx.layout = layout(out) if out.dim() == 4 else None
            return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        weight, up, down, scale, *tensors = ctx.saved_tensors
        op, needs = ctx.op, ctx.needs_input_grad
        if ctx.layout is torch.channels_last and layout(g) is not ctx.layout:  # else all gradients before it go without
            g = g.contiguous(memory_format=ctx.layout)
        with exactly(g):
            gx = gw = gb = gu = gd = whole = x = None
            if needs[3]:
                gb = op.total(g)
            if ctx.steps is not None:
                x = rebuild(ctx.steps, tensors).to(g.dtype)
            shapes = ctx.shape, weight.shape
            factored = up is not None and needs[5] and _factored(op, weight.shape, up.shape[1])
            if factored:
                thin = op.pointwise(g, times(up, scale).mul(ctx.scaling).t().to(g.dtype))
                a = _like(down, weight).to(g.dtype)
                gd = op.backward(thin, x, None, (ctx.shape, a.shape), (False, True))[1].reshape(down.shape)
                if needs[4]:
                    gu = _through(op, g, op(x, a), scale, ctx.scaling)
                x = x if isinstance(op, Conv) else None  # a linear layer's can go before its gradient comes
            if needs[1]:
                whole = times(weight, scale) if up is None else updated(weight, up, down, ctx.scaling, scale)
                whole = whole.to(g.dtype)
            if factored:
                gx = op.backward(g, x, whole, shapes, (True, False))[0] if needs[1] else None
            elif up is None or ctx.only_up:
                gx, gw = op.backward(g, x, whole, shapes, (needs[1], needs[2]))
                gw = gw if gw is None else times(gw, scale)
                gu = _through(op, g, tensors[0], scale, ctx.scaling) if ctx.only_up else None
            else:  # through the gradient of the whole weight
                gx, gw = op.backward(g, x, whole, shapes, (needs[1], True))
                of_update = times(gw, scale).flatten(1).to(up.dtype).mul_(ctx.scaling)
                gd = up.t() @ of_update if needs[5] else None
                gu, gw = of_update @ down.t() if needs[4] else None, None
            return None, gx, gw, gb, gu, gd, None, None, None, None, None


def exactly(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _nothing


_nothing = nullcontext()


def layout(x: Tensor) -> torch.memory_format:
    """Return how (B, C, H, W) lies in memory."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _factored(op: Conv | Linear, shape: torch.Size, r: int) -> bool:
    """Return whether a low-rank gradient is faster through r channels than through the whole weight's gradient.

    It always needs fewer operations, but convolutions of few channels are slow: benchmarks/lean.py --layers times both.
    """
    return isinstance(op, Linear) or (op.groups == 1 and min(shape[0], shape[1]) >= 8 * r)


def _through(op: Conv | Linear, g: Tensor, inner: Tensor, scale: Tensor | None, scaling: float) -> Tensor:
    """Return the gradient of `up`, from `inner`, the x that went through `down`."""
    gu = op.outer(inner, g).mul_(scaling).t()  # the narrow one first: up to four times faster than the other way round
    return times(gu, scale)


def updated(weight: Tensor, up: Tensor, down: Tensor, scaling: float, scale: Tensor | None = None) -> Tensor:
    """Return ``(weight + scaling * up @ down) * scale``."""
    whole = torch.addmm(weight.flatten(1), up, down, alpha=scaling)
    return (whole if scale is None else whole.mul_(scale.unsqueeze(1))).view(weight.shape)


def times(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return a weight whose outputs are multiplied by `scale`, (O,)."""
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.dim() - 1))


def _like(down: Tensor, weight: Tensor) -> Tensor:
    return down.view(-1, *weight.shape[1:])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
