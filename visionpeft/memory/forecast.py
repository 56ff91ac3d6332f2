"""Peak memory of a training step, known before it runs: its own code runs on tensors without content.

The step is the real one: the family's model with the plan attached, lean, the library's own loss, backward, the optimizer.
Only the tensors are fake (`torch._subclasses.FakeTensorMode`): they have shapes and no memory. Where code asks for the
content of one (how many elements of a mask are true?), `Answers` says what the family expects. `Ledger` follows every
storage from its making to its end.

A batch that divides no other size is run once; what is a multiple of it grows with the batch, the rest does not. So one
run gives the peak for all batch sizes.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import lean as leanly
from .. import tables
from ..core.attach import attach, settle, train_mode
from ..core.base_model import Base
from ..core.plan import Plan
from ..errors import ConfigError
from ..families.capabilities import DryRun, LeadingStages, Step, SupportsDryRun
from ..lean.frozen_stages import DTYPES, Prefix, put_on, take_off
from ..lean.products import layout
from ..measure import PeakBytes, held

CONTEXT = 500e6  # bytes of a GPU that CUDA's context, kernels and cuBLAS take; assumed
WORKSPACE = 128e6  # bytes that cuDNN's algorithms take while they run; assumed
OPERATIONS, BANDWIDTH = 20e12, 300e9  # a second, about an RTX 3060's in half precision; only to compare steps by
ROUNDING = 0.06  # share that the allocator adds to tensors by rounding and by gaps between them; assumed

_aten = torch.ops.aten
_PRIMES = (61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173)


# -------------------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Forecast:
    """What a training run of a plan takes, in bytes. Prints as a table."""

    plan: Plan
    lean: str
    batch: int
    imgsz: int
    gpu: bool
    weights: int  # parameters and statistics
    average: int  # their moving average
    optimizer: int  # its state
    step: int  # the most that a training step takes beside: activations, gradients, the loss
    saved: int  # of that, what lives when backward begins
    validation: int  # the most that validation takes beside weights, average and optimizer
    flops: float  # multiplications and additions of a training step
    traffic: float  # bytes that it reads and writes, about
    objects: int  # labelled ones that were assumed in every image

    @property
    def tensors(self) -> int:
        """The most that all tensors take at once."""
        return self.weights + self.average + self.optimizer + max(self.step, self.validation)

    @property
    def allowance(self) -> int:
        """What a GPU needs beside: CUDA's context, workspaces, rounding. Assumed, not counted."""
        return round(CONTEXT + WORKSPACE + ROUNDING * self.tensors) if self.gpu else 0

    @property
    def total(self) -> int:
        """Tensors and allowance."""
        return self.tensors + self.allowance

    @property
    def cost(self) -> float:
        """What a training step costs, by its operations and the bytes that it moves: to compare steps by, no time."""
        return self.flops / OPERATIONS + self.traffic / BANDWIDTH

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = (
            "lean",
            "batch",
            "imgsz",
            "gpu",
            "objects",
            "weights",
            "average",
            "optimizer",
            "step",
            "saved",
            "validation",
        )
        sums = {"tensors": self.tensors, "allowance": self.allowance, "total": self.total, "flops": self.flops}
        return {**{n: getattr(self, n) for n in named}, **sums}

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, ""),
            ("moving average", self.average, ""),
            ("optimizer", self.optimizer, ""),
            ("training step", self.step, f"{tables.size(self.saved)} of it kept for backward"),
            ("validation", self.validation, "not at the same time as the step"),
            ("allowance", self.allowance, "CUDA context, workspaces, rounding: assumed" if self.gpu else "none on a CPU"),
            ("peak", self.total, "in training" if self.step >= self.validation else "in validation"),
        ]
        objects = f", up to {self.objects} objects an image" if self.objects else ""
        title = f"Memory at batch={self.batch}, imgsz={self.imgsz}, lean={self.lean}{objects}"
        return tables.text(title, ("", "bytes", ""), [(n, tables.size(b), why) for n, b, why in rows], right=(1,))


@dataclass(frozen=True)
class Trace:
    """What a step of a plan takes, as a function of the batch size: `at`."""

    example: Forecast
    sums: Sequence[tuple[int, int]]  # (once, per image) of the training step at moments that may be its peak
    saved: tuple[int, int]
    validation: Sequence[tuple[int, int]]
    flops: float  # per image
    traffic: float  # per image
    gradients: int  # bytes of all
    devices: int = 1  # that share a batch
    nbs: int = 0  # images whose gradients are accumulated, where a step has fewer

    def at(self, batch: int) -> Forecast:
        """Return the forecast for so many images a step: of one device, where several share them."""
        own = max(batch // self.devices, 1)
        # gradients that wait for further steps, and those that devices exchange, are there all the time
        waiting = self.gradients * ((self.devices > 1) + (round(self.nbs / batch) > 1))
        return replace(
            self.example,
            batch=batch,
            step=waiting + max(once + own * each for once, each in self.sums),
            saved=self.saved[0] + own * self.saved[1],
            validation=max(once + own * each for once, each in self.validation),
            flops=own * self.flops,
            traffic=own * self.traffic,
        )


# ------------------------------------------------------------------------------------------------------------- how it runs
class Answers(TorchDispatchMode):
    """Answers where code asks for the content of a tensor that has none: whether it is true, what number it is, how many
    elements of a mask are true. Numbers are as large as they may be expected to be at most."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.true: Callable[[Sequence[int]], int] = math.prod
        self.number: Callable[[], int] = lambda: 1
        self.yes = False  # what a single truth is: while parts are made, none, or what draws until all fit would not end

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:  # .item(), if, int(): counts are of objects
            # an optimizer divides by 1 minus the number that it reads
            return self.yes if args[0].dtype is torch.bool else 0.5 if args[0].is_floating_point() else self.number()
        if func in (_aten.allclose.default, _aten.equal.default):
            return True
        if func is _aten.nonzero.default:
            return self._places(args[0])
        if func is _aten._unique2.default:  # with places, of things that are all different; else of labels, by image
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


class Ledger(PeakBytes):
    """Follows storages, and tells those whose size grows with the batch from the rest. Counts operations, too.

    Args:
        batch: A number of images that divides no other size.
        gpu: Whether it is a GPU whose memory is forecast.
    """

    def __init__(self, batch: int, gpu: bool):
        super().__init__()
        self.batch, self.gpu = batch, gpu
        self.once = self.each = 0  # bytes that live now: whatever the batch, and per image
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
            self._pass(_backward_inside(self.gpu, *args))
        elif count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        if func is _aten.convolution.default:
            self._pass(_forward_inside(self.gpu, out, *args))
        elif not self.gpu and torch.Tag.pointwise in func.tags and func is not _aten.where.self:
            self._pass(_promoted([x for x in args if isinstance(x, Tensor)]))
        elif func._overloadpacket is _aten.sum and out.dtype is torch.long is not args[0].dtype:
            self._pass([args[0].numel() * out.itemsize])
        return out

    def _pass(self, sizes: Sequence[int]) -> None:
        """Note tensors that live only inside of an operation, beside its results."""
        for size in sizes:
            self._note(size)
        self.sums.add((self.once, self.each))
        for size in sizes:
            self._note(-size)

    def _size(self, key: int, size: int) -> None:
        self._note(-self._sizes.get(key, 0))
        super()._size(key, size)
        self._note(size)
        self.sums.add((self.once, self.each))

    def _end(self, key: int) -> None:
        self._note(-self._sizes[key])
        super()._end(key)

    def _note(self, change: int) -> None:
        if change % self.batch:
            self.once += change
        else:
            self.each += change // self.batch

    def peaks(self) -> list[tuple[int, int]]:
        """Return the moments since the last call that are the peak at some batch size; starts anew."""
        found: list[tuple[int, int]] = []
        for once, each in sorted(self.sums, reverse=True):
            if not found or each > found[-1][1]:
                found.append((once, each))
        self.sums = {(self.once, self.each)}
        return found


def _promoted(tensors: Sequence[Tensor]) -> list[int]:
    """Return the sizes of the copies of those that a CPU's kernel turns into the type of the others."""
    kinds = {x.dtype for x in tensors if x.dim()}
    if len(kinds) < 2:
        return []
    common = functools.reduce(torch.promote_types, kinds)
    return [x.numel() * common.itemsize for x in tensors if x.dim() and x.dtype is not common]


def _forward_inside(gpu: bool, out: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, *rest: Any) -> list[int]:
    """Return the sizes of what a convolution takes inside and gives back: copies in another layout.

    On a CPU these are oneDNN's, as `torch.profiler` shows them: with channels first it computes in a layout of its own.
    """
    last, small = _last(x) or _last(weight), weight.shape[2:].numel() == 1
    copies = [] if last is _last(x) else [x.nbytes]
    if gpu or x.dim() != 4 or (small and set(stride) == {1}):
        return copies
    if last:
        return [*copies, weight.nbytes, weight.nbytes]
    return [*copies, *max([x.nbytes, weight.nbytes], [out.nbytes], key=sum)]


def _backward_inside(
    gpu: bool, g: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, pad: Any, dil: Any, turned: bool, out: Any,
    groups: int, mask: Sequence[bool],
) -> list[int]:  # fmt: skip
    """As `_forward_inside`, of a convolution's backward."""
    last, small = _last(x) or _last(weight), weight.shape[2:].numel() == 1
    copies = [t.nbytes for t in (g, x) if _last(t) is not last]
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


def _last(x: Tensor) -> bool:
    """Say whether (B, C, H, W) lies in memory with its channels last."""
    return x.dim() == 4 and layout(x) is torch.channels_last


class _CudaAutocast(TorchFunctionMode):
    """Where fake tensors lie on a CPU under its autocast: runs in single precision what CUDA's autocast would.

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


@dataclass(frozen=True)
class Case:
    """What is to be forecast."""

    family: SupportsDryRun
    base: Base
    fitted: nn.Module  # the base with its head made for the data; it stays as it is
    plan: Plan
    step: Step  # its batch does not count
    lean: str = "auto"  # a level, or "off"
    gpu: bool = True  # which needs an allowance, and computes in half precision otherwise than a CPU
    leading: LeadingStages | None = None  # the frozen stages, where they run apart from the rest
    frozen_dtype: str | None = None  # their precision
    cached: bool = False  # whether their outputs are read from the disk instead
    devices: int = 1  # that share a batch
    nbs: int = 0  # images whose gradients are accumulated, where a step has fewer


def trace(case: Case, validation: Sequence[tuple[int, int]] = ()) -> Trace:
    """Return what a training step takes.

    Args:
        case: What is to be forecast.
        validation: What validation takes, where it is known from another plan that edits nothing either.
    """
    sizes = {size for p in (*case.fitted.parameters(), *case.fitted.buffers()) for size in (*p.shape, p.numel())}
    prime = next(prime for prime in _PRIMES if all(size % prime for size in sizes))
    if made := _run(case, prime, True, validation):
        return replace(made, devices=case.devices, nbs=case.nbs)
    (few, many), (fewer, more) = (_ALONE, (_run(case, count, False, validation) for count in _ALONE))
    assert fewer is not None and more is not None

    def line(a: float, b: float) -> tuple[int, int]:
        each = (b - a) / (many - few)
        return math.ceil(a - few * each), math.ceil(each)

    one, two = fewer.at(few), more.at(many)
    sums, saved, validated = (line(getattr(one, k), getattr(two, k)) for k in ("step", "saved", "validation"))
    return Trace(
        one, [sums], saved, [validated], two.flops / many, two.traffic / many, fewer.gradients, case.devices, case.nbs
    )


_ALONE = (2, 8)  # batches, where a loss goes through its images one by one: what it takes for each looks like no multiple


def _run(case: Case, batch: int, tell: bool, validation: Sequence[tuple[int, int]]) -> Trace | None:
    """Run a step, and tell what grows with the batch from the rest; None where that cannot be told."""
    step, half = replace(case.step, batch=batch), case.step.amp
    answers, ledger = Answers(batch), Ledger(batch if tell else sys.maxsize, case.gpu)
    with _quietly(), FakeTensorMode(allow_non_fake_inputs=True) as fake, answers:
        with FakeCopyMode(fake):
            model, plain = copy.deepcopy(case.fitted), copy.deepcopy(case.base.model if case.leading else nn.Module())
        settle(attach(model, case.plan, start=False), case.plan)
        train_mode(model.train(), case.plan)
        answers.yes = True
        rehearsal = case.family.dry_run(model, case.base, step)
        if tell and rehearsal.loops:
            return None
        weights = held(list(model.parameters()), list(model.buffers()))
        if case.leading:
            computing = DTYPES[case.frozen_dtype or "fp32"]
            stored = DTYPES[case.frozen_dtype or "bf16"] if case.cached else computing
            images = torch.zeros(2, *case.leading.image)
            prefix = Prefix(plain, case.leading.modules, images, case.leading.read, computing, stored)
            weights += prefix.bytes
            put_on(model, prefix)
            if case.cached:
                rehearsal = _from_vectors(rehearsal, torch.zeros(batch, prefix.length, dtype=stored))
        if case.lean != "off":
            leanly.apply(model, case.lean)
        answers.true, answers.number = rehearsal.true, rehearsal.number
        with ledger, _autocast(half, case.gpu):
            given = rehearsal.batch()
            loss = rehearsal.loss(given)
        with ledger:
            saved = ledger.once, ledger.each
            loss.backward()
            del loss
            peaks = ledger.peaks()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            try:
                rehearsal.optimizer.step()
            except RuntimeError as error:  # it compiles itself, say
                raise ConfigError(f"what optimizer='{step.optimizer}' takes cannot be forecast; give another") from error
            rehearsal.optimizer.zero_grad()
            del given
            made, stepping = ledger.once, ledger.peaks()
        state = held(list(rehearsal.optimizer.state.values()))
        if not validation:
            judge = Ledger(ledger.batch, case.gpu)
            # it is the average; autocast would keep copies of what requires a gradient
            leanly.remove(model.eval().requires_grad_(False))
            if case.leading:  # validated is the exact model
                take_off(model)
            with judge, _autocast(half and case.gpu, case.gpu):
                rehearsal.validate()
            validation = judge.peaks()
    one = Forecast(
        plan=case.plan,
        lean=case.lean,
        batch=batch,
        imgsz=step.imgsz,
        gpu=case.gpu,
        weights=weights,
        average=rehearsal.average,
        optimizer=state,
        step=0,
        saved=0,
        validation=0,
        flops=0.0,
        traffic=0.0,
        objects=step.objects,
    )
    sums = [*peaks, *((once - made, each) for once, each in stepping)]
    return Trace(one, sums, saved, validation, ledger.flops / batch, ledger.traffic / batch, gradients)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the garbage collector still, which some hundred thousand short-lived objects set going again and again, and
    torch from warning of copied fake tensors."""
    was = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _autocast(amp: bool, gpu: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        if not (amp and gpu):
            yield
            return
        with _CudaAutocast():
            yield


def _from_vectors(rehearsal: DryRun, vectors: Tensor) -> DryRun:
    """Return a rehearsal whose training batches hold stored outputs of the frozen stages in place of images."""

    def batch() -> Any:
        given = rehearsal.batch()
        if isinstance(given, dict):
            return {**given, "img": vectors.clone()}
        return vectors.clone(), *given[1:]

    return replace(rehearsal, batch=batch)


# ----------------------------------------------------------------------------------------------------------------- budgets
def parse_memory(text: str | int | float) -> int:
    """Return bytes: "6GB" (10⁹), "6GiB" (2³⁰), "8000MB", or a number of GB.

    Raises:
        ConfigError: It is no amount of memory.
    """
    units = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": 2**30, "mb": 1e6, "m": 1e6, "mib": 2**20}
    given = str(text).strip().lower().replace(" ", "")
    number = given.rstrip("gmib")
    try:
        amount = float(number) * units[given[len(number) :]]
    except (ValueError, KeyError):
        amount = math.nan
    if not 0 < amount < 1e15:
        raise ConfigError(f"memory='{text}' is not understood; give e.g. 6GB, 6GiB or 8000MB")
    return round(amount)
