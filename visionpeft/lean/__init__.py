"""Exact training with the least memory: the same parameters, keys and results, and far less kept for backward.

``lean.apply(model)`` lets a model of any kind run its forward under a mode (`mode.py`) that replaces the functions
which keep too much:

products.py   convolutions and linear layers keep their input only where a weight learns from it
norms.py      BatchNorm keeps nothing where it is frozen, LayerNorm only x̂, from which x can be rebuilt
pointwise.py  activations keep their input or its signs; max pooling keeps one byte per output
recompute.py  a tensor that can be rebuilt from kept ones is not kept itself
folds.py      frozen BatchNorms are folded into the convolutions before them

Gradients are those of plain autograd to rounding. Without gradients, while tracing, compiling or exporting, and inside of
torch's checkpoint the model runs as it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._torch_private import transforming
from ..core import class_swap
from ..core.class_swap import Mixin
from ..errors import ConfigError, ModelError, nearest
from . import folds
from .mode import LeanMode, checkpointing, running
from .products import layout
from .recompute import Leaf, attach_recipe, derive
from .report import Report

LEVELS = ("auto", "memory")


class LeanForward(Mixin):
    """A model whose forward runs under `LeanMode` while gradients are recorded."""

    _mixin_rank = 3
    lean_level: str
    lean_folds: list[folds.Fold]
    lean_unfolded: dict[str, str]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        if not _useful(args, kwargs):
            return plain(*args, **kwargs)
        current, recompute_all = folds.current(self.lean_folds), self.lean_level == "memory"
        with LeanMode(current, recompute_all, self.__dict__.get("lean_report")) as mode:
            turned = [_channels_last(x) for x in args]
            out = plain(*turned, **kwargs)
        if mode.folded:
            raise ModelError(
                "a BatchNorm was folded into its convolution, but did not run behind it: the model was changed, or uses the "
                "convolution's weight elsewhere too; call lean.apply anew after a change, else train without lean"
            )
        same = all(a is b for a, b in zip(turned, args, strict=True))
        return out if same else tree_map_only(Tensor, _contiguous, out)


def apply(model: nn.Module, level: str = "memory") -> nn.Module:
    """Let a model train leanly, in place: the same parameters, state-dict keys and results.

    Args:
        model: Any model, also one with a delta attached, or before it is.
        level: "memory" keeps the least; "auto" does nothing that costs time.

    Returns:
        The model.

    Raises:
        ConfigError: It is lean already, or there is no such level.
    """
    if applied(model) is not None:
        raise ConfigError(f"this model is lean already (level '{applied(model)}'); call lean.remove first")
    if level not in LEVELS:
        raise ConfigError(f"lean level '{level}' is not known; it is {' or '.join(LEVELS)}.{nearest(level, LEVELS)}")
    foldable, refused = folds.find(model)
    class_swap.add_mixin(model, LeanForward)
    model.__dict__.update(lean_level=level, lean_folds=foldable, lean_unfolded=refused)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take `apply` back, in place; no effect on a model that is not lean. Returns the model."""
    if class_swap.has_mixin(model, LeanForward):
        class_swap.remove_mixin(model, LeanForward)
        for name in LeanForward.__annotations__:
            del model.__dict__[name]
    return model


def applied(model: nn.Module) -> str | None:
    """Return the level at which a model is lean, or None."""
    return model.__dict__.get("lean_level")


def report(model: nn.Module, *inputs: Any) -> Report:
    """Run a lean model on `inputs`, and return which functions were replaced, which were not, and why.

    Raises:
        ConfigError: The model is not lean, or no inputs are given.
    """
    if applied(model) is None:
        raise ConfigError("this model is not lean; call lean.apply first")
    if not inputs:
        raise ConfigError("nothing to run the model on was given; call lean.report(model, images)")
    counted = Report(len(folds.current(model.__dict__["lean_folds"])), model.__dict__["lean_unfolded"])
    model.__dict__["lean_report"] = counted
    try:
        with torch.enable_grad():
            model(*inputs)
    finally:
        del model.__dict__["lean_report"]
    return counted


def _channels_last(x: Any) -> Any:
    """Return images with their channels side by side in memory, a layout that convolutions pass on: faster on CPUs, and
    on GPUs in half precision."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not (x.device.type == "cpu" or torch.is_autocast_enabled("cuda")):
        return x
    turn = partial(Tensor.contiguous, memory_format=torch.channels_last)
    turned = turn(x)
    return x if turned is x else attach_recipe(turned, derive(turn, Leaf(x)))


def _contiguous(x: Tensor) -> Tensor:
    """Return an output in the memory layout that it has without lean."""
    return x.contiguous() if layout(x) is torch.channels_last else x


def _useful(args: tuple, kwargs: dict) -> bool:
    """Return whether autograd records this forward for backward, and it may run under a mode."""
    return (
        not torch.compiler.is_compiling()  # first: dynamo cannot trace what follows
        and torch.is_grad_enabled()
        and any(isinstance(x, Tensor) and not x.is_meta for x in (*args, *kwargs.values()))
        and not running()
        and not checkpointing()
        and not torch.jit.is_tracing()
        and not transforming()
    )
