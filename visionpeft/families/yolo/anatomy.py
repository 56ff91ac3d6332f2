"""The anatomy of Ultralytics' networks: a stage is a layer of the YAML, the head its last one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules.block import Attention as AreaAttention
from ultralytics.nn.modules.conv import Conv

from ...core.anatomy import HEAD, Anatomy, Attention, Block, Stage
from ...core.class_swap import plain
from ..introspect import Seen, observe, read_layers, read_params, read_statistics, read_stride
from .tasks import Task


def read_anatomy(model: Any, family: str, name: str, task: Task) -> Anatomy:
    """Read the facts of a network that has nothing attached."""
    last = len(model.model) - 1

    def stage_of(parameter: str) -> int | None:
        if ".dfl." in parameter:
            return None
        index = int(parameter.split(".")[1])
        return HEAD if index == last else index

    attentions = {n: m for n, m in model.named_modules() if isinstance(m, AreaAttention) and stage_of(n) != HEAD}
    image = _example(model)
    seen = observe(model, image, [*(f"model.{i}" for i in range(last)), *attentions])
    larger = task.imgsz / image.shape[-1]  # images of the task's usual size than this one
    return Anatomy(
        family=family,
        model=name,
        stages=_stages(model, seen),
        head=plain(type(model.model[last])).__name__,
        heads=(f"model.{last}",),
        params=read_params(model, stage_of),
        layers=read_layers(model, stage_of, attentions, {f"{n}.qkv.conv": _slices(m) for n, m in attentions.items()}),
        blocks=_blocks(model, seen),
        attentions=tuple(_attention(n, m, round(math.prod(seen[n].out[2:]) * larger**2)) for n, m in attentions.items()),
        statistics=read_statistics(model, stage_of),
    )


def _example(model: Any) -> Tensor:
    """Return an image that is large enough for every stage."""
    first = next(model.parameters())
    size = max(int(model.stride.max()) * 2, 64)
    return torch.zeros(1, model.yaml.get("channels", 3), size, size, device=first.device, dtype=first.dtype)


def _channels(module: Any, seen: Seen | None) -> int:
    """Return the channels of the map that a stage with parameters puts out, 0 of any other."""
    shape = seen.out if seen else ()
    return shape[1] if len(shape) == 4 and any(True for _ in module.parameters()) else 0


def _stages(model: Any, seen: dict[str, Seen]) -> tuple[Stage, ...]:
    *body, head = model.model
    to_head = head.f if isinstance(head.f, list) else [len(body) + head.f]
    stages = []
    for i, module in enumerate(body):
        channels = _channels(module, seen.get(f"model.{i}"))
        kind = plain(type(module)).__name__
        stages.append(Stage(i, f"model.{i}", kind, channels, "NCHW" if channels else "", i in to_head))
    return tuple(stages)


def _blocks(model: Any, seen: dict[str, Seen]) -> tuple[Block, ...]:
    """Return the stages whose output a module may follow: all that put out a map and are no plain convolution."""
    blocks = []
    for i, module in enumerate(model.model[:-1]):
        channels = _channels(module, around := seen.get(f"model.{i}"))
        if channels and around and not isinstance(module, Conv):
            read, out = around
            inputs, stride = (read[1], read_stride(read[2:], out[2:])) if read else (0, 0)
            kind = plain(type(module)).__name__
            blocks.append(Block(f"model.{i}", "conv", channels, "NCHW", i, cls=kind, inputs=inputs, stride=stride))
    return tuple(blocks)


def _attention(name: str, module: Any, keys: int) -> Attention:
    stage = int(name.split(".")[1])
    return Attention(name, "map", module.num_heads, module.key_dim, module.head_dim, stage, keys=keys)


def _slices(attention: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the rows of q, k and v in Ultralytics' fused projection, where each head has its own three."""
    step = attention.key_dim * 2 + attention.head_dim
    spans = {
        "q": (0, attention.key_dim),
        "k": (attention.key_dim, 2 * attention.key_dim),
        "v": (2 * attention.key_dim, step),
    }
    return {n: tuple((h * step + a, h * step + b) for h in range(attention.num_heads)) for n, (a, b) in spans.items()}
