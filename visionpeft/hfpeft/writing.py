"""A delta as a folder for peft: an adapter where peft has the method, all else as modules that are saved as a whole."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .. import files
from ..core import attach as attaching
from ..core.anatomy import inside
from ..core.base_model import Base
from ..core.delta import KEY, Delta
from ..core.method import Edit, PeftFields, PeftLayer, restore_method
from ..core.plan import Plan
from ..errors import ConfigError
from ..registry import METHODS
from ..tables import escaped
from .folder import (
    CARD,
    CONFIG,
    LISTS,
    PATTERNS,
    PREFIX,
    WEIGHTS,
    as_json,
    called,
    excludes,
    pattern_of,
    saved_too,
    target_names,
)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Parts:
    """A delta, divided as peft is to hold it.

    Attributes:
        layers: Layers with an adapter, by module.
        whole: Modules that are saved as a whole, with everything in them.
        merged: Those of them whose update by the method peft would compute wrongly, or cannot name apart.
    """

    layers: dict[str, PeftLayer]
    whole: tuple[str, ...]
    merged: tuple[str, ...]


def write(model: nn.Module, delta: Delta, base: Base, opening: str, out: str | Path, exist_ok: bool = False) -> Path:
    """Write a delta as a folder that ``peft.PeftModel.from_pretrained`` reads, with equal outputs.

    Args:
        model: The base with the delta on it.
        delta: The delta.
        base: The base.
        opening: Lines of Python that make the model, called ``model``, to which peft is to add the adapter.
        out: The folder.
        exist_ok: Replace a folder that is there, where it holds nothing else.

    Raises:
        ConfigError: peft has nothing that computes the same, or the folder is there.
    """
    parts = divide(model, delta, base)
    state = attaching.merge(copy.deepcopy(model)).state_dict()
    saved = {k: v for k, v in state.items() if k.startswith(tuple(f"{m}." for m in parts.whole))}
    adapters = {f"{m}.{name}": t for m, layer in parts.layers.items() for name, t in layer.tensors.items()}
    tensors = {f"{PREFIX}{k}": _whole(v) for k, v in {**adapters, **saved}.items()}
    names = _names(model)
    config = {
        "peft_type": METHODS[delta.plan.edits[0].method].peft_type,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,  # as peft has it for models that are not of transformers
        "revision": None,
        "inference_mode": True,
        "target_modules": target_names(list(parts.layers), names),
        "modules_to_save": list(parts.whole) or None,
        **_common({m: layer.fields for m, layer in parts.layers.items()}),
    }
    header = {k: v for k, v in delta.header.items() if k not in ("plan", "bytes", "checksum", "format")}
    metadata = {KEY: json.dumps(header, sort_keys=True, separators=(",", ":"))}  # one key: several come in any order
    contents: dict[str, bytes | str] = {
        CONFIG: as_json(config),
        WEIGHTS: save_tensors(tensors, metadata),
        CARD: _card(delta, parts, opening),
    }
    return files.folder(out, contents, exist_ok)


def divide(model: nn.Module, delta: Delta, base: Base) -> Parts:
    """Divide a delta into an adapter for peft and modules that are saved as a whole.

    Raises:
        ConfigError: peft computes nothing the same.
    """
    plan = delta.plan
    _check_method(plan)
    method = next(m for m in restore_method(plan.method, plan.settings).parts if m.name == plan.edits[0].method)
    run = called(model, [e.module for e in plan.edits], base)
    edited = {e.module: method.to_peft(*_part(model, e)) if e.module in run else None for e in plan.edits}
    layers = {module: layer for module, layer in edited.items() if layer is not None}
    if not layers:
        raise ConfigError(
            f"HF peft computes something else on all {len(edited)} layers that {method.name} edits here (convolutions with "
            "groups, dilation or weights that are not read as they are), so there is nothing to export; use merge"
        )
    changed = {k.rpartition(".")[0] for k in delta.tensors if not attaching.is_added(k)}
    head = {k.rpartition(".")[0] for k in model.state_dict() if inside(k, plan.heads)}  # a new head is nowhere else
    whole = {*(m for m, layer in edited.items() if layer is None), *changed, *head}
    _check_whole(model, whole, layers)

    def as_change(name: str) -> PeftLayer | None:
        """Return a layer of the body that trained itself as an adapter, where peft has one."""
        changed_keys = {k for k in delta.tensors if k.startswith(f"{name}.")}
        if name in head or changed_keys != {f"{name}.weight"} or not called(model, [name], base):
            return None
        return method.change_to_peft(model.get_submodule(name), base.state[f"{name}.weight"])

    _separate(_names(model), layers, whole, as_change)
    _check_whole(model, whole, layers)
    return Parts(layers, tuple(sorted(whole)), tuple(m for m in edited if m not in layers))


def _separate(
    names: Sequence[str], layers: dict[str, PeftLayer], whole: set[str], as_change: Callable[[str], PeftLayer | None]
) -> None:
    """Change `layers` and `whole` until the names in `whole` select just these modules for peft.

    A name selects all modules that end like it: "conv1" of a ResNet is also "layer1.0.conv1". Those are then saved whole,
    too; where they have adapters, the module of that name gets an adapter instead, or else theirs are merged.
    """
    pending, settled = sorted(whole), set[str]()  # settled: whole because of another's name
    while pending:
        name = pending.pop()
        others = saved_too(name, names)
        clash = [t for t in layers if t in others or excludes(name, t)]
        if clash and name not in settled and (layer := as_change(name)) is not None:
            layers[name] = layer
            whole.remove(name)
            pending = sorted(whole)
            continue
        for target in clash:
            del layers[target]
        settled |= {*others, *clash}
        pending += settled - whole
        whole |= settled


def _check_method(plan: Plan) -> None:
    """Refuse a plan that no single adapter of peft can hold."""
    used = list(dict.fromkeys(e.method for e in plan.edits))
    known = sorted(name for name, cls in METHODS.items() if cls.peft_type)
    if strange := [name for name in used if not METHODS[name].peft_type] or [plan.method] * (not used):
        raise ConfigError(f"HF peft has nothing that computes what '{strange[0]}' does; it has {', '.join(known)}")
    if len(used) > 1:
        raise ConfigError(f"an adapter of HF peft holds one method, but this delta has {' and '.join(used)}; use merge")


def _check_whole(model: nn.Module, whole: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse modules that peft cannot save as a whole."""
    for name in whole:
        if name in layers:
            raise ConfigError(
                f"{name} has an update of its weight, and a weight or bias of its own that was trained, which an adapter of "
                "HF peft cannot hold together; use merge"
            )
        if not name or isinstance(model.get_submodule(name), _CONTAINERS):
            what = f"{name} is a {type(model.get_submodule(name)).__name__}" if name else "a parameter of the model itself"
            raise ConfigError(f"HF peft saves modules as a whole, but what was trained includes {what}; use merge")
        if target := next((m for m in layers if m.startswith(f"{name}.")), None):
            raise ConfigError(
                f"HF peft would have to save {name} as a whole, but {target} inside it has an adapter, which excludes it; "
                "use merge"
            )


def _part(model: nn.Module, edit: Edit) -> tuple[nn.Module, nn.Module]:
    layer: Any = model.get_submodule(edit.module)
    return layer.peft_weight[edit.method], layer


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name and ".peft_" not in f".{name}"]


def _common(fields: Mapping[str, PeftFields]) -> PeftFields:
    """Return one configuration for all layers: the most common value of a field, and patterns for the others."""
    config: dict[str, Any] = {}
    for name in dict.fromkeys(name for of_layer in fields.values() for name in of_layer):
        values = {module: of_layer[name] for module, of_layer in fields.items()}
        first = config[name] = next(iter(values.values()))
        if name in LISTS:  # as a regular expression, for in a list even half a name counts
            config[name] = "|".join(re.escape(module) for module, true in values.items() if true) or []
        if name in PATTERNS:
            config[name] = Counter(values.values()).most_common(1)[0][0]
            config[PATTERNS[name]] = {pattern_of(m): v for m, v in values.items() if v != config[name]}
        assert name in (*LISTS, *PATTERNS) or all(v == first for v in values.values()), f"{name} is one for all layers"
    return config


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()


def _card(delta: Delta, parts: Parts, opening: str) -> str:
    """Return the README of the folder, with the exact lines that use it."""
    header = delta.header
    name, count = escaped(header["base"]["model"]), len(header["names"])
    saved = len(parts.whole) - len(parts.merged)
    notes = [f"- {len(parts.layers)} layers have an adapter."]
    if saved:
        notes.append(
            f"- {saved} modules are saved as a whole: the head, and what else was trained or has statistics that moved."
        )
    if parts.merged:
        notes.append(
            f"- {len(parts.merged)} layers have their update merged and are saved as a whole, for HF peft would compute "
            f"something else on them, or cannot tell them from others: {', '.join(map(escaped, parts.merged))}."
        )
    return f"""---
library_name: peft
---

# {delta.plan.method} of {name}, {count} classes

Trained with visionpeft {version("visionpeft")}, exported for HF peft.

```python
from peft import PeftModel

{opening}
model = PeftModel.from_pretrained(model, ".")  # or the path of this folder; in eval mode
```

{chr(10).join(notes)}
- Base: {name}; sha256 of its tensors {escaped(header["base"]["sha256"])}.
- Classes: {", ".join(escaped(header["names"][k]) for k in sorted(header["names"], key=int))}.
"""
