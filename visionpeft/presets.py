"""The YAML files of options that visionpeft ships, by name, and anybody's own, by path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, nearest
from .files import read_yaml
from .sources import packaged


def read(given: str | Path, kind: str) -> dict[str, Any]:
    """Read a YAML of options.

    Args:
        given: A path, or the name of a packaged file without its suffix.
        kind: The folder of packaged files that a name is looked up in: "train" or "benchmark".

    Raises:
        ConfigError: There is no such file, or it holds no options.
    """
    own = packaged(f"configs/{kind}")
    path = Path(given) if Path(given).suffix in (".yaml", ".yml") else own.get(str(given))
    if path is None or not path.is_file():
        raise ConfigError(
            f"there is no config '{given}'; give a YAML file, or one of {', '.join(own)}.{nearest(str(given), own)}"
        )
    try:
        values = read_yaml(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{path} holds no options; it must be a list of 'option: value' lines")
    return {name.replace("-", "_"): number(value) for name, value in values.items()}


def number(value: Any) -> Any:
    """Return 1e-3 as a number, which YAML 1.1 takes for text; in lists and mappings, too."""
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value
