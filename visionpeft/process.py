"""The caller's process stays as it was: what the verbs, and the libraries under them, change for all of it is put back.

Threads share all that is kept here. What overlaps in several of them is therefore entered by the first and left by the last,
see `shared`, and what seeds the process's generators of random numbers has them alone, see `untouched`.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

_TURN = threading.RLock()  # of those that seed


class _Shared(AbstractContextManager[None]):
    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self._make, self._lock, self._users = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._held = self._make()
                self._held.__enter__()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._held.__exit__(None, None, None)


def shared(make: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Decorate what makes a context manager over something of the whole process: while several enter it, in threads or one
    inside the other, the first enters and the last leaves. Otherwise one could put back what it found of another."""
    one = _Shared(make)
    return lambda: one


@contextmanager
def untouched(alone: bool = False) -> Iterator[None]:
    """Leave the process as it was: environment, warnings, classes that ``torch.load`` takes, torch's settings, generators.

    Args:
        alone: One thread at a time: what is entered seeds the generators, and another's draws would change its results.
            The others wait.

    Generators are put back for what seeds them, and in the main thread. Elsewhere they only moved on, and to put them back
    would have the other threads draw the same numbers again.
    """
    mine = alone or threading.current_thread() is threading.main_thread()
    with _TURN if alone else nullcontext(), _settings(), _generators() if mine else nullcontext(), _of_thread():
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


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])  # another machine may have fewer
