"""The only file that changes a model: attach, merge and detach at four points.

weight    the class of the layer or normalisation is swapped; reading ``weight`` (and ``bias``) applies the parts, assigning
          ``weight`` folds them away
output    a hook passes what a module returns through the parts
input     a hook passes what a module is given through the parts
forward   the module's class is swapped; the parts run around its own forward

Parts are children of the module they edit (``peft_weight.lora``, ``peft_output.adapter``, ...), so the base keeps its
own state-dict keys, and an attached model deep-copies, pickles and moves between devices like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch_private import as_plain_tensors
from ..errors import ConfigError, ModelError
from . import class_swap
from .class_swap import Mixin
from .method import Edit
from .plan import Plan

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # of batches and of instances; layers; groups
_POINTS = ("weight", "output", "input", "forward")


@dataclass(frozen=True)
class Attached:
    """The record that a model carries while a plan is attached, as ``model.peft``."""

    plan: Plan
    trainable: frozenset[str]  # the parameters that required a gradient before


# ------------------------------------------------------------------------------------------------------------ the verbs
def attach(model: Any, plan: Plan, *, start: bool = True) -> nn.Module:
    """Apply a plan to a model, in place; where it fails, the model is unchanged.

    Args:
        model: The model whose anatomy the plan was made from.
        plan: The parameters to train and the edits to add.
        start: Whether parts that begin from the layer's own values (DoRA's magnitudes) read them. False where their
            values are loaded afterwards.

    Raises:
        ConfigError: Something is attached already, or the plan does not fit this model.
    """
    if attached(model) is not None:
        raise ConfigError(f"a '{model.peft.plan.method}' delta is attached already; detach or merge it first")
    places = [(e.module, e.point, e.method) for e in plan.edits]
    if twice := next((p for p in places if places.count(p) > 1), None):
        raise ConfigError(f"{twice[0]} would be edited twice by '{twice[2]}'; name each method once")
    changes = [_prepare(model, edit, start) for edit in plan.edits]
    for module, edit, part in changes:
        if getattr(part, "dropout", 0) and sum(m is module and e.point == "weight" for m, e, _ in changes) > 1:
            raise ConfigError(f"{edit.module} has two weight deltas, where dropout has no exact meaning; set it to 0")
    trained = {name: _parameter(model, name) for name in plan.train}
    model.peft = Attached(plan, frozenset(n for n, p in model.named_parameters() if p.requires_grad))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    for module, edit, part in changes:
        _install(module, edit, part)
    return model


def attached(model: nn.Module) -> Plan | None:
    """Return the plan that is attached to `model`, or None."""
    record = getattr(model, "peft", None)
    return record.plan if isinstance(record, Attached) else None


def train_mode(model: nn.Module, plan: Plan, progress: float = 1.0) -> nn.Module:
    """Put the model in training mode, but leave the plan's frozen statistics still.

    Args:
        model: A model that the plan is attached to.
        plan: The plan, which says whose statistics move, and from when on.
        progress: The share of the training that is done.
    """
    model.train()
    waiting = plan.still_frozen(progress).difference(plan.train)
    for name in (*plan.still, *waiting):
        model.get_submodule(name).eval()
    return model


def set_requires_grad(model: nn.Module, plan: Plan, progress: float = 1.0) -> nn.Module:
    """Let exactly the plan's parameters require a gradient; trainers tend to reset this.

    Args:
        model: A model that the plan is attached to.
        plan: The plan, which says what trains, and from when on.
        progress: The share of the training that is done; by default all of the plan trains.
    """
    wanted = set(plan.train) - plan.still_frozen(progress)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted or is_added(name))
    return model


def mergeable(model: nn.Module) -> bool:
    """Return whether every attached part can be folded into the base's own weights."""
    return not _unmergeable(model)


def merge(model: nn.Module) -> nn.Module:
    """Fold every part into the model's own weights, in place: the base's keys, classes and speed.

    Raises:
        ConfigError: A part cannot be merged (an adapter, a prompt, ...); the model is unchanged.
    """
    if names := _unmergeable(model):
        raise ConfigError(
            f"{', '.join(sorted(names))} cannot be merged into the base's weights; use the delta file with load()"
        )
    for module in [m for m in model.modules() if class_swap.has_mixin(m, ReparametrizedWeight)]:
        fold(module)
    return _release(model)


def detach(model: nn.Module, base: Mapping[str, Tensor]) -> nn.Module:
    """Take every part off and put the base's own values back, in place and bit for bit.

    Args:
        model: A model with a plan attached.
        base: The base's state dict: at least what the plan trains and the statistics that moved.

    Raises:
        ModelError: `base` lacks a tensor that training may have changed, or has it in another shape; nothing is changed.
    """
    values = {k: v for k, v in model.state_dict(keep_vars=True).items() if not is_added(k)}
    if missing := [k for k, v in values.items() if k not in base or base[k].shape != v.shape]:
        raise ModelError(f"this base does not fit: {missing[0]} is missing or has another shape; load the model anew")
    for module in list(model.modules()):
        for point in [p for p, _ in _containers(module)]:
            _uninstall(module, point)
    copy_into(values, base)
    return _release(model)


@torch.no_grad()
def copy_into(state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors of `source` into those of the same names in `state`, in place; `source` has all of these names."""
    for name, tensor in state.items():
        tensor.copy_(source[name])


def fold(layer: Any) -> None:
    """Fold the weight parts of one layer into its own weight and bias."""
    weight, bias = layer.weight, layer.bias
    _uninstall(layer, "weight")
    layer.weight = nn.Parameter(_plain(weight).detach().clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None and bias is not layer.bias:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.weight.requires_grad)


def is_added(key: str) -> bool:
    """Return whether a state-dict key belongs to a part and not to the base."""
    return any(f"peft_{point}" in key.split(".") for point in _POINTS)


# ------------------------------------------------------------------------------------------------------ the four points
class ReparametrizedWeight(Mixin):
    """The weight point. Reading ``weight`` and ``bias`` applies the parts; assigning ``weight`` folds them."""

    _mixin_rank = 2
    peft_instead: Tensor | None = None  # the update, read in place of the weight for the second summand of forward

    @property
    def weight(self: Any) -> Tensor:
        if self.peft_instead is not None:
            return self.peft_instead
        base = weight = self._parameters["weight"]
        for part in self.peft_weight.values():
            weight = part(weight)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or weight is base:
            return weight
        if type(weight) is Tensor:  # a fake one (see forecast.py) cannot be of another class beside, and is never written
            weight = weight.as_subclass(ComputedWeight)
        part, *more = self.peft_weight.values()
        if not (self.training and any(getattr(p, "dropout", 0) for p in self.peft_weight.values())):
            weight.peft_base = base
        if not more and hasattr(part, "factors"):
            weight.peft_factors = part.factors(base)
        return weight

    @property
    def bias(self: Any) -> Tensor | None:
        if self.peft_instead is not None:
            return None
        bias = self._parameters["bias"]
        for part in self.peft_weight.values():
            bias = part.bias(bias) if hasattr(part, "bias") else bias
        return bias

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for part in self.peft_weight.values():
            if self.training and getattr(part, "dropout", 0):  # W x + U drop(x) = (W + U) x + U (drop(x) - x)
                self.peft_instead = part.update()
                try:
                    y = y + super().forward(functional.dropout(x, part.dropout) - x, *args, **kwargs)  # type: ignore[misc]
                finally:
                    self.peft_instead = None
        return y

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        if name in ("weight", "bias") and "peft_weight" in self._modules:
            fold(self)
            type(self).register_parameter(self, name, _plain_parameter(param))  # the class is the plain one again
        else:
            super().register_parameter(name, _plain_parameter(param))  # type: ignore[misc]


class ComputedWeight(Tensor):
    """A weight computed by parts: reading works, a change in place is refused instead of silently lost."""

    peft_base: Tensor  # the layer's own weight; absent where dropout has forward read another weight, too
    peft_factors: tuple[Tensor, Tensor, Tensor, float] | None = None  # base, U, V and s, where this is base + s U V

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.__name__
        in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        target: Any = args[0] if args else None
        if in_place and name != "requires_grad_" and type(target) is cls and not getattr(target, "_is_param", False):
            raise ConfigError(
                f"{name}: this weight is computed by an attached delta, so a change in place would be lost; "
                "merge first, or assign layer.weight = nn.Parameter(...)"
            )
        with as_plain_tensors():
            result = func(*args, **(kwargs or {}))
        views = type(target) is cls and isinstance(result, Tensor) and result.layout == target.layout == torch.strided
        if views and result.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
            return result.as_subclass(cls)  # a view of it is refused to be written to as well
        return result


class WrappedForward(Mixin):
    """The forward point: each part is called with the module, its forward so far, and the arguments."""

    _mixin_rank = 1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        for part in self.peft_forward.values():
            run = partial(part, self, run)
        return run(*args, **kwargs)


def _output(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    for part in module.peft_output.values():
        output = part(output, *args)
    return output


def _input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    first, *rest = args
    for part in module.peft_input.values():
        first = part(first)
    return (first, *rest), kwargs


# ------------------------------------------------------------------------------------------------------------- plumbing
def _prepare(model: nn.Module, edit: Edit, start: bool) -> tuple[nn.Module, Edit, nn.Module]:
    """Build an edit's part and check that it fits, changing nothing."""
    if edit.point not in _POINTS:
        raise ConfigError(f"edit of {edit.module}: there is no point '{edit.point}'; there are {', '.join(_POINTS)}")
    try:
        module = model.get_submodule(edit.module)
    except AttributeError as error:
        raise ModelError(f"the plan edits {edit.module}, which this model does not have") from error
    known = isinstance(module, (*_LAYERS, *_NORMS)) and module._parameters.get("weight") is not None
    if edit.point == "weight" and not known:
        fit = ", ".join(t.__name__ for t in _LAYERS)
        raise ConfigError(
            f"{edit.module} is a {type(module).__name__}; a weight delta fits {fit}, their subclasses, and normalisations "
            "of batches, layers and groups with a scale"
        )
    part = edit.build()
    if hasattr(part, "start") and start:
        part.start(module)  # type: ignore[operator]
    like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), None)
    if like is None or all((p.device, p.dtype) == (like.device, like.dtype) for p in (*part.parameters(), *part.buffers())):
        return module, edit, part  # `to` would fail on the fake tensors of a forecast
    return module, edit, part.to(like.device, like.dtype)


def _install(module: Any, edit: Edit, part: nn.Module) -> None:
    name = f"peft_{edit.point}"
    if name not in module._modules:
        parts: Any = nn.ModuleDict()
        if edit.point == "weight":
            class_swap.add_mixin(module, ReparametrizedWeight)
        elif edit.point == "forward":
            class_swap.add_mixin(module, WrappedForward)
        elif edit.point == "output":
            parts.handle = module.register_forward_hook(_output, with_kwargs=True)
        else:
            parts.handle = module.register_forward_pre_hook(_input, with_kwargs=True)
        module.add_module(name, parts)
    module._modules[name][edit.method] = part
    module._modules[name].train(module.training)


def _uninstall(module: Any, point: str) -> None:
    parts = module._modules.pop(f"peft_{point}")
    if point == "weight":
        class_swap.remove_mixin(module, ReparametrizedWeight)
    elif point == "forward":
        class_swap.remove_mixin(module, WrappedForward)
    else:
        parts.handle.remove()


def _containers(module: nn.Module) -> Iterator[tuple[str, nn.ModuleDict]]:
    for point in _POINTS:
        parts = module._modules.get(f"peft_{point}")
        if isinstance(parts, nn.ModuleDict):
            yield point, parts


def _unmergeable(model: nn.Module) -> set[str]:
    return {
        name for module in model.modules() for point, parts in _containers(module) for name in parts if point != "weight"
    }


def _release(model: nn.Module) -> nn.Module:
    """Forget the plan and let the same parameters require a gradient as before."""
    record = model.__dict__.pop("peft", None)
    if record is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in record.trainable)
    return model


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if type(tensor) is ComputedWeight else tensor


def _plain_parameter(parameter: Any) -> Any:
    if type(parameter) is not ComputedWeight:
        return parameter
    return nn.Parameter(_plain(parameter).detach(), requires_grad=parameter.requires_grad)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"the plan trains {name}, which this model does not have") from error
