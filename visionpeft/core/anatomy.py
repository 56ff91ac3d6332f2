"""A backbone as a record of facts, which is all that methods see of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import deprecation
from ..errors import ConfigError

HEAD = -1  # the stage index of what belongs to the task head


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
class GradientStats:
    """Gradients of the training loss on some training images, by parameter of the untouched model."""

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
    gradient_stats: GradientStats | None = None  # for methods that look at data before they plan

    @property
    def body(self) -> tuple[Param, ...]:
        """The parameters outside the head."""
        return tuple(p for p in self.params if p.stage != HEAD)

    evidence = deprecation.alias("Anatomy.evidence", "gradient_stats")

    def without(self, gone: Callable[[Any], bool]) -> Anatomy:
        """Return the anatomy without the parts for which `gone(part)` is true."""
        names = ("params", "layers", "blocks", "attentions", "statistics")
        rest: dict[str, Any] = {n: tuple(part for part in getattr(self, n) if not gone(part)) for n in names}
        open_stages = {p.stage for p in rest["params"]}
        return replace(self, stages=tuple(s for s in self.stages if s.index in open_stages), **rest)


def inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module, or a parameter of it, is one of these modules or inside one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


class Unfit(ConfigError):
    """Raised by a method whose targets the anatomy lacks; the sentence names them."""
