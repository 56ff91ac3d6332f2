"""The folder of results: one JSON file per cell, whole or absent.

RESULTS/benchmark.json      what was asked for
RESULTS/cells/HASH.json     a cell that is done
RESULTS/failed/HASH.json    one that failed
RESULTS/trials/HASH.json    a run that chose an option, on training images held back
RESULTS/runs/HASH/          what train() left; nothing here reads it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .grid import hash_of

FORMAT = 1
_KEYS = {
    "cells": {"format", "hash", "cell", "names", "score", "run", "states", "evidence", "seconds"},
    "failed": {"format", "hash", "cell", "names", "error", "kind"},
    "trials": {"format", "hash", "cell", "score", "seconds"},
}
_WITHIN = {  # a cell: what a row is made of
    "cell": {"seed", "freeze", "options", "own"},
    "names": {"model", "data", "method"},
    "run": {"after", "parameters", "measured", "history", "delta_bytes"},
    "states": {"bn", "head", "lean"},
}


def read(out: str | Path, kind: str = "cells") -> list[dict[str, Any]]:
    """Return what a folder of results holds, in the order of the files' names.

    Args:
        out: The folder.
        kind: "cells", "failed" or "trials".

    Raises:
        ConfigError: There is no such folder, or a file in it is truncated or of something else.
    """
    if not Path(out).is_dir():
        raise ConfigError(f"there are no results in {out}; give the folder that a benchmark wrote into")
    return [load(file, kind) for file in sorted((Path(out) / kind).glob("*.json")) if not file.name.startswith(".")]


def load(file: Path, kind: str) -> dict[str, Any]:
    """Return one file's content.

    Raises:
        ConfigError: It is truncated, or of something else.
    """
    where = f"{file} is not a file of a benchmark's {kind}"
    instead = "move it out of the folder; every other result stays, and its own is made again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} ({' '.join(str(error).split())}); {instead}") from error
    if missing := _missing(content, _KEYS[kind]):
        raise ConfigError(f"{where} (it has no {missing}); {instead}")
    if content["format"] != FORMAT:
        raise ConfigError(
            f"{file} has format {content['format']}, this visionpeft reads {FORMAT}; use the one that wrote it"
        )
    if hash_of(content["cell"]) != file.stem:
        raise ConfigError(f"{where} (its configuration is not that of its name: it was altered or renamed); {instead}")
    for part, keys in _WITHIN.items() if kind == "cells" else ():
        if missing := _missing(content[part], keys):
            raise ConfigError(f"{where} (its {part} has no {missing}); {instead}")
    if kind == "cells" and (missing := _missing(content["run"]["after"], {content["score"]})):
        raise ConfigError(f"{where} (its run has no {missing}); {instead}")
    return content


def _missing(content: Any, keys: set[str]) -> str:
    """Return one of the keys that content lacks; nothing where it has them all."""
    if not isinstance(content, dict):
        return "keys"
    return min(keys - content.keys(), default="")
