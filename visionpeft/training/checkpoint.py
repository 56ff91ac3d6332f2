"""The training checkpoint, from which a run goes on bit for bit: weights that train, moving average, fp32 optimizer,
scaler, position and every random state. Plain tensors and values only; loading never unpickles code."""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import files, pickles, schema
from ..core.attach import copy_into
from ..errors import DiskFull, TrainingError, VisionpeftError
from ..process import RandomStates


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's ``state_dict``."""

    state: Mapping[int, Mapping[str, Any]]
    param_groups: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Saved:
    """The content of every checkpoint. Families add fields; those that a later visionpeft adds have a default here."""

    epoch: int
    done: bool
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    updates: int
    optimizer: Optimizer
    history: Sequence[Mapping[str, Any]]
    measured: Mapping[str, Any]
    random: RandomStates
    origin: str | None = None
    within: Mapping[str, Any] | None = None


def save(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all."""
    return files.replace(path, lambda temporary: torch.save(dict(content), temporary))


class Writer:
    """Writes a run's files while it trains, in one thread and in order. A context manager; its exit waits for the last.

    >>> with Writer() as writer:
    ...     writer.put(lambda: deltas.write(path, delta), lambda: save(other, content))
    """

    threads: ClassVar[weakref.WeakSet[threading.Thread]] = weakref.WeakSet()  # of all writers

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last `put`, or since the writer was made."""
        return time.monotonic() - self._last

    def put(self, *writes: Callable[[], object]) -> None:
        """Call `writes` one after the other, in the thread. They must write copies, see `snapshot`: training goes on.

        Waits for the writes of an earlier call: a slow disk holds a run up, but never fills its memory.

        Raises:
            TrainingError: A write of an earlier call failed.
        """
        self.wait()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._call, args=writes, name="visionpeft-writer")
        self.threads.add(self._thread)
        self._thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread:  # the error of the block matters more
            self._thread.join()

    def _call(self, *writes: Callable[[], object]) -> None:
        try:
            for write in writes:
                write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the writes of the last `put`.

        Raises:
            TrainingError: One failed.
        """
        if self._thread:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if isinstance(error, OSError | RuntimeError | DiskFull):  # torch raises the latter where a disk is full
            reason = "the disk is full" if isinstance(error, DiskFull) else getattr(error, "strerror", None)
            reason = reason or str(error).split("\n")[0]
            raise TrainingError(
                f"the run cannot be saved ({reason}); make room on the disk, then resume it, or start in another folder"
            ) from error
        if error:
            raise error


def _wait() -> None:
    for thread in Writer.threads:
        thread.join()


if hasattr(os, "register_at_fork"):  # processes that load images must not begin with a lock that a writer holds
    os.register_at_fork(before=_wait)


def snapshot(content: Any) -> Any:
    """Return a copy of nested mappings and sequences, with its tensors on the CPU."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {k: snapshot(v) for k, v in content.items()}
    return type(content)(map(snapshot, content)) if isinstance(content, list | tuple) else content


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        TrainingError: There is none, or it cannot be read.
    """
    if not path.is_file():
        raise TrainingError(f"there is nothing to resume at {path}; a run can be resumed once its first epoch is over")
    if why := pickles.objection(path):
        raise TrainingError(f"the checkpoint {path} cannot be read ({why}); start the run anew")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        schema.check(Saved, content, newer=False)
    except pickle.UnpicklingError as error:  # torch's own sentence advises to let the file run code
        raise TrainingError(f"the checkpoint {path} holds more than tensors and values, and is not opened") from error
    except Exception as error:  # whatever a damaged zip file, or what it holds, makes of torch
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"the checkpoint {path} cannot be read ({reason}); start the run anew") from error
    return content


@contextmanager
def restoring() -> Iterator[None]:
    """Turn errors while a checkpoint's content is put back into one sentence. Also a decorator.

    Raises:
        TrainingError: The content does not fit the run.
    """
    try:
        yield
    except (VisionpeftError, torch.OutOfMemoryError):  # these say better what is wrong
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"the checkpoint does not fit this run ({type(error).__name__}: {reason}); start the run anew"
        ) from error


def live(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training can change, by key: parameters that require a gradient, and all buffers."""
    wanted = {n for n, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    return {k: v for k, v in model.state_dict().items() if k in wanted}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of `live` back into a model."""
    own = model.state_dict(keep_vars=True)
    if missing := [k for k in tensors if k not in own or own[k].shape != tensors[k].shape]:
        raise TrainingError(f"the checkpoint does not fit this model ({missing[0]}); resume with the same arguments")
    copy_into({k: own[k] for k in tensors}, tensors)


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimizer's state, but keep its way of computing (fused or not), which is no part of a run."""
    own, saved = optimizer.param_groups, state["param_groups"]
    how = ("fused", "foreach", "capturable")
    groups = [{**s, **{k: g[k] for k in how if k in g}} for s, g in zip(saved, own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
