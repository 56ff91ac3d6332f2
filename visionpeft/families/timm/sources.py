"""Models of timm that a file from elsewhere may name: those that are here already, with plain values as arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download

from ...core.base_model import LARGEST_IMAGE
from ...errors import ModelError
from ..base import Arguments

# arguments of create_model that are whole numbers or lists of them, with the largest
_SIZES = dict.fromkeys("layers depth depths num_heads block_repeats".split(), 64)
_SIZES |= dict.fromkeys("patch_size window_size output_stride cardinality head_dim reg_tokens".split(), 256)
_SIZES |= dict.fromkeys("embed_dim dims channels stem_width base_width width num_features stem_chs in_chans".split(), 8192)
_SIZES |= {"img_size": LARGEST_IMAGE, "num_classes": 1 << 16}
_PLAIN = set(  # numbers, truths and words, which choose among what timm has
    "pad_type global_pool drop_rate drop_path_rate drop_block_rate attn_drop_rate proj_drop_rate patch_drop_rate "
    "pos_drop_rate head_drop_rate act_layer norm_layer aa_layer bn_momentum bn_eps bn_tf mlp_ratio mlp_ratios qkv_bias "
    "qk_norm init_values ls_init_value class_token pos_embed no_embed_class pre_norm fc_norm final_norm dynamic_img_size "
    "dynamic_img_pad strict_img_size always_partition window_ratio stem_type deep_stem avg_down replace_stem_pool "
    "zero_init_last fix_stem round_chs_fn channel_multiplier width_mult depth_mult".split()
)
_SEEN = ("mean", "std", "crop_pct", "input_size")  # of pretrained_cfg_overlay: how images are given to the model
_MOST = 1 << 30  # parameters of a model whose sizes a file says


def check_named(source: str | None, named: Arguments, own: Arguments, scratch: bool) -> Arguments:
    """Check the model that a file names; see `Family.check_named`.

    Raises:
        ModelError: It is not here, or more than plain values.
    """
    for argument, value in named.items():
        _check_argument(argument, value)
    given = {**named, **own}
    if source is None or own.get("pretrained_cfg_overlay"):
        return {}
    if not timm.is_model(source):
        raise ModelError(f"the model {source}, which timm does not have")
    if named.keys() & _SIZES.keys() - {"img_size", "num_classes"}:
        _check_size(source, given)
    if given.get("checkpoint_path") is not None or (scratch and not given.get("pretrained", True)):
        return {}
    if not given.get("pretrained", True):
        raise ModelError(f"the model {source} with random weights, which no delta is made for")
    overlay = named.get("pretrained_cfg_overlay") or {}
    return {"pretrained_cfg_overlay": {**overlay, "file": _cached(source, given.get("cache_dir"))}}


def _check_argument(name: str, value: Any) -> None:
    """Refuse an argument of create_model that a file names, unless it is a file here, or a plain value of usual size.

    Raises:
        ModelError: It is not.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if name in ("checkpoint_path", "cache_dir"):
        there = Path.is_file if name == "checkpoint_path" else Path.is_dir
        good = value is None or (isinstance(value, str) and not value.startswith(("//", "\\\\")) and there(Path(value)))
        if not good:
            raise ModelError(f"{name}={value}, which is not here")
    elif name == "pretrained":
        good = isinstance(value, bool)
    elif name == "pretrained_cfg_overlay":
        good = isinstance(value, Mapping) and all(
            key in _SEEN and all(map(_number, v if isinstance(v, list | tuple) else [v])) for key, v in value.items()
        )
    elif most := _SIZES.get(name):
        good = len(values) <= 8 and all(v is None or (isinstance(v, int) and 0 <= v <= most) for v in values)
    else:
        words = (isinstance(v, str) and re.fullmatch(r"\w{0,40}", v) for v in values)
        good = name in _PLAIN and len(values) <= 64 and all(w or _number(v) for w, v in zip(words, values, strict=True))
    if not good:
        raise ModelError(f"the argument {name}={str(value)[:60]}, which only your own call may give")


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= 1024)


def _check_size(name: str, arguments: Arguments) -> None:
    """Refuse a model whose sizes a file says, if it is larger than any that could be meant.

    Raises:
        ModelError: It is.
    """
    sizes = {k: v for k, v in arguments.items() if k in _SIZES}
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name, pretrained=False, **sizes).parameters())
    except Exception as error:  # timm raises what comes
        raise ModelError(f"the model {name} with {sizes}, which timm cannot make ({type(error).__name__})") from error
    if count > _MOST:
        raise ModelError(f"the model {name} with {sizes}, which has {count:,} parameters")


def _cached(name: str, cache_dir: str | None) -> str:
    """Return where the pretrained weights of a model are on this machine.

    Raises:
        ModelError: They are not.
    """
    cfg: Any = timm.get_pretrained_cfg(name)
    if repository := getattr(cfg, "hf_hub_id", None):
        for file in filter(None, (getattr(cfg, "hf_hub_filename", None), "model.safetensors", "pytorch_model.bin")):
            with suppress(OSError):
                return hf_hub_download(repository, file, cache_dir=cache_dir, local_files_only=True)
    elif url := getattr(cfg, "url", None):
        path = Path(cache_dir or Path(torch.hub.get_dir(), "checkpoints"), Path(url).name)
        if path.is_file():
            return str(path)
    raise ModelError(f"the model {name}, whose weights are not here")
