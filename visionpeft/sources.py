"""From names to paths: generated sets, the detector that ships, packaged YAML files, and the cache folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from . import scenes
from .errors import ConfigError
from .files import writable


def find(source: str | Path) -> str:
    """Return the path that a name under "scenes/" stands for, and anything else as it is.

    "scenes/satellite" and the like are drawn into the cache folder (see `cache_folder`) when they are first asked for;
    "scenes/driving.pt" is the packaged detector. A file or folder of that name in the working directory goes before.

    Raises:
        ConfigError: There is no such name, or no place to draw at.
    """
    name = Path(source).as_posix()
    if not name.startswith(scenes.PREFIX) or Path(source).exists():
        return str(source)
    name = name.removeprefix(scenes.PREFIX)
    if name == scenes.WEIGHTS.name:
        return str(scenes.WEIGHTS)
    generated = scenes.find_set(name)
    folder = cache_folder() / f"{name}-{scenes.VERSION}"
    if not folder.is_dir():
        print(f"drawing {scenes.PREFIX}{name} into {folder}", file=sys.stderr)
        scenes.write(name, folder)
    return str(generated.entry(folder))


def packaged(folder: str) -> dict[str, Path]:
    """Return the YAML files that come with visionpeft, by name.

    Args:
        folder: "datasets", "configs/train" or "configs/benchmark".
    """
    here = Path(__file__).parent
    installed = here / folder
    return {f.stem: f for f in sorted((installed if installed.is_dir() else here.parent / folder).glob("*.yaml"))}


def cache_folder() -> Path:
    """Return the cache folder: $VISIONPEFT_CACHE, or the user's; the temporary folder where that is read-only.

    Raises:
        ConfigError: $VISIONPEFT_CACHE is set, and cannot be written.
    """
    if chosen := os.environ.get("VISIONPEFT_CACHE"):
        try:
            return writable(chosen)
        except ConfigError as error:
            raise ConfigError(f"cannot write to VISIONPEFT_CACHE={chosen}; set it to a folder you may write to") from error
    user = str(os.getuid()) if hasattr(os, "getuid") else ""  # the temporary folder may be everybody's
    for folder in (_user_cache() / "visionpeft", Path(tempfile.gettempdir()) / f"visionpeft{user}"):
        try:
            return writable(folder)
        except ConfigError:
            continue
    raise ConfigError("no folder to draw scenes into can be written; set VISIONPEFT_CACHE to one")


def _user_cache() -> Path:
    """Return the platform's folder for files that can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
