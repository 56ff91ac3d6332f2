"""Settings of the whole process, which the verbs, and the libraries under them, change: they are put back.

Threads share these settings. A change that overlaps in several of them is therefore entered by the first and left by the
last, see `shared`, and code that seeds the process's generators of random numbers has them alone, see `untouched`.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

_SEEDING = threading.RLock()


class RandomStates(TypedDict):
    """States of the generators of Python, NumPy and torch."""

    python: tuple[int, tuple[int, ...], Any]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: Sequence[Tensor]  # by device


class _Shared(AbstractContextManager[None]):
    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self._make, self._lock, self._users = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._entered = self._make()
                self._entered.__enter__()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._entered.__exit__(None, None, None)


def shared(make: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Decorate a maker of context managers over a setting of the whole process. While several users overlap, in threads or
    nested, the first enters and the last leaves. Otherwise one could put back a change of another."""
    one = _Shared(make)
    return lambda: one


@contextmanager
def untouched(alone: bool = False) -> Iterator[None]:
    """Restore the process at exit: environment, warnings, classes that ``torch.load`` takes, torch's settings, generators.

    Args:
        alone: Let one thread at a time enter, and the others wait: for code that seeds the generators, whose results another
            thread's draws would change.

    Generators are restored after code that seeds them, and in the main thread. Elsewhere they only moved on, and restoring
    them would let the other threads draw the same numbers again.
    """
    mine = alone or threading.current_thread() is threading.main_thread()
    with _SEEDING if alone else nullcontext(), _settings(), _generators() if mine else nullcontext(), _of_thread():
        yield


@contextmanager
def _of_thread() -> Iterator[None]:
    threads, device = torch.get_num_threads(), torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(device)


@shared
@contextmanager
def _generators() -> Iterator[None]:
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
        if torch.cuda.is_initialized() and not states["cuda"]:  # by now: as it begins where nothing was done
            torch.cuda.manual_seed_all(torch.initial_seed())


@shared
@contextmanager
def _settings() -> Iterator[None]:
    environment, trusted = dict(os.environ), set(torch.serialization.get_safe_globals())
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn
    fixed, tried = cudnn.deterministic, cudnn.benchmark
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        with torch.serialization.safe_globals([k for k in torch.serialization.get_safe_globals() if k not in trusted]):
            pass  # its end takes them out
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        cudnn.deterministic, cudnn.benchmark = fixed, tried


def random_states() -> RandomStates:
    """Return the states of Python's, NumPy's and torch's generators."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: RandomStates) -> None:
    """Restore the states that `random_states` returned."""
    random.setstate(states["python"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])  # another machine may have fewer
