"""The cost of a training step, as a whole and by part: bytes saved for backward, bytes that live, CUDA's peaks, and time."""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import deprecation
from ._torch_private import storage_id

Part = Literal["data", "forward", "backward", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer")  # of a step, in their order
HEAD, LOSS = "head", "loss"  # labels of what runs in the head, and behind it
_ON_GPU = "CUDA allocator's peak"


@dataclass
class StepBytes:
    """Bytes of the step that was watched; None where they were not counted."""

    saved_bytes: int | None = None
    saved_by_stage: Mapping[str, int] | None = None
    saved_by_cause: Mapping[str, int] | None = None
    live_bytes: int | None = None


WATCHED = tuple(f.name for f in fields(StepBytes))  # keys of a report


class SavedBytes:
    """Counts the unique storages that autograd keeps for backward while it is entered, parameters and buffers apart.

    `bytes` is the most that is kept at once; tensors saved for a result that is dropped again leave it. The number is exact
    and the same on any device. Tensors that an `autograd.Function` gives to ``ctx.save_for_backward`` count; those that it
    keeps as attributes of its context do not (`PeakBytes` sees them, too).

    >>> with SavedBytes(model) as saved:
    ...     loss = model(x).sum()
    >>> saved.bytes

    Args:
        model: Whose parameters and buffers do not count.
        *others: Tensors that do not count either, such as the batch.
    """

    def __init__(self, model: nn.Module, *others: Tensor):
        self._own = set(map(storage_id, _storages([*model.parameters(), *model.buffers(), *others])))
        self._users: Counter[int] = Counter()  # of each storage that is kept now
        self._sizes: dict[int, int] = {}
        self._now = self.bytes = 0  # kept now, and the most so far

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error or (None, None, None))

    def _pack(self, tensor: Tensor) -> _Kept:
        # a result kept with its own graph would keep that for ever, where backward is never called
        kept, storage = _Kept(tensor.detach()), tensor.untyped_storage()
        if (key := storage_id(storage)) not in self._own:
            self._users[key] += 1
            weakref.finalize(kept, self._drop, key).atexit = False
            if self._users[key] == 1:
                self._sizes[key] = storage.nbytes()
                self._change(key, self._sizes[key])
        return kept

    def _drop(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._change(key, -self._sizes.pop(key))

    def _change(self, key: int, size: int) -> None:
        self._now += size
        self.bytes = max(self.bytes, self._now)


class _Kept:
    """The object that autograd keeps instead of a tensor; it dies when autograd drops it."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedSplit(SavedBytes):
    """`SavedBytes` that also splits its bytes by stage of the model, and by operation.

    A storage counts for the first that saves it. Code between two stages counts for the one before, code behind the head as
    "loss". The operation is the function of torch that was called, also where `lean` computes it otherwise; "other" is an
    `autograd.Function` from elsewhere.

    Autograd tells neither, but Python's stack does: the modules being called stand on it, and the functions of torch, which
    go through a mode that changes nothing. Hooks would keep lean from folding the modules that they are put on.

    >>> with SavedSplit(model, {"layer1": "layer1", "fc": "head"}) as saved:
    ...     loss = criterion(model(x), y)
    >>> saved.by_stage, saved.by_cause  # ({"layer1": 4096, ...}, {"conv2d": 2048, ...}); both sum to saved.bytes

    Args:
        model: Whose stages are followed.
        stages: Labels of its modules by path, in the order in which they run; "head" for those of the head.
        *others: As for `SavedBytes`.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, str], *others: Tensor):
        super().__init__(model, *others)
        self._labels = {model.get_submodule(path): label for path, label in stages.items()}
        self._stage = next(iter(stages.values()), LOSS)
        self._changes: list[tuple[int, int, tuple[str, str]]] = []  # storage, bytes, and for what is kept stage and cause
        self._largest = 0  # so many of them led to the most

    @property
    def by_stage(self) -> dict[str, int]:
        """Bytes kept so far, by the label of the stage; stages that keep nothing have 0."""
        return {**dict.fromkeys((*self._labels.values(), LOSS), 0), **self._sums(0)}

    @property
    def by_cause(self) -> dict[str, int]:
        """Bytes kept so far, by the operation that keeps them; the largest first."""
        return dict(self._sums(1).most_common())

    def __enter__(self) -> SavedSplit:
        self._calls = _Calls(self._follow).__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error or (None, None, None))

    def _change(self, key: int, size: int) -> None:
        origin = "", ""
        if size > 0:
            self._follow()
            called = (frame.f_locals.get("func") for frame in _stack("__torch_function__"))
            origin = self._stage, getattr(next(filter(None, called), None), "__name__", "other").strip("_")
        self._changes.append((key, size, origin))
        before = self.bytes
        super()._change(key, size)
        if self.bytes > before:
            self._largest = len(self._changes)

    def _follow(self) -> None:
        """Set the current stage to the one that runs."""
        modules = (frame.f_locals["self"] for frame in _stack("_wrapped_call_impl"))  # what nn.Module.__call__ is
        outside = LOSS if self._stage == HEAD else self._stage
        self._stage = next((self._labels[module] for module in modules if module in self._labels), outside)

    def _sums(self, which: int) -> Counter[str]:
        """Return the bytes that were kept at the peak, by stage (`which` = 0) or by cause (1)."""
        kept: dict[int, tuple[int, tuple[str, str]]] = {}
        for key, size, origin in self._changes[: self._largest]:
            if size > 0:
                kept[key] = size, origin
            else:
                kept.pop(key, None)
        sums: Counter[str] = Counter()
        for size, origin in kept.values():
            sums[origin[which]] += size
        return sums


class _Calls(TorchFunctionMode):
    """Changes nothing, but puts every function of torch that is called on Python's stack, and calls `tell` before it."""

    def __init__(self, tell: Callable[[], None]):
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self._tell()
        return func(*args, **(kwargs or {}))


def _stack(name: str) -> Iterator[FrameType]:
    """Yield the frames of the running functions of this name, the innermost first."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == name:
            yield frame


class PeakBytes(TorchDispatchMode):
    """Counts the storages of tensors that are created while it is entered, each from its creation to its end.

    A storage counts as long as it lives, for whatever reason: saved for backward, kept on a Function's context, held by a
    variable, a gradient. Views and changes in place add nothing. The numbers are exact and the same on any device. An
    allocator's rounding and the memory that an operation uses inside are not in them.

    >>> with PeakBytes() as peak:
    ...     loss = model(x).sum()
    ...     after_forward = peak.live
    ...     loss.backward()
    >>> peak.bytes
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes that are alive now
        self.bytes = 0  # the most that were alive at once
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> PeakBytes:
        self._eager = torch.compiler.set_stance("force_eager")  # compiled code refuses to run under a mode
        self._eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = None
        for storage in _storages(output):
            key = storage_id(storage)
            if key not in self._sizes:
                if inputs is None:  # only now, for most operations return views of known storages
                    inputs = set(map(storage_id, _storages((args, kwargs))))
                if key in inputs:  # older than this mode
                    continue
                weakref.finalize(storage, self._end, key)
            self._size(key, storage.nbytes())  # of a known storage, too: it may have been resized
        return output

    def _size(self, key: int, size: int) -> None:
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.bytes = max(self.bytes, self.live)

    def _end(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all dense tensors in `values`, however nested."""
    if isinstance(values, Tensor):
        return [values.untyped_storage()] if values.layout == torch.strided else []
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return [storage for part in parts for storage in _storages(part)]


def storage_bytes(*values: Any, beside: Any = ()) -> int:
    """Return the bytes of the storages of the tensors in `values`, each once, without those of tensors in `beside`."""
    known = set(map(storage_id, _storages(beside)))
    return sum({key: s.nbytes() for s in _storages(values) if (key := storage_id(s)) not in known}.values())


class Meter:
    """Measures the steps of a training loop, which calls `start` with each part of a step.

    "data" starts with an epoch and where a step is over, "forward" when the batch is there, "backward" when the loss is, and
    "optimizer" when the gradients are complete. A loop that cannot tell some of them apart leaves them out.

    The first step is watched: the bytes saved for backward, by whom, and the most that are alive at once. This takes time
    but changes no number, so the step is left out of the times. On a GPU times are between CUDA events, so no step waits.

    Args:
        model: The model that trains.
        device: The device it trains on.
        stages: Labels of the model's modules, see `SavedSplit`.
        optimizer: The optimizer, whose state is counted.
        average: A moving average of the model, which may share tensors with it.
        compiled: Whether the model goes through torch.compile, which chooses itself what to save: bytes are not split then.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        stages: Mapping[str, str] | None = None,
        optimizer: Any = None,
        average: nn.Module | None = None,
        compiled: bool = False,
    ):
        self._model, self._device, self._stages = model, device, stages or {}
        self._optimizer, self._average, self._compiled = optimizer, average, compiled
        self._saved: SavedBytes | None = None  # these two while they watch
        self._alive: PeakBytes | None = None
        self._seen = StepBytes()  # of the step under way
        self._watched: StepBytes | None = None  # of the first that ended
        self._again = False  # whether a later step is watched
        self._gradients: int | None = None
        self._part: Part | None = None  # the part under way
        self._since: Any = None
        self._step: dict[Part, tuple[Any, Any]] = {}  # start and end of the parts of the step under way
        self._steps: list[dict[Part, tuple[Any, Any]]] = []  # those since the last report
        self._times: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
        self._first: float | None = None
        self._cuda = {"allocated": 0, "reserved": 0} if device.type == "cuda" else None
        self._earlier: Mapping[str, Any] = {}  # the report of an earlier part of the run

    def start(self, part: Part) -> None:
        """Start a part of a step; the part before it is over."""
        now = self._now()
        if part == "forward" and self._part != "data":
            self.close()  # the last step did not end (out of memory)
        if self._part:
            self._step[self._part] = self._since, now
        self._part, self._since = part, now
        if part == "forward":
            self._start_step()
        elif self._saved is not None:
            self._end_forward(self._saved)
        if "forward" in self._step and part in ("optimizer", "data") and self._gradients is None:
            self._gradients = storage_bytes([p.grad for p in self._model.parameters()])
        if "forward" in self._step and part == "data":
            self._end_step()

    begin = deprecation.alias("Meter.begin", "start")

    def rearm(self) -> None:
        """Watch the next step, too, and report its bytes: from here on, more parameters train."""
        if self._watched is not None:
            self._watched, self._gradients, self._again = None, None, True

    def close(self) -> None:
        """Drop the step under way, and stop watching it."""
        for watching in (self._saved, self._alive):
            if watching is not None:
                watching.__exit__(None, None, None)
        self._saved = self._alive = self._part = None
        self._step, self._seen = {}, StepBytes()

    def _start_step(self) -> None:
        if self._cuda:  # the peak of training steps: what validation takes between them does not count
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._watched is not None:
            return
        if self._compiled:
            self._saved = SavedBytes(self._model).__enter__()
        else:
            self._alive = PeakBytes().__enter__()
            self._saved = SavedSplit(self._model, self._stages).__enter__()

    def _end_forward(self, saved: SavedBytes) -> None:
        saved.__exit__(None, None, None)
        self._seen = StepBytes(saved.bytes)
        if isinstance(saved, SavedSplit):
            self._seen.saved_by_stage, self._seen.saved_by_cause = saved.by_stage, saved.by_cause
        self._saved = None

    def _end_step(self) -> None:
        if self._alive is not None:
            self._alive.__exit__(None, None, None)
            self._seen.live_bytes, self._alive = self._alive.bytes, None
        untimed = self._watched is None and self._again
        if self._watched is None:
            self._watched, self._again = self._seen, False
        if self._cuda:
            self._cuda["allocated"] = max(self._cuda["allocated"], torch.cuda.max_memory_allocated(self._device))
            self._cuda["reserved"] = max(self._cuda["reserved"], torch.cuda.max_memory_reserved(self._device))
        self._steps += [] if untimed else [self._step]
        self._step = {}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @property
    def memory(self) -> int | None:
        """Bytes that stand for the memory of training: the GPU's peak, on a CPU the bytes saved for backward."""
        return self._cuda["allocated"] if self._cuda else (self._watched or StepBytes()).saved_bytes

    def restore(self, report: Mapping[str, Any]) -> None:
        """Go on from the report of an earlier part of the run; it may be older than some of the keys."""
        self._earlier = report
        self._watched = StepBytes(*(report.get(k) for k in WATCHED))
        self._gradients = (report.get("state_bytes") or {}).get("gradients")
        if self._cuda and report["peak_measure"] == _ON_GPU:
            self._cuda = report.get("cuda") or {"allocated": report["peak_bytes"], "reserved": 0}

    def report(self) -> dict[str, Any]:
        """Return the measurements as JSON values: bytes, and seconds.

        - ``saved_bytes``: kept for backward in the first step, exact on any device (see `SavedBytes`)
        - ``saved_by_stage``, ``saved_by_cause``: the same by stage and by operation (see `SavedSplit`)
        - ``live_bytes``: the peak of tensors created in the first step (see `PeakBytes`)
        - ``state_bytes``: weights, buffers, gradients, optimizer, and the average without tensors shared with the model
        - ``peak_bytes``, ``peak_measure``: the number that stands for the memory of training, and which it is
        - ``cuda``: the allocator's peaks in training steps, allocated and reserved; None on a CPU
        - ``step_seconds``: median of forward and backward of a step, without the first
        - ``seconds_by_part``: the same for each of data, forward, backward and optimizer; None where no step had that part
        - ``first_step_seconds``: the first step, forward to optimizer, with the watching
        """
        self._count()
        medians = {k: statistics.median(v) if v else None for k, v in self._times.items()}
        step, old = medians.pop("step"), self._earlier
        return {
            **vars(self._watched or StepBytes()),
            "state_bytes": self._state(),
            "peak_bytes": self.memory,
            "peak_measure": _ON_GPU if self._cuda else "bytes saved for backward",
            "cuda": dict(self._cuda) if self._cuda else None,
            "step_seconds": old.get("step_seconds") if step is None else step,
            "seconds_by_part": medians if step is not None else old.get("seconds_by_part") or medians,
            "first_step_seconds": old.get("first_step_seconds", self._first),
        }

    def _state(self) -> dict[str, int | None]:
        weights, buffers = list(self._model.parameters()), list(self._model.buffers())
        average = [] if self._average is None else [*self._average.parameters(), *self._average.buffers()]
        state = [] if self._optimizer is None else list(self._optimizer.state.values())
        return {
            "weights": storage_bytes(weights),
            "buffers": storage_bytes(buffers, beside=weights),
            "gradients": self._gradients,
            "optimizer": storage_bytes(state, beside=weights),
            "average": storage_bytes(average, beside=(weights, buffers)),
        }

    def _count(self) -> None:
        """Turn the steps since the last report into seconds."""
        if self._cuda and self._steps:
            torch.cuda.synchronize(self._device)
        for parts in self._steps:
            spans = {part: _seconds(*span) for part, span in parts.items()}
            if self._first is None:
                self._first = sum(spans[part] for part in PARTS[1:] if part in spans)
                continue
            self._times["step"].append(spans["forward"] + spans.get("backward", 0.0))
            for part, seconds in spans.items():
                self._times[part].append(seconds)
        self._steps = []


def _seconds(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
