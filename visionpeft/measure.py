"""What a training step costs, as a whole and by part: bytes saved for backward, bytes that live, CUDA's peaks, and time."""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Part = Literal["data", "forward", "backward", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer")  # of a step, in their order
HEAD, LOSS = "head", "loss"  # labels of what runs in the head, and behind it
_ON_GPU = "CUDA allocator's peak"
WATCHED = ("saved_bytes", "saved_by_stage", "saved_by_cause", "live_bytes")  # of a report, what the first step tells


class SavedBytes:
    """Counts the unique storages that autograd keeps for backward while it is entered, parameters and buffers apart.

    Counted is the most that is kept at once; what was saved for a result that is dropped again does not stay in it. The
    number is exact and the same on any device. What an `autograd.Function` gives to ``ctx.save_for_backward`` counts; what
    it keeps as attributes of its context does not: `PeakBytes` sees that, too.

    >>> with SavedBytes(model) as saved:
    ...     loss = model(x).sum()
    >>> saved.bytes

    Args:
        model: Whose parameters and buffers do not count.
        *given: Tensors that do not count either, for they live anyway: the batch.
    """

    def __init__(self, model: nn.Module, *given: Tensor):
        self._own = {s._cdata for s in _storages([*model.parameters(), *model.buffers(), *given])}
        self._users: Counter[int] = Counter()  # of each storage that is kept now
        self._sizes: dict[int, int] = {}
        self._now = 0
        self.bytes = 0  # the most so far

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error or (None, None, None))

    def _pack(self, tensor: Tensor) -> _Kept:
        # a result kept with its own graph would keep that for ever, where backward is never called
        kept, storage = _Kept(tensor.detach()), tensor.untyped_storage()
        if (key := storage._cdata) not in self._own:
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
    """What autograd keeps instead of a tensor; it ends when autograd lets go."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedSplit(SavedBytes):
    """`SavedBytes` that also says which stage of a model saved how much, and which operation.

    A storage counts for the first that saves it. What runs between stages counts for the one before, what runs behind the
    head as "loss". The operation is the function of torch that was called, also where `lean` computes it otherwise; "other"
    is an `autograd.Function` of somebody's own.

    Autograd tells neither, but Python's stack does: modules that are being called stand on it, and functions of torch, for
    they come through a mode that changes nothing. Hooks would keep lean from folding what they are put on.

    >>> with SavedSplit(model, {"layer1": "layer1", "fc": "head"}) as saved:
    ...     loss = criterion(model(x), y)
    >>> saved.by_stage, saved.by_cause  # ({"layer1": 4096, ...}, {"conv2d": 2048, ...}); both sum to saved.bytes

    Args:
        model: Whose stages are followed.
        stages: Labels of its modules by path, in the order in which they run; "head" for those of the head.
        *given: As for `SavedBytes`.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, str], *given: Tensor):
        super().__init__(model, *given)
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
        self._calls = _Calls(self._follow)
        self._calls.__enter__()
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
        """Set the stage to the one that runs."""
        modules = (frame.f_locals["self"] for frame in _stack("_wrapped_call_impl"))  # what nn.Module.__call__ is
        outside = LOSS if self._stage == HEAD else self._stage
        self._stage = next((self._labels[module] for module in modules if module in self._labels), outside)

    def _sums(self, which: int) -> Counter[str]:
        """Sum up what was kept when it was the most."""
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
    """Changes nothing: it is told of every function of torch that is called, and puts it on Python's stack."""

    def __init__(self, tell: Callable[[], None]):
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self._tell()
        return func(*args, **(kwargs or {}))


def _stack(name: str) -> Iterator[FrameType]:
    """Return the functions of a name that are being called, the innermost first."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == name:
            yield frame


class PeakBytes(TorchDispatchMode):
    """Follows the storages of the tensors that are made while it is entered, each from its making to its end.

    Counted is what lives, for whatever reason: saved for backward, kept on a Function's context, held by a variable, a
    gradient. Views and changes in place add nothing. The numbers are exact and the same on any device; what an allocator
    rounds up or an operation takes inside and gives back is not in them.

    >>> with PeakBytes() as peak:
    ...     loss = model(x).sum()
    ...     after_forward = peak.live
    ...     loss.backward()
    >>> peak.bytes
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes that live now
        self.bytes = 0  # the most that ever lived
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> PeakBytes:
        self._eager = torch.compiler.set_stance("force_eager")  # what is compiled refuses to run under a mode
        self._eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = None
        for storage in _storages(output):
            key = storage._cdata
            if key not in self._sizes:
                if given is None:  # looked at only where something is new: most operations on views are not
                    given = {s._cdata for s in _storages((args, kwargs))}
                if key in given:  # older than this mode
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
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [storage for value in values for storage in _storages(value)]


def held(*values: Any, beside: Any = ()) -> int:
    """Return the bytes of the storages that tensors in `values` hold, each once, without those of tensors in `beside`."""
    known = {s._cdata for s in _storages(beside)}
    return sum({s._cdata: s.nbytes() for s in _storages(values) if s._cdata not in known}.values())


class Meter:
    """Follows a run's steps, whatever loop makes them: `begin` says which part of a step begins.

    "data" begins with an epoch and where a step is over, "forward" when the batch is there, "backward" when the loss is, and
    "optimizer" where gradients are put to use. A loop that cannot tell some of them apart leaves them out.

    The first step is watched, which takes time but changes no number: what is saved for backward and by whom, and what lives
    at most. It does not count among the times of the others. On a GPU times are between CUDA events, so no step waits.

    Args:
        model: What trains.
        device: Where.
        stages: Labels of the model's modules, see `SavedSplit`.
        optimizer: Whose state is counted.
        average: A moving average of the model, which may share tensors with it.
        compiled: Whether the model goes through torch.compile, which chooses itself what to save: it then is only summed up.
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
        self._saved: SavedBytes | None = None  # these two as long as they watch
        self._lives: PeakBytes | None = None
        self._seen: dict[str, Any] = {}  # what they saw of the step under way
        self._watched: dict[str, Any] | None = None  # and of the first that ended
        self._again = False  # whether it watches a later step
        self._gradients: int | None = None
        self._part: Part | None = None
        self._since: Any = None
        self._step: dict[Part, tuple[Any, Any]] = {}  # of the step under way: when its parts began and ended
        self._steps: list[dict[Part, tuple[Any, Any]]] = []  # those since the last report
        self._times: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
        self._first: float | None = None
        self._cuda = {"allocated": 0, "reserved": 0} if device.type == "cuda" else None
        self._earlier: Mapping[str, Any] = {}  # what an earlier part of the run reported

    # --------------------------------------------------------------------------------------------------- while it trains
    def begin(self, part: Part) -> None:
        """Say that a part of a step begins, and the one before it is over."""
        now = self._now()
        if part == "forward" and self._part != "data":
            self.close()  # the last step did not end (out of memory)
        if self._part:
            self._step[self._part] = self._since, now
        self._part, self._since = part, now
        if part == "forward":
            self._start()
        elif self._saved is not None:
            self._forward_over()
        if "forward" in self._step and part in ("optimizer", "data") and self._gradients is None:
            self._gradients = held([p.grad for p in self._model.parameters()])
        if "forward" in self._step and part == "data":
            self._stop()

    def rearm(self) -> None:
        """From here more trains: watch the next step, too, and let its bytes stand for the run's."""
        if self._watched is not None:
            self._watched, self._gradients, self._again = None, None, True

    def close(self) -> None:
        """Forget the step under way, and stop watching it."""
        for watching in (self._saved, self._lives):
            if watching is not None:
                watching.__exit__(None, None, None)
        self._saved = self._lives = self._part = None
        self._step, self._seen = {}, {}

    def _start(self) -> None:
        if self._cuda:  # the peak of training steps: what validation takes between them does not count
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._watched is not None:
            return
        if self._compiled:
            self._saved = SavedBytes(self._model).__enter__()
        else:
            self._lives = PeakBytes().__enter__()
            self._saved = SavedSplit(self._model, self._stages).__enter__()

    def _forward_over(self) -> None:
        assert self._saved is not None
        self._saved.__exit__(None, None, None)
        self._seen = {"saved_bytes": self._saved.bytes}
        if isinstance(self._saved, SavedSplit):
            self._seen |= {"saved_by_stage": self._saved.by_stage, "saved_by_cause": self._saved.by_cause}
        self._saved = None

    def _stop(self) -> None:
        """The step is over."""
        if self._lives is not None:
            self._lives.__exit__(None, None, None)
            self._seen["live_bytes"], self._lives = self._lives.bytes, None
        apart = self._watched is None and self._again  # of its time nothing is said
        if self._watched is None:
            self._watched, self._again = {**dict.fromkeys(WATCHED), **self._seen}, False
        if self._cuda:
            self._cuda["allocated"] = max(self._cuda["allocated"], torch.cuda.max_memory_allocated(self._device))
            self._cuda["reserved"] = max(self._cuda["reserved"], torch.cuda.max_memory_reserved(self._device))
        self._steps += [] if apart else [self._step]
        self._step = {}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    # ------------------------------------------------------------------------------------------------------ what it found
    @property
    def memory(self) -> int | None:
        """Bytes that stand for what training takes: the GPU's peak, on a CPU what was saved for backward."""
        return self._cuda["allocated"] if self._cuda else (self._watched or {}).get("saved_bytes")

    def restore(self, report: Mapping[str, Any]) -> None:
        """Go on from what an earlier part of the run reported; it may be older than some of the keys."""
        self._earlier = report
        self._watched = {k: report.get(k) for k in WATCHED}
        self._gradients = (report.get("state_bytes") or {}).get("gradients")
        if self._cuda and report["peak_measure"] == _ON_GPU:
            self._cuda = report.get("cuda") or {"allocated": report["peak_bytes"], "reserved": 0}

    def report(self) -> dict[str, Any]:
        """Return what was measured, as JSON's values: bytes, and seconds.

        - ``saved_bytes``: kept for backward in the first step, exact on any device (see `SavedBytes`)
        - ``saved_by_stage``, ``saved_by_cause``: the same by stage and by operation (see `SavedSplit`)
        - ``live_bytes``: the most that lived at once in the first step above what lived before it (see `PeakBytes`)
        - ``state_bytes``: weights, buffers, gradients, optimizer, and the average less what it shares with the model
        - ``peak_bytes``, ``peak_measure``: what stands for the memory of training, and what it is
        - ``cuda``: the allocator's peaks in training steps, allocated and reserved; None on a CPU
        - ``step_seconds``: forward and backward of a step, median, the first apart
        - ``seconds_by_part``: the same for data, forward, backward and optimizer, None where there was none; where gradients
          are accumulated, the optimizer's of those steps in which it ran
        - ``first_step_seconds``: the first step, forward to optimizer, watched as it was
        """
        self._count()
        medians = {k: statistics.median(v) if v else None for k, v in self._times.items()}
        step, old = medians.pop("step"), self._earlier
        return {
            **(self._watched or dict.fromkeys(WATCHED)),
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
        state = {} if self._optimizer is None else dict(self._optimizer.state)
        return {
            "weights": held(weights),
            "buffers": held(buffers, beside=weights),
            "gradients": self._gradients,
            "optimizer": held(list(state.values()), beside=weights),
            "average": held(average, beside=(weights, buffers)),
        }

    def _count(self) -> None:
        """Turn the steps since the last report into seconds."""
        if self._cuda and self._steps:
            torch.cuda.synchronize(self._device)
        for parts in self._steps:
            spans = {part: self._between(*span) for part, span in parts.items()}
            if self._first is None:
                self._first = sum(spans[part] for part in PARTS[1:] if part in spans)
                continue
            self._times["step"].append(spans["forward"] + spans.get("backward", 0.0))
            for part, seconds in spans.items():
                self._times[part].append(seconds)
        self._steps = []

    @staticmethod
    def _between(began: Any, ended: Any) -> float:
        return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
