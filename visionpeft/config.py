"""Every option of `train`, once: its type, its default, what it may be, and what depends on it.

`train` makes a `TrainConfig` of its arguments on its first line, and from there on only that travels. The command line, YAML
files, the benchmark's grid, a resumed run, the forecast and the search read its fields.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from . import deprecation, schema
from .errors import ConfigError
from .schema import Json, Malformed

if TYPE_CHECKING:
    from .core.method import Method
else:
    Method = Any  # importing it would import torch, which `visionpeft --help` has no time for

ModelArgs = Mapping[str, Any]  # of a family's model loader
Options = Mapping[str, Any]  # of a method, or of a family: what `train` has no argument for
Freeze = int | Sequence[int | str]
MODEL, METHOD, HOW, RUN = "Model and data", "What trains", "How it trains", "The run"
RENAMED = {"prefix_dtype": "frozen_dtype"}  # options, and keys of files


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type and default.

    Attributes:
        help: For the command line.
        group: Of the command line's help.
        choices: All that it may be, where it has a default of the family or none.
        least: The least whole number that it may be.
        text: Text that looks like a number is text.
        memory: How much memory a run takes may depend on it.
        placement: It only says where the run's folder is, or how much is printed, and is not kept in ``train.json``.
        resumable: A run that is resumed may be given another value.
    """

    help: str
    group: str = HOW
    choices: tuple[str, ...] = ()
    least: int | None = None
    text: bool = False
    memory: bool = True
    placement: bool = False
    resumable: bool = False


def _option(default: Any, *args: Any, **kwargs: Any) -> Any:
    return field(default=default, metadata={"option": Option(*args, **kwargs)})


@dataclass(frozen=True)
class TrainConfig:
    """The options of one run: as they were given, or, once `settled`, all of them known."""

    data: str | Path | None = _option(
        None,
        "A data YAML; for classifiers a folder with train/CLASS and val/CLASS; or scenes/satellite and the like.",
        MODEL,
        text=True,
        resumable=True,
    )
    model: str | Path | None = _option(
        None,
        "A YOLO checkpoint (a path, or yolo11n.pt, the default), or timm/NAME. With neither data nor model: a small "
        "detector that ships with visionpeft, adapted to satellite scenes that it draws.",
        MODEL,
        text=True,
        resumable=True,
    )
    method: str | Method | None = _option(
        None, "A name, or several joined by +; full where --freeze is given, else lora.", METHOD, text=True
    )
    freeze: Freeze = _option(0, "The first N stages, or indices (0,1,2), or names (model.0,model.1).", METHOD)
    bn: str | None = _option(None, "frozen or train: whether BatchNorm statistics outside the head move.", METHOD, text=True)
    head: str | None = _option(
        None, "keep what of the head fits, or rebuild it.", METHOD, choices=("keep", "rebuild"), text=True
    )
    epochs: int | None = _option(None, "Passes over the data.", least=1)
    imgsz: int | None = _option(None, "Image size in pixels.", least=1)
    batch: float | None = _option(None, "Images per step.")
    lr0: float | None = _option(None, "Learning rate of the head.", memory=False)
    lr_scale: float | None = _option(
        None, "Factor of the body's learning rates, which method and family choose relative to lr0.", memory=False
    )
    optimizer: str | None = _option(None, "AdamW, SGD, ...", text=True)
    device: str | int | Sequence[int] | None = _option(None, "cpu, 0, 0,1, ...", text=True)
    workers: int | None = _option(None, "Processes that load images.", least=0, memory=False)
    seed: int = _option(0, "Of every random choice.", least=0, memory=False)
    amp: bool | str | None = _option(None, "true, bf16 or false.")
    delta_dtype: str = _option(
        "fp16", "fp16 or fp32: how the delta stores trained weights.", RUN, choices=("fp16", "fp32"), memory=False
    )
    cache: int | str | bool = _option(
        0,
        "K: keep what the frozen stages make of K views of each image (approximate); ram, disk: keep the images.",
    )
    cache_limit: float = _option(20.0, "GB that such views may take.", memory=False)
    frozen_dtype: str | None = _option(
        None,
        "bf16, fp16 or fp32: the precision of the frozen stages before the first that trains (approximate).",
        text=True,
    )
    lean: str = _option(
        "auto",
        "memory: least memory; auto: less memory in the same time (both exact); off: as PyTorch does.",
        choices=("off", "auto", "memory"),
        text=True,
    )
    trackers: str | Sequence[str] = _option(
        "csv",
        "Where every epoch's numbers go beside metrics.csv: tensorboard, wandb, mlflow (several: tensorboard,wandb).",
        RUN,
        text=True,
        memory=False,
        resumable=True,
    )
    quiet: bool = _option(False, "Print nothing but mistakes.", RUN, memory=False, placement=True)
    project: str | Path = _option("runs/visionpeft", "Folder of runs.", RUN, text=True, memory=False, placement=True)
    name: str | None = _option(None, "Folder of this run in it.", RUN, text=True, memory=False, placement=True)
    exist_ok: bool = _option(False, "Write into an existing folder of that name.", RUN, memory=False, placement=True)
    resume: bool | str | Path = _option(
        False,
        'A run\'s folder, or "true" for the newest: go on where it was. SIGTERM, SIGHUP and SIGUSR1 have a run save at its '
        "next step and exit with 75, to be resumed.",
        RUN,
        placement=True,
    )
    save_every: float = _option(
        10.0,
        "Minutes after which a checkpoint is saved within an epoch, too: 10 by default; 0: at its end only.",
        RUN,
        memory=False,
    )
    memory: str | float | None = _option(
        None,
        "6GB: method, freeze, lean, batch and imgsz, where not given, are the best that fits (see visionpeft suggest).",
        text=True,
    )
    model_args: ModelArgs | None = _option(
        None, "Arguments of timm's create_model, as {checkpoint_path: FILE, pad_type: same}.", MODEL, resumable=True
    )
    allow_download: bool = _option(
        False,
        "Let Ultralytics fetch images as the data YAML's download: says, which can be code; look at it first.",
        MODEL,
        placement=True,
    )
    options: Options = field(default_factory=dict)  # of the method and the family; once settled, of the family

    @classmethod
    def from_call(cls, given: Mapping[str, Any], with_idle: bool = False) -> TrainConfig:
        """Return the configuration of a call.

        Args:
            given: The arguments by name, "options" those that have none of their own; names that are no fields are left out.
            with_idle: Take options from among "options", too, on which memory does not depend.

        Raises:
            ConfigError: A name or a path is of another type, or an option is given by two names.
        """
        options = dict(given.get("options", {}))
        made = {name: given[name] for name in OPTIONS if name in given}
        for old, new in RENAMED.items():
            if old not in options or new not in made:
                continue
            deprecation.warn(f"{old}=", f"{new}=", 5)
            if made[new] is not None:
                raise ConfigError(f"{old} and {new} are two names of one option; give {new} alone")
            made[new] = options.pop(old)
        for name in idle(options) if with_idle else ():
            made[name] = options.pop(name)
        config = cls(**made, options=options)
        config.check_names()
        return config

    @classmethod
    def from_file(cls, values: Json) -> TrainConfig:
        """Return the configuration that ``train.json`` holds; other values in it are left out.

        Raises:
            Malformed: One is missing, or of another type.
        """
        values = {RENAMED.get(k, k): v for k, v in values.items()}
        needed = ("model", "data", "method", "model_args", "options", "seed")
        if missing := next((name for name in needed if name not in values), None):
            raise Malformed(f"it has no {missing}")
        kinds = {**types(), **dict.fromkeys(("model", "data", "method"), str), "model_args": ModelArgs}
        kinds |= {"cache_limit": Real, "options": Options}  # there may be no limit
        names = [n for n in kinds if n in values and not (n in OPTIONS and OPTIONS[n].placement)]
        return cls(**{name: schema.check(kinds[name], values[name], name) for name in names})

    def or_else(self, defaults: Options) -> TrainConfig:
        """Return a copy with these values for options that were left open (None). What is no option of `train` is one of the
        family's."""
        own = {k: v for k, v in defaults.items() if k in OPTIONS and getattr(self, k) is None}
        more = {k: v for k, v in defaults.items() if k not in OPTIONS}
        return dataclasses.replace(self, **own, options={**more, **self.options})

    def changed(self) -> list[str]:
        """Return the options that are not at their defaults."""
        fields = dataclasses.fields(self)
        return [*(f.name for f in fields if f.name in OPTIONS and getattr(self, f.name) != f.default), *self.options]

    def settled(self, defaults: Options) -> SettledConfig:
        """Return the configuration with these values for options that were left open (None), checked.

        Raises:
            ConfigError: A value is one that no family can use.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made = SettledConfig(**{**own, **{name: value for name, value in defaults.items() if own[name] is None}})
        made._check()
        return made

    @property
    def views(self) -> int:
        """How many views of every image are stored; 0 where `cache` is a family's own."""
        return 0 if isinstance(self.cache, bool | str) else self.cache

    def arguments(self) -> Json:
        """Return what the run is, by option, as its folder keeps it: all but where it lies."""
        fields = {name: getattr(self, name) for name, option in OPTIONS.items() if not option.placement}
        return {**fields, "options": dict(self.options)}

    def check_names(self) -> None:
        """Refuse what can be no name and no path: a model, a list of files.

        Raises:
            ConfigError: One is of another type.
        """
        resume = None if isinstance(self.resume, bool) else self.resume
        check_paths(data=self.data, model=self.model, project=self.project, name=self.name, resume=resume)

    def _check(self) -> None:
        if not isinstance(self.optimizer, str):
            raise ConfigError(f"optimizer={self.optimizer} is not usable; give a name, e.g. 'AdamW' or 'SGD'")
        if self.optimizer.lower() == "auto":
            raise ConfigError("optimizer='auto' ignores lr0 and picks its own; name one, e.g. 'AdamW' or 'SGD'")
        for name, option in OPTIONS.items():
            value, least = getattr(self, name), option.least
            if option.choices and value not in option.choices:
                raise ConfigError(f"{name}='{value}' is not known; it is {' or '.join(map(repr, option.choices))}")
            if least is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32):
                raise ConfigError(f"{name}={value} is not usable; it must be a whole number of at least {least}")
        batch = self.batch
        if (
            batch is None
            or not _is_number(batch)
            or not (batch == -1 or 0 < batch < 1 or (batch >= 1 and batch == int(batch)))
        ):
            raise ConfigError(f"batch={batch} is not usable; it must be at least 1 (or -1: as much as fits on the GPU)")
        for name, value in (("lr0", self.lr0), ("lr_scale", 1 if self.lr_scale is None else self.lr_scale)):
            if not (isinstance(value, int | float) and 0 < value < 1e3):
                raise ConfigError(f"{name}={value} is not usable; it must be a number above 0")
        if not _is_number(self.save_every) or not 0 <= self.save_every < math.inf:
            raise ConfigError(
                f"save_every={self.save_every} is not usable; it must be a number of minutes, or 0: only after epochs"
            )


class SettledConfig(TrainConfig):
    """The options of a run, all known: with the family's defaults, and names and devices resolved."""

    if TYPE_CHECKING:
        data: str
        model: str
        method: str
        head: str
        epochs: int
        imgsz: int
        batch: int  # below 1: to be found by the family
        lr0: float
        optimizer: str
        device: str
        workers: int
        model_args: ModelArgs


OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(TrainConfig) if "option" in f.metadata
}


@cache
def types() -> dict[str, Any]:
    """Return the types of the options."""
    return get_type_hints(TrainConfig)


def idle(names: Iterable[str]) -> list[str]:
    """Return those of some names that are options on which a run's memory does not depend."""
    return [name for name in names if name in OPTIONS and not OPTIONS[name].memory]


def by_new_names(options: Options) -> Options:
    """Return options of a command line or a file by their names of today, with a warning for each that has another one."""
    named = {name.replace("-", "_"): value for name, value in options.items()}
    for old in named.keys() & RENAMED:
        deprecation.warn(f"--{old}", f"--{RENAMED[old]}")
        named[RENAMED[old]] = named.pop(old)
    return named


def check_paths(**given: Any) -> None:
    """Refuse what can be no name and no path.

    Raises:
        ConfigError: One is of another type.
    """
    for name, value in given.items():
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"{name} is of the type {type(value).__name__}, which cannot be used; give a name or a path")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
