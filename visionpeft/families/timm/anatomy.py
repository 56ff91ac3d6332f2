"""A timm classifier's anatomy: stages are timm's own groups; blocks and attentions show in modules' parts and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import (
    RmsNorm,
    RmsNorm2d,
    RmsNorm2dFp32,
    RmsNormFp32,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    SimpleNorm,
    SimpleNorm2d,
    StdConv2d,
    StdConv2dSame,
)
from timm.models import group_parameters
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention as PlainAttention
from timm.models.vision_transformer import Block as PlainBlock
from torch import Tensor, nn

from ...core.anatomy import HEAD, Anatomy, Attention, Block, Stage
from ...core.class_swap import plain
from ..introspect import Seen, observe, read_layers, read_params, read_statistics, read_stride

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_ATTENTIONS = {PlainAttention: "global", WindowAttention: "window"}  # those whose keys and values a prefix can extend
_NORMS = (RmsNorm, RmsNorm2d, RmsNormFp32, RmsNorm2dFp32, SimpleNorm, SimpleNorm2d)
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_MLPS = ("mlp", "mlp_channels")  # timm's names of a feed-forward module over channels


def read_anatomy(model: nn.Module, family: str, name: str) -> Anatomy:
    """Read the facts of a timm classifier that has nothing attached."""
    heads = classifiers(model)
    reader = _Reader(model, heads)
    attentions: dict[str, Any] = {n: m for n, m in _attentions(model).items() if reader.stage_of(n) != HEAD}
    slices = {f"{n}.qkv": _slices(m) for n, m in attentions.items()}
    return Anatomy(
        family=family,
        model=name,
        stages=reader.stages(),
        head=" and ".join(plain(type(model.get_submodule(h))).__name__ for h in heads),
        heads=heads,
        params=read_params(model, reader.stage_of, _NORMS),
        layers=read_layers(model, reader.stage_of, _projecting(model), slices, _STANDARDISED),
        blocks=reader.blocks(),
        attentions=tuple(_attention(n, m, reader.stage_of(n) or 0, reader.seen.get(n)) for n, m in attentions.items()),
        statistics=read_statistics(model, reader.stage_of),
    )


def classifiers(model: Any) -> tuple[str, ...]:
    """Return the names of the modules that turn features into classes; one, but two in distilled models."""
    found = model.get_classifier()
    wanted = {id(m) for m in (found if isinstance(found, tuple | list | nn.ModuleList) else (found,))}
    names = tuple(n for n, m in model.named_modules() if id(m) in wanted)
    return names or ((model.pretrained_cfg["classifier"],) if isinstance(model.pretrained_cfg["classifier"], str) else ())


def leading(model: nn.Module, count: int) -> list[str]:
    """Return the outermost modules that hold parameters of the first `count` stages and of no other."""
    groups = _groups(model, tuple(f"{h}." for h in classifiers(model)))
    later = {path for name in dict(model.named_parameters()) if groups.get(name, count) >= count for path in _parents(name)}
    found: list[str] = []
    for name, module in model.named_modules():  # those that hold others come before them
        holds = any(True for _ in module.parameters())
        if name and holds and name not in later and not name.startswith(tuple(f"{f}." for f in found)):
            found.append(name)
    return found


class _Reader:
    """Stages and blocks of one model: the parameters that belong to each, and the shapes that come out."""

    def __init__(self, model: Any, heads: tuple[str, ...]):
        self._model, self._inside_head = model, tuple(f"{h}." for h in heads)
        self._groups = _groups(model, self._inside_head)
        self._owners: dict[str, set[int]] = {}  # the stages whose parameters a module holds
        self._held: dict[tuple[str, int], int] = {}  # how many of a stage's parameters a module holds
        for name, stage in self._groups.items():
            for path in _parents(name):
                self._owners.setdefault(path, set()).add(stage)
                self._held[path, stage] = self._held.get((path, stage), 0) + 1
        self._count = max((s for s in self._groups.values()), default=HEAD) + 1
        self._names = [self._stage_module(i) for i in range(self._count)]
        self._units = self._find_units("", model)
        wanted = {*self._names, *self._units} | {f"{u}.{n}" for u in self._units for n in ("attn", *_MLPS)}
        wanted = wanted & set(dict(model.named_modules())) | _attentions(model).keys()
        self._size = input_size(model)
        # not all zeros, of which all sums would be the same
        x = torch.rand(1, *self._size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
        with _Sums(model, self._units) as sums:
            self.seen = observe(model, x, wanted)
        self._norms = sums.norms

    def stage_of(self, name: str) -> int | None:
        """Return the stage of a parameter or buffer, or of the last parameter inside a module."""
        if f"{name}.".startswith(self._inside_head):
            return HEAD
        for path in (name, *_parents(name)):
            if path in self._groups:
                return self._groups[path]
            if path in self._owners:
                return max(self._owners[path])
        return None

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages; the side ladder's end is the last one that puts out a feature map."""
        found, last = [], None
        for i, name in enumerate(self._names):
            total = sum(s == i for s in self._groups.values())
            module = self._model.get_submodule(name)
            kind = "stem" if i == 0 else "several"
            if name and (i or self._held[name, i] == total):
                kind = plain(type(module)).__name__
            channels, layout = self._map(name)
            bare = not any(True for _ in module.children())  # an activation behind it may write into its output
            if bare and i < self._count - 1:
                channels, layout = 0, ""
            last = i if channels else last
            found.append((i, name, kind, channels, layout))
        return tuple(Stage(*facts, to_head=facts[0] == last) for facts in found)

    def blocks(self) -> tuple[Block, ...]:
        """Return the residual units whose output a module may follow."""
        sequence = _plain_sequence(self._model)
        found = []
        for name in self._units:
            channels, layout = self._map(name)
            mlp = next((f"{name}.{n}" for n in _MLPS if self._width(f"{name}.{n}") == channels), "")
            attention = f"{name}.attn" if self._width(f"{name}.attn") == channels else ""
            stage = self.stage_of(name)
            if not channels or stage is None or (layout != "NCHW" and not mlp):
                continue
            facts: dict[str, Any] = {"kind": "conv"}
            if layout != "NCHW":
                norm = self._norms.get(name, "") if mlp else ""
                facts = {"kind": "transformer", "attention": attention, "mlp": mlp, "norm": norm}
            if layout == "NLC":
                # some let their class token join late
                counts = (getattr(self._model, "num_prefix_tokens", 0), 0)
                grids = {n: _grid(self.seen[name].out, n, self._size) for n in counts}
                facts["leading"] = next((n for n, grid in grids.items() if all(grid)), 0)
                facts["grid"] = grids[facts["leading"]]
            inputs, stride = self._read(name, layout)
            cls = plain(type(self._model.get_submodule(name))).__name__
            facts |= {"cls": cls, "inputs": inputs, "stride": stride, "sequence": name in sequence}
            found.append(Block(name=name, channels=channels, layout=layout, stage=stage, **facts))
        return tuple(found)

    def _read(self, name: str, layout: str) -> tuple[int, int]:
        """Return channels and stride of the one map, laid out as its output, that a module reads; 0 where it does not."""
        read, out = self.seen[name]
        if read is None or len(read) != len(out) or read[0] != out[0]:
            return 0, 0
        if layout == "NLC":
            return read[2], int(read[1] == out[1])
        channels, space = (1, slice(2, 4)) if layout == "NCHW" else (3, slice(1, 3))
        return read[channels], read_stride(read[space], out[space])

    def _map(self, name: str) -> tuple[int, str]:
        """Return channels and layout of a module's output; 0 where it is no map of features."""
        shape = self.seen[name].out if name in self.seen else ()
        if len(shape) == 3:
            return shape[2], "NLC"
        if len(shape) != 4:
            return 0, ""
        last = getattr(self._model, "output_fmt", None) == "NHWC"
        space = shape[1:3] if last else shape[2:]
        if max(space) == 1:  # pooled
            return 0, ""
        return (shape[3], "NHWC") if last else (shape[1], "NCHW")

    def _width(self, name: str) -> int:
        return self.seen[name].out[-1] if name in self.seen else 0

    def _stage_module(self, stage: int) -> str:
        """Return the outermost module that holds most of a stage's parameters, and none of another stage's or the head's."""
        total = sum(s == stage for s in self._groups.values())
        own = [p for (p, s), n in self._held.items() if s == stage and 2 * n > total and self._owners[p] == {stage}]
        own = [p for p in own if not any(h.startswith(f"{p}.") for h in self._inside_head)]
        return min(own, key=len, default="")

    def _find_units(self, name: str, module: nn.Module) -> list[str]:
        """Return the residual units below a module.

        They are what containers hold: modules of several layers, each within one stage. A stage is no unit if it holds
        some.
        """
        found = []
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if len(self._owners.get(path, ())) == 0 or f"{path}.".startswith(self._inside_head):
                continue
            unit = _layers(child) > 1 and not self._holds_units(path, child) and len(self._owners[path]) == 1
            if unit and self._holds_units(name, module) and path not in self._names:
                found.append(path)
            else:
                found += self._find_units(path, child) or ([path] if unit and path in self._names else [])
        return found

    def _holds_units(self, name: str, module: nn.Module) -> bool:
        """Say whether a module is a container: by its class, or a stage all of whose children are units of one class."""
        children = [c for c in module.children() if any(True for _ in c.parameters())]
        alike = len({type(c) for c in children}) == 1 and all(_layers(c) > 1 for c in children)
        return isinstance(module, _CONTAINERS) or (alike and name in self._names)


class _Sums:
    """Finds, in the run inside of it, the normalisations that read the sum which a feed-forward module is added to.

    There are such in blocks of the form ``x = x + attn(norm1(x)); x = x + mlp(norm2(x))``: what `mlp` reads is what
    `norm2` puts out, and where `mlp` puts out zeros, the block puts out what `norm2` reads. Shapes are not changed by that.
    """

    def __init__(self, model: nn.Module, units: Sequence[str]):
        self.norms: dict[str, str] = {}  # by unit
        self._model, self._units = model, units
        self._handles: list[Any] = []

    def __enter__(self) -> _Sums:
        for unit in self._units:
            block = self._model.get_submodule(unit)
            mlp = next((block._modules[n] for n in _MLPS if block._modules.get(n) is not None), None)
            if mlp is not None:
                self._watch(unit, block, mlp)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, unit: str, block: nn.Module, mlp: nn.Module) -> None:
        passed: dict[str, tuple[Any, Any]] = {}  # input and output of each child
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable:
            return lambda module, args, output: passed.update({name: (args[0] if args else None, output)})

        def silence(module: nn.Module, args: tuple, output: object) -> object:
            found.update({n: given for n, (given, out) in passed.items() if args and out is args[0]})
            return torch.zeros_like(output) if isinstance(output, Tensor) else output

        def judge(module: nn.Module, args: tuple, output: object) -> None:
            for name, given in found.items():
                same = isinstance(output, Tensor) and given.shape[0] == output.shape[0] and given.numel() == output.numel()
                if same and torch.equal(given.flatten(), output.flatten()):  # type: ignore[attr-defined]
                    self.norms[unit] = f"{unit}.{name}"

        children = [(n, m) for n, m in block.named_children() if m is not mlp]
        self._handles += [m.register_forward_hook(note(n)) for n, m in children]
        self._handles += [mlp.register_forward_hook(silence), block.register_forward_hook(judge)]


def _groups(model: Any, head: tuple[str, ...]) -> dict[str, int]:
    """Return the stage of every parameter: timm's coarse groups, less the head, counted from 0."""
    try:
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    except (AttributeError, AssertionError):  # a few architectures have no matcher, or no coarse one
        groups = _by_child(model)
    body = {n: g for n, g in groups.items() if not n.startswith(head)}
    order = {g: i for i, g in enumerate(sorted(set(body.values())))}
    return {n: order[g] for n, g in body.items()}


def _by_child(model: nn.Module) -> dict[str, int]:
    """Group parameters by the model's children, and by the members of those that are containers."""
    seen: dict[str, int] = {}
    groups = {}
    for name, _ in model.named_parameters():
        first, *rest = name.split(".")
        deep = len(rest) > 1 and isinstance(getattr(model, first), _CONTAINERS)
        groups[name] = seen.setdefault(f"{first}.{rest[0]}" if deep else first, len(seen))
    return groups


def _parents(name: str) -> list[str]:
    """Return the paths above a name, nearest first: "a.b" and "a" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _layers(module: nn.Module) -> int:
    return sum(isinstance(m, _LAYERS) for m in module.modules())


def _plain_sequence(model: Any) -> set[str]:
    """Return the blocks of a plain vision transformer, through which one sequence of tokens runs."""
    blocks = list(getattr(model, "blocks", ()))
    plainly = all(plain(type(b)) is PlainBlock and plain(type(b.attn)) is PlainAttention for b in blocks)
    return {f"blocks.{i}" for i in range(len(blocks))} if plainly else set()


def _projecting(model: nn.Module) -> list[str]:
    """Return the modules that hold the projections of an attention."""
    wanted = ({"qkv"}, {"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"}, {"q", "kv"})
    return [n for n, m in model.named_modules() if any(w <= set(m._modules) for w in wanted)]


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions whose keys and values a prefix can extend."""
    return {n: m for n, m in model.named_modules() if plain(type(m)) in _ATTENTIONS}


def _attention(name: str, module: Any, stage: int, seen: Seen | None) -> Attention:
    width = module.qkv.weight.shape[0] // 3 // module.num_heads
    keys = seen.out[1] if seen else 0
    return Attention(name, _ATTENTIONS[plain(type(module))], module.num_heads, width, width, stage, keys)


def _grid(tokens: Sequence[int], leading: int, image: tuple[int, int, int]) -> tuple[int, int]:
    """Return rows and columns of the patches that a sequence (1, N, C) consists of after its leading tokens, or (0, 0)."""
    batch, count, _ = tokens
    side = math.isqrt(image[1] * image[2] // max(count - leading, 1))  # of one patch, in pixels
    rows, columns = (image[1] // side, image[2] // side) if side else (0, 0)
    return (rows, columns) if batch == 1 and rows * columns == count - leading > 0 else (0, 0)


def _slices(attention: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the rows of q, k and v in timm's fused projection: one after the other."""
    c = attention.qkv.weight.shape[0] // 3
    return {"q": ((0, c),), "k": ((c, 2 * c),), "v": ((2 * c, 3 * c),)}


def input_size(model: Any) -> tuple[int, int, int]:
    """Return the (C, H, W) that a model was made for."""
    channels, *size = model.pretrained_cfg["input_size"]
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)  # where it was made for another
    return (channels, *(own or size))
