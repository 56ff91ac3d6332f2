"""The folder of results: one JSON file per cell, whole or absent.

RESULTS/benchmark.json      what was asked for
RESULTS/cells/HASH.json     a cell that is done
RESULTS/failed/HASH.json    one that failed
RESULTS/trials/HASH.json    a run that chose an option, on training images held back
RESULTS/runs/HASH/          what train() left; nothing here reads it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

from .. import schema
from ..errors import ConfigError
from ..schema import Json, Malformed
from .grid import hash_of

FORMAT = 1
if TYPE_CHECKING:
    Count: TypeAlias = int
    Number: TypeAlias = float
else:  # a file may hold any number, NaN included
    Count = Number = Real
Numbers: TypeAlias = Mapping[str, Number | None]


class CellSpec(TypedDict):
    """The definition of a cell. Its hash is of all that stands there, of which this is what tables need."""

    model: Any
    data: Any
    seed: int
    freeze: int | list[int | str]
    options: Mapping[str, object]
    own: Sequence[str]


class CellNames(TypedDict):
    """The names of a cell in a table."""

    model: str
    data: str
    method: str


class Parameters(TypedDict):
    """Counts of a model's parameters: all, and those that train in body and head."""

    total: Count
    body: Count
    head: Count


class Measured(TypedDict, total=False):
    """Measurements of a run; older ones did not measure all of it."""

    saved_bytes: Count | None
    live_bytes: Count | None
    peak_bytes: Count | None
    peak_measure: str | None
    step_seconds: Number | None
    cuda: Numbers | None
    state_bytes: Numbers | None
    seconds_by_part: Numbers | None
    saved_by_stage: Numbers | None
    saved_by_cause: Numbers | None


class _Run(TypedDict):
    after: Numbers
    parameters: Parameters
    measured: Measured
    history: Sequence[Numbers]
    delta_bytes: dict[str, Count] | None


class RunRecord(_Run, total=False):
    """The part of ``run.json`` that a row is made of."""

    before: Numbers | None
    arguments: Mapping[str, object] | None
    versions: Mapping[str, object] | None


class States(TypedDict):
    """The treatment of batch norm and of the head, and the level of lean training."""

    bn: str
    head: str
    lean: str


class _Retained(TypedDict):
    before: Number
    after: Number


class Retained(_Retained, total=False):
    """Scores on the old classes, before and after."""

    per_class: Mapping[str, tuple[Number, Number]] | None
    metric: str
    data: str


class _Result(TypedDict):
    cell: CellSpec
    names: CellNames
    score: str
    run: RunRecord
    states: States
    evidence: Mapping[str, str] | None
    seconds: Number
    format: int
    hash: str


class Pictures(TypedDict, total=False):
    """JPEGs of validation images in base64, with their labels and with predictions."""

    labels: Sequence[str] | None
    after: Sequence[str] | None


class CellResult(_Result, total=False):
    """The file of a cell that is done."""

    task: str | None
    retained: Retained | None
    pictures: Pictures | None
    command: str | None
    environment: Mapping[str, object] | None
    chosen: Any
    interval: Any
    train_seconds: Any


class _Failure(TypedDict):
    cell: Mapping[str, object]
    names: Mapping[str, object]
    error: str
    kind: str
    format: int
    hash: str


class CellFailure(_Failure, total=False):
    """The file of a cell that failed."""

    log: Any
    seconds: Any


class _Trial(TypedDict):
    cell: Mapping[str, object]
    score: Number | None
    seconds: Number
    format: int
    hash: str


class TrialResult(_Trial, total=False):
    """The file of a run that chose an option."""

    error: Any


_KINDS: dict[str, type] = {"cells": CellResult, "failed": CellFailure, "trials": TrialResult}


@overload
def read(out: str | Path, kind: Literal["cells"] = "cells") -> list[CellResult]: ...
@overload
def read(out: str | Path, kind: Literal["failed"]) -> list[CellFailure]: ...
@overload
def read(out: str | Path, kind: str) -> list[Any]: ...
def read(out: str | Path, kind: str = "cells") -> list[Any]:
    """Return the contents of a folder of results, in the order of the files' names.

    Args:
        out: The folder.
        kind: "cells", "failed" or "trials".

    Raises:
        ConfigError: There is no such folder, or a file in it is truncated or of something else.
    """
    if not Path(out).is_dir():
        raise ConfigError(f"there are no results in {out}; give the folder that a benchmark wrote into")
    return [load(file, kind) for file in sorted((Path(out) / kind).glob("*.json")) if not file.name.startswith(".")]


def load(file: Path, kind: str) -> Any:
    """Return one file's content.

    Raises:
        ConfigError: It is truncated, or of something else.
    """
    where = f"{file} is not a file of a benchmark's {kind}"
    instead = "move it out of the folder; every other result stays, and its own is made again"
    try:
        content = schema.check(Json, schema.parse(file.read_bytes()))
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
