"""Methods: frozen dataclasses whose fields are their settings, their documentation and their options at once."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .. import deprecation, schema
from ..errors import ConfigError, nearest
from ..registry import METHODS
from .anatomy import Anatomy, Param

Settings = Mapping[str, Any]  # of a part: plain values, as JSON has them
PeftFields = Mapping[str, Any]  # the configuration of an adapter of HF peft


@dataclass(frozen=True)
class Edit:
    """One addition to one module. `METHODS[method].build(**settings)` makes its part."""

    module: str  # "" is the model itself
    point: str  # "weight", "output", "input" or "forward"
    method: str
    settings: Settings = field(default_factory=dict)
    lr_scale: float = 1.0  # learning rate of its part, relative to that of full fine-tuning

    @property
    def prefix(self) -> str:
        """The path of its part in the model, where it is attached."""
        return ".".join(filter(None, (self.module, f"peft_{self.point}", self.method)))

    def build(self) -> torch.nn.Module:
        """Make the part, on torch's current default device."""
        return METHODS[self.method].build(**self.settings)


_RENAMED = {  # attributes of methods, as those of users may still call them
    "worth": "expected_gain",
    "staged": "search_freeze_depths",
    "looks": "needs_gradients",
    "reads_map": "needs_token_grid",
    "lengthens": "adds_tokens",
    "starts_unchanged": "identity_at_init",
}


@dataclass(frozen=True)
class PeftLayer:
    """One layer in HF peft's format.

    Attributes:
        tensors: By the names that peft gives them after the layer's, as "lora_A.weight".
        fields: The adapter's configuration for this layer: "r", "lora_alpha", "use_dora", ...
    """

    tensors: Mapping[str, Tensor]
    fields: PeftFields


class PeftPart(NamedTuple):
    """A part that an adapter of HF peft describes: the settings of its edit, and its tensors."""

    settings: Settings
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """How a model is tuned. It names targets in an `Anatomy` and never sees a model, a device or a trainer.

    The head trains with every method; methods speak of the body alone.
    """

    name: ClassVar[str]
    bn: ClassVar[str] = "frozen"  # whether running statistics of the body move by default
    lr_scale: ClassVar[float] = 1.0  # learning rate, relative to that of full fine-tuning
    merges: ClassVar[bool] = True  # the result can be folded into the base's own weights
    identity_at_init: ClassVar[bool] = True  # attaching changes no output
    # share of full fine-tuning's gain over the head alone (benchmarks/worth.py); None: `suggest` does not look at it
    expected_gain: ClassVar[float | None] = None
    needs_token_grid: ClassVar[bool] = False  # it reads a token sequence as the map that it was made from
    adds_tokens: ClassVar[bool] = False  # it adds tokens to a sequence
    search_freeze_depths: ClassVar[bool] = False  # whether `suggest` tries it with early stages frozen, too
    peft_type: ClassVar[str] = ""  # HF peft's name of it; "" where peft computes nothing the same
    peft_fields: ClassVar[frozenset[str]] = frozenset()  # of peft's configuration: those that `from_peft` understands

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for old in _RENAMED.keys() & vars(cls):
            deprecation.warn(f"{cls.__name__}.{old}", _RENAMED[old])
            setattr(cls, _RENAMED[old], vars(cls)[old])

    @property
    def needs_gradients(self) -> bool:
        """Whether it reads `Anatomy.gradient_stats`: the gradients of a few batches, before it plans."""
        return False

    @property
    def parts(self) -> tuple[Method, ...]:
        """The single methods that it consists of."""
        return (self,)

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        """Return the names of the body's own parameters that train."""
        return ()

    def rate(self, param: Param, anatomy: Anatomy) -> float:
        """Return the learning rate of one of the model's own parameters, relative to that of full fine-tuning."""
        return self.lr_scale

    def moving(self, anatomy: Anatomy) -> Iterable[str]:
        """Return the modules of the body whose running statistics move where they may (bn="train")."""
        return [s.name for s in anatomy.statistics]

    def opens(self, anatomy: Anatomy) -> Mapping[str, float]:
        """Return the share of the training after which a parameter trains, or a module's statistics move; by default 0."""
        return {}

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """Return the edits of the body.

        Raises:
            Unfit: The anatomy lacks the method's targets.
        """
        return ()

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        """Return the part of one edit, made from the edit's settings alone."""
        raise NotImplementedError

    def to_peft(self, part: nn.Module, layer: nn.Module) -> PeftLayer | None:
        """Return a part in HF peft's format, or None where peft would compute something else on this layer."""
        return None

    def change_to_peft(self, layer: nn.Module, before: Tensor) -> PeftLayer | None:
        """Return a layer whose own weight was trained in HF peft's format, or None where it has none.

        Args:
            layer: The layer.
            before: Its weight in the base.
        """
        return None

    @classmethod
    def from_peft(cls, fields: PeftFields) -> Method | None:
        """Return the method that a configuration with this `peft_type` describes; None where it is another's."""
        return None

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        """Return the part of a layer in HF peft's format: the reverse of `to_peft`.

        None where peft computes something else on this layer than the part would.

        Raises:
            KeyError: A tensor is missing.
        """
        return None

    def edit(self, module: str, point: str, **settings: Any) -> Edit:
        """Return an edit of this method."""
        return Edit(module, point, self.name, settings, self.lr_scale)

    def settings(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)

    def check(self, field: str, value: float, low: float, high: float = float("inf")) -> None:
        """Raise a ConfigError unless ``low <= value <= high``."""
        if not low <= value <= high:
            allowed = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
            raise ConfigError(f"{self.name}: {field}={value} is out of range; it must be {allowed}")

    def check_choice(self, field: str, allowed: Sequence[str]) -> None:
        """Raise a ConfigError unless the value of a field is one of `allowed`."""
        if (value := getattr(self, field)) not in allowed:
            names = " or ".join(allowed) if len(allowed) == 2 else f"one of {', '.join(allowed)}"
            raise ConfigError(f"{self.name}: {field}='{value}' is not known; it is {names}")


@dataclass(frozen=True)
class Combined(Method):
    """Several methods at once, as in ``method="lora+bitfit"``."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        names = [m.name for m in self.parts]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"method '{self.name}' names {'a method twice; name each once' if names else 'none'}")
        longer, readers = [m.name for m in self.parts if m.adds_tokens], [m.name for m in self.parts if m.needs_token_grid]
        if longer and readers:
            raise ConfigError(
                f"'{longer[0]}' adds tokens to the sequence that '{readers[0]}' takes for a map; use one of the two"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(m.name for m in self.methods)

    @property
    def bn(self) -> str:  # type: ignore[override]
        return "train" if any(m.bn == "train" for m in self.methods) else "frozen"

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return all(m.merges for m in self.methods)

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        return all(m.identity_at_init for m in self.methods)

    @property
    def needs_gradients(self) -> bool:
        return any(m.needs_gradients for m in self.methods)

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.parts)

    def settings(self) -> dict[str, Any]:
        return {m.name: m.settings() for m in self.parts}


def make_method(method: str | Method | None, options: Mapping[str, Any] | None = None, freeze: Any = 0) -> Method:
    """Return the method that a name, a configuration, or nothing at all means, with `options` as its fields.

    Args:
        method: A name ("lora"), several joined by "+" ("lora+bitfit"), a configuration (``LoraConfig(r=16)``), or None:
            then `full` where `freeze` is given (layer freezing), else `lora`.
        options: Fields of the method, by name.
        freeze: The argument of `train`.

    Raises:
        ConfigError: No such method or field, or a value of the wrong type.
    """
    options = dict(options or {})
    if isinstance(method, Method):
        _refuse_unknown(options, {f.name: [method] for f in dataclasses.fields(method)}, method.name)
        return dataclasses.replace(method, **{k: _typed(type(method), k, v) for k, v in options.items()})
    if method is None:
        method = "full" if freeze else "lora"
    if not isinstance(method, str):
        raise ConfigError(
            f"method is of the type {type(method).__name__}; give a name, or a configuration as LoraConfig(r=16)"
        )
    names = [n.strip() for n in str(method).split("+")]
    classes = [METHODS[name] for name in names]
    takers: dict[str, list] = {}
    for cls in classes:
        for f in dataclasses.fields(cls):
            takers.setdefault(f.name, []).append(cls)
    _refuse_unknown(options, takers, str(method))
    return _combined(cls(**{k: _typed(cls, k, v) for k, v in options.items() if cls in takers[k]}) for cls in classes)


def restore_method(name: str, settings: Settings) -> Method:
    """Return the method whose `settings()` are these values (after JSON, too)."""
    names = name.split("+")
    each = {name: settings} if len(names) == 1 else settings
    for n in names:
        if not isinstance(fields := each.get(n), Mapping):
            raise ConfigError(f"the settings given are not those of method '{n}': {schema.shown(settings)}")
        _refuse_unknown(fields, {f.name: f for f in dataclasses.fields(METHODS[n])}, n)
    return _combined(METHODS[n](**{k: _typed(METHODS[n], k, v) for k, v in each[n].items()}) for n in names)


def _combined(methods: Iterable[Method]) -> Method:
    first, *others = methods
    return Combined((first, *others)) if others else first


def fields_of(cls: type[Method]) -> list[tuple[str, str, Any, str]]:
    """Return (name, type, default, comment) of every field; the comment is the one on the line that declares it."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Method) and base is not Method:
            with suppress(OSError, TypeError):  # without source there are no comments
                lines = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(base), re.MULTILINE)
                comments.update(dict(lines))
    defaults = cls()
    return [(f.name, str(f.type), getattr(defaults, f.name), comments.get(f.name, "")) for f in dataclasses.fields(cls)]


def _refuse_unknown(options: Mapping[str, Any], known: Mapping[str, Any], method: str) -> None:
    for name in options:
        if name not in known:
            valid = f"it has {', '.join(known)}" if known else "it has no settings"
            raise ConfigError(f"method '{method}' has no setting '{name}'; {valid}.{nearest(name, known)}")


def _typed(cls: type, field: str, value: Any) -> Any:
    """Return `value` as the field's type, text from a command line included."""
    wanted = get_type_hints(cls)[field]
    choices = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    plain = [get_origin(c) or c for c in choices]
    if isinstance(value, str) and str not in plain:
        try:
            value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            pass
    if isinstance(value, list) and tuple in plain:
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and int not in plain and float in plain:
        value = float(value)
    if not any(isinstance(value, t) and not (t is int and isinstance(value, bool)) for t in plain):
        names = " or ".join(getattr(t, "__name__", str(t)) for t in plain)
        raise ConfigError(f"{cls.name}: {field}={value!r} is not of the right type; it must be {names}")  # type: ignore[attr-defined]
    return value


def parameters(edit: Edit) -> int:
    """Count the parameters that an edit brings, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in edit.build().parameters())
