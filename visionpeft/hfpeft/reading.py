"""A folder that peft wrote, put on its base as a delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core import delta as deltas
from ..core.anatomy import HEAD, Param, inside
from ..core.attach import attach, copy_into
from ..core.base_model import Base, Data
from ..core.delta import Delta
from ..core.method import Edit, Method, PeftLayer
from ..core.plan import plan_from_trained
from ..errors import ConfigError, DeltaError, MismatchError
from ..families.base import Family
from ..registry import METHODS
from ..schema import Json
from .folder import LISTS, PATTERNS, Adapter, called

_IGNORED = {  # fields that change nothing in a trained adapter's results, or that `Adapter` reads
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "module_dropout", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "rank_dropout", "rank_dropout_scale", "revision", "runtime_config", "target_modules"),
    *("task_type", "velora_config", *PATTERNS.values(), *LISTS),
}
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})  # values of an option that is not used
Tensors = Mapping[str, Tensor]


def adopt(adapter: Adapter, family: Family, base: Base, header: Json, data: Data | None = None) -> Delta:
    """Make a delta of an adapter.

    Args:
        adapter: The folder's content.
        family: The family of the base.
        base: The base that the adapter was trained on.
        header: Further fields of the delta's header.
        data: A data set whose classes are the adapter's, where they are not the base's.

    Raises:
        MismatchError: The adapter was trained on another base.
        DeltaError: It is incomplete, or computes something that no method here does.
    """
    if adapter.header:
        deltas.verify_base(adapter.header["base"], base.state)
    method = _method(adapter)
    model, facts = _with_head(adapter, family, base, data)
    anatomy = family.anatomy(model, base.source)
    layers, saved = _divide(adapter, model, base)
    edits: list[tuple[Edit, Tensors]] = []
    state = model.state_dict(keep_vars=True)
    copy_into({k: state[k] for k in saved}, saved)
    for edit, tensors in _edits(adapter, method, model, layers, base):
        if inside(edit.module, anatomy.heads):  # a head is its own weights, without parts
            _fold(model.get_submodule(edit.module), _part(edit, tensors))
        else:
            edits.append((edit, tensors))
    before = base.state
    moved = {k for k, v in saved.items() if k not in before or not _same(v, before[k])}
    train = moved & {name for name, _ in model.named_parameters()}
    statistics = {k.rpartition(".")[0] for k in moved - train}
    constants = sorted(train - {p.name for p in anatomy.params})  # of the head, which peft trains as a whole
    more = (Param(name, state[name].numel(), "other", HEAD) for name in constants)
    anatomy = replace(anatomy, params=(*anatomy.params, *more))
    attach(model, plan_from_trained(method, anatomy, [edit for edit, _ in edits], train, statistics), start=False)
    parts = {f"{edit.prefix}.{name}": value for edit, tensors in edits for name, value in tensors.items()}
    state = model.state_dict(keep_vars=True)
    copy_into({k: state[k] for k in parts}, parts)
    return deltas.collect(model, before, {**header, **facts}, "exact")


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
    known = _IGNORED | set(PATTERNS) | {field for cls in classes for field in cls.peft_fields}
    if strange := next((k for k, v in config.items() if k not in known and v not in _OFF), None):
        raise DeltaError(f"the adapter was made with {strange}={config[strange]!r}, which has no like here")
    try:
        return next(method for cls in classes if (method := cls.from_peft(config)) is not None)
    except ConfigError as error:
        raise DeltaError(f"this adapter cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------------------- the head
def _with_head(adapter: Adapter, family: Family, base: Base, data: Data | None) -> tuple[nn.Module, Json]:
    """Return the base with a head that the adapter's tensors fit, and the facts of that head for the delta's header.

    Raises:
        MismatchError: None is known.
    """
    heads = family.anatomy(base.model, base.source).heads
    tensors = {k: v for k, v in adapter.tensors.items() if inside(k, heads)}
    for names, head, outputs in _heads(adapter, base, data, tensors):
        model = family.with_head(base, names, head, **outputs)
        own = {k: v for k, v in model.state_dict().items() if inside(k, heads)}
        fits = all(own[k].shape == v.shape for k, v in tensors.items() if k in own)
        if fits and (names == base.names or tensors.keys() >= own.keys()):  # a new head is nowhere but in the folder
            return model, {"names": {str(i): name for i, name in names.items()}, "head": head, "outputs": outputs}
    last = "".join(f"{k} of {_shape(v)}" for k, v in sorted(tensors.items())[-1:]) or "no head"
    source, count = (data.source, len(data.names)) if data else (base.source, len(base.names))
    raise MismatchError(
        f"the adapter does not fit: the folder holds {last}, but {source} has {count} classes; give the base that it was "
        "trained on, and data=... for the names of other classes"
    )


def _heads(adapter: Adapter, base: Base, data: Data | None, tensors: Tensors) -> Iterator[tuple[dict, str, dict]]:
    """Yield the heads that the adapter may have: class names, "keep" or "rebuild", and further arguments."""
    header = adapter.header
    ways = list(dict.fromkeys([header.get("head", "keep"), "keep", "rebuild"]))
    if data:
        yield from ((dict(data.names), way, dict(data.outputs)) for way in ways)
    elif header:
        yield {int(i): name for i, name in header["names"].items()}, header["head"], header.get("outputs", {})
    else:
        yield base.names, "keep", {}
        own = base.state
        counts = {len(v) for k, v in tensors.items() if v.ndim and (k not in own or own[k].shape != v.shape)}
        yield from (({i: str(i) for i in range(count)}, way, {}) for count in sorted(counts) for way in ways)


@torch.no_grad()
def _fold(layer: Any, part: Any) -> None:
    """Fold a part into a layer to which it is not attached."""
    if layer.bias is not None and hasattr(part, "bias"):
        layer.bias.copy_(part.bias(layer.bias))
    layer.weight.copy_(part(layer.weight))


# ------------------------------------------------------------------------------------------------------------- the layers
def _divide(adapter: Adapter, model: nn.Module, base: Base) -> tuple[Mapping[str, Tensors], Tensors]:
    """Divide an adapter's tensors into those of layers, by layer, and of whole modules, and check that none is missing.

    Raises:
        MismatchError: The model lacks a module, or has it in another shape.
        DeltaError: Something is missing.
    """
    state, modules = model.state_dict(), {name for name, _ in model.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
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
    """Yield the edits of an adapter, with the tensors of their parts.

    Raises:
        MismatchError: A tensor has another shape than the layer takes.
        DeltaError: One is missing or strange, or peft computes something else on a layer than the method here.
    """
    run = called(model, layers, base)
    for module in (name for name, _ in model.named_modules() if name in layers):
        layer, saved = model.get_submodule(module), PeftLayer(layers[module], adapter.fields(module))
        try:
            read = method.read_peft(layer, saved)
        except KeyError as error:
            raise DeltaError(f"the folder has tensors of {module}, but no {error.args[0]}; get the folder again") from error
        except ConfigError as error:
            raise DeltaError(f"this adapter cannot be read: {error}") from error
        except IndexError as error:
            raise DeltaError(f"a tensor of {module} in the folder is no matrix; get the folder again") from error
        if read is None or module not in run:
            raise DeltaError(
                f"HF peft's {adapter.config['peft_type']} of {module} is no change of its weight, for it is a "
                f"{type(layer).__name__} with groups, dilation or a forward of its own; train without it"
            )
        edit = method.edit(module, "weight", **read[0])
        with torch.device("meta"):
            expected = method.to_peft(edit.build(), layer)
        assert expected is not None, "what peft computes is read and written on the same layers"
        _check(module, saved, expected, base)
        yield edit, read[1]


def _check(module: str, saved: PeftLayer, expected: PeftLayer, base: Base) -> None:
    """Refuse the tensors of a layer where they are not those that it takes."""
    if strange := next((name for name in saved.tensors if name not in expected.tensors), None):
        several = any(f"{name.split('.')[0]}." in strange and name != strange for name in expected.tensors)
        why = "tensors carry the name of an adapter, as if there were several" if several else "nothing here reads it"
        raise DeltaError(f"the folder has {module}.{strange}: {why}; give a folder that peft's save_pretrained wrote")
    for name, tensor in expected.tensors.items():
        if saved.tensors[name].shape != tensor.shape:
            rank = f" at r={saved.fields['r']}" if "r" in saved.fields else ""
            folder, layer = _shape(saved.tensors[name]), _shape(tensor)
            raise _other_base(base, f"{module}.{name} is {folder} in the folder, but this layer takes {layer}{rank}")


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
