"""What the verbs are given, made whole: the family of a model, its defaults, options told apart, values refused."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import scenes
from .core.base_model import Base, Data
from .core.method import Method, make_method, restore_method
from .errors import ConfigError, ModelError, nearest
from .families.base import Family
from .lean import LEVELS
from .registry import FAMILIES


def find_family(source: str) -> Family:
    """Return the family that a model's name or path belongs to.

    Raises:
        ModelError: No family knows it.
    """
    families = [cls() for cls in FAMILIES.values()]
    for family in families:
        if family.supports(source):
            return family
    known = [name for family in families for name in family.model_names()]
    raise ModelError(
        f"no family knows the model '{source}'; give yolo11n.pt, a .pt file or timm/NAME.{nearest(source, known)}"
    )


def check_names(**given: Any) -> None:
    """Refuse what can be no name and no path: a model, a list of files.

    Raises:
        ConfigError: One is of another type.
    """
    for name, value in given.items():
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"{name} is of the type {type(value).__name__}, which cannot be used; give a name or a path")


def split_options(
    family: Family,
    method: Any,
    freeze: Any,
    options: Mapping[str, Any],
    own: Iterable[str] = (),
    configured: Mapping[str, Any] | None = None,
) -> tuple[Method, dict[str, Any]]:
    """Tell the method's fields from the family's arguments; refuse what is neither.

    Args:
        family: Of the model.
        method: As for `train`.
        freeze: As for `train`.
        options: What was given.
        own: Arguments of the verb itself, to suggest.
        configured: All of the method's settings, as a run that is resumed wrote them down.

    Raises:
        ConfigError: There is no such option.
    """
    if configured is not None:
        if strange := set(options) - set(family.train_options()):
            raise ConfigError(
                f"'{min(strange)}' is no argument of the {family.name} family; the run's train.json was altered"
            )
        return restore_method(method, configured), dict(options)
    plain = make_method(method, {}, freeze)
    parts = getattr(plain, "methods", (plain,))
    fields = [f.name for part in parts for f in dataclasses.fields(part)]
    arguments = set(family.train_options())
    for name in options:
        if name in family.refused:
            raise ConfigError(f"'{name}' is not for train: {family.refused[name]}")
        if name not in fields and name not in arguments:
            hint = nearest(name, [*fields, *own, *arguments])
            has = f"method '{plain.name}' has {', '.join(fields)}" if fields else f"method '{plain.name}' has no settings"
            raise ConfigError(f"'{name}' is no setting of train or of the {family.name} family; {has}.{hint}")
    tuning = make_method(method, {k: v for k, v in options.items() if k in fields}, freeze)
    return tuning, {k: v for k, v in options.items() if k not in fields}


def views_of(family: Family, cache: Any, extra: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Tell a number of stored views from a family's own argument of that name; returns it and the family's arguments."""
    if cache is False or cache is None:
        return 0, extra
    if isinstance(cache, int) and not isinstance(cache, bool):
        if cache < 0:
            raise ConfigError(f"cache={cache} is not usable; give the number of views of every image to keep, 0 for none")
        return cache, extra
    if "cache" not in family.train_options() or cache not in (True, "ram", "disk"):
        own = ", or 'ram', 'disk' or True (keep the images)" if "cache" in family.train_options() else ""
        raise ConfigError(f"cache={cache!r} is not known; give the number of views of every image to keep{own}")
    return 0, {**extra, "cache": cache}


def check_settings(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse values that no family can use; `settings` are those with defaults of the family, `given` the others.

    Raises:
        ConfigError: One is not usable.
    """
    if not isinstance(settings["optimizer"], str):
        raise ConfigError(f"optimizer={settings['optimizer']} is not usable; give a name, e.g. 'AdamW' or 'SGD'")
    if settings["optimizer"].lower() == "auto":
        raise ConfigError("optimizer='auto' ignores lr0 and picks its own; name one, e.g. 'AdamW' or 'SGD'")
    choices = {"head": ("keep", "rebuild"), "delta_dtype": ("fp16", "fp32"), "lean": ("off", *LEVELS)}
    for name, allowed in choices.items():
        if (value := {**given, **settings}.get(name, allowed[0])) not in allowed:
            raise ConfigError(f"{name}='{value}' is not known; it is {' or '.join(map(repr, allowed))}")
    wholes = {"epochs": (1, settings), "imgsz": (1, settings), "workers": (0, settings), "seed": (0, {"seed": 0, **given})}
    for name, (least, where) in wholes.items():
        value = where[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
            raise ConfigError(f"{name}={value} is not usable; it must be a whole number of at least {least}")
    batch = settings["batch"]
    number = isinstance(batch, int | float) and not isinstance(batch, bool)
    if not number or not (batch == -1 or 0 < batch < 1 or (batch >= 1 and batch == int(batch))):
        raise ConfigError(f"batch={batch} is not usable; it must be at least 1 (or -1: as much as fits on the GPU)")
    for name, value in (("lr0", settings["lr0"]), ("lr_scale", given.get("lr_scale"))):
        if value is not None and not (isinstance(value, int | float) and 0 < value < 1e3):
            raise ConfigError(f"{name}={value} is not usable; it must be a number above 0")
    minutes = given.get("save_every", 0)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
        raise ConfigError(f"save_every={minutes} is not usable; it must be a number of minutes, or 0: only after epochs")


def device_of(device: Any) -> str:
    """Return a device as text, "cpu" or "0,1"; by default a GPU where there is one."""
    if device is None:
        return "0" if torch.cuda.is_available() else "cpu"
    return ",".join(map(str, device)) if isinstance(device, list | tuple) else str(device)


def loader_arguments(given: Any) -> dict[str, Any]:
    """Return the further arguments of a model's loader, files by paths that hold in any folder.

    Raises:
        ConfigError: They are no names with values.
    """
    if not isinstance(given or {}, Mapping):
        raise ConfigError(f"model_args={given!r} is not usable; give names with values, e.g. {{'num_classes': 10}}")
    return {k: resolve_path(v) if isinstance(v, str | Path) else v for k, v in (given or {}).items()}


def resolve_path(source: str | Path) -> str:
    """Return the name of a model as it is, the path of a file so that it holds in any folder."""
    path = Path(source)
    return str(path.resolve()) if path.parent != Path(".") and path.is_file() else str(source)


def fitted(
    family: Family, base: Base, data: Any, head: str | None, allow_download: bool = False
) -> tuple[Base, nn.Module, Data | None]:
    """Return the base, made for the data's images, and with its head made for the data, or its own where there are none."""
    names, outputs, checked = base.names, {}, None
    if data:
        checked = family.read_data(scenes.find(data), base, allow_download=allow_download)
        names, outputs = checked.names, checked.outputs
        base, _ = family.suited(base, checked)
    return base, family.with_head(base, names, head or family.defaults_for(base)["head"], **outputs), checked
