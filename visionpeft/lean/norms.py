"""Normalisations: BatchNorm that keeps its input by a recipe (frozen: nothing), LayerNorm that keeps only x̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backward import first_order
from .recompute import Kept, rebuild

_aten = torch.ops.aten


class BatchNorm(torch.autograd.Function):
    """Batch normalisation of (B, C, ...) by running statistics, or by the batch's (`training`).

    With running statistics and a frozen weight, only the scale is kept. Returns the output, and the scale and shift (C,)
    that make it from x.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.training, ctx.eps, ctx.steps = training, eps, kept and kept.steps
        if training:
            out, center, inverse = _aten.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
            statistics = center, inverse
        else:
            assert mean is not None and var is not None
            center, inverse, statistics = mean, torch.rsqrt(var + eps), (mean, var)
        scale, shift = scale_and_shift(center, inverse, weight, bias)
        if not training:
            out = affine(x, scale, shift).to(x.dtype)
        ctx.save_for_backward(*(kept.tensors if kept else (scale,)), weight, *(statistics if kept else ()))
        ctx.mark_non_differentiable(scale, shift)
        return out, scale, shift

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        wanted = ctx.needs_input_grad[:3]
        if ctx.steps is None:
            scale, _weight = ctx.saved_tensors
            gx = g * _spread(scale, g).to(g.dtype) if wanted[0] else None
            gb = g.sum((0, *range(2, g.dim())), dtype=scale.dtype) if wanted[2] else None
            return gx, None, gb, *[None] * 6
        *tensors, weight, mean, var = ctx.saved_tensors
        x = rebuild(ctx.steps, tensors).to(g.dtype)
        running, batch = ((None, None), (mean, var)) if ctx.training else ((mean, var), (None, None))
        gx, gw, gb = _aten.native_batch_norm_backward(g, x, weight, *running, *batch, ctx.training, ctx.eps, wanted)
        return gx if wanted[0] else None, gw if wanted[1] else None, gb if wanted[2] else None, *[None] * 6


def scale_and_shift(center: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset of a normalisation by a mean and an inverse deviation; (C,) each."""
    scale = inverse if weight is None else weight * inverse
    return scale, -center * scale if bias is None else bias - center * scale


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * scale + shift`` per channel (dimension 1)."""
    return torch.addcmul(_spread(shift, x), x, _spread(scale, x))


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 2))


class LayerNorm(torch.autograd.Function):
    """The normalised input x̂ = (x - mean) / std over the last dimensions, then weight and bias.

    Keeps x̂ in place of x: the weights that read the output learn from it, too. Returns the output, x̂, mean and 1 / std.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, shape: tuple, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normal, mean, inverse = _aten.native_layer_norm(x, shape, None, None, eps)
        ctx.shape = shape
        ctx.save_for_backward(normal.detach(), inverse, weight, bias)
        ctx.mark_non_differentiable(normal, mean, inverse)
        return rescale(normal, weight, bias).to(x.dtype), normal, mean, inverse

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        normal, inverse, weight, bias = ctx.saved_tensors
        mixed = weight is not None and weight.dtype != normal.dtype  # autocast on a CPU: statistics are as the weight is
        inverse = inverse.to(weight.dtype) if mixed else inverse
        zero, one = torch.zeros_like(inverse), torch.ones_like(inverse)  # x̂ is its own normalised input
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        gx, gw, gb = _aten.native_layer_norm_backward(
            g.contiguous().to(normal.dtype), normal, ctx.shape, zero, one, weight, bias, mask
        )
        return gx.mul_(inverse) if mask[0] else None, None, gw if mask[1] else None, gb if mask[2] else None, None


def rescale(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``normal * weight + bias``."""
    if weight is None:
        return normal.clone()
    return normal * weight if bias is None else torch.addcmul(bias, normal, weight)
