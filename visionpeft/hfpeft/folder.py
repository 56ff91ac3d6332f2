"""The folder: what its two files hold, and which modules peft means by the names in its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from .. import schema
from ..core.delta import KEY, Facts, read_metadata
from ..errors import DeltaError
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
    """A folder's content.

    Attributes:
        config: Of ``adapter_config.json``.
        tensors: Of ``adapter_model.safetensors``, less the prefix that all names share.
        header: What visionpeft said of the delta that it wrote the folder from; empty in folders of others.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def fields(self, module: str) -> dict[str, Any]:
        """Return the configuration as it holds for one layer: numbers for patterns, and whether a list means it.

        Raises:
            DeltaError: A pattern in it is no regular expression.
        """
        found = dict(self.config)
        for field in LISTS:
            wanted = self.config.get(field) or []
            found[field] = _meant(wanted, module) if isinstance(wanted, str) else module.endswith(tuple(wanted))
        for field, pattern in PATTERNS.items():
            values = self.config.get(pattern) or {}
            key = next((k for k in values if _matches(rf"(.*\.)?({k})$", module, k)), None)
            if field in found and key is not None:
                found[field] = values[key]
            whole = "whole " * (field == "r")
            if field in found and not (schema.finite(found[field]) and (not whole or isinstance(found[field], int))):
                raise DeltaError(
                    f"{CONFIG} has {found[field]!r} as {field} of {module}, which is no {whole}number; get the file again"
                )
        return found

    def targets(self, names: Iterable[str]) -> list[str]:
        """Return those of a model's modules that peft would put an adapter on, as far as names alone say it."""
        wanted, excluded = self.config.get("target_modules") or [], self.config.get("exclude_modules") or []
        saved = self.config.get("modules_to_save") or []
        return [
            name
            for name in names
            if _meant(wanted, name) and not _meant(excluded, name) and not any(excludes(s, name) for s in saved)
        ]

    def saved(self, names: Iterable[str]) -> list[str]:
        """Return those of a model's modules that peft saves as a whole."""
        wanted = self.config.get("modules_to_save") or []
        return [name for name in names if name and name.endswith(tuple(wanted))]


def target_names(wanted: Sequence[str], names: Iterable[str]) -> list[str] | str:
    """Return what `target_modules` must say to mean exactly `wanted` of a model's modules.

    A list means endings, too ("conv1" is also "layer1.0.conv1"); where that is too much, it is a regular expression.
    """
    exact = not any(n not in wanted and n.endswith(tuple(f".{w}" for w in wanted)) for n in names)
    return list(wanted) if exact else "|".join(re.escape(name) for name in wanted)


def meant_too(saved: str, names: Iterable[str]) -> list[str]:
    """Return what else of a model's modules `modules_to_save` means by the name of one: endings, even of half a name."""
    return [name for name in names if name != saved and name.endswith(saved)]


def excludes(saved: str, target: str) -> bool:
    """Say whether peft puts no adapter on a target because of a name in `modules_to_save`."""
    return _matches(rf"(^|.*\.){saved}($|\..*)", target, saved)


def pattern_of(module: str) -> str:
    """Return the key that means one module in `rank_pattern` and `alpha_pattern`, where peft prepends ``(.*\\.)?``."""
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
        found = load_tensors(path.read_bytes())
        header = schema.parse(text) if text else {}
    except (SafetensorError, Malformed) as error:
        raise DeltaError(f"{path} is damaged ({error}); get the file again") from error
    try:
        _ = header and schema.check(Facts, header)
    except Malformed as error:
        raise DeltaError(f"what visionpeft wrote into {path} of the delta cannot be used: {error}") from error
    if bad := next((k for k, v in found.items() if v.is_floating_point() and not torch.isfinite(v).all()), None):
        raise DeltaError(f"{path} has values in {bad} that are no finite numbers; train anew, with a lower learning rate")
    if strange := next((k for k in sorted(found) if not k.startswith(PREFIX)), None):
        raise DeltaError(f"{path} has a tensor '{strange}', but peft's begin with {PREFIX}; give a folder that peft wrote")
    return Adapter(config, {k.removeprefix(PREFIX): v for k, v in sorted(found.items())}, header)


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


def _read_config(path: Path) -> dict[str, Any]:
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
            given = f"{name}={schema.shown(config[name])}"
            raise DeltaError(f"{path} has {given}, which is not what peft writes there; get the file again") from None
    return config


def _meant(wanted: Sequence[str] | str, name: str) -> bool:
    """Say whether `target_modules` or the like means a module."""
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


def as_json(config: Mapping[str, Any]) -> str:
    """Return a configuration as peft writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
