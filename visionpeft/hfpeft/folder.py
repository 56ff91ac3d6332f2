"""The folder: its two files, and the modules that the names in its configuration mean to peft."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from .. import schema
from ..core.base_model import Base
from ..core.delta import KEY, Facts, read_metadata
from ..core.method import PeftFields
from ..errors import DeltaError
from ..families.introspect import observe
from ..schema import Malformed
from .patterns import matches

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."  # of every tensor's name: peft wraps a model twice
LISTS = ("feedforward_modules",)  # fields that list the layers for which they are true
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}  # fields that layers may differ in
_KINDS: dict[str, Any] = {  # of those fields that are read
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), list[str] | str),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, Any]),
    **dict.fromkeys(("r", "decompose_factor"), int),
    **dict.fromkeys(("lora_alpha", "alpha"), float),
    **dict.fromkeys(("use_rslora", "use_dora", "decompose_both", "fan_in_fan_out"), bool),
    "modules_to_save": list[str],
    "init_lora_weights": bool | str,
    "peft_version": str,
}


@dataclass(frozen=True)
class Adapter:
    """The content of a folder.

    Attributes:
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``, without the prefix that all names share.
        header: The header of the delta that visionpeft wrote the folder from; empty in folders of others.
    """

    config: PeftFields
    tensors: dict[str, Tensor]
    header: schema.Json

    def fields(self, module: str) -> PeftFields:
        """Return the configuration of one layer: its number for a pattern, true or false for a list of layers.

        Raises:
            DeltaError: A pattern in it is no regular expression.
        """
        fields = dict(self.config)
        for field in LISTS:
            wanted = self.config.get(field) or []
            fields[field] = _selects(wanted, module) if isinstance(wanted, str) else module.endswith(tuple(wanted))
        for field, pattern in PATTERNS.items():
            values = self.config.get(pattern) or {}
            key = next((k for k in values if _matches(rf"(.*\.)?({k})$", module, k)), None)
            if field in fields and key is not None:
                fields[field] = values[key]
            whole = "whole " * (field == "r")
            if field in fields and not (schema.finite(fields[field]) and (not whole or isinstance(fields[field], int))):
                raise DeltaError(
                    f"{CONFIG} has {fields[field]!r} as {field} of {module}, which is no {whole}number; get the file again"
                )
        return fields

    def targets(self, names: Iterable[str]) -> list[str]:
        """Return the modules of a model that peft would put an adapter on, by their names alone."""
        wanted, excluded = self.config.get("target_modules") or [], self.config.get("exclude_modules") or []
        saved = self.config.get("modules_to_save") or []
        return [
            name
            for name in names
            if _selects(wanted, name) and not _selects(excluded, name) and not any(excludes(s, name) for s in saved)
        ]

    def saved(self, names: Iterable[str]) -> list[str]:
        """Return the modules of a model that peft saves as a whole."""
        wanted = self.config.get("modules_to_save") or []
        return [name for name in names if name and name.endswith(tuple(wanted))]


def target_names(wanted: Sequence[str], names: Iterable[str]) -> list[str] | str:
    """Return the `target_modules` that select exactly `wanted` of a model's modules.

    A list selects by endings, too ("conv1" is also "layer1.0.conv1"); where that is too much, it is a regular expression.
    """
    exact = not any(n not in wanted and n.endswith(tuple(f".{w}" for w in wanted)) for n in names)
    return list(wanted) if exact else "|".join(re.escape(name) for name in wanted)


def saved_too(saved: str, names: Iterable[str]) -> list[str]:
    """Return the further modules that a name in `modules_to_save` selects: all that end like it, even by half a name."""
    return [name for name in names if name != saved and name.endswith(saved)]


def excludes(saved: str, target: str) -> bool:
    """Return whether a name in `modules_to_save` keeps peft from putting an adapter on a target."""
    return _matches(rf"(^|.*\.){saved}($|\..*)", target, saved)


def pattern_of(module: str) -> str:
    """Return the key that selects one module in `rank_pattern` and `alpha_pattern`, where peft prepends ``(.*\\.)?``."""
    return f"^{re.escape(module)}"


def read(folder: str | Path) -> Adapter:
    """Read a folder that peft, or `write`, has written. Nothing is ever unpickled.

    Raises:
        DeltaError: A file is missing or damaged, or it holds something else than one adapter.
    """
    folder = Path(folder)
    _check_files(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        text = read_metadata(path).get(KEY)
        tensors = load_tensors(path.read_bytes())
        header = schema.parse(text) if text else {}
    except (SafetensorError, Malformed) as error:
        raise DeltaError(f"{path} is damaged ({error}); get the file again") from error
    try:
        _ = header and schema.check(Facts, header)
    except Malformed as error:
        raise DeltaError(f"what visionpeft wrote into {path} of the delta cannot be used: {error}") from error
    if bad := next((k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()), None):
        raise DeltaError(f"{path} has values in {bad} that are no finite numbers; train anew, with a lower learning rate")
    if strange := next((k for k in sorted(tensors) if not k.startswith(PREFIX)), None):
        raise DeltaError(f"{path} has a tensor '{strange}', but peft's begin with {PREFIX}; give a folder that peft wrote")
    return Adapter(config, {k.removeprefix(PREFIX): v for k, v in sorted(tensors.items())}, header)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise DeltaError(f"there is no folder {folder}; give one that peft's save_pretrained wrote")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if not missing:
        return
    if inside := sorted(f.parent.name for f in folder.glob(f"*/{CONFIG}")):
        raise DeltaError(f"{folder} holds several adapters ({', '.join(inside)}); give the folder of one of them")
    if missing == [WEIGHTS] and (folder / "adapter_model.bin").is_file():
        raise DeltaError(
            f"{folder} has its tensors in adapter_model.bin, a pickle, which is never opened; save them from peft with "
            "safe_serialization=True"
        )
    raise DeltaError(f"{folder} has no {' and no '.join(missing)}; give a folder that peft's save_pretrained wrote")


def _read_config(path: Path) -> PeftFields:
    try:
        config = schema.parse(path.read_bytes())
    except Malformed as error:
        raise DeltaError(f"{path} is no JSON that can be read ({error}); get the file again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise DeltaError(f"{path} says no peft_type, so it is no configuration of an adapter; give one that peft wrote")
    for name in _KINDS.keys() & config.keys():
        try:
            schema.check(_KINDS[name] | None, config[name])
        except Malformed:
            field = f"{name}={schema.shown(config[name])}"
            raise DeltaError(f"{path} has {field}, which is not what peft writes there; get the file again") from None
    return config


def _selects(wanted: Sequence[str] | str, name: str) -> bool:
    """Return whether `target_modules`, or a field like it, selects a module."""
    if isinstance(wanted, str):
        return _matches(f"(?:{wanted})$", name, wanted)
    return f".{name}".endswith(tuple(f".{w}" for w in wanted))


def _matches(pattern: str, name: str, given: str) -> bool:
    try:
        return matches(pattern, name, given)
    except ValueError as error:
        shown = given if len(given) < 80 else f"{given[:80]}…"
        raise DeltaError(
            f"{CONFIG} has '{shown}', which is no regular expression that is read here ({error}); write out the names"
        ) from None


def called(model: nn.Module, names: Iterable[str], base: Base) -> set[str]:
    """Return those modules that the model calls. On one whose weight it only reads, peft's adapter has no effect."""
    side = base.facts["imgsz"]
    return set(observe(model, torch.zeros(1, base.facts.get("channels", 3), side, side), names))


def as_json(config: PeftFields) -> str:
    """Return a configuration as peft writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
