"""The training arguments of classifiers: hyperparameters, checked; devices and precision."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import timm.optim
import torch
from timm.data import create_transform

from ...config import SettledConfig
from ...errors import ConfigError, nearest
from ...training.devices import check_shares, devices
from ..base import Arguments


@dataclass(frozen=True)
class Hyperparameters:
    """The arguments of `train` that are timm's alone, under Ultralytics' names where it has them."""

    lrf: float = 0.01  # the last learning rate, relative to the first
    cos_lr: bool = True  # fall along a cosine, or else along a line
    warmup_epochs: float = -1.0  # rise to the full learning rate over this many; -1: a tenth of all, at most 3
    momentum: float = 0.9  # of optimizers that have one
    weight_decay: float = 0.05  # of weights; biases, scales and the like are never decayed
    nbs: int = 0  # gradients are accumulated to this many images; 0: to one batch
    patience: int = 100  # stop after this many epochs without a better score
    ema: float = 0.9999  # decay of the moving average, reached after some thousand steps; 0: no average
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    mixup: float = 0.0  # alpha of timm's mixup; 0: off
    cutmix: float = 0.0  # alpha of timm's cutmix; 0: off
    scale: float = 0.5  # random crops cover at least 1 less this share of the image
    fliplr: float = 0.5  # probability of a flip left to right
    flipud: float = 0.0  # probability of a flip upside down
    color_jitter: float = 0.4  # strength of random brightness, contrast and saturation
    erasing: float = 0.0  # probability that a patch is erased
    auto_augment: str = ""  # timm's augmentation policy, e.g. "rand-m9-mstd0.5-inc1"; "": none

    def __post_init__(self) -> None:
        shares = {"lrf", "momentum", "ema", "label_smoothing", "scale", "fliplr", "flipud", "erasing"}
        for field in fields(self):
            value, low, high = getattr(self, field.name), -1 if field.name == "warmup_epochs" else 0, math.inf
            high = 1 if field.name in shares else high
            if field.type in ("float", "int") and not (isinstance(value, int | float) and low <= value <= high):
                allowed = f"a number from {low} to {high}" if high == 1 else f"a number of at least {low}"
                raise ConfigError(f"{field.name}={value!r} is not usable; it must be {allowed}")


def check(config: SettledConfig) -> Hyperparameters:
    """Return the hyperparameters among a run's options; refuse those that training would stumble over.

    Raises:
        ConfigError: One of them cannot be used.
    """
    hyper = Hyperparameters(**{k: v for k, v in config.options.items() if k in Hyperparameters.__dataclass_fields__})
    if not isinstance(config.batch, int) or config.batch < 1:
        raise ConfigError(f"batch={config.batch} is not usable; for timm models it must be a whole number of at least 1")
    if (hyper.mixup or hyper.cutmix) and config.batch % 2:
        raise ConfigError(f"mixup and cutmix mix pairs of images, but batch={config.batch} is odd; give an even one")
    try:
        create_transform(32, is_training=True, auto_augment=hyper.auto_augment or None)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"auto_augment={hyper.auto_augment!r} is not one of timm's policies; give e.g. 'rand-m9-mstd0.5-inc1'"
        ) from error
    known = [str(n) for n in timm.optim.list_optimizers()]
    if config.optimizer.lower() not in known:
        hint = nearest(config.optimizer, known)
        raise ConfigError(f"optimizer='{config.optimizer}' is not one of timm's, e.g. adamw, sgd, lamb.{hint}")
    if timm.optim.get_optimizer_info(config.optimizer.lower()).second_order:
        raise ConfigError(f"optimizer='{config.optimizer}' needs second derivatives, which training does not make")
    check_shares(config.device, config.batch)
    for name in devices(config.device):
        precision(config.amp, select_device(name).type == "cpu")
    return hyper


def select_device(device: str | None) -> torch.device:
    """Return torch's device for "cpu", "0", "cuda:1" or None, and make a GPU the current one.

    Raises:
        ConfigError: There is no such device.
    """
    name = str(device).removeprefix("cuda:").removeprefix("cuda") if device else ""
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not (name or "0").isdigit() or int(name or 0) >= count:
        here = f"this machine has {count} GPUs, counted from 0" if count else "this machine has no GPU that torch can use"
        raise ConfigError(f"device='{device}' is not there: {here}; give device='cpu' or another number")
    if name:
        torch.cuda.set_device(int(name))
    return torch.device("cuda", torch.cuda.current_device())


def precision(amp: bool | str | None, cpu: bool) -> str:
    """Return accelerate's name: bf16 by default where the GPU has it, and nothing on a CPU unless asked by name."""
    if amp not in (None, True, False, "bf16", "fp16"):
        raise ConfigError(f"amp={amp!r} is not known; it is True (fp16), 'bf16' or False")
    if cpu:
        return "bf16" if amp == "bf16" else "no"
    if amp is None:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": "bf16", "fp16": "fp16", True: "fp16", False: "no"}[amp]


def make_optimizer(name: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Return timm's optimizer of this name.

    Raises:
        ConfigError: It needs something that is not installed.
    """
    try:
        kind = timm.optim.get_optimizer_class(name.lower(), bind_defaults=False)
        # one kernel for all parameters, where the optimizer has such, as most of torch's own do
        how: dict[str, Any] = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
        return timm.optim.create_optimizer_v2(groups, name.lower(), **settings, **how)
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"optimizer='{name}' cannot be used here ({error}); give another") from error


@dataclass(frozen=True)
class PredictOptions:
    """The options of a prediction."""

    imgsz: int | None = None  # None: the model's own
    batch: int = 32
    device: str | None = None


@dataclass(frozen=True)
class EvalOptions(PredictOptions):
    """The options of an evaluation."""

    workers: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch={self.batch!r} is not usable; it must be a whole number of at least 1")


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export."""

    imgsz: int | None = None  # None: the model's own
    dynamic: bool = True  # any number of images


T = TypeVar("T", PredictOptions, EvalOptions, ExportOptions)


def read_options(kind: type[T], given: Arguments) -> T:
    """Return the options of a verb.

    Raises:
        ConfigError: There is no such option.
    """
    known = [f.name for f in fields(kind)]
    if strange := [k for k in given if k not in known]:
        hint = nearest(strange[0], known)
        raise ConfigError(f"'{strange[0]}' is no option here; there are {', '.join(known)}.{hint}")
    return kind(**given)
