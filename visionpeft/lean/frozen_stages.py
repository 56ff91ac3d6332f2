"""The frozen stages: those before the first that trains. Their outputs depend on the image alone, so they can run apart from
the rest, faster, or not at all where their outputs are at hand.

`FrozenStages` computes the outputs: BatchNorm folded, channels_last, without a graph, in a precision of its own. A model
that has them installed takes images as before, or instead of each image one vector that `FrozenStages.flatten` made; its
frozen modules then return outputs computed elsewhere. The model's own forward is as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

from ..core import class_swap
from ..core.class_swap import Mixin
from ..errors import ConfigError
from . import folds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FrozenStages:
    """A copy of a model's first modules, to be run apart from the rest.

    Args:
        model: The model, nothing attached to it; it stays as it is.
        modules: Paths of the modules that together are the frozen stages; what is computed between them belongs to them.
        x: Images to try it on, (B, C, H, W), of the size that vectors will be made for.
        read: Those modules whose outputs the rest of the model reads; by default the one that runs last.
        dtype: The type to compute in.
        stored: The type to round outputs to; by default `dtype`.

    Raises:
        ConfigError: The model does not come to the same result when its first modules run apart.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        x: Tensor,
        read: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
    ):
        self.dtype, self.stored = dtype, stored or dtype
        trial = copy.deepcopy(model).eval()
        outputs, results = _outputs(trial, modules, x)
        self.modules = tuple(outputs)  # in the order in which they run
        self.read = tuple(read) or self.modules[-1:]
        self.shapes = {name: output.shape[1:] for name, output in outputs.items()}
        self.image = x.shape[1:]
        self._check(trial, outputs, results)
        self._last = next(name for name in reversed(self.modules) if name in self.read)
        self._fast = _cast(self._folded(model, outputs, x), dtype)

    def __deepcopy__(self, memo: dict) -> FrozenStages:
        return self  # it never changes

    @property
    def length(self) -> int:
        """Count of numbers in the vector of one image."""
        return sum(math.prod(self.shapes[name]) for name in self.read)

    @property
    def bytes(self) -> int:
        """Bytes of its own copy of the modules."""
        return sum(t.nbytes for t in (*self._fast.parameters(), *self._fast.buffers()))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs that the rest of the model reads, by module, in the stored type."""
        if next(self._fast.parameters()).device != images.device:
            self._fast.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            outputs = self._run(self._fast, images.to(self.dtype, memory_format=torch.channels_last))
        return {name: outputs[name].to(self.stored) for name in self.read}

    def flatten(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return outputs as a vector per image, (B, length); the images must be of the size of the trial."""
        return torch.cat([outputs[name].flatten(1) for name in self.read], 1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the outputs that vectors (B, length) hold, by module."""
        parts = vectors.split([math.prod(self.shapes[name]) for name in self.read], 1)
        return {n: part.view(len(part), *self.shapes[n]) for n, part in zip(self.read, parts, strict=True)}

    def install(self, model: nn.Module) -> nn.Module:
        """Let the model's first modules run apart, or not at all where the model is given vectors; in place."""
        for module in self.members(model).values():
            class_swap.add_mixin(module, PrecomputedOutput)
        class_swap.add_mixin(model, FrozenStagesMixin)
        model.__dict__["frozen_stages"] = self
        return model

    def uninstall(self, model: nn.Module) -> nn.Module:
        """Undo `install`, in place."""
        for module in self.members(model).values():
            class_swap.remove_mixin(module, PrecomputedOutput)
        class_swap.remove_mixin(model, FrozenStagesMixin)
        del model.__dict__["frozen_stages"]
        return model

    def members(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the frozen modules of a model, by path."""
        return {name: model.get_submodule(name) for name in self.modules}

    def _run(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Run a model up to the last module that is read, and return the outputs of those that are."""
        outputs: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output
            if name == self._last:
                raise _AllComputed

        with _hooked(model, self.read, record):
            try:
                model(x)
            except _AllComputed:
                pass
        return outputs

    def _folded(self, model: nn.Module, outputs: dict[str, Tensor], x: Tensor) -> nn.Module:
        """Return a copy of the modules that run, with BatchNorm folded where that gives the same outputs."""
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        with torch.no_grad():
            _trim(plain, self.modules, lambda: self._run(plain, x))
            folded = copy.deepcopy(plain)
            fold(folded)
            again = self._run(folded, x)
        same = all((again[n] - outputs[n]).norm() <= 1e-3 * outputs[n].norm() for n in self.read)
        return folded if same else plain

    @torch.no_grad()
    def _check(self, model: nn.Module, outputs: dict[str, Tensor], results: list[Tensor]) -> None:
        """Refuse a model that does not return `results` where its frozen modules return `outputs` without running."""
        if missing := [name for name in self.read if name not in outputs]:
            raise ConfigError(_refusal(f"{missing[0]} does not run"))
        self.install(model)
        try:
            again = _tensors(model(self.flatten(outputs)))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
            raise ConfigError(_refusal("the rest reads what they compute in between")) from error
        finally:
            self.uninstall(model)
        pairs = zip(again, results, strict=False)
        if not all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in pairs):
            raise ConfigError(_refusal("the rest reads what they compute in between"))


class FrozenStagesMixin(Mixin):
    """A model whose frozen stages run apart. Outermost, for other mixins record what the model computes, not its stages."""

    _mixin_rank = 0
    frozen_stages: FrozenStages

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not isinstance(x, Tensor):  # a whole batch, whose images the forward calls itself with
            return run(x, *args, **kwargs)
        stages = self.frozen_stages
        outputs = stages.unflatten(x) if x.ndim == 2 else stages(x)
        layout = torch.preserve_format
        if x.device.type == "cpu":  # where a lean rest is faster with channels last, and another without
            layout = torch.channels_last if hasattr(self, "lean_level") else torch.contiguous_format
        outputs = {
            name: output.to(torch.float32, memory_format=layout if output.dim() == 4 else torch.preserve_format)
            for name, output in outputs.items()
        }
        with _precomputed(self, stages, outputs):
            return run(outputs[stages.read[0]].new_empty(0, *stages.image), *args, **kwargs)


class PrecomputedOutput(Mixin):
    """A module that returns an output it was given instead of running."""

    _mixin_rank = 4
    precomputed: Tensor | None = None

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # not forward: a library that fuses layers gives modules another one, and no hook shall see this
        return super().__call__(*args, **kwargs) if self.precomputed is None else self.precomputed  # type: ignore[misc]


@contextmanager
def _precomputed(model: nn.Module, stages: FrozenStages, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Let the frozen modules return `outputs`; those that nobody reads, a batch of no images, which costs nothing."""
    members, like = stages.members(model), outputs[stages.read[0]]
    for name, module in members.items():
        output = outputs[name] if name in outputs else like.new_empty(0, *stages.shapes[name])
        module.__dict__["precomputed"] = output
    try:
        yield
    finally:
        for module in members.values():
            del module.__dict__["precomputed"]


# ------------------------------------------------------------------------------------------------------- running in part
class _AllComputed(Exception):
    """The last output that is read has been computed."""


@contextmanager
def _hooked(model: nn.Module, names: Iterable[str], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Have `hook` called with the path, arguments and output of each of the named modules."""
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _outputs(model: nn.Module, names: Iterable[str], x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the outputs of the named modules, in the order in which they run, and those of the model."""
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in outputs or not isinstance(output, Tensor) or len(output) != len(x):
            raise ConfigError(_refusal(f"{name} runs twice, or returns something else than a tensor with a row per image"))
        outputs[name] = output.clone()  # an activation behind it may write into it

    with _hooked(model, names, record):
        results = _tensors(model(x))
    if not outputs:
        raise ConfigError(_refusal("none of its modules runs"))
    return outputs, results


def _refusal(why: str) -> str:
    return f"the frozen stages of this model cannot run apart from the rest ({why}); leave cache and frozen_dtype out"


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------------------------------------- making it fast
def fold(model: nn.Module) -> None:
    """Fold BatchNorms for good into the convolutions that they alone read; in place, in eval mode."""
    for parent, conv_path, norm_path in folds.find(model)[0]:
        conv: Any = parent.get_submodule(conv_path)
        norm: Any = parent.get_submodule(norm_path)
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        above, _, leaf = norm_path.rpartition(".")
        rest = nn.Sequential(*norm.children())  # some also drop and activate, see `folds`
        parent.get_submodule(above)._modules[leaf] = rest


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model with its floats in another type, channels last; in place, tensor by tensor, for `to` cannot turn the
    fake tensors of a forecast."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point():
                cast = tensor.detach().to(dtype)
                cast = cast.to(memory_format=torch.channels_last) if cast.dim() == 4 else cast
                if name in module._buffers:
                    module._buffers[name] = cast
                else:
                    module._parameters[name] = nn.Parameter(cast, False)
    return model


def _trim(model: nn.Module, modules: Iterable[str], run: Callable[[], object]) -> None:
    """Drop, in place, the modules that stand beside the frozen ones and do not run with them."""
    parents = {".".join(parts[:i]) for parts in (name.split(".") for name in modules) for i in range(len(parts))}
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, args: ran.add(module)) for m in model.modules()]
    run()
    for handle in handles:
        handle.remove()
    for parent in parents:
        for name, child in model.get_submodule(parent).named_children():
            if child not in ran and ".".join(filter(None, (parent, name))) not in parents:
                model.get_submodule(parent)._modules[name] = nn.Identity()
