"""The folder of results: one JSON file per cell, whole or absent.

RESULTS/benchmark.json      what was asked for
RESULTS/cells/HASH.json     a cell that is done
RESULTS/failed/HASH.json    one that failed
RESULTS/trials/HASH.json    a run that chose an option, on training images held back
RESULTS/runs/HASH/          what train() left; nothing here reads it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from .. import schema
from ..errors import ConfigError
from ..schema import Malformed
from .grid import hash_of

FORMAT = 1
Numbers = Mapping[str, Real | None]


@dataclass(frozen=True)
class Spec:
    """What a cell is; its hash is of this, and of whatever else stands there."""

    model: Any
    data: Any
    seed: int
    freeze: int | Sequence[int | str]
    options: Mapping[str, Any]
    own: Sequence[str]


@dataclass(frozen=True)
class Names:
    """What a table calls a cell."""

    model: str
    data: str
    method: str


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has, and how many of them train."""

    total: Real
    body: Real
    head: Real


@dataclass(frozen=True)
class Measured:
    """What a run measured; older ones did not measure all of it."""

    saved_bytes: Real | None = None
    live_bytes: Real | None = None
    peak_bytes: Real | None = None
    peak_measure: str | None = ""
    step_seconds: Real | None = None
    cuda: Numbers | None = None
    state_bytes: Numbers | None = None
    seconds_by_part: Numbers | None = None
    saved_by_stage: Numbers | None = None
    saved_by_cause: Numbers | None = None


@dataclass(frozen=True)
class Ran:
    """Of ``run.json``, what a row is made of."""

    after: Numbers
    parameters: Parameters
    measured: Measured
    history: Sequence[Numbers]
    delta_bytes: Numbers | None
    before: Numbers | None = None
    arguments: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class States:
    """What a row must say of itself beside its numbers."""

    bn: str
    head: str
    lean: str


@dataclass(frozen=True)
class Retained:
    """What is left of the old classes."""

    before: Real
    after: Real
    per_class: Mapping[str, tuple[Real, Real]] | None = None


@dataclass(frozen=True)
class Done:
    """A cell that is done."""

    cell: Spec
    names: Names
    score: str
    run: Ran
    states: States
    evidence: Mapping[str, str] | None
    seconds: Real
    format: int
    hash: str
    task: str | None = ""
    retained: Retained | None = None
    pictures: Mapping[str, Sequence[str] | None] | None = None
    command: str | None = ""
    environment: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Failed:
    """A cell that failed."""

    cell: Mapping[str, Any]
    names: Mapping[str, Any]
    error: str
    kind: str
    format: int
    hash: str


@dataclass(frozen=True)
class Trial:
    """A run that chose an option."""

    cell: Mapping[str, Any]
    score: Real | None
    seconds: Real
    format: int
    hash: str


_KINDS: dict[str, type] = {"cells": Done, "failed": Failed, "trials": Trial}


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
        content = schema.check(dict[str, Any], schema.parse(file.read_bytes()))
        if (written := content.get("format", FORMAT)) != FORMAT:
            raise ConfigError(
                f"{file} has format {schema.shown(written)}, this visionpeft reads {FORMAT}; use the one that wrote it"
            )
        schema.check(_KINDS[kind], content, newer=False)
    except (OSError, Malformed) as error:
        raise ConfigError(f"{where} ({' '.join(str(error).split())}); {instead}") from error
    if hash_of(content["cell"]) != file.stem:
        raise ConfigError(f"{where} (its configuration is not that of its name: it was altered or renamed); {instead}")
    if kind == "cells" and content["run"]["after"].get(content["score"]) is None:
        raise ConfigError(f"{where} (its run has no {content['score']}); {instead}")
    return content
