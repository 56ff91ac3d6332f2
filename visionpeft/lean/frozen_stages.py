"""The frozen prefix: the stages before the first that trains. What they put out depends on the image alone, so they can run
apart from the rest, faster, or not at all where their outputs are given.

`Prefix` computes the outputs: BatchNorm folded, channels_last, without a graph, in a precision of its own. `put_on` makes
twins of the model and of the prefix's modules. Such a model takes images as before, or instead of each image one vector
that `Prefix.flatten` made, and the modules then return what was computed elsewhere. The model's own forward is as it was.
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

from ..core import class_twins as twins
from ..errors import ConfigError
from . import folds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Prefix:
    """The first modules of a model, copied, to be run apart from it.

    Args:
        model: The model, nothing attached to it; it stays as it is.
        modules: Paths of modules that together are the prefix; whatever is computed between them counts as well.
        x: Images to try it on, (B, C, H, W), of the size that vectors will be made for.
        read: Those modules whose outputs the rest of the model reads; by default the one that runs last.
        dtype: What it computes in.
        stored: What its outputs are rounded to; by default `dtype`.

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
        _check(trial, self, outputs, results)
        self._last = next(name for name in reversed(self.modules) if name in self.read)
        self._fast = _cast(self._faster(model, outputs, x), dtype)

    def __deepcopy__(self, memo: dict) -> Prefix:
        return self  # it never changes

    @property
    def length(self) -> int:
        """Numbers in the vector of one image."""
        return sum(math.prod(self.shapes[name]) for name in self.read)

    @property
    def bytes(self) -> int:
        """What its own copy of the modules takes."""
        return sum(t.nbytes for t in (*self._fast.parameters(), *self._fast.buffers()))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the rest of the model reads, by module, in the type that is stored."""
        found: dict[str, Tensor] = {}
        if next(self._fast.parameters()).device != images.device:
            self._fast.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            _run(self._fast, images.to(self.dtype, memory_format=torch.channels_last), self.read, self._last, found)
        return {name: found[name].to(self.stored) for name in self.read}

    def flatten(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return outputs as a vector per image, (B, length); the images must be of the size of the trial."""
        return torch.cat([outputs[name].flatten(1) for name in self.read], 1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return outputs of vectors (B, length)."""
        parts = vectors.split([math.prod(self.shapes[name]) for name in self.read], 1)
        return {n: part.view(len(part), *self.shapes[n]) for n, part in zip(self.read, parts, strict=True)}

    def _faster(self, model: nn.Module, outputs: dict[str, Tensor], x: Tensor) -> nn.Module:
        """Return a copy of what runs, with BatchNorm folded where that gives the same outputs."""
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            _trim(plain, self.modules, lambda: _run(plain, x, self.read, self._last, {}))
            folded = copy.deepcopy(plain)
            fold(folded)
            _run(folded, x, self.read, self._last, found)
        same = all((found[n] - outputs[n]).norm() <= 1e-3 * outputs[n].norm() for n in self.read)
        return folded if same else plain


def put_on(model: nn.Module, prefix: Prefix) -> nn.Module:
    """Let the model's first modules run apart, as `prefix`, or not at all where it is given vectors; in place."""
    for module in _members(model, prefix).values():
        twins.put_on(module, Skipped)
    twins.put_on(model, Apart)
    model.__dict__["prefix"] = prefix
    return model


def take_off(model: nn.Module) -> nn.Module:
    """Take `put_on` back, in place."""
    for module in _members(model, model.__dict__.pop("prefix")).values():
        twins.take_off(module, Skipped)
    twins.take_off(model, Apart)
    return model


class Apart:
    """Twin of a model. Its name sorts it outside of twins that record what the model computes: the prefix is not theirs."""

    prefix: Prefix

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not isinstance(x, Tensor):  # a whole batch, whose images the forward calls itself with
            return run(x, *args, **kwargs)
        outputs = self.prefix.unflatten(x) if x.ndim == 2 else self.prefix(x)
        layout = torch.preserve_format
        if x.device.type == "cpu":  # where a lean rest is faster with channels last, and another without
            layout = torch.channels_last if hasattr(self, "lean_level") else torch.contiguous_format
        given = {
            name: output.to(torch.float32, memory_format=layout if output.dim() == 4 else torch.preserve_format)
            for name, output in outputs.items()
        }
        with _given(self, self.prefix, given):
            return run(given[self.prefix.read[0]].new_empty(0, *self.prefix.image), *args, **kwargs)


class Skipped:
    """Twin of a module: while it has been given an output, it returns that instead of running."""

    given_output: Tensor | None = None

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # not forward: a library that fuses layers gives modules another one, and no hook shall see this
        return super().__call__(*args, **kwargs) if self.given_output is None else self.given_output  # type: ignore[misc]


@contextmanager
def _given(model: nn.Module, prefix: Prefix, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Let the prefix's modules return `outputs`; those that nobody reads, a batch of no images, which costs nothing."""
    members, like = _members(model, prefix), outputs[prefix.read[0]]
    for name, module in members.items():
        output = outputs[name] if name in outputs else like.new_empty(0, *prefix.shapes[name])
        module.__dict__["given_output"] = output
    try:
        yield
    finally:
        for module in members.values():
            del module.__dict__["given_output"]


def _members(model: nn.Module, prefix: Prefix) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in prefix.modules}


# ------------------------------------------------------------------------------------------------------- running in part
class _Enough(Exception):
    """The last output that is read has been computed."""


def _run(model: nn.Module, x: Tensor, read: Iterable[str], last: str, found: dict[str, Tensor]) -> None:
    """Run a model up to its module `last`, and put what the modules `read` return into `found`."""

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output
        if name == last:
            raise _Enough

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in read]
    try:
        model(x)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _outputs(model: nn.Module, names: Iterable[str], x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return what the named modules put out, in the order in which they run, and what the model returns."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in found or not isinstance(output, Tensor) or len(output) != len(x):
            raise ConfigError(_apart(f"{name} runs twice, or returns something else than a tensor with a row per image"))
        found[name] = output.clone()  # an activation behind it may write into it

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        results = _tensors(model(x))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ConfigError(_apart("none of its modules runs"))
    return found, results


@torch.no_grad()
def _check(model: nn.Module, prefix: Prefix, outputs: dict[str, Tensor], results: list[Tensor]) -> None:
    """Refuse a model that does not return `results` when its prefix is given `outputs` and does not run."""
    if missing := [name for name in prefix.read if name not in outputs]:
        raise ConfigError(_apart(f"{missing[0]} does not run"))
    put_on(model, prefix)
    try:
        again = _tensors(model(prefix.flatten(outputs)))
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise ConfigError(_apart("the rest reads what they compute in between")) from error
    finally:
        take_off(model)
    pairs = zip(again, results, strict=False)
    if not all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in pairs):
        raise ConfigError(_apart("the rest reads what they compute in between"))


def _apart(why: str) -> str:
    return f"the frozen stages of this model cannot run apart from the rest ({why}); leave cache and frozen_dtype out"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


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
                turned = tensor.detach().to(dtype)
                turned = turned.to(memory_format=torch.channels_last) if turned.dim() == 4 else turned
                if name in module._buffers:
                    module._buffers[name] = turned
                else:
                    module._parameters[name] = nn.Parameter(turned, False)
    return model


def _trim(model: nn.Module, modules: Iterable[str], run: Callable[[], object]) -> None:
    """Let go, in place, of what stands beside the prefix's modules and does not run with them."""
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
