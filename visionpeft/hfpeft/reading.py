"""A folder that peft wrote, put on its base as a delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core import delta as deltas
from ..core.anatomy import HEAD, Param
from ..core.attach import attach
from ..core.base_model import Base, Data
from ..core.delta import Delta
from ..core.method import Edit, Method, PeftLayer
from ..core.plan import plan_from_trained
from ..errors import ConfigError, DeltaError, MismatchError
from ..families.base import Family
from ..families.introspect import observe
from ..registry import METHODS
from .folder import LISTS, PATTERNS, Adapter

_ASIDE = {  # fields that say nothing of what a trained adapter computes, or that `Adapter` reads
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "module_dropout", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "rank_dropout", "rank_dropout_scale", "revision", "runtime_config", "target_modules"),
    *("task_type", "velora_config", *PATTERNS.values(), *LISTS),
}
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})  # values of an option that is not used
Tensors = dict[str, Tensor]


def adopt(adapter: Adapter, family: Family, base: Base, header: Mapping[str, Any], data: Data | None = None) -> Delta:
    """Make a delta of an adapter.

    Args:
        adapter: The folder's content.
        family: Of the base.
        base: What the adapter was trained on.
        header: What the delta shall say besides.
        data: Says what the classes are called, where they are not the base's.

    Raises:
        MismatchError: The adapter was trained on another base.
        DeltaError: It is incomplete, or computes something that has no like here.
    """
    if adapter.header:
        deltas.verify_base(adapter.header["base"], base.state)
    method = _method(adapter)
    model, said = _fitted(adapter, family, base, data)
    anatomy = family.anatomy(model, base.source)
    layers, saved = _divide(adapter, model, base)
    inside_head = tuple(f"{h}." for h in anatomy.heads)
    edits: list[tuple[Edit, Tensors]] = []
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in saved.items():
            own[key].copy_(value)
        for edit, tensors in _edits(adapter, method, model, layers, base):
            if f"{edit.module}.".startswith(inside_head):  # a head is its own weights, without parts
                _fold(model.get_submodule(edit.module), _part(edit, tensors))
            else:
                edits.append((edit, tensors))
    before = base.state
    moved = {k for k, v in saved.items() if k not in before or not _same(v, before[k])}
    train = moved & {name for name, _ in model.named_parameters()}
    statistics = {k.rpartition(".")[0] for k in moved - train}
    constants = sorted(train - {p.name for p in anatomy.params})  # of the head, which peft trains as a whole
    more = (Param(name, own[name].numel(), "other", HEAD) for name in constants)
    anatomy = replace(anatomy, params=(*anatomy.params, *more))
    attach(model, plan_from_trained(method, anatomy, [edit for edit, _ in edits], train, statistics), start=False)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for edit, tensors in edits:
            for name, value in tensors.items():
                own[f"{edit.prefix}.{name}"].copy_(value)
    return deltas.collect(model, before, {**header, **said}, "exact")


def _method(adapter: Adapter) -> Method:
    """Return the method that the configuration describes.

    Raises:
        DeltaError: There is none, or an option has no like here.
    """
    config, kind = adapter.config, adapter.config["peft_type"]
    classes = [cls for cls in METHODS.values() if cls.peft_type == kind]
    if not classes:
        types = sorted({cls.peft_type for cls in METHODS.values()} - {""})
        raise DeltaError(f"peft_type={kind} has no like here; there are {', '.join(types)}")
    known = _ASIDE | set(PATTERNS) | {field for cls in classes for field in cls.peft_fields}
    if strange := next((k for k, v in config.items() if k not in known and v not in _OFF), None):
        raise DeltaError(f"the adapter was made with {strange}={config[strange]!r}, which has no like here")
    try:
        made = [method for cls in classes if (method := cls.from_peft(config)) is not None]
    except ConfigError as error:
        raise DeltaError(f"this adapter cannot be read: {error}") from error
    return made[0]


# ------------------------------------------------------------------------------------------------------------- the head
def _fitted(adapter: Adapter, family: Family, base: Base, data: Data | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the base with a head that the adapter's fits into, and what a delta says of that head.

    Raises:
        MismatchError: None is known.
    """
    inside = tuple(f"{h}." for h in family.anatomy(base.model, base.source).heads)
    given = {k: v for k, v in adapter.tensors.items() if k.startswith(inside)}
    for names, head, outputs in _heads(adapter, base, data, given):
        model = family.with_head(base, names, head, **outputs)
        own = {k: v for k, v in model.state_dict().items() if k.startswith(inside)}
        fits = all(own[k].shape == v.shape for k, v in given.items() if k in own)
        if fits and (names == base.names or given.keys() >= own.keys()):  # a new head is nowhere but in the folder
            return model, {"names": {str(i): name for i, name in names.items()}, "head": head, "outputs": outputs}
    found = "".join(f"{k} of {_shape(v)}" for k, v in sorted(given.items())[-1:]) or "no head"
    source, count = (data.source, len(data.names)) if data else (base.source, len(base.names))
    raise MismatchError(
        f"the adapter does not fit: the folder holds {found}, but {source} has {count} classes; give the base that it was "
        "trained on, and data=... for the names of other classes"
    )


def _heads(adapter: Adapter, base: Base, data: Data | None, given: Tensors) -> Iterator[tuple[dict, str, dict]]:
    """Yield what classes the adapter's head may be for, and how it may have been made."""
    header = adapter.header
    ways = list(dict.fromkeys([header.get("head", "keep"), "keep", "rebuild"]))
    if data:
        yield from ((dict(data.names), way, dict(data.outputs)) for way in ways)
    elif header:
        yield {int(i): name for i, name in header["names"].items()}, header["head"], header.get("outputs", {})
    else:
        yield base.names, "keep", {}
        own = base.state
        counts = {len(v) for k, v in given.items() if v.ndim and (k not in own or own[k].shape != v.shape)}
        yield from (({i: str(i) for i in range(count)}, way, {}) for count in sorted(counts) for way in ways)


@torch.no_grad()
def _fold(layer: Any, part: Any) -> None:
    """Fold a part into a layer to which it is not attached."""
    if layer.bias is not None and hasattr(part, "bias"):
        layer.bias.copy_(part.bias(layer.bias))
    layer.weight.copy_(part(layer.weight))


# ------------------------------------------------------------------------------------------------------------- the layers
def _divide(adapter: Adapter, model: nn.Module, base: Base) -> tuple[dict[str, Tensors], Tensors]:
    """Tell an adapter's tensors, by layer, from those of modules that are saved as a whole, and check that none is missing.

    Raises:
        MismatchError: The model lacks a module, or has it in another shape.
        DeltaError: Something is missing.
    """
    state, modules = model.state_dict(), {name for name, _ in model.named_modules()}
    layers: dict[str, Tensors] = {}
    saved: Tensors = {}
    for key, value in adapter.tensors.items():
        if key in state:
            if state[key].shape != value.shape:
                raise _other_base(base, f"{key} is {_shape(value)} in the folder, but {_shape(state[key])} in the model")
            saved[key] = value
            continue
        ends = [i for i, character in enumerate(key) if character == "."]
        end = next((i for i in reversed(ends) if key[:i] in modules), 0)
        layers.setdefault(key[:end], {})[key[end:].removeprefix(".")] = value
    for module, tensors in layers.items():
        if not isinstance(getattr(model.get_submodule(module), "weight", None), Tensor):
            key = ".".join(filter(None, (module, next(iter(tensors)))))
            raise _other_base(base, f"it has no layer for the folder's {key}")
    if missing := next((m for m in adapter.targets(modules) if m not in layers), None):
        if not adapter.config.get("layers_to_transform"):
            raise DeltaError(f"target_modules means {missing}, but the folder has no tensors of it; get the folder again")
    whole = tuple(f"{m}." for m in adapter.saved(modules))
    if missing := next((k for k in state if k.startswith(whole) and k not in saved), None):
        raise DeltaError(f"modules_to_save means {missing}, but the folder has no such tensor; get the folder again")
    return layers, saved


def _edits(
    adapter: Adapter, method: Method, model: nn.Module, layers: Mapping[str, Tensors], base: Base
) -> Iterator[tuple[Edit, Tensors]]:
    """Yield the edits that an adapter is, with the tensors of their parts.

    Raises:
        MismatchError: A tensor has another shape than the layer takes.
        DeltaError: One is missing or strange, or peft computes on a layer what the method here does not.
    """
    side = base.facts["imgsz"]
    called = observe(model, torch.zeros(1, base.facts.get("channels", 3), side, side), layers)
    for module in (name for name, _ in model.named_modules() if name in layers):
        layer, found = model.get_submodule(module), PeftLayer(layers[module], adapter.fields(module))
        try:
            read = method.read_peft(layer, found)
        except KeyError as error:
            raise DeltaError(f"the folder has tensors of {module}, but no {error.args[0]}; get the folder again") from error
        except ConfigError as error:
            raise DeltaError(f"this adapter cannot be read: {error}") from error
        except IndexError as error:
            raise DeltaError(f"a tensor of {module} in the folder is no matrix; get the folder again") from error
        if read is None or module not in called:
            raise DeltaError(
                f"HF peft's {adapter.config['peft_type']} of {module} is no change of its weight, for it is a "
                f"{type(layer).__name__} with groups, dilation or a forward of its own; train without it"
            )
        edit = method.edit(module, "weight", **read[0])
        with torch.device("meta"):
            expected = method.to_peft(edit.build(), layer)
        assert expected is not None, "what peft computes is read and written on the same layers"
        _check(module, layer, found, expected, base)
        yield edit, read[1]


def _check(module: str, layer: nn.Module, found: PeftLayer, expected: PeftLayer, base: Base) -> None:
    """Compare the tensors of a layer with those that it takes."""
    if strange := next((name for name in found.tensors if name not in expected.tensors), None):
        several = any(f"{name.split('.')[0]}." in strange and name != strange for name in expected.tensors)
        why = "tensors carry the name of an adapter, as if there were several" if several else "nothing here reads it"
        raise DeltaError(f"the folder has {module}.{strange}: {why}; give a folder that peft's save_pretrained wrote")
    for name, tensor in expected.tensors.items():
        if found.tensors[name].shape != tensor.shape:
            rank = f" at r={found.fields['r']}" if "r" in found.fields else ""
            given = _shape(found.tensors[name])
            raise _other_base(base, f"{module}.{name} is {given} in the folder, but this layer takes {_shape(tensor)}{rank}")


def _part(edit: Edit, tensors: Tensors) -> nn.Module:
    part = edit.build()
    part.load_state_dict(tensors)
    return part


def _other_base(base: Base, what: str) -> MismatchError:
    return MismatchError(f"the folder belongs to another base than {base.source}: {what}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.dtype))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
