"""The content of a report as plain values, from the folders of results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar, cast

from .. import schema
from ..benchmark import Row, compare, read
from ..benchmark.grid import hash_of
from ..benchmark.results import CellFailure, CellResult
from ..errors import ConfigError, printable
from ..schema import Json, Malformed
from .notes import notes
from .rows import Memory, by_seed, memory_of, share
from .summary import Summary, summarise

T = TypeVar("T")

AGAINST = "full"  # the reference, where the results name none
_SETTINGS = ("imgsz", "batch", "optimizer", "lr0")  # said once where all cells of a section share them


@dataclass(frozen=True)
class Section:
    """One model on one data set.

    Attributes:
        key: Unlike any other section's, and safe as an id.
        model: Name of the model.
        data: Name of the data set.
        task: detect, classify, ...
        metric: Name of the score.
        settings: Settings that all cells share, as text.
        rows: One for each method, the best score first.
        memory: The measure of their memory.
        summary: The method that is named, and why.
    """

    key: str
    model: str
    data: str
    task: str
    metric: str
    settings: str
    rows: list[Row]
    memory: Memory
    summary: Summary

    @property
    def cells(self) -> list[CellResult]:
        """The cells of all rows, in the order of the rows and of the seeds."""
        return [cell for row in self.rows for cell in by_seed(row)]


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish."""

    cell: str  # model, data, method and seed
    kind: str  # ConfigError, OutOfMemory, ...
    error: str  # in a sentence


@dataclass(frozen=True)
class BenchmarkReport:
    """All sections, and the facts about them together.

    Attributes:
        name: Name of the sweeps.
        created: When they began.
        sections: One for each model and data set.
        failed: Cells without a result.
        against: The label of the method that others are compared with.
        methods: Methods of all sections: the reference, then the others by the share that trains, the largest first.
        notes: Notes that a reader needs.
        folders: Folders of the results, as they were given.
    """

    name: str
    created: str
    sections: list[Section]
    failed: list[Failure]
    against: str
    methods: list[str]
    notes: list[str]
    folders: list[str]

    @property
    def cells(self) -> list[CellResult]:
        """The cells of all sections."""
        return [cell for section in self.sections for cell in section.cells]


def read_report(folders: Sequence[str | Path]) -> BenchmarkReport:
    """Return the report on folders of results.

    Args:
        folders: Folders that `visionpeft benchmark` wrote into.

    Raises:
        ConfigError: A folder is missing or empty, a file in it is truncated or of something else, or the folders have
            different references.
    """
    cells = {cell["hash"]: _printable(cell) for folder in folders for cell in read(folder)}
    failed = {hash_of(cell["cell"]): _printable(cell) for folder in folders for cell in read(folder, "failed")}
    failed = {key: cell for key, cell in failed.items() if key not in cells}  # in another folder it is done
    if not cells:
        why = f" ({len(failed)} failed)" if failed else ""
        raise ConfigError(
            f"there is no finished cell in {', '.join(map(str, folders))}{why}; run `visionpeft benchmark` first"
        )
    abouts = [_printable(_about(Path(folder))) for folder in folders]
    references = sorted({str((about.get("defaults") or {}).get("against") or AGAINST) for about in abouts})
    if len(references) > 1:
        raise ConfigError(f"these results are compared with {' and '.join(references)}; give folders with one reference")
    against = references[0]
    rows = compare(cells.values(), against)
    places = dict.fromkeys((row.names["data"], row.names["model"]) for row in rows)
    sections = [
        _section(f"s{i}", [r for r in rows if (r.names["data"], r.names["model"]) == place], against)
        for i, place in enumerate(places)
    ]
    return BenchmarkReport(
        name=", ".join(dict.fromkeys(str(about["name"]) for about in abouts if about.get("name"))) or "benchmark",
        created=min((str(about["created"]) for about in abouts if about.get("created")), default="")[:16].replace("T", " "),
        sections=sections,
        failed=[_failure(cell) for cell in failed.values()],
        against=against,
        methods=_ordered(rows, against),
        notes=notes(rows, against),
        folders=[str(folder) for folder in folders],
    )


def _printable(content: T) -> T:
    """Return the content of a file, all text in it printable."""
    result: object = content
    if isinstance(content, str):
        result = printable(content)
    elif isinstance(content, Mapping):
        result = {printable(k): _printable(v) for k, v in content.items()}
    elif isinstance(content, list):
        result = [_printable(v) for v in content]
    return cast(T, result)


def _section(key: str, rows: list[Row], against: str) -> Section:
    rows = sorted(rows, key=lambda row: -row.score_mean)
    memory = memory_of(rows)
    return Section(
        key=key,
        model=rows[0].names["model"],
        data=rows[0].names["data"],
        task=rows[0].cells[0].get("task") or "",
        metric=rows[0].score,
        settings=_shared([cell["run"].get("arguments") or {} for row in rows for cell in row.cells]),
        rows=rows,
        memory=memory,
        summary=summarise(rows, memory, against),
    )


def _shared(arguments: Sequence[Mapping[str, object]]) -> str:
    first = arguments[0]
    same = [k for k in _SETTINGS if first.get(k) is not None and all(a.get(k) == first[k] for a in arguments)]
    return ", ".join(f"{k} {first[k]}" for k in same)


def _ordered(rows: Sequence[Row], against: str) -> list[str]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row.method, []).append(share(row))
    return sorted(shares, key=lambda method: (method != against, -fmean(shares[method]), method))


def _failure(cell: CellFailure) -> Failure:
    spec = cell["cell"]
    names = cell["names"].values() or [spec.get(k) for k in ("model", "data", "method")]
    label = ", ".join(map(str, (*names, f"seed {spec.get('seed')}")))
    return Failure(label, cell["kind"], " ".join(cell["error"].split()))


def _about(folder: Path) -> Json:
    """Return the content of benchmark.json; nothing where there is none."""
    file = folder / "benchmark.json"
    try:
        content = schema.check(Json, schema.parse(file.read_bytes())) if file.is_file() else {}
        schema.check(Json | None, content.get("defaults"), "its defaults")
    except (OSError, Malformed) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read ({reason}); remove it, or run the benchmark again") from error
    return content
