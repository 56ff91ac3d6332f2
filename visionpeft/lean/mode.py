"""The mode under which a lean model runs forward: each function of torch that keeps too much gives way to one that does not.

A handler is called in place of the function, with its arguments. It may keep tensors by their recipes, and lets its
result carry one. Everything that is not in `HANDLERS` runs as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .._torch_private import saved_tensors_hook, version
from ..errors import ModelError
from . import recompute as recipes
from .norms import BatchNorm, LayerNorm, affine, rescale, scale_and_shift
from .pointwise import Activation, MaxPool, Pointwise, gelu, hardswish, hardtanh, leaky_relu, relu, silu
from .products import Conv, Linear, LowRank, Product, exactly, layout, times, updated
from .recompute import Derived, Kept, Leaf, SharedRecompute, attach_recipe, derive, keep, keep_itself, recipe_of
from .report import Report

MAX_PASSES = 12.0  # of the costliest recipe of all
WORK_PER_PASS = 64.0  # multiplications per element beside which a pass over the tensor costs little

_state = threading.local()


class LeanMode(TorchFunctionMode):
    """Runs one forward leanly.

    Args:
        folds: The frozen BatchNorm that follows a convolution, by the id of the convolution's own weight.
        recompute_all: Whether memory comes before time: recipes may cost many passes over a tensor, and linear layers are
            computed again for the activation that follows them. Else a recipe is used where rebuilding costs little beside
            the work that the tensor is rebuilt for.
        report: Where to count the bytes of functions' results.
    """

    def __init__(self, folds: Mapping[int, nn.Module], recompute_all: bool, report: Report | None = None):
        super().__init__()
        self.folds, self.recompute_all, self.report = folds, recompute_all, report
        self.folded = 0  # convolutions whose BatchNorm has not come yet

    def __enter__(self) -> LeanMode:
        _state.mode = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _state.mode = None
        super().__exit__(*error)
        recipes.detach_recipes()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is None or checkpointing():
            out = func(*args, **(kwargs or {}))
            if self.report and isinstance(out, Tensor) and out.requires_grad and not out._is_view():
                self.report.others[func.__name__] += out.nbytes
            return out
        return handler(self, func, *args, **(kwargs or {}))

    def max_passes(self, work: float = 0.0) -> float:
        """Return the cost that a recipe may have, for a function of `work` multiplications per element in backward."""
        return MAX_PASSES if self.recompute_all else work // WORK_PER_PASS

    def replaced(self, kind: str, out: Tensor) -> Tensor:
        """Note that a function was replaced, and return its result."""
        if self.report:
            self.report.taken[kind] += out.nbytes
        return out

    def fallback(self, func: Callable, why: str, *args: Any, **kwargs: Any) -> Any:
        """Run a function as it is, note why, and return its result."""
        out = func(*args, **kwargs)
        if self.report and isinstance(out, Tensor):
            self.report.left[f"{func.__name__}: {why}"] += out.nbytes
        return out


def running() -> bool:
    """Return whether a lean forward is under way in this thread."""
    return getattr(_state, "mode", None) is not None


def checkpointing() -> bool:
    """Return whether torch's checkpoint is under way. Its two forwards must do the same, so they run as they are."""
    return getattr(saved_tensors_hook(), "__module__", "") == checkpoint.__name__


# ------------------------------------------------------------------------------------------------------------- products
def _conv2d(
    lean: LeanMode,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4 or not input.numel():
        why = "padding by name" if isinstance(padding, str) else "not (B, C, H, W)"
        return lean.fallback(func, why, input, weight, bias, stride, padding, dilation, groups)
    op = Conv(_pair(stride), _pair(padding), _pair(dilation), groups)
    bn: Any = lean.folds.get(id(getattr(weight, "peft_base", weight)))
    if bn is None:
        return lean.replaced("convolution", _product(lean, op, input, weight, bias, None))
    weight_of_bn = None if bn.weight is None else bn.weight.detach()
    scale, shift = scale_and_shift(bn.running_mean, torch.rsqrt(bn.running_var + bn.eps), weight_of_bn, bn.bias)
    out = _product(lean, op, input, weight, shift if bias is None else shift + bias * scale, scale)
    out._lean_normalised = bn.running_mean, version(out)  # type: ignore[attr-defined]
    lean.folded += 1
    return lean.replaced("convolution + frozen BatchNorm", out)


def _linear(lean: LeanMode, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.dim() < 2 or not input.numel():
        return lean.fallback(func, "no rows", input, weight, bias)
    out, recipe = _product(lean, Linear(), input, weight, bias, None), recipe_of(input)
    factors = _factors(weight)
    if lean.recompute_all and recipe is not None and recipe.passes < MAX_PASSES and (weight.is_leaf or factors is not None):
        again = SharedRecompute(partial(_linear_again, out.dtype, factors.scaling if factors else None, bias is not None))
        tensors = (weight,) if factors is None else (factors.base, factors.up, factors.down)
        parts = (recipe, *map(Leaf, (*tensors, *(() if bias is None else (bias,)))))
        attach_recipe(out, Derived(again, parts, MAX_PASSES - 1))  # costly, so only for a direct reader
    return lean.replaced("linear", out)


def _linear_again(dtype: torch.dtype, scaling: float | None, biased: bool, x: Tensor, *tensors: Tensor) -> Tensor:
    (weight, *factors), bias = (tensors[:-1], tensors[-1].to(dtype)) if biased else (tensors, None)
    with exactly(x):
        if scaling is not None:
            up, down = factors
            weight = updated(weight, up, down, scaling)
        return functional.linear(x.to(dtype), weight.to(dtype), bias)


def _product(
    lean: LeanMode, op: Conv | Linear, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    factors, learns = _factors(weight), weight.requires_grad
    if not (learns or x.requires_grad or (bias is not None and bias.requires_grad)):
        return op(x, times(weight, scale), bias)
    dtype, kept = _autocast(x), None
    if learns and (factors is None or factors.down.requires_grad or op.groups > 1):
        kept = keep(x, lean.max_passes(op.work(weight.shape)))
        if factors is None and scale is None and kept.itself and dtype in (None, x.dtype):
            return op(x, weight, bias)  # PyTorch keeps no more
    if factors is None:
        return Product.apply(op, x, weight.as_subclass(Tensor), bias, None, None, scale, None, 1.0, dtype, kept)
    value = weight.detach().as_subclass(Tensor)
    return Product.apply(op, x, factors.base, bias, factors.up, factors.down, scale, value, factors.scaling, dtype, kept)


def _factors(weight: Tensor) -> LowRank | None:
    """Return the factors of a weight that a low-rank delta has computed on a frozen base, else None."""
    offered = getattr(weight, "peft_factors", None)
    if offered is None or offered[0].requires_grad or not offered[1].requires_grad:
        return None
    return LowRank(*offered)


# ---------------------------------------------------------------------------------------------------------- activations
def _activation(make: Callable[..., Activation], *names: str) -> Callable:
    """Return a handler of an activation function; `names` are its arguments between input and inplace."""

    def handler(lean: LeanMode, func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = dict(zip((*names, "inplace"), args, strict=False), **kwargs)
        inplace, act = settings.pop("inplace", False) or func is torch.relu_, make(**settings)
        recipe = recipe_of(input)
        if recipe is not None and inplace and not recipes.survives_change_of(recipe, input):
            recipe = None
        if not input.requires_grad or not input.is_floating_point():
            return attach_recipe(func(input, *args, **kwargs), derive(act.function, recipe))
        if recipe is not None and 0 < recipe.passes <= lean.max_passes():
            kept: Kept | None = keep(input, lean.max_passes())
        elif act.mask is not None:
            kept, recipe = None, None
        elif inplace:
            return lean.fallback(func, "in place", input, *args, **kwargs)
        else:  # PyTorch keeps no more than the input itself; what reads the result may be rebuilt from it
            leaf = keep_itself(input)
            return attach_recipe(lean.replaced("activation", func(input, *args, **kwargs)), derive(act.function, leaf))
        out = lean.replaced("activation", Pointwise.apply(input, act, kept, inplace))
        return attach_recipe(out, derive(act.function, recipe))

    return handler


# ------------------------------------------------------------------------------------------------------- normalisations
def _batch_norm(
    lean: LeanMode,
    func: Callable,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    mean, when = getattr(input, "_lean_normalised", (None, 0))
    if mean is running_mean is not None and when == version(input):
        del input._lean_normalised  # type: ignore[attr-defined]
        lean.folded -= 1
        return input
    learns = any(t is not None and t.requires_grad for t in (input, weight, bias))
    if not learns or input.dim() < 2 or input.numel() <= (input.shape[1] if training else 0):
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    keeps = training or (weight is not None and weight.requires_grad)
    if keeps and not lean.recompute_all:  # PyTorch keeps no more
        out = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return lean.replaced("BatchNorm", out)
    kept = keep(input, lean.max_passes()) if keeps else None
    out, scale, shift = BatchNorm.apply(input, weight, bias, running_mean, running_var, training, momentum, eps, kept)
    dtype = out.dtype
    again = SharedRecompute(lambda x, s, t: affine(x, s, t).to(dtype))  # for the activation and for what reads that
    attach_recipe(out, derive(again, recipe_of(input), Leaf(scale), Leaf(shift)))
    return lean.replaced("BatchNorm", out)


def _layer_norm(
    lean: LeanMode,
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **kwargs: Any,
) -> Tensor:
    if not any(t is not None and t.requires_grad for t in (input, weight, bias)) or not input.numel():
        return func(input, normalized_shape, weight, bias, eps, **kwargs)
    x = input.float() if _autocast(input) is not None and input.device.type == "cuda" else input  # as autocast has it
    out, normal, mean, inverse = LayerNorm.apply(x, tuple(normalized_shape), weight, bias, eps)
    affines, kept = [Leaf(t) for t in (weight, bias) if t is not None], Leaf(normal)
    attach_recipe(out, derive(lambda n, w=None, b=None: rescale(n, w, b), kept, *affines))
    if recipe_of(input) is None and input.dtype in (torch.float32, torch.float64) and normal.dtype is input.dtype:
        attach_recipe(input, derive(lambda n, m, s: torch.addcmul(m, n, s.reciprocal()), kept, Leaf(mean), Leaf(inverse)))
    return lean.replaced("LayerNorm", out)


# -------------------------------------------------------------------------------------------------------------- the rest
def _max_pool2d(
    lean: LeanMode,
    func: Callable,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel = _pair(kernel_size)
    window = kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode
    if return_indices:
        return lean.fallback(func, "with indices", input, *window, return_indices=True)
    known = input.dim() == 4 and input.numel() > 0 and kernel[0] * kernel[1] <= 256
    if not input.requires_grad or not known or input.shape[-1] <= window[3][1] * (kernel[1] - 1):  # see MaxPool
        out = torch.max_pool2d(input, *window)
    else:
        out = lean.replaced("max pooling", MaxPool.apply(input, *window))
    return attach_recipe(out, derive(lambda x: torch.max_pool2d(x, *window), recipe_of(input), passes=2.0))


def _view(lean: LeanMode, func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if layout(input) is torch.channels_last and not torch.is_inference_mode_enabled():
        try:
            return recipes.of_one(func, (input, *args), kwargs, 0.0)
        except RuntimeError:  # it needs the layout that x would have without lean
            _lay_out(input)
    return recipes.of_one(func, (input, *args), kwargs, 0.0)


def _in_order(lean: LeanMode, func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a function whose result depends on the order of memory: of strides, or of random numbers, drawn in that order."""
    if layout(input) is torch.channels_last and not input._is_view():
        _lay_out(input)
    return func(input, *args, **kwargs)


def _data(lean: LeanMode, func: Callable, input: Tensor, *args: Any) -> Any:
    """Read or set ``x.data``. A change through it does not count as a change of x, so x loses its recipe."""
    input.__dict__.pop("_lean", None)
    return func(input, *args)


def _lay_out(x: Tensor) -> None:
    """Give a tensor the memory layout that it would have without lean, in place."""
    if x._is_view():
        raise ModelError(
            "this model reads a view of a map in a layout that lean changes; use lean='off', or leave lean.apply out"
        )
    x.data = x.data.contiguous()


def _interpolate(lean: LeanMode, func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "nearest")
    if mode != "nearest":
        return func(input, *args, **kwargs)
    return recipes.of_one(func, (input, *args), kwargs, 1.0)


def _of_one(passes: float) -> Callable:
    return lambda lean, func, *args, **kwargs: recipes.of_one(func, args, kwargs, passes)


def _pair(value: Any) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:
        return value
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def _autocast(x: Tensor) -> torch.dtype | None:
    """Return the type that autocast would compute with x in, or None."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


_VIEWS = (
    "chunk split unbind narrow select permute transpose movedim reshape flatten unflatten contiguous __getitem__ "
    "squeeze unsqueeze t mT"
).split()

HANDLERS: dict[Callable, Callable] = {
    torch.conv2d: _conv2d,
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    functional.silu: _activation(silu),
    functional.gelu: _activation(gelu, "approximate"),
    functional.hardswish: _activation(hardswish),
    functional.relu: _activation(relu),
    torch.relu: _activation(relu),
    torch.relu_: _activation(relu),
    functional.relu6: _activation(lambda: hardtanh(0.0, 6.0)),
    functional.hardtanh: _activation(hardtanh, "min_val", "max_val"),
    functional.leaky_relu: _activation(leaky_relu, "negative_slope"),
    functional.interpolate: _interpolate,
    torch.cat: lambda lean, func, *args, **kwargs: recipes.cat(func, *args, **kwargs),
    **{
        f: lambda lean, func, *args, **kwargs: recipes.add(func, args, kwargs)
        for f in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
    },
    **{f: _of_one(0.0) for name in _VIEWS for f in (getattr(Tensor, name, None), getattr(torch, name, None)) if callable(f)},
    Tensor.view: _view,
    **{f: _in_order for f in (functional.dropout, torch.rand_like, torch.randn_like, torch.bernoulli, Tensor.bernoulli_)},
    **{f: _in_order for f in (torch.as_strided, Tensor.as_strided)},
    torch.roll: _of_one(1.0),
    **{f: _data for f in (Tensor.data.__get__, Tensor.data.__set__)},  # type: ignore[attr-defined]
}
