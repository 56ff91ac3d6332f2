"""The plan of a training: the parameters that train and the edits, as a value, made and printed before anything changes.

An `Anatomy` is a backbone as a record of facts. `make_plan` is a pure function from a method, an anatomy and a freeze to
a `Plan`. Only `attach` turns a plan into a changed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import deprecation, schema, tables
from ..errors import ConfigError, nearest, printable
from ..registry import METHODS
from ..schema import Json
from .anatomy import HEAD, Anatomy, Unfit, inside
from .method import Edit, Method, Settings, parameters


@dataclass(frozen=True)
class Row:
    """One line of the plan's table."""

    stage: str
    kind: str
    params: int  # of the model itself
    trained: int  # of those
    edits: int
    added: int  # parameters that the edits bring
    statistics: str  # "still", "moving", "mixed" or ""
    moving: int  # values of the statistics that move
    opens: float = 0.0  # the share of the training after which all of it trains
    ranks: str = ""  # of its edits, where they have one: "4", or "1–12"


@dataclass(frozen=True)
class Plan:
    """The parameters that train, the edits, and the statistics that stay still. Prints as a table."""

    family: str
    model: str
    method: str
    settings: Settings
    freeze: int | tuple[int | str, ...]
    bn: str
    heads: tuple[str, ...]  # the modules that the head consists of
    train: tuple[str, ...]  # parameters of the model that train
    rates: Mapping[str, float]  # of those: learning rates relative to that of full fine-tuning, where they differ from it
    edits: tuple[Edit, ...]
    still: tuple[str, ...]  # modules whose running statistics stay as they are
    rows: tuple[Row, ...]  # the body's stages, then the head
    opens: Mapping[str, float] = field(default_factory=dict)  # share of the training after which something begins to train

    @property
    def total(self) -> int:
        """Count of the model's parameters, without those of edits."""
        return sum(r.params for r in self.rows)

    @property
    def trained_body(self) -> int:
        """Count of the parameters that train outside the head, those of edits included."""
        return sum(r.trained + r.added for r in self.rows[:-1])

    @property
    def trained_head(self) -> int:
        """Count of the head's parameters that train."""
        return self.rows[-1].trained + self.rows[-1].added

    @property
    def num_frozen_stages(self) -> int:
        """Count of the first stages in which nothing trains, is edited or has moving statistics.

        The last of them has parameters: nothing is gained by those without that follow.
        """
        if any(edit.module == "" for edit in self.edits):  # it edits all of the model
            return 0
        count = 0
        for i, row in enumerate(self.rows[:-1], 1):
            if row.trained or row.edits or row.moving:
                break
            count = i if row.params else count
        return count

    @property
    def body(self) -> int:
        """Count of the model's parameters outside the head."""
        return sum(r.params for r in self.rows[:-1])

    @property
    def fully_unfrozen_at(self) -> float:
        """The share of the training after which all of it trains."""
        return max(self.opens.values(), default=0.0)

    def still_frozen(self, progress: float) -> set[str]:
        """Return the parameters, and modules with statistics, that train only later than at this share of the training."""
        return {name for name, share in self.opens.items() if share > progress + 1e-9}

    untouched = deprecation.alias("Plan.untouched", "num_frozen_stages")
    opened = deprecation.alias("Plan.opened", "fully_unfrozen_at")
    closed = deprecation.alias("Plan.closed", "still_frozen")

    def rate(self, parameter: str) -> float:
        """Return a body parameter's learning rate, relative to that of full fine-tuning; added parts' parameters too."""
        parts = parameter.split(".")
        added = next((i for i, part in enumerate(parts) if part.startswith("peft_")), None)
        if added is None:
            return self.rates.get(parameter, 1.0)
        prefix = ".".join(parts[: added + 2])
        return next(e.lr_scale for e in self.edits if e.prefix == prefix)

    def to_dict(self) -> Json:
        """Return the plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Json) -> Plan:
        """Make the plan again from `to_dict`'s values (after JSON, too).

        Raises:
            Malformed: They are no plan's.
        """
        return schema.check(cls, values, "its plan")

    def __str__(self) -> str:
        return plan_table(self)


def make_plan(method: Method, anatomy: Anatomy, freeze: int | Sequence[int | str] = 0, bn: str | None = None) -> Plan:
    """Make the plan of a method for a model. Pure: no model is touched.

    Args:
        method: The method.
        anatomy: The model's facts; with `gradient_stats` where the method needs them (`Method.needs_gradients`).
        freeze: The first N stages, a list of stage indices, or names of stages or modules.
        bn: "frozen" or "train": whether running statistics outside the head move. By default as the method
            says. In frozen stages they always stay still, in the head they always move.

    Raises:
        ConfigError: The method does not fit the model, `freeze` names nothing, or nothing is left to train.
    """
    asked, bn = bn, bn or method.bn
    if bn not in ("frozen", "train"):
        raise ConfigError(f"bn='{bn}' is not known; it is 'frozen' or 'train'")
    frozen = _freezer(anatomy, freeze)
    if method.needs_gradients and anatomy.gradient_stats is None:
        raise ConfigError(f"with these settings '{method.name}' looks at training images before it plans; give data")
    open_anatomy = anatomy.without(frozen)
    rates: dict[str, float] = {}
    edits: list[Edit] = []
    moving: set[str] = set()
    opens: dict[str, float] = {}
    params = {p.name: p for p in anatomy.params}
    try:
        for part in method.parts:
            edits += part.edits(open_anatomy)
            trained = list(part.train(open_anatomy))
            for name in trained:
                rates[name] = max(rates.get(name, 0.0), part.rate(params[name], open_anatomy))
            moved = list(part.moving(open_anatomy)) if "train" in (part.bn, asked) else []
            moving.update(moved)
            later = part.opens(open_anatomy)
            for name in (*trained, *moved):  # what another part opens from the start does not wait
                opens[name] = min(opens.get(name, 1.0), later.get(name, 0.0))
    except Unfit as reason:
        raise _refusal(method, anatomy, freeze, reason) from None
    wanted = {*rates, *(p.name for p in open_anatomy.params if p.stage == HEAD)}
    if not wanted and not edits:
        raise ConfigError(f"freeze={freeze} with method='{method.name}' leaves nothing to train; freeze less")
    may = {s.name for s in anatomy.statistics if s.stage == HEAD or (bn == "train" and s.name in moving)}
    still = {s.name for s in anatomy.statistics if frozen(s) or s.name not in may}
    opens = {name: share for name, share in opens.items() if share and (name in wanted or name in may - still)}
    if wanted and not edits and wanted <= opens.keys():
        raise ConfigError(f"freeze={freeze} with method='{method.name}' leaves nothing to train at first; freeze less")
    frozen_parts = freeze if isinstance(freeze, int) else tuple(freeze)
    rates = {name: rate for name, rate in rates.items() if rate != 1.0}
    return _plan(method, anatomy, edits, wanted, still, freeze=frozen_parts, bn=bn, rates=rates, opens=opens)


def plan_from_trained(
    method: Method, anatomy: Anatomy, edits: Sequence[Edit], train: Iterable[str], moved: Iterable[str]
) -> Plan:
    """Return the plan of a model that was trained elsewhere, from its known edits and trained parameters.

    Args:
        method: The method, for the record.
        anatomy: The model's facts.
        edits: The edits.
        train: The parameters of the body that were trained.
        moved: The modules of the body whose running statistics moved.
    """
    wanted = {*train, *(p.name for p in anatomy.params if p.stage == HEAD)}
    moving = {*moved, *(s.name for s in anatomy.statistics if s.stage == HEAD)}
    still = {s.name for s in anatomy.statistics} - moving
    bn = "train" if any(s.name in moving and s.stage != HEAD for s in anatomy.statistics) else "frozen"
    return _plan(method, anatomy, edits, wanted, still, freeze=0, bn=bn, rates={}, opens={})


def _plan(
    method: Method, anatomy: Anatomy, edits: Sequence[Edit], wanted: set[str], still: set[str], **decided: Any
) -> Plan:
    return Plan(
        family=anatomy.family,
        model=anatomy.model,
        method=method.name,
        settings=method.settings(),
        heads=anatomy.heads,
        train=tuple(p.name for p in anatomy.params if p.name in wanted),
        edits=tuple(edits),
        still=tuple(s.name for s in anatomy.statistics if s.name in still),
        rows=_rows(anatomy, wanted, edits, still, decided["opens"]),
        **decided,
    )


def applicable_methods(anatomy: Anatomy) -> list[str]:
    """Return the names of the methods that have something to work on in this anatomy."""
    return [name for name, cls in METHODS.items() if _fits(cls(), anatomy)]


def _fits(method: Method, anatomy: Anatomy) -> bool:
    if method.needs_gradients and anatomy.gradient_stats is None:
        return bool(anatomy.stages)  # what it would choose is not known yet
    try:
        for part in method.parts:
            part.edits(anatomy), part.train(anatomy)
    except ConfigError:
        return False
    return True


def _refusal(method: Method, anatomy: Anatomy, freeze: object, reason: Unfit) -> ConfigError:
    if freeze and _fits(method, anatomy):
        return ConfigError(f"freeze={freeze} leaves '{method.name}' nothing to work on ({reason}); freeze less")
    return ConfigError(
        f"method '{method.name}' does not fit {anatomy.model}: {reason}. "
        f"With their defaults these fit: {', '.join(applicable_methods(anatomy))}"
    )


def _freezer(anatomy: Anatomy, freeze: int | Sequence[int | str]) -> Callable[[Any], bool]:
    """Return a predicate: whether a part of the anatomy is frozen."""
    count = len(anatomy.stages)
    if isinstance(freeze, bool) or not isinstance(freeze, int | Sequence):
        raise ConfigError(f"freeze={freeze!r} is not understood; give a number of stages, or a list of indices or names")
    chosen: Iterable[int | str] = range(freeze) if isinstance(freeze, int) else freeze
    if isinstance(freeze, str):
        chosen = (freeze,)
    if isinstance(freeze, int) and not 0 <= freeze <= count:
        raise ConfigError(f"freeze={freeze} goes beyond {anatomy.model}: its body has {count} stages, so 0 to {count}")
    stages, names = set(), []
    for one in chosen:
        if isinstance(one, int):
            if not 0 <= one < count:
                raise ConfigError(f"freeze: there is no stage {one} in {anatomy.model}; it has 0 to {count - 1}")
            stages.add(one)
        else:
            names.append(_freeze_name(anatomy, str(one)))

    def frozen(part: Any) -> bool:
        return part.stage in stages or inside(part.name, names)

    return frozen


def _freeze_name(anatomy: Anatomy, text: str) -> str:
    """Return the module path that a name in `freeze` means; "2.cv1" is a path inside stage 2."""
    first, _, rest = text.strip(".").partition(".")
    name = text.strip(".")
    if first.isdigit() and int(first) < len(anatomy.stages) and anatomy.stages[int(first)].name:
        name = ".".join(filter(None, (anatomy.stages[int(first)].name, rest)))
    paths = {".".join(p.name.split(".")[:i]) for p in anatomy.params for i in range(1, p.name.count(".") + 2)}
    if name not in paths:
        raise ConfigError(f"freeze: {anatomy.model} has nothing called '{text}'.{nearest(name, paths)}")
    return name


def _rows(
    anatomy: Anatomy, wanted: set[str], edits: Sequence[Edit], still: set[str], opens: Mapping[str, float]
) -> tuple[Row, ...]:
    where = {p.name.rpartition(".")[0]: p.stage for p in anatomy.params if "." in p.name}  # normalisations are edited, too
    where |= {part.name: part.stage for parts in (anatomy.layers, anatomy.blocks, anatomy.attentions) for part in parts}
    last = anatomy.stages[-1].index
    added = [(where.get(e.module, last), parameters(e)) for e in edits]
    ranks = [(where.get(e.module, last), e.settings["r"]) for e in edits if "r" in e.settings]

    def row(index: int, label: str, kind: str) -> Row:
        params = [p for p in anatomy.params if p.stage == index]
        moving = {s.name: s.numel for s in anatomy.statistics if s.stage == index and s.name not in still}
        count = sum(s.stage == index for s in anatomy.statistics)
        here = [r for stage, r in ranks if stage == index]
        return Row(
            stage=label,
            kind=kind,
            params=sum(p.numel for p in params),
            trained=sum(p.numel for p in params if p.name in wanted),
            edits=sum(stage == index for stage, _ in added),
            added=sum(n for stage, n in added if stage == index),
            statistics="" if not count else {0: "still", count: "moving"}.get(len(moving), "mixed"),
            moving=sum(moving.values()),
            ranks="–".join(str(r) for r in sorted({min(here), max(here)})) if here else "",
            opens=max((opens.get(p.name, 0.0) for p in params if p.name in wanted), default=0.0),
        )

    return (*(row(s.index, str(s.index), s.kind) for s in anatomy.stages), row(HEAD, "head", anatomy.head))


def plan_table(plan: Plan, width: int | None = None) -> str:
    """Return a plan as text: a line per stage, then the totals."""
    names: tuple[str, ...] = ("stage", "kind", "parameters", "trained", "edits", "added", "statistics")
    rows: list[tuple[str, ...]] = [
        (r.stage, r.kind, f"{r.params:,}", _count(r.trained), _count(r.edits), _count(r.added), r.statistics)
        for r in plan.rows
    ]
    more: dict[str, list[str]] = {}
    if len({r.ranks for r in plan.rows if r.ranks}) > 1:
        more["rank"] = [r.ranks for r in plan.rows]
    if plan.opens:
        more["from"] = [f"{r.opens:.0%}" if r.trained else "" for r in plan.rows]  # the share of the epochs until all trains
    if (width := width or tables.columns()) < 72 + 4 * len(more):  # what a narrow terminal has no room for
        names, rows = names[:2] + names[3::2], [r[:2] + r[3::2] for r in rows]
    for name, values in more.items():
        names, rows = (*names, name), [(*r, value) for r, value in zip(rows, values, strict=True)]
    settings = ", ".join(f"{k}={v}" for k, v in plan.settings.items() if v not in ("", None, {}))
    title = f"{plan.model}: {plan.method}" + (f" ({settings})" if settings else "")
    trained = plan.trained_body + plan.trained_head
    lines = (
        f"freeze={plan.freeze}, bn={plan.bn}: {trained:,} parameters train, {trained / plan.total:.2%} of {plan.total:,}",
        f"body {plan.trained_body:,} ({_share(plan.trained_body, plan.body)} of {plan.body:,}), head {plan.trained_head:,}",
    )
    right = [i for i, name in enumerate(names) if name in ("parameters", "trained", "edits", "added")]
    return "\n".join((tables.text(title, names, rows, width=width, right=right), *map(printable, lines)))


def _count(n: int) -> str:
    return f"{n:,}" if n else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
