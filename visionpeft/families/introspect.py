"""The parts of reading an anatomy that all families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import measure
from ..core.anatomy import HEAD, Anatomy, Layer, Param, Statistics
from ..core.class_swap import plain

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def read_params(model: nn.Module, stage_of: Callable[[str], int | None], norms: tuple[type, ...] = ()) -> tuple[Param, ...]:
    """Return the model's parameters; those whose stage is None never train.

    Args:
        model: The model.
        stage_of: The stage of a parameter, by name.
        norms: Further classes of normalisations, beside torch's own.
    """
    modules = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        stage = stage_of(name)
        if stage is None or ".peft_" in f".{name}":
            continue
        if isinstance(modules[owner], _NORMS + norms):
            role = f"norm.{leaf}"
        else:
            role = leaf if leaf in ("bias",) or (leaf == "weight" and parameter.ndim > 1) else "other"
        found.append(Param(name, parameter.numel(), role, stage))
    return tuple(found)


def read_layers(
    model: nn.Module,
    stage_of: Callable[[str], int | None],
    attentions: Iterable[str] = (),
    slices: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]] | None = None,
    standardised: tuple[type, ...] = (),
) -> tuple[Layer, ...]:
    """Return the body's linear and convolutional layers.

    Args:
        model: The model.
        stage_of: The stage of a parameter, by name.
        attentions: Names of the modules whose layers are attention projections.
        slices: Rows of q, k and v of fused projections, by layer name.
        standardised: Classes of layers that standardise their weight before they use it, so are not linear in it.
    """
    inside = tuple(f"{a}." for a in attentions)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS) or "weight" not in module._parameters or ".peft_" in f".{name}":
            continue
        stage = stage_of(f"{name}.weight")
        if stage is None or stage == HEAD:
            continue
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
            kind = "conv_transpose"
        found.append(
            Layer(
                name=name,
                kind=kind,
                shape=tuple(module._parameters["weight"].shape),  # type: ignore[union-attr]
                groups=getattr(module, "groups", 1),
                stage=stage,
                attention=name.startswith(inside) if inside else False,
                linear=plain(type(module)) not in standardised,
                slices=(slices or {}).get(name, {}),
            )
        )
    return tuple(found)


def read_statistics(model: nn.Module, stage_of: Callable[[str], int | None]) -> tuple[Statistics, ...]:
    """Return the modules with running statistics."""
    found = []
    for name, module in model.named_modules():
        if "running_mean" in module._buffers and module._buffers["running_mean"] is not None:
            stage = stage_of(f"{name}.running_mean")
            numel = sum(module._buffers[n].numel() for n in ("running_mean", "running_var"))  # type: ignore[union-attr]
            found.append(Statistics(name, HEAD if stage is None else stage, numel))
    return tuple(found)


def stage_modules(anatomy: Anatomy) -> dict[str, str]:
    """Return the paths of the outermost modules that belong to one stage, with the stage's label, in the stages' order.
    Their time and bytes count as the stage's when a step is measured."""
    labels = {s.index: "stem" if s.kind == "stem" else s.name or f"stage {s.index}" for s in anatomy.stages}
    owners: dict[str, set[int]] = {}  # the stages whose parameters a module holds
    for parameter in anatomy.params:
        parts = parameter.name.split(".")
        for end in range(1, len(parts)):
            owners.setdefault(".".join(parts[:end]), set()).add(parameter.stage)
    found = {s.name: s.index for s in anatomy.stages if s.name}  # also of those without parameters
    for path, (stage, *others) in owners.items():
        if stage != HEAD and not others and len(owners.get(path.rpartition(".")[0], ())) != 1:
            found[path] = stage
    body = {path: labels[stage] for path, stage in sorted(found.items(), key=lambda item: item[1])}
    return {**body, **dict.fromkeys(anatomy.heads, measure.HEAD)}


class Seen(NamedTuple):
    """Shapes around one module while the model ran."""

    read: torch.Size | None  # of its first argument; None where that is no tensor, or not the only one
    out: torch.Size


def observe(model: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, Seen]:
    """Return the shapes that the named modules read and put out for input `x`, but of those that put out no single tensor.

    The model runs once in eval mode without gradients; nothing of it changes.
    """
    seen: dict[str, Seen] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            if isinstance(output, Tensor):
                only = len(inputs) == 1 and inputs[0] is args[0]
                seen[name] = Seen(inputs[0].shape if only else None, output.shape)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(note(n)) for n in names if n]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def read_stride(read: Sequence[int], out: Sequence[int]) -> int:
    """Return how many times as high and wide a map (H, W) is as another; 0 where no one whole number says so."""
    stride = read[0] // max(out[0], 1)
    return stride if stride and all(r == stride * o for r, o in zip(read, out, strict=True)) else 0
