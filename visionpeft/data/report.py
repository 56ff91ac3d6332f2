"""The report of a check, which prints at 80 columns and turns into JSON, and the tally it is made from."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from .. import tables
from ..errors import printable
from ..schema import Json

T = TypeVar("T")

_WIDTH, _CLASSES, _EXAMPLES = 80, 25, 3


class Tally:
    """Counts by kind, with the first few examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, example: str = "", count: int = 1) -> None:
        """Count one more of a kind."""
        self.counts[kind] += count
        if example and len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(printable(example))

    def to_dict(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Return the count and the examples of each kind."""
        return {kind: (count, tuple(self.examples[kind])) for kind, count in self.counts.items()}

    def summary(self) -> str:
        """Return the counts on one line: 2 x row that is malformed, 1 x DontCare region."""
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.items())


def with_progress(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Return items, with a bar of progress on a terminal's stderr while they are taken."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


@dataclass(frozen=True)
class Finding:
    """A kind of problem or note, with how often it was found.

    Attributes:
        kind: A key of `checking.KINDS`.
        title: The same for people.
        problem: Whether it spoils training or measuring; else it is a note.
        count: How often it was found.
        advice: Its consequence, or the remedy.
        examples: The first few places, with file names.
    """

    kind: str
    title: str
    problem: bool
    count: int
    advice: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Counts of one split.

    Attributes:
        images: Image files.
        objects: Rows that can be used; of a classification set, images that can be.
        background: Images whose label file is empty.
        unlabelled: Images without a label file.
        sizes: Smallest, median and largest image, (width, height) by area.
        classes: Objects per class; zero where there are none.
        side: Median of sqrt(width x height) of the objects, in pixels at `CheckReport.imgsz`; None without boxes.
        tiny: Share of objects below `CheckReport.tiny` pixels.
    """

    images: int = 0
    objects: int = 0
    background: int = 0
    unlabelled: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    classes: dict[str, int] = field(default_factory=dict)
    side: float | None = None
    tiny: float = 0.0


@dataclass(frozen=True)
class CheckReport:
    """The report of a checked set; ``print`` it, ask `ok`, or take `to_dict()`.

    Attributes:
        source: The set that was checked, as it was named.
        task: detect, segment, pose, obb or classify.
        names: Classes by index.
        splits: Counts of train, val and test.
        findings: Problems first, then notes.
        imgsz: The size that object sizes refer to.
        tiny: Objects below so many pixels are called tiny.
        sheet: The contact sheet's file, where one was asked for.
    """

    source: str
    task: str
    names: dict[int, str]
    splits: dict[str, Split]
    findings: tuple[Finding, ...]
    imgsz: int
    tiny: int
    sheet: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no problems; notes do not count."""
        return not any(f.problem for f in self.findings)

    def to_dict(self) -> Json:
        """Return all of it as plain JSON values."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        classes = f"{len(self.names)} class{'es' * (len(self.names) != 1)}"
        parts = [f"{printable(self.source)}: {self.task}, {classes}", self._splits(), self._classes()]
        for title, problem in (("problems", True), ("notes", False)):
            found = [f for f in self.findings if f.problem == problem]
            lines = [line for f in found for line in counted_lines(f"{f.title}. {f.advice}", f.count, f.examples)]
            parts += ["\n".join([f"{title}:", *lines])] if found else []
        if self.sheet:
            parts.append(f"contact sheet: {printable(self.sheet)}")
        return "\n\n".join(p for p in (*parts, self.verdict) if p)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        bad = sum(f.problem for f in self.findings)
        notes = len(self.findings) - bad
        tail = f", {notes} note{'s' * (notes != 1)}" if notes else ""
        return f"{bad} kind{'s' * (bad != 1)} of problem{tail}." if bad else f"No problems found{tail}."

    def _splits(self) -> str:
        if self.task == "classify":
            rows = [(n, f"{s.images:,}", *_sizes(s)) for n, s in self.splits.items()]
            return tables.text("", ("split", "images", "smallest", "median", "largest"), rows, _WIDTH, range(1, 5))
        headings = ("split", "images", "objects", "empty", "no labels", "image sizes", "object", f"<{self.tiny}px")
        counts = [
            (n, f"{s.images:,}", f"{s.objects:,}", s.background, s.unlabelled, _range(s), _side(s), f"{s.tiny:.0%}")
            for n, s in self.splits.items()
        ]
        return (
            tables.text("", headings, counts, _WIDTH, (1, 2, 3, 4, 6, 7))
            + f"\nobject: median of sqrt(width x height) at imgsz={self.imgsz}; <{self.tiny}px: share that is smaller"
        )

    def _classes(self) -> str:
        order = sorted(self.names.values(), key=lambda n: -sum(s.classes[n] for s in self.splits.values()))
        rows = [(n, *(f"{s.classes[n]:,}" for s in self.splits.values())) for n in order[:_CLASSES]]
        if rest := order[_CLASSES:]:
            sums = (f"{sum(s.classes[n] for n in rest):,}" for s in self.splits.values())
            rows.append((f"... {len(rest)} more (--json lists all)", *sums))
        counted = "images" if self.task == "classify" else "objects"
        return tables.text(f"{counted} per class", ("class", *self.splits), rows, _WIDTH, range(1, 1 + len(self.splits)))


def counted_lines(what: str, count: int, examples: Sequence[str]) -> list[str]:
    """Return the lines of something that was counted, with its first few examples."""
    lines = textwrap.wrap(f"{count:,} x {what}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines += [f"      {e}" for e in examples]
    return lines + [f"      ... and {count - len(examples):,} more"] * bool(examples and count > len(examples))


def _sizes(split: Split) -> tuple[str, ...]:
    return tuple(f"{w}x{h}" for w, h in split.sizes) or ("–",) * 3


def _range(split: Split) -> str:
    smallest, *_, largest = _sizes(split)
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _side(split: Split) -> str:
    return "–" if split.side is None else f"{split.side:.0f} px"
