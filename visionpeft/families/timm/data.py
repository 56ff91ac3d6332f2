"""Images as timm's transforms prepare them for a model."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ...errors import ConfigError
from ..introspect import observe
from .anatomy import input_size
from .arguments import Hyperparameters


def transform(model: Any, imgsz: int | None, hyper: Hyperparameters | None = None) -> Any:
    """Return timm's transform for a model: the one of training with hyperparameters, else the one of evaluation.

    Raises:
        ConfigError: The model cannot read images of this size.
    """
    _, own, _ = input_size(model)
    size = int(imgsz or own)
    if size != own:
        check_size(model, size, own)
    config = {**resolve_model_data_config(model), "input_size": (3, size, size)}
    if hyper is None:
        return create_transform(**config)
    return create_transform(
        **config,
        is_training=True,
        scale=(1 - min(hyper.scale, 0.99), 1.0),
        hflip=hyper.fliplr,
        vflip=hyper.flipud,
        color_jitter=hyper.color_jitter,
        auto_augment=hyper.auto_augment or None,
        re_prob=hyper.erasing,
    )


def check_size(model: nn.Module, size: int, own: int) -> None:
    """Refuse an image size that a model, made for its own, cannot read.

    Raises:
        ConfigError: It cannot.
    """
    try:
        observe(model, torch.zeros(1, 3, size, size).to(next(model.parameters())), ())
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"this model cannot read images of imgsz={size}: it was made for {own}; leave imgsz out, or make it for "
            f"that size with model_args={{'img_size': {size}}}"
        ) from error
