"""What trains and what is added where: values, made and printed before anything is changed.

An `Anatomy` is a backbone as a record of facts. `make_plan` is a pure function from a method, an anatomy and a freeze to
a `Plan`. Only `attach` turns a plan into a changed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import schema
from .errors import ConfigError, nearest
from .registry import METHODS

if TYPE_CHECKING:
    from .methods.base import Method

HEAD = -1  # the stage index of what belongs to the task head


# ---------------------------------------------------------------------------------------------------- the model's facts
@dataclass(frozen=True)
class Param:
    """A parameter of the model itself."""

    name: str
    numel: int
    role: str  # "weight", "bias", "norm.weight", "norm.bias" or "other" (position embeddings, layer scales, ...)
    stage: int


@dataclass(frozen=True)
class Layer:
    """A module with a linear or convolutional weight."""

    name: str
    kind: str  # "linear", "conv" or "conv_transpose"
    shape: tuple[int, ...]  # of the weight
    groups: int
    stage: int
    attention: bool = False  # one of the projections of an attention
    linear: bool = True  # its output is linear in its weight (not so for weight-standardised convolutions)
    slices: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # rows of q, k, v in a fused qkv


@dataclass(frozen=True)
class Block:
    """A residual unit that a module may follow or run beside."""

    name: str
    kind: str  # "conv" or "transformer"
    channels: int  # of its output
    layout: str  # of its output: "NCHW", "NHWC" or "NLC"
    stage: int
    attention: str = ""  # its attention module, where it has one
    mlp: str = ""  # its feed-forward module, where it has one
    sequence: bool = False  # it reads a plain token sequence (B, N, C) that may be made longer
    cls: str = ""  # its class: "C2f", "BasicBlock", ...
    inputs: int = 0  # channels of the one map that it reads, in the layout of its output; 0 where it reads another thing
    stride: int = 0  # that map is this many times as high and wide as its output; 0 where no whole number says so
    norm: str = ""  # the normalisation between attention and mlp, where it reads the residual sum that mlp is added to
    leading: int = 0  # tokens of its sequence that come before those of the image: class, registers, ...
    grid: tuple[int, int] = (0, 0)  # rows and columns of the image's tokens in its sequence; (0, 0) where they are no grid


@dataclass(frozen=True)
class Attention:
    """A self-attention whose keys and values may be extended."""

    name: str
    kind: str  # "global" (fused qkv on B, N, C), "window" (the same, with a relative bias) or "map" (on B, C, H, W)
    heads: int
    key_dim: int  # channels of one head's keys
    value_dim: int  # channels of one head's values
    stage: int
    keys: int = 0  # how many a query sees, at the image size that the model was made for; 0 where that is unknown


@dataclass(frozen=True)
class Statistics:
    """A normalisation with running statistics."""

    name: str
    stage: int
    numel: int  # values of its mean and variance


@dataclass(frozen=True)
class Stage:
    """A stretch of the body; ``freeze=N`` cuts between stages."""

    index: int
    name: str  # the module path its parameters share, "" where they share none
    kind: str
    channels: int = 0  # of its output; 0 where its output is no single feature map
    layout: str = ""
    to_head: bool = False  # its output is read by the head


@dataclass(frozen=True)
class Evidence:
    """What the training loss on some of the training images says of a model's own parameters, before any has moved."""

    images: int
    weight: Mapping[str, float]  # by parameter: its length |w|
    gradient: Mapping[str, float]  # the length of its mean gradient |g|
    product: Mapping[str, float]  # sum |w g|: to first order, what setting one number after the other to zero would change


@dataclass(frozen=True)
class Anatomy:
    """A model as a method sees it: facts only, ordered from input to output."""

    family: str
    model: str
    stages: tuple[Stage, ...]
    head: str  # what the head is, for people
    heads: tuple[str, ...]  # the modules it consists of
    params: tuple[Param, ...]  # those that may train; the head's have stage HEAD
    layers: tuple[Layer, ...]  # of the body
    blocks: tuple[Block, ...]
    attentions: tuple[Attention, ...]
    statistics: tuple[Statistics, ...]
    evidence: Evidence | None = None  # for methods that look at data before they plan

    @property
    def body(self) -> tuple[Param, ...]:
        """The parameters outside the head."""
        return tuple(p for p in self.params if p.stage != HEAD)

    def without(self, gone: Callable[[Any], bool]) -> Anatomy:
        """Return the anatomy less every part for which `gone(part)` holds."""
        names = ("params", "layers", "blocks", "attentions", "statistics")
        kept: dict[str, Any] = {n: tuple(part for part in getattr(self, n) if not gone(part)) for n in names}
        open_stages = {p.stage for p in kept["params"]}
        return replace(self, stages=tuple(s for s in self.stages if s.index in open_stages), **kept)


# ------------------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Edit:
    """One addition to one module. `METHODS[method].build(**settings)` makes its part."""

    module: str  # "" is the model itself
    point: str  # "weight", "output", "input" or "forward"
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_scale: float = 1.0  # learning rate of its part, relative to that of full fine-tuning

    @property
    def prefix(self) -> str:
        """The path of its part in the model, where it is attached."""
        return ".".join(filter(None, (self.module, f"peft_{self.point}", self.method)))

    def build(self) -> torch.nn.Module:
        """Make the part, on torch's current default device."""
        return METHODS[self.method].build(**self.settings)


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
    """What trains, what is added where, whose statistics stay still. Prints as a table."""

    family: str
    model: str
    method: str
    settings: Mapping[str, Any]
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
        """Parameters of the model, without what is added."""
        return sum(r.params for r in self.rows)

    @property
    def trained_body(self) -> int:
        """Parameters that train outside the head, what is added included."""
        return sum(r.trained + r.added for r in self.rows[:-1])

    @property
    def trained_head(self) -> int:
        """Parameters of the head that train."""
        return self.rows[-1].trained + self.rows[-1].added

    @property
    def untouched(self) -> int:
        """How many stages, counted from the first, come before all that trains, is edited or has moving statistics.

        Those without parameters at their end do not count: nothing is gained by them.
        """
        if any(edit.module == "" for edit in self.edits):  # it works on all of the model
            return 0
        count = 0
        for i, row in enumerate(self.rows[:-1], 1):
            if row.trained or row.edits or row.moving:
                break
            count = i if row.params else count
        return count

    @property
    def body(self) -> int:
        """Parameters of the model outside the head."""
        return sum(r.params for r in self.rows[:-1])

    @property
    def opened(self) -> float:
        """The share of the training after which all of it trains."""
        return max(self.opens.values(), default=0.0)

    def closed(self, progress: float) -> set[str]:
        """Return the parameters, and modules with statistics, that still wait when this share of the training is done."""
        return {name for name, share in self.opens.items() if share > progress + 1e-9}

    def rate(self, parameter: str) -> float:
        """Return a body parameter's learning rate, relative to that of full fine-tuning; added parts' parameters too."""
        parts = parameter.split(".")
        added = next((i for i, part in enumerate(parts) if part.startswith("peft_")), None)
        if added is None:
            return self.rates.get(parameter, 1.0)
        prefix = ".".join(parts[: added + 2])
        return next(e.lr_scale for e in self.edits if e.prefix == prefix)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Make the plan again from `to_dict`'s values (after JSON, too).

        Raises:
            Malformed: They are no plan's.
        """
        return schema.check(cls, values, "its plan")

    def __str__(self) -> str:
        from .tables import plan_table  # printing is not a plan's business, but a plan that prints is what users expect

        return plan_table(self)


class Unfit(ConfigError):
    """Raised by a method that finds nothing it could work on; the sentence says what is missing."""


def make_plan(method: Method, anatomy: Anatomy, freeze: int | Sequence[int | str] = 0, bn: str | None = None) -> Plan:
    """Decide what trains and what is edited. Pure: no model is touched.

    Args:
        method: How to tune.
        anatomy: The model's facts; with evidence, if the method looks at data (`Method.looks`).
        freeze: Where not to: the first N stages, a list of stage indices, or names of stages or modules.
        bn: "frozen" or "train": whether running statistics outside the head move. By default as the method
            says. In frozen stages they always stay still, in the head they always move.

    Raises:
        ConfigError: The method does not fit the model, `freeze` names nothing, or nothing is left to train.
    """
    asked, bn = bn, bn or method.bn
    if bn not in ("frozen", "train"):
        raise ConfigError(f"bn='{bn}' is not known; it is 'frozen' or 'train'")
    frozen = _freezer(anatomy, freeze)
    if method.looks and anatomy.evidence is None:
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
    return Plan(
        family=anatomy.family,
        model=anatomy.model,
        method=method.name,
        settings=method.settings(),
        freeze=freeze if isinstance(freeze, int) else tuple(freeze),
        bn=bn,
        heads=anatomy.heads,
        train=tuple(p.name for p in anatomy.params if p.name in wanted),
        rates={name: rate for name, rate in rates.items() if rate != 1.0},
        edits=tuple(edits),
        still=tuple(s.name for s in anatomy.statistics if s.name in still),
        rows=_rows(anatomy, wanted, edits, still, opens),
        opens=opens,
    )


def given_plan(method: Method, anatomy: Anatomy, edits: Sequence[Edit], train: Iterable[str], moved: Iterable[str]) -> Plan:
    """Return the plan of a model that was trained elsewhere: what it edits and trains is known, nothing is decided.

    Args:
        method: How it was tuned, for the record.
        anatomy: The model's facts.
        edits: What was added.
        train: The parameters of the body that were trained.
        moved: The modules of the body whose running statistics moved.
    """
    wanted = {*train, *(p.name for p in anatomy.params if p.stage == HEAD)}
    moving = {*moved, *(s.name for s in anatomy.statistics if s.stage == HEAD)}
    still = {s.name for s in anatomy.statistics} - moving
    return Plan(
        family=anatomy.family,
        model=anatomy.model,
        method=method.name,
        settings=method.settings(),
        freeze=0,
        bn="train" if any(s.name in moving and s.stage != HEAD for s in anatomy.statistics) else "frozen",
        heads=anatomy.heads,
        train=tuple(p.name for p in anatomy.params if p.name in wanted),
        rates={},
        edits=tuple(edits),
        still=tuple(s.name for s in anatomy.statistics if s.name in still),
        rows=_rows(anatomy, wanted, edits, still, {}),
    )


def fitting(anatomy: Anatomy) -> list[str]:
    """Return the names of the methods that have something to work on in this anatomy."""
    return [name for name, cls in METHODS.items() if _fits(cls(), anatomy)]


def _fits(method: Method, anatomy: Anatomy) -> bool:
    if method.looks and anatomy.evidence is None:
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
        f"With their defaults these fit: {', '.join(fitting(anatomy))}"
    )


def _freezer(anatomy: Anatomy, freeze: int | Sequence[int | str]) -> Callable[[Any], bool]:
    """Return the predicate that says of any part of the anatomy whether it is frozen."""
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
        return part.stage in stages or any(part.name == n or part.name.startswith(n + ".") for n in names)

    return frozen


def _freeze_name(anatomy: Anatomy, given: str) -> str:
    """Return the module path that a name in `freeze` means; "2.cv1" is a path inside stage 2."""
    first, _, rest = given.strip(".").partition(".")
    name = given.strip(".")
    if first.isdigit() and int(first) < len(anatomy.stages) and anatomy.stages[int(first)].name:
        name = ".".join(filter(None, (anatomy.stages[int(first)].name, rest)))
    paths = {".".join(p.name.split(".")[:i]) for p in anatomy.params for i in range(1, p.name.count(".") + 2)}
    if name not in paths:
        raise ConfigError(f"freeze: {anatomy.model} has nothing called '{given}'.{nearest(name, paths)}")
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
        own = [r for stage, r in ranks if stage == index]
        return Row(
            stage=label,
            kind=kind,
            params=sum(p.numel for p in params),
            trained=sum(p.numel for p in params if p.name in wanted),
            edits=sum(stage == index for stage, _ in added),
            added=sum(n for stage, n in added if stage == index),
            statistics="" if not count else {0: "still", count: "moving"}.get(len(moving), "mixed"),
            moving=sum(moving.values()),
            ranks="–".join(str(r) for r in sorted({f(own) for f in (min, max)})) if own else "",
            opens=max((opens.get(p.name, 0.0) for p in params if p.name in wanted), default=0.0),
        )

    return (*(row(s.index, str(s.index), s.kind) for s in anatomy.stages), row(HEAD, "head", anatomy.head))


def parameters(edit: Edit) -> int:
    """Count the parameters that an edit brings, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in edit.build().parameters())
