"""Ultralytics' own arguments: which of them `train` passes on, refuses, and gives other defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.utils.torch_utils import select_device

from ...config import SettledConfig
from ...errors import ConfigError, VisionpeftError, nearest
from ...sources import find
from ...training.devices import check_shares
from ...training.job import Job
from ..base import Arguments
from .output import one_line

# what train() decides itself, and what would undo it
_OURS = {"model", "data", "epochs", "imgsz", "batch", "lr0", "optimizer", "device", "workers", "seed", "amp", "resume"}
_OURS |= {"freeze", "project", "name", "exist_ok"}
REFUSED: Mapping[str, str] = {
    "task": "the task is the model's: yolo11n-seg.pt segments",
    "mode": "train() trains; val, predict and export are verbs of their own",
    "pretrained": "the weights are those of model=...; for random ones give a design, model='yolo11n.yaml'",
    "cfg": "a file of options is a recipe: --config FILE on the command line",
    "distill_model": "training learns from labels alone",
    "save": "a run always saves its delta, and the merged checkpoint beside it",
    "save_dir": "a run's folder is project/name",
    "save_period": "a run can be resumed from each of its epochs, and keeps the best one's delta",
    "single_cls": "let the data YAML name one class, and every label row begin with 0",
    "quantize": "export the adapted model, and quantise that",
}
PASSED = tuple(sorted(set(DEFAULT_CFG_DICT) - _OURS - set(REFUSED)))  # to Ultralytics, as the user gives them
_OPTIMIZERS = ("AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "MuSGD")


def check(config: SettledConfig) -> None:
    """Refuse settings that training would stumble over later.

    Raises:
        ConfigError: One of them cannot be used.
    """
    name = config.optimizer
    if name.lower() not in map(str.lower, _OPTIMIZERS):
        raise ConfigError(f"optimizer='{name}' is not known; give {', '.join(_OPTIMIZERS)}.{nearest(name, _OPTIMIZERS)}")
    if (amp := config.amp) not in (None, True, False, "bf16", "fp32"):
        raise ConfigError(f"amp={amp!r} is not known; it is True (fp16), 'bf16' or False")
    check_shares(config.device, config.batch)
    settings = {**_shared(config), **config.options}
    with usable(settings):
        get_cfg(overrides={k: v for k, v in settings.items() if v is not None})
        select_device(config.device, verbose=False)


@contextmanager
def usable(args: Arguments) -> Iterator[None]:
    """Refuse arguments that Ultralytics does not know, and say in a sentence that it cannot use a value of one."""
    known = {*DEFAULT_CFG_DICT, "save_dir", "head", "delta_dtype"}
    if strange := [k for k in args if k not in known]:
        raise ConfigError(f"'{strange[0]}' is no argument of Ultralytics.{nearest(strange[0], known)}")
    try:
        yield
    except (SyntaxError, FileNotFoundError) as error:
        raise ConfigError(one_line(error)) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, VisionpeftError) or not any(f"'{k}" in str(error) for k in args):
            raise
        raise ConfigError(one_line(error)) from error


def of_run(job: Job) -> Arguments:
    """Return Ultralytics' arguments for a run: for fine-tuning other defaults suit than for training anew."""
    config = job.config
    return {
        "warmup_epochs": min(3.0, config.epochs / 10),
        "warmup_bias_lr": 0.0,  # biases start at no other rate than the rest
        "plots": False,  # train() draws its own
        "nbs": config.batch if config.batch >= 1 else 64,  # a step per batch: small sets get real optimizer steps
        **config.options,
        "task": job.base.task,
        "mode": "train",
        "model": find(job.base.source),
        "data": job.data.source,
        **_shared(config),
        "amp": config.amp if config.amp is not None else _amp(config.device),
        "save_dir": str(job.folder),
        "exist_ok": True,
        "resume": job.resume,
    }


def _shared(config: SettledConfig) -> Arguments:
    """Return the options of `train` that are Ultralytics' arguments, too."""
    names = ("epochs", "imgsz", "batch", "lr0", "optimizer", "device", "workers", "seed", "amp")
    return {name: getattr(config, name) for name in names}


def _amp(device: str) -> bool | str:
    """Return "bf16" where the GPU has it: it needs no loss scaling, and no weights to be fetched for a check."""
    if str(device) == "cpu" or not torch.cuda.is_available():
        return False
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else True
