"""Peak memory of a training step, known before it runs: its own code runs on tensors without content.

The step is the real one: the family's model with the plan attached, lean, the library's own loss, backward, the optimizer.
Only the tensors are fake (torch's `FakeTensorMode`): they have shapes and no memory. Where code asks for the
content of one (how many elements of a mask are true?), `FakeTensorOracle` gives the family's estimate.
`BatchScalingLedger` follows every storage from its making to its end.

A batch that divides no other size is run once; what is a multiple of it grows with the batch, the rest does not. So one
run gives the peak for all batch sizes.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import lean as leanly
from .. import tables
from .._torch_private import FakeCopyMode, FakeTensorMode
from ..core.attach import attach, set_requires_grad, train_mode
from ..core.base_model import Base
from ..core.plan import Plan
from ..errors import ConfigError
from ..families.capabilities import DryRun, LeadingStages, Step, SupportsDryRun
from ..lean.frozen_stages import DTYPES, FrozenStages
from ..measure import storage_bytes
from ..schema import Json
from .fake_tensors import BatchScalingLedger, FakeTensorOracle, autocast

CONTEXT = 500e6  # bytes of a GPU that CUDA's context, kernels and cuBLAS take; assumed
WORKSPACE = 128e6  # bytes that cuDNN's algorithms take while they run; assumed
OPERATIONS, BANDWIDTH = 20e12, 300e9  # a second, about an RTX 3060's in half precision; only to compare steps by
ROUNDING = 0.06  # share that the allocator adds to tensors by rounding and by gaps between them; assumed

Bytes = tuple[int, int]  # whatever the batch, and per image
_PRIMES = (61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173)


# -------------------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Forecast:
    """The memory of a training run of a plan, in bytes. Prints as a table."""

    plan: Plan
    lean: str
    batch: int
    imgsz: int
    gpu: bool
    weights: int  # parameters and statistics
    average: int  # their moving average
    optimizer: int  # its state
    step: int = 0  # the peak of a training step, beside those: activations, gradients, the loss
    saved: int = 0  # of that, the bytes saved for backward
    validation: int = 0  # the peak of validation, beside weights, average and optimizer
    flops: float = 0.0  # multiplications and additions of a training step
    traffic: float = 0.0  # bytes that it reads and writes, about
    objects: int = 0  # labelled objects that were assumed in every image

    @property
    def tensors(self) -> int:
        """The peak of all tensors, in bytes."""
        return self.weights + self.average + self.optimizer + max(self.step, self.validation)

    @property
    def allowance(self) -> int:
        """Bytes of a GPU beside the tensors: CUDA's context, workspaces, rounding. Assumed, not counted."""
        return round(CONTEXT + WORKSPACE + ROUNDING * self.tensors) if self.gpu else 0

    @property
    def total(self) -> int:
        """Tensors and allowance."""
        return self.tensors + self.allowance

    @property
    def cost(self) -> float:
        """The cost of a training step, by its operations and the bytes that it moves: to compare steps by, no time."""
        return self.flops / OPERATIONS + self.traffic / BANDWIDTH

    def to_dict(self) -> Json:
        """Return plain JSON values."""
        named = "lean batch imgsz gpu objects weights average optimizer step saved validation".split()
        sums = {"tensors": self.tensors, "allowance": self.allowance, "total": self.total, "flops": self.flops}
        return {**{n: getattr(self, n) for n in named}, **sums}

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, ""),
            ("moving average", self.average, ""),
            ("optimizer state", self.optimizer, ""),
            ("training step", self.step, f"{tables.size(self.saved)} of it saved for backward"),
            ("validation", self.validation, "not at the same time as the step"),
            ("allowance", self.allowance, "CUDA context, workspaces, rounding: assumed" if self.gpu else "none on a CPU"),
            ("peak", self.total, "in training" if self.step >= self.validation else "in validation"),
        ]
        objects = f", up to {self.objects} objects an image" if self.objects else ""
        title = f"Memory at batch={self.batch}, imgsz={self.imgsz}, lean={self.lean}{objects}"
        return tables.text(title, ("", "bytes", ""), [(n, tables.size(b), why) for n, b, why in rows], right=(1,))


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a step of a plan, as a function of the batch size: `at`."""

    example: Forecast
    sums: Sequence[Bytes]  # of the training step, at moments that may be its peak
    saved: Bytes
    validation: Sequence[Bytes]  # of a validation step, at moments that may be its peak
    flops: float  # per image
    traffic: float  # per image
    gradients: int  # bytes
    devices: int = 1  # that share a batch
    nbs: int = 0  # images whose gradients are accumulated, where a step has fewer

    def at(self, batch: int) -> Forecast:
        """Return the forecast for a batch of so many images: of one device, where several share them."""
        share = max(batch // self.devices, 1)
        # gradients that wait for further steps, and those that devices exchange, are there all the time
        waiting = self.gradients * ((self.devices > 1) + (round(self.nbs / batch) > 1))
        return replace(
            self.example,
            batch=batch,
            step=waiting + max(once + share * each for once, each in self.sums),
            saved=self.saved[0] + share * self.saved[1],
            validation=max(once + share * each for once, each in self.validation),
            flops=share * self.flops,
            traffic=share * self.traffic,
        )


@dataclass(frozen=True)
class ForecastRequest:
    """A run to forecast."""

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


def memory_model(request: ForecastRequest, validation: Sequence[Bytes] = ()) -> MemoryModel:
    """Return the memory of a training step as a function of the batch size.

    Args:
        request: The run to forecast.
        validation: The peaks of validation, where they are known from another plan that edits nothing either.
    """
    sizes = {size for p in (*request.fitted.parameters(), *request.fitted.buffers()) for size in (*p.shape, p.numel())}
    prime = next(prime for prime in _PRIMES if all(size % prime for size in sizes))
    model = _run(request, prime, True, validation) or _line(request, validation)
    return replace(model, devices=request.devices, nbs=request.nbs)


def _line(request: ForecastRequest, validation: Sequence[Bytes]) -> MemoryModel:
    """Return the line through two batches, where a loss goes through its images one by one: no size is then a multiple of
    the batch."""
    (few, many), (fewer, more) = ((2, 8), (_run(request, count, False, validation) for count in (2, 8)))
    assert fewer is not None and more is not None
    of_few, of_many = fewer.at(few), more.at(many)

    def line(name: str) -> Bytes:
        each = (getattr(of_many, name) - getattr(of_few, name)) / (many - few)
        return math.ceil(getattr(of_few, name) - few * each), math.ceil(each)

    flops, traffic = of_many.flops / many, of_many.traffic / many
    return MemoryModel(of_few, [line("step")], line("saved"), [line("validation")], flops, traffic, fewer.gradients)


@dataclass
class _Training:
    """A model that is ready to train on fake tensors."""

    model: nn.Module
    dry_run: DryRun
    weights: int  # bytes
    frozen: FrozenStages | None


def _run(request: ForecastRequest, batch: int, split: bool, validation: Sequence[Bytes]) -> MemoryModel | None:
    """Run a step of so many images. `split` tells bytes that grow with the batch from the rest; None where it cannot."""
    oracle, ledger = FakeTensorOracle(batch), BatchScalingLedger(batch if split else sys.maxsize, request.gpu)
    with _quietly(), FakeTensorMode(allow_non_fake_inputs=True) as fake, oracle:
        training = _set_up(request, batch, fake, oracle)
        if split and training.dry_run.loops:
            return None
        sums, saved, gradients = _train(request, training, ledger)
        optimizer = storage_bytes(list(training.dry_run.optimizer.state.values()))
        validation = validation or _validate(request, training, BatchScalingLedger(ledger.batch, request.gpu))
    example = Forecast(
        plan=request.plan,
        lean=request.lean,
        batch=batch,
        imgsz=request.step.imgsz,
        gpu=request.gpu,
        weights=training.weights,
        average=training.dry_run.average,
        optimizer=optimizer,
        objects=request.step.objects,
    )
    return MemoryModel(example, sums, saved, validation, ledger.flops / batch, ledger.traffic / batch, gradients)


def _set_up(request: ForecastRequest, batch: int, fake: FakeTensorMode, oracle: FakeTensorOracle) -> _Training:
    leading, frozen = request.leading, None
    with FakeCopyMode(fake):
        model, base = copy.deepcopy(request.fitted), copy.deepcopy(request.base.model) if leading else nn.Module()
    set_requires_grad(attach(model, request.plan, start=False), request.plan)
    train_mode(model.train(), request.plan)
    oracle.yes = True
    dry_run = request.family.dry_run(model, request.base, replace(request.step, batch=batch))
    weights = storage_bytes(list(model.parameters()), list(model.buffers()))
    if leading:
        dtype = DTYPES[request.frozen_dtype or "fp32"]
        stored = DTYPES[request.frozen_dtype or "bf16"] if request.cached else dtype
        frozen = FrozenStages(base, leading.modules, torch.zeros(2, *leading.image), leading.read, dtype, stored)
        weights += frozen.bytes
        frozen.install(model)
        if request.cached:
            dry_run = _from_vectors(dry_run, torch.zeros(batch, frozen.length, dtype=stored))
    if request.lean != "off":
        leanly.apply(model, request.lean)
    oracle.true, oracle.number = dry_run.true, dry_run.number
    return _Training(model, dry_run, weights, frozen)


def _train(request: ForecastRequest, training: _Training, ledger: BatchScalingLedger) -> tuple[list[Bytes], Bytes, int]:
    """Run a training step, and return its peaks, the bytes saved for backward, and those of all gradients."""
    dry_run = training.dry_run
    with ledger, autocast(request.step.amp, request.gpu):
        batch = dry_run.batch()
        loss = dry_run.loss(batch)
    with ledger:
        saved = ledger.once, ledger.each
        loss.backward()
        del loss
        peaks = ledger.peaks()
        gradients = sum(p.grad.nbytes for p in training.model.parameters() if p.grad is not None)
        try:
            dry_run.optimizer.step()
        except RuntimeError as error:  # it compiles itself, say
            name = request.step.optimizer
            raise ConfigError(f"what optimizer='{name}' takes cannot be forecast; give another") from error
        dry_run.optimizer.zero_grad()
        del batch
        state, stepping = ledger.once, ledger.peaks()
    return [*peaks, *((once - state, each) for once, each in stepping)], saved, gradients


def _validate(request: ForecastRequest, training: _Training, ledger: BatchScalingLedger) -> list[Bytes]:
    """Run a validation step, and return its peaks."""
    # it is of the average; autocast would keep copies of tensors that require a gradient
    model = leanly.remove(training.model.eval().requires_grad_(False))
    if training.frozen:  # validated is the exact model
        training.frozen.uninstall(model)
    with ledger, autocast(request.step.amp and request.gpu, request.gpu):
        training.dry_run.validate()
    return ledger.peaks()


@contextmanager
def _quietly() -> Iterator[None]:
    """Turn off the garbage collector, which some hundred thousand short-lived objects would start again and again, and
    torch's warning of copied fake tensors."""
    was = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        if was:
            gc.enable()


def _from_vectors(dry_run: DryRun, vectors: Tensor) -> DryRun:
    """Return a dry run whose training batches hold stored outputs of the frozen stages in place of images."""

    def batch() -> Any:
        made = dry_run.batch()
        if isinstance(made, dict):
            return {**made, "img": vectors.clone()}
        return vectors.clone(), *made[1:]

    return replace(dry_run, batch=batch)


# ----------------------------------------------------------------------------------------------------------------- budgets
def parse_memory(text: str | float | None) -> int:
    """Return bytes: "6GB" (10⁹), "6GiB" (2³⁰), "8000MB", or a number of GB.

    Raises:
        ConfigError: It is no amount of memory.
    """
    units = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": 2**30, "mb": 1e6, "m": 1e6, "mib": 2**20}
    plain = str(text).strip().lower().replace(" ", "")
    number = plain.rstrip("gmib")
    try:
        amount = float(number) * units[plain[len(number) :]]
    except (ValueError, KeyError):
        amount = math.nan
    if not 0 < amount < 1e15:
        raise ConfigError(f"memory='{text}' is not understood; give e.g. 6GB, 6GiB or 8000MB")
    return round(amount)
