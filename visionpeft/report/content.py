"""What a report says, as plain values: sections, their rows, their answers, and the notes that a reader needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..benchmark import Row, compare, read
from ..benchmark.grid import hash_of
from ..errors import ConfigError
from ..tables import size

NEAR = 0.95  # of the reference's score: what counts as near to it in a section's answer
_NEAR = f"{100 * NEAR:.0f} %"
AGAINST = "full"
MEBI = 1e6  # bytes of a MB, as `tables.size` counts
_SETTINGS = ("imgsz", "batch", "optimizer", "lr0")  # of a run, said above its table where all cells share them
_GONE = "–"


@dataclass(frozen=True)
class Memory:
    """What stands for peak memory in a section: the strictest measure that all of its rows have."""

    name: str  # of a column or an axis
    meaning: str
    of: Callable[[Row], float | None]


@dataclass(frozen=True)
class Column:
    """A column of the table of a section.

    Attributes:
        name: Its heading.
        value: What it is sorted by; None stands at the end.
        text: What it shows.
        hint: What it means, in a few words.
    """

    name: str
    value: Callable[[Row], float | str | None]
    text: Callable[[Row], str]
    hint: str = ""


@dataclass(frozen=True)
class Answer:
    """What a section comes to.

    Attributes:
        row: The method that is named.
        said: Why, in a sentence.
        shares: Of the reference: score, memory and trained parameters, with what they are called.
    """

    row: Row
    said: str
    shares: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """One model on one data set."""

    key: str  # safe as an id
    model: str
    data: str
    task: str
    metric: str
    settings: str  # those that all its cells share
    rows: list[Row]  # the best score first
    memory: Memory
    answer: Answer

    @property
    def cells(self) -> list[dict[str, Any]]:
        """All cells, in the order of the rows and of their seeds."""
        return [c for row in self.rows for c in sorted(row.cells, key=lambda c: c["cell"]["seed"])]

    @property
    def front(self) -> set[str]:
        """Methods that no other beats in score and memory at once."""
        placed = [(row, self.memory.of(row)) for row in self.rows]
        return {
            row.method
            for row, bytes_ in placed
            if bytes_ is not None and not any(_beats(other, b, row, bytes_) for other, b in placed if b is not None)
        }


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish."""

    what: str  # model, data, method and seed
    kind: str  # ConfigError, OutOfMemory, ...
    error: str  # in a sentence


@dataclass(frozen=True)
class Report:
    """All that a report shows."""

    name: str
    created: str
    sections: list[Section]
    failed: list[Failure]
    against: str  # the method that the others are compared with
    methods: list[str]  # of all sections: the reference first, the others by what they train, the most first
    notes: list[str]
    folders: list[str]  # as they were given

    @property
    def cells(self) -> int:
        """How many cells are done."""
        return sum(len(s.cells) for s in self.sections)


def gather(results: Sequence[str | Path]) -> Report:
    """Read folders of results, and work out what is to be said of them.

    Args:
        results: The folders that `visionpeft benchmark` wrote into.

    Raises:
        ConfigError: A folder is missing or empty, or a file in it is truncated or of something else.
    """
    cells = {c["hash"]: c for folder in results for c in read(folder)}
    failed = {hash_of(c["cell"]): c for folder in results for c in read(folder, "failed")}
    failed = {h: c for h, c in failed.items() if h not in cells}  # done by now, in another folder
    if not cells:
        also = f"; {len(failed)} failed there: see {Path(results[0]) / 'failed'}" if failed else ""
        raise ConfigError(
            f"there is no finished cell in {_listed(map(str, results))}{also}; run `visionpeft benchmark` first"
        )
    abouts = [_about(Path(folder)) for folder in results]
    against = {str((a.get("defaults") or {}).get("against") or AGAINST) for a in abouts}
    if len(against) > 1:
        raise ConfigError(f"these results are compared with {_listed(sorted(against))}; give folders with one reference")
    reference = against.pop()
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in compare(cells.values(), against=reference):
        groups.setdefault((row.names["model"], row.names["data"]), []).append(row)
    sections = [_section(i, rows, reference) for i, (_, rows) in enumerate(sorted(groups.items()))]
    return Report(
        name=", ".join(dict.fromkeys(str(a["name"]) for a in abouts if a.get("name"))) or "benchmark",
        created=", ".join(dict.fromkeys(str(a["created"])[:16].replace("T", " ") for a in abouts if a.get("created"))),
        sections=sections,
        failed=[_failure(c) for c in failed.values()],
        against=reference,
        methods=_ordered([row for s in sections for row in s.rows], reference),
        notes=_notes(sections, reference),
        folders=[str(folder) for folder in results],
    )


def columns(section: Section) -> list[Column]:
    """Return the columns that a section's table has: those that at least one row fills."""
    made = [
        Column(
            section.metric,
            lambda r: r.score_mean,
            lambda r: f"{r.score_mean:.3f}{interval(r.low, r.high)}",
            "after training, mean over the seeds [95 % interval]",
        ),
        Column(
            "difference",
            lambda r: r.difference,
            lambda r: (
                _GONE
                if r.difference is None
                else signed(r.difference) + interval(r.difference_low, r.difference_high, signed)
            ),
            "from the reference on the same images and seeds [95 % interval]",
        ),
        Column("body", lambda r: r.trained_body, lambda r: f"{r.trained_body:,}", "parameters of the body that train"),
        Column("share", _share, lambda r: f"{100 * _share(r):.1f} %", "of all parameters: trained, body and head"),
        Column("head", lambda r: r.trained_head, lambda r: f"{r.trained_head:,}", "parameters of the head that train"),
        Column("saved", lambda r: r.saved_bytes, lambda r: size(r.saved_bytes), "bytes kept for backward in a step"),
        Column("live", lambda r: r.live_bytes, lambda r: size(r.live_bytes), "most bytes alive at once in a step"),
        Column("GPU peak", _gpu, lambda r: size(_gpu(r)), "the CUDA allocator's peak in training steps"),
        Column("step", lambda r: r.step_seconds, lambda r: seconds(r.step_seconds), "forward and backward, median"),
        Column("wall", lambda r: r.seconds, lambda r: seconds(r.seconds), "of a whole cell, its measuring included"),
        Column("delta", _delta, lambda r: size(_delta(r)), "size of the delta file"),
        Column(
            "old classes",
            lambda r: r.retained_after,
            lambda r: _GONE if r.retained_after is None else f"{r.retained_before:.3f} → {r.retained_after:.3f}",
            "score on the base's old classes under its own head, before → after",
        ),
    ]
    return [c for c in made if any(c.value(row) is not None for row in section.rows)]


def states(row: Row) -> dict[str, str]:
    """Return what a row must say of itself beside its numbers."""
    frozen = ", ".join(map(str, row.freeze)) if isinstance(row.freeze, list | tuple) else str(row.freeze)
    epochs = "/".join(map(str, dict.fromkeys(row.epochs.values())))
    said = {"bn": row.bn, "head": row.head, "lean": row.lean, "freeze": frozen, "epochs": epochs, "seeds": row.seeds}
    return {k: str(v) for k, v in said.items()}


# ------------------------------------------------------------------------------------------------------------ text of values
def plain(value: float) -> str:
    """Return a score: 0.231."""
    return f"{value:.3f}"


def interval(low: float | None, high: float | None, text: Callable[[float], str] = plain) -> str:
    """Return " [0.231, 0.262]", or nothing where there is none."""
    return "" if low is None or high is None else f" [{text(low)}, {text(high)}]"


def signed(value: float) -> str:
    """Return a difference with its sign: +0.012, −0.004."""
    return f"{value:+.3f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """Return seconds for people: 0.31 s, 64 s."""
    return _GONE if value is None else f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def measured(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a cell's run measured; older runs have fewer keys."""
    return cell["run"].get("measured") or {}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are there, or None."""
    there = [v for v in values if v is not None]
    return fmean(there) if there else None


# ------------------------------------------------------------------------------------------------------------------ sections
def _section(index: int, rows: list[Row], reference: str) -> Section:
    rows = sorted(rows, key=lambda r: (-r.score_mean, r.method))
    memory = _memory(rows)
    return Section(
        key=f"s{index}",
        model=rows[0].names["model"],
        data=rows[0].names["data"],
        task=rows[0].cells[0].get("task") or "",
        metric=rows[0].score,
        settings=_shared([c for row in rows for c in row.cells]),
        rows=rows,
        memory=memory,
        answer=_answer(rows, memory, reference),
    )


def _memory(rows: list[Row]) -> Memory:
    if all(_gpu(row) is not None for row in rows):
        return Memory("peak GPU memory", "the CUDA allocator's peak in training steps", _gpu)
    if all(row.live_bytes is not None for row in rows):
        meaning = "the most bytes that lived at once in a training step, above the model and what else lived before it"
        return Memory("peak live bytes", meaning, lambda row: row.live_bytes)
    return Memory("bytes saved", "bytes kept for backward in a training step", lambda row: row.saved_bytes)


def _answer(rows: list[Row], memory: Memory, reference: str) -> Answer:
    """Choose the row that keeps most of the reference's score for the least memory, and say so."""
    full = next((row for row in rows if row.names["method"] == reference), None)
    others = [row for row in rows if row.names["method"] != reference]
    if full is None or not others:
        best = rows[0]
        missing = f"no {reference}" if full is None else "nothing"
        return Answer(
            best, f"The best score, {best.score_mean:.3f} {best.score}; there is {missing} here to compare it with."
        )
    near = [row for row in others if row.score_mean >= NEAR * full.score_mean]
    if not near:
        best = max(others, key=lambda r: r.score_mean)
        return Answer(
            full,
            f"No other method keeps {_NEAR} of its {full.score_mean:.3f} {full.score}. Nearest is {_beside(best, full, memory)}.",
        )
    known = [row for row in (full, *near) if memory.of(row) is not None]
    row = min(known, key=lambda r: memory.of(r) or 0) if full in known else full
    if row is full:
        best = max(near, key=lambda r: r.score_mean)
        return Answer(
            full, f"No method that keeps {_NEAR} of its score takes less memory. Nearest is {_beside(best, full, memory)}."
        )
    which = f"The least memory of {len(near)} that keep" if len(near) > 1 else "The only one that keeps"
    return Answer(row, f"{_beside(row, full, memory)}. {which} {_NEAR} of {reference}'s score.", _shares(row, full, memory))


def _beside(row: Row, full: Row, memory: Memory) -> str:
    said = f"{row.method}: {row.score_mean:.3f} {row.score} against {full.score_mean:.3f} of {full.method}"
    if row.difference is not None:
        said += f" ({signed(row.difference)}{_reaches(row)})"
    own, whole = memory.of(row), memory.of(full)
    return said if own is None or whole is None else f"{said}; {memory.name} {size(own)} against {size(whole)}"


def _shares(row: Row, full: Row, memory: Memory) -> list[tuple[str, float]]:
    pairs = [
        ("score", row.score_mean, full.score_mean),
        ("memory", memory.of(row), memory.of(full)),
        ("step time", row.step_seconds, full.step_seconds),
        ("trained", row.trained_body + row.trained_head, full.trained_body + full.trained_head),
    ]
    return [(name, part / whole) for name, part, whole in pairs if part is not None and whole]


def _reaches(row: Row) -> str:
    if row.difference_low is None or row.difference_high is None:
        return ""
    return f", 95 % interval {signed(row.difference_low)} to {signed(row.difference_high)}"


def _shared(cells: list[dict[str, Any]]) -> str:
    """Return the settings that all cells of a section have in common, as text."""
    arguments = [c["run"].get("arguments") or {} for c in cells]
    said = [
        f"{k} {a}" for k in _SETTINGS if (a := arguments[0].get(k)) is not None and all(x.get(k) == a for x in arguments)
    ]
    return ", ".join(said)


def _beats(other: Row, theirs: float, row: Row, own: float) -> bool:
    no_worse = other.score_mean >= row.score_mean and theirs <= own
    return no_worse and (other.score_mean > row.score_mean or theirs < own)


def _ordered(rows: list[Row], reference: str) -> list[str]:
    trained: dict[str, list[float]] = {}
    for row in rows:
        trained.setdefault(row.method, []).append((row.trained_body + row.trained_head) / max(row.total, 1))
    return sorted(trained, key=lambda m: (m != reference, -fmean(trained[m]), m))


def _share(row: Row) -> float:
    return (row.trained_body + row.trained_head) / max(row.total, 1)


def _gpu(row: Row) -> float | None:
    return mean((measured(c).get("cuda") or {}).get("allocated") for c in row.cells)


def _delta(row: Row) -> float | None:
    return (row.delta_bytes or {}).get("file")


# --------------------------------------------------------------------------------------------------------------------- notes
def _notes(sections: list[Section], reference: str) -> list[str]:
    rows = [row for s in sections for row in s.rows]
    notes = [
        f"Named for each model and data set is the method that takes the least memory among those that keep {_NEAR} of "
        f"{reference}'s score, {reference} included."
    ]
    if any(row.low is not None for row in rows):
        notes.append(
            "Intervals are 95 % bootstrap intervals over validation images and seeds; differences are paired: the same images "
            f"and seeds as {reference}."
        )
    if any(row.low is None for row in rows):
        notes.append("A score without an interval comes from cells that kept no evidence of single images.")
    if any(row.seeds == 1 for row in rows):
        notes.append(
            "A row of one seed has an interval over images only: it does not say how much another seed would differ."
        )
    if any(s.memory.name != "peak GPU memory" for s in sections):
        notes.append(
            "Cells that ran on a CPU have no allocator's peak. Bytes saved and bytes alive are counted exactly and are the same "
            "on a GPU, but leave out the model's weights, the optimizer's state, and what CUDA and its libraries take."
        )
    if any(row.retained_after is not None for row in rows):
        notes.append(
            "Old classes are measured with the adapted body under the base's own head. To deploy both heads takes two passes, "
            "one of the base and one of the adapted model: their bodies differ. A detached delta gives the base back, bit for bit."
        )
    if len({row.bn for row in rows}) > 1:
        notes.append(
            "Where `bn` differs, part of a difference in score and in memory comes from it: statistics that move need more kept."
        )
    machines = {
        tuple((c.get("environment") or {}).get(k) for k in ("platform", "cpu", "gpu", "threads"))
        for s in sections
        for c in s.cells
    }
    if len(machines) > 1:
        notes.append("Cells ran on different machines: compare their times only within one.")
    return notes


def _failure(cell: Mapping[str, Any]) -> Failure:
    spec = cell["cell"]
    names = (cell.get("names") or {}).values() or [str(spec.get(k)) for k in ("model", "data", "method")]
    what = f"{_listed(names)}, seed {spec.get('seed')}"
    return Failure(what, str(cell.get("kind") or "error"), " ".join(str(cell.get("error")).split()))


def _about(folder: Path) -> dict[str, Any]:
    """Read benchmark.json: what was asked for."""
    import json

    file = folder / "benchmark.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({' '.join(str(error).split())}); remove it, or run the benchmark again"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not what a benchmark writes; remove it, or run the benchmark again")
    return content


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
