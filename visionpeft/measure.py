"""What a training step costs: bytes saved for backward, the CUDA peak, and time."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """Counts the unique storages that autograd keeps for backward while it is entered, parameters and buffers apart.

    The number is exact and the same on any device. What an `autograd.Function` gives to ``ctx.save_for_backward`` counts;
    what it keeps as attributes of its context does not: `PeakBytes` sees that, too.

    >>> with SavedBytes(model) as saved:
    ...     loss = model(x).sum()
    >>> saved.bytes

    Args:
        model: Whose parameters and buffers do not count.
        *given: Tensors that do not count either, for they live anyway: the batch.
    """

    def __init__(self, model: nn.Module, *given: Tensor):
        own: Iterable[Tensor] = (*model.parameters(), *model.buffers(), *given)
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._kept: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes kept so far."""
        return sum(self._kept.values())

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error or (None, None, None))

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            # a storage freed and another made at its address cannot both be kept, so the larger of the two is right
            self._kept[storage.data_ptr()] = max(self._kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor.detach()  # a result kept with its own graph would keep that for ever, where backward is never called


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
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]


class Meter:
    """Follows a run's steps: `start` before the forward, `stop` after the backward, of every batch.

    The first step is watched for saved bytes and left out of the times.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device
        self._saved: SavedBytes | None = None
        self._began = 0.0
        self._times: list[float] = []
        self._peak = 0
        self.saved_bytes: int | None = None

    def start(self) -> None:
        """A batch is about to go forward."""
        if self._saved is not None:  # the last step did not end (out of memory): watch this one instead
            self._saved.__exit__()
        if self.saved_bytes is None:
            self._saved = SavedBytes(self._model).__enter__()
        if self._device.type == "cuda":  # the peak of training steps: what validation takes between them does not count
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """The batch has gone backward."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        if self._saved is not None:
            self.close()
            return
        self._times.append(time.perf_counter() - self._began)

    @property
    def memory(self) -> int | None:
        """Bytes that stand for what training takes: the GPU's peak, on a CPU what was saved for backward."""
        return self._peak if self._device.type == "cuda" else self.saved_bytes

    def close(self) -> None:
        """Stop watching, also in the middle of a step."""
        if self._saved is not None:
            self._saved.__exit__()
            self.saved_bytes, self._saved = self._saved.bytes, None
            gc.collect()

    def restore(self, report: Mapping[str, Any]) -> None:
        """Go on from what an earlier part of the run reported."""
        self.saved_bytes = report["saved_bytes"]
        self._peak = report["peak_bytes"] or 0

    def report(self) -> dict[str, Any]:
        """Return saved_bytes, peak_bytes with what it measures, and step_seconds (median)."""
        cuda = self._device.type == "cuda"
        return {
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.memory,
            "peak_measure": "CUDA allocator's peak" if cuda else "bytes saved for backward",
            "step_seconds": statistics.median(self._times) if self._times else None,
        }
