"""Modes for a step on fake tensors: one answers where code asks for content, one follows every storage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..lean.products import layout
from ..measure import PeakBytes

_aten = torch.ops.aten


class FakeTensorOracle(TorchDispatchMode):
    """Answers where code asks for the content of a tensor that has none: whether it is true, which number it is, how many
    elements of a mask are true. A number is the largest that can be expected."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.true: Callable[[Sequence[int]], int] = math.prod
        self.number: Callable[[], int] = lambda: 1
        self.yes = False  # answers a single bool; False while parts are built, or loops that draw until all fit never end

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:  # .item(), if, int(): a count of objects
            # an optimizer divides by 1 minus the number that it reads
            return self.yes if args[0].dtype is torch.bool else 0.5 if args[0].is_floating_point() else self.number()
        if func in (_aten.allclose.default, _aten.equal.default):
            return True
        if func is _aten.nonzero.default:
            return self._places(args[0])
        if func is _aten._unique2.default:  # with places, of values that all differ; else of labels, by image
            places = len(args) > 2 and args[2]
            count = args[0].numel() if places else self.batch
            whole = {"dtype": torch.long, "device": args[0].device}
            return args[0].new_empty(count), torch.empty(count * places, **whole), torch.empty(count, **whole)
        if func is _aten.bincount.default:
            length = (kwargs or {}).get("minlength", args[2] if len(args) > 2 else 0)
            return torch.empty(length, dtype=torch.long, device=args[0].device)
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default):
            indices: list[Any] = []
            for index in args[1]:
                mask = index is not None and index.dtype in (torch.bool, torch.uint8)
                indices += self._places(index).unbind(1) if mask else [index]
            args = (args[0], indices, *args[2:])
        return func(*args, **(kwargs or {}))

    def _places(self, mask: Tensor) -> Tensor:
        return torch.empty(self.true(mask.shape), mask.dim(), dtype=torch.long, device=mask.device)


class BatchScalingLedger(PeakBytes):
    """Follows storages, and separates those whose size grows with the batch from the rest. Counts operations, too.

    Args:
        batch: A number of images that divides no other size.
        gpu: Whether the memory of a GPU is forecast.
    """

    def __init__(self, batch: int, gpu: bool):
        super().__init__()
        self.batch, self.gpu = batch, gpu
        self.once = self.each = 0  # bytes that are alive now: whatever the batch, and per image
        self.sums: set[tuple[int, int]] = set()
        self.flops = self.traffic = 0.0  # operations; bytes that they read and write, about

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view:
            self.traffic += 2 * sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))
        if func is _aten.convolution_backward.default:  # torch's own count is wrong with groups
            g, x, weight, turned, mask = *args[:3], args[7], args[10]
            self.flops += 2 * (x if turned else g).numel() * weight[0].numel() * sum(mask[:2])
            self._count_inside(_backward_copies(self.gpu, *args))
        elif count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        if func is _aten.convolution.default:
            self._count_inside(_forward_copies(self.gpu, out, *args))
        elif not self.gpu and torch.Tag.pointwise in func.tags and func is not _aten.where.self:
            self._count_inside(_promotion_copies([x for x in args if isinstance(x, Tensor)]))
        elif func._overloadpacket is _aten.sum and out.dtype is torch.long is not args[0].dtype:
            self._count_inside([args[0].numel() * out.itemsize])
        return out

    def _count_inside(self, sizes: Sequence[int]) -> None:
        """Count tensors that live only inside of an operation, beside its results."""
        for size in sizes:
            self._add(size)
        self.sums.add((self.once, self.each))
        for size in sizes:
            self._add(-size)

    def _size(self, key: int, size: int) -> None:
        self._add(-self._sizes.get(key, 0))
        super()._size(key, size)
        self._add(size)
        self.sums.add((self.once, self.each))

    def _end(self, key: int) -> None:
        self._add(-self._sizes[key])
        super()._end(key)

    def _add(self, change: int) -> None:
        if change % self.batch:
            self.once += change
        else:
            self.each += change // self.batch

    def peaks(self) -> list[tuple[int, int]]:
        """Return the (once, per image) bytes since the last call that are the peak at some batch size; starts anew."""
        peaks: list[tuple[int, int]] = []
        for once, each in sorted(self.sums, reverse=True):
            if not peaks or each > peaks[-1][1]:
                peaks.append((once, each))
        self.sums = {(self.once, self.each)}
        return peaks


def _promotion_copies(tensors: Sequence[Tensor]) -> list[int]:
    """Return the sizes of copies: of those tensors that a CPU's kernel converts to the type of the others."""
    kinds = {x.dtype for x in tensors if x.dim()}
    if len(kinds) < 2:
        return []
    common = functools.reduce(torch.promote_types, kinds)
    return [x.numel() * common.itemsize for x in tensors if x.dim() and x.dtype is not common]


def _forward_copies(gpu: bool, out: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, *rest: Any) -> list[int]:
    """Return the sizes of the copies in another layout that a convolution makes and frees.

    On a CPU these are oneDNN's, as `torch.profiler` shows them: with channels first it computes in a layout of its own.
    """
    last, small = _channels_last(x) or _channels_last(weight), weight.shape[2:].numel() == 1
    copies = [] if last is _channels_last(x) else [x.nbytes]
    if gpu or x.dim() != 4 or (small and set(stride) == {1}):
        return copies
    if last:
        return [*copies, weight.nbytes, weight.nbytes]
    return [*copies, *max([x.nbytes, weight.nbytes], [out.nbytes], key=sum)]


def _backward_copies(
    gpu: bool, g: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, pad: Any, dil: Any, turned: bool, out: Any,
    groups: int, mask: Sequence[bool],
) -> list[int]:  # fmt: skip
    """As `_forward_copies`, of a convolution's backward."""
    last, small = _channels_last(x) or _channels_last(weight), weight.shape[2:].numel() == 1
    copies = [t.nbytes for t in (g, x) if _channels_last(t) is not last]
    if gpu or x.dim() != 4:
        return copies
    learns = mask[1] or mask[2]  # for the bias alone, oneDNN computes both
    if last:
        copies += [] if small else [weight.nbytes]
        parts = 256 if groups > 1 else 2  # sums of the weight's gradient, by parts
        return [*copies, parts * weight.nbytes] if learns else copies
    if learns and groups == 1:
        return [*copies, g.nbytes, x.nbytes, weight.nbytes]
    return [*copies, x.nbytes] if set(stride) == {1} else [*copies, x.nbytes, x.nbytes]


def _channels_last(x: Tensor) -> bool:
    """Return whether (B, C, H, W) lies in memory with its channels last."""
    return x.dim() == 4 and layout(x) is torch.channels_last


class _CudaAutocast(TorchFunctionMode):
    """Runs the functions in single precision that CUDA's autocast would, for fake tensors on a CPU under its autocast.

    https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32
    """

    names = frozenset(
        "binary_cross_entropy_with_logits cross_entropy exp group_norm kl_div l1_loss layer_norm log log_softmax mse_loss "
        "nll_loss norm pow __pow__ prod smooth_l1_loss softmax softplus sum cumsum".split()
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype is torch.bfloat16 else x for x in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast(amp: bool, gpu: bool) -> Iterator[None]:
    """Let fake tensors compute in the types that `amp` chooses, on a GPU or a CPU."""
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        if not (amp and gpu):
            yield
            return
        with _CudaAutocast():
            yield
