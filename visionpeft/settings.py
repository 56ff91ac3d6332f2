"""What the verbs are given, made whole: the family of a model, options told apart, names and devices resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from . import sources
from .config import OPTIONS, ModelArgs, Options, TrainConfig
from .core.base_model import Base, Data
from .core.method import Method, make_method, restore_method
from .errors import ConfigError, ModelError, nearest
from .families.base import Family
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


def split_options(
    family: Family, config: TrainConfig, own: Iterable[str] = OPTIONS, configured: Options | None = None
) -> tuple[Method, TrainConfig]:
    """Tell the method's fields from the family's arguments; refuse what is neither.

    Args:
        family: Of the model.
        config: Its `options` are of both.
        own: Arguments of the verb itself, to suggest.
        configured: All of the method's settings, as a run that is resumed wrote them down.

    Returns:
        The method, and the configuration with its name, and with the family's options alone.

    Raises:
        ConfigError: There is no such option.
    """
    options, arguments = dict(config.options), {*family.train_options()}
    if configured is not None:
        if strange := options.keys() - arguments:
            raise ConfigError(
                f"'{min(strange)}' is no argument of the {family.name} family; the run's train.json was altered"
            )
        method = restore_method(str(config.method), configured)
    else:
        plain = make_method(config.method, {}, config.freeze)
        fields = [f.name for part in getattr(plain, "methods", (plain,)) for f in dataclasses.fields(part)]
        for name in options:
            if name in family.refused:
                raise ConfigError(f"'{name}' is not for train: {family.refused[name]}")
            if name not in fields and name not in arguments:
                hint = nearest(name, [*fields, *own, *arguments])
                has = f"method '{plain.name}' has {', '.join(fields) or 'no settings'}"
                raise ConfigError(f"'{name}' is no setting of train or of the {family.name} family; {has}.{hint}")
        method = make_method(config.method, {k: options.pop(k) for k in fields if k in options}, config.freeze)
    return method, replace(config, method=method.name, options=_with_cache(options, config.cache, arguments))


def _with_cache(options: Options, cache: Any, arguments: set[str]) -> Options:
    """Return the family's options, among them its own meaning of `cache`, where that is no number of stored views."""
    if cache is False or cache is None:
        return options
    if isinstance(cache, int) and not isinstance(cache, bool):
        if cache < 0:
            raise ConfigError(f"cache={cache} is not usable; give the number of views of every image to keep, 0 for none")
        return options
    if "cache" not in arguments or cache not in (True, "ram", "disk"):
        own = ", or 'ram', 'disk' or True (keep the images)" if "cache" in arguments else ""
        raise ConfigError(f"cache={cache!r} is not known; give the number of views of every image to keep{own}")
    return {**options, "cache": cache}


def loader_arguments(given: Any) -> ModelArgs:
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


def build_with_head(family: Family, base: Base, config: TrainConfig) -> tuple[Base, nn.Module, Data | None]:
    """Return the base, made for the data's images, and with its head made for the data, or its own where there are none."""
    names, outputs, checked = base.names, {}, None
    if config.data:
        checked = family.read_data(sources.find(config.data), base, allow_download=config.allow_download)
        names, outputs = checked.names, checked.outputs
        base, _ = family.suited(base, checked)
    head = config.head or family.defaults_for(base)["head"]
    return base, family.with_head(base, names, head, **outputs), checked
