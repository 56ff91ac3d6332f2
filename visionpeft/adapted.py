"""A base with a delta on it: found, checked against each other, and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .config import ModelArgs, Options, check_paths
from .core import attach as attaching
from .core import delta as deltas
from .core.base_model import LARGEST_IMAGE, Base
from .core.delta import Delta
from .errors import DeltaError, ModelError
from .families.base import Family
from .registry import FAMILIES
from .settings import find_family, loader_arguments

_MOST = {"imgsz": LARGEST_IMAGE, "batch": 4096}  # that a delta is believed


@dataclass(frozen=True, repr=False)
class Adapted:
    """A base with a delta on it, from `load`.

    Attributes:
        model: The model, the delta attached, in eval mode.
        delta: What was loaded.
        family: Its family.
        base: The base, untouched.
    """

    model: nn.Module
    delta: Delta
    family: Family
    base: Base

    @property
    def mergeable(self) -> bool:
        """Whether the delta can be folded into the base's own weights."""
        return attaching.mergeable(self.model)

    def __repr__(self) -> str:
        plan, names = self.delta.plan, list(self.delta.names.values())
        shown = ", ".join(names[:3]) + (", ..." if names[3:] else "")
        can = "mergeable" if self.mergeable else "not mergeable"
        return f"Adapted({plan.method} on {self.base.source}: {self.base.task}, {len(names)} classes ({shown}), {can})"

    def as_trained(self, given: Options, *names: str) -> Options:
        """Return the options given, with those of the training for `names` that were not.

        Raises:
            DeltaError: The delta says a value that would fill any memory.
        """
        own = {}
        for name in names:
            if name not in given:
                value = self.delta.header["train_args"][name]
                if name == "batch" and value < 1:  # it was to be found for training
                    value = self.family.defaults[name]
                own[name] = value
                if not value <= _MOST[name]:
                    raise DeltaError(
                        f"the delta says {name}={value}, and more than {_MOST[name]} is used only if you give {name}=..."
                    )
        return {**own, **given}


def opened(delta: str | Path | Adapted, model: str | Path | None, model_args: ModelArgs | None) -> Adapted:
    """Return a delta on its base, which may be there already."""
    if isinstance(delta, Adapted):
        return delta
    read, family, base = read_on_base(delta, model, model_args)
    return Adapted(put_together(family, base, read), read, family, base)


def read_on_base(delta: str | Path, model: str | Path | None, model_args: ModelArgs | None) -> tuple[Delta, Family, Base]:
    """Read a delta and its base, and check that they belong together.

    Raises:
        DeltaError: They do not, or one of them cannot be used.
    """
    check_paths(delta=delta, model=model)
    read = deltas.read(delta)
    if read.plan.family not in FAMILIES:
        raise DeltaError(f"{delta} is for models of '{read.plan.family}'; there are {', '.join(FAMILIES)}")
    family: Family = FAMILIES[read.plan.family]()
    base = load_named(family, read.header["base"], delta, model, loader_arguments(model_args))
    deltas.verify(read, base.state)
    return read, family, base


def load_named(family: Family, said: Mapping[str, Any], file: str | Path, model: str | Path | None, own: ModelArgs) -> Base:
    """Load the base that a file names, with what the user gives instead: a file alone can fetch nothing, and run nothing."""
    try:
        source, named, settled = trusted(family, said, model, own)
    except ModelError as error:
        raise DeltaError(f"{file} names {error}; give a base that you trust with model=... or model_args=...") from error
    return family.load(source, **{**named, **settled})


def trusted(
    family: Family | None,
    said: Mapping[str, Any],
    model: str | Path | None,
    own: ModelArgs,
    scratch: bool = False,
) -> tuple[str, ModelArgs, ModelArgs]:
    """Return a model's name, its loader's arguments (the caller's before the file's), and those that keep it from fetching.

    Args:
        family: Of the model; None where the model says it.
        said: "model" and "model_args" of the file, which may be anybody's: they are checked, see `Family.check_named`.
        model: The user's, instead of the file's.
        own: Arguments of the user's, instead of the file's.
        scratch: Whether it may be a model without weights.

    Raises:
        ModelError: What the file says is not here, or no such thing.
    """
    source = str(model or said["model"])
    named = {k: v for k, v in said["model_args"].items() if k not in own}
    family = family or find_family(source)
    settled = family.check_named(None if model else source, named, own, scratch=scratch)
    return source, {**named, **own}, settled


def head_of(family: Family, base: Base, delta: Delta) -> nn.Module:
    """Return the base with a delta's head, the delta checked against it."""
    outputs = family.read_outputs(delta.header.get("outputs", {}))
    model = family.with_head(base, delta.names, delta.header["head"], **outputs)
    deltas.check(delta, model, base.state)
    return model


def put_together(family: Family, base: Base, delta: Delta) -> nn.Module:
    """Return a delta on a copy of its base, in eval mode."""
    model = head_of(family, base, delta)
    attaching.attach(model, delta.plan, start=False)
    return deltas.apply(model, delta, base.state).eval()
