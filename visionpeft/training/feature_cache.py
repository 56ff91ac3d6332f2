"""Stored views: outputs of the frozen stages for a few augmented views of every image, computed once, kept in one file on
the disk, and read instead of the images from then on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .. import files
from ..errors import ConfigError, DiskFull, TrainingError
from ..process import random_states, set_random_states
from ..tables import size
from . import feature_cache_file as view_file
from .feature_cache_file import CacheWriter, ViewSchedule, join_sample

_SPARE = 10**9  # bytes that are left free for the rest of the run


@dataclass(frozen=True)
class Store:
    """The place of a run's views on the disk, and their limit."""

    file: Path
    schedule: ViewSchedule
    limit: float  # GB that all stored views together may take

    def check_room(self, count: int) -> None:
        """Make room for `count` bytes: the views that were used longest ago go first, where the limit asks for it.

        Raises:
            ConfigError: They are more than the limit, or than the disk has.
        """
        most = int(self.limit * 1e9)
        smaller = "give a smaller cache or imgsz"
        if count > most:
            raise ConfigError(
                f"cache: the views would take {size(count)}, but cache_limit={self.limit:g} allows {size(most)}; "
                f"{smaller}, or a higher cache_limit (in GB)"
            )
        folder, spared = files.writable(self.file.parent), time.time() - 86400
        others = [f for f in folder.glob("*.views") if not f.name.startswith(".") or f.stat().st_mtime < spared]
        others.sort(key=lambda f: f.stat().st_mtime)  # a name with a dot is being written, or was when its run was killed
        there, freed = sum(f.stat().st_size for f in others), 0
        leaving = []
        for other in others:
            if there - freed + count > most:
                freed += other.stat().st_size
                leaving.append(other)
        if count + _SPARE > (free := shutil.disk_usage(folder).free + freed):
            raise ConfigError(
                f"cache: the views would take {size(count)}, but {folder} has {size(free)} free, and {size(_SPARE)} stay "
                f"free for the rest of the run; {smaller}, free some, or set VISIONPEFT_CACHE to a folder on a larger disk"
            )
        for other in leaving:
            with suppress(OSError):  # another run reads it, where that matters
                other.unlink()


def content(items: Iterable[str | tuple[str, int]]) -> str:
    """Return a digest of the content of image files; each is one, or comes with its class.

    All of every file is read: names, sizes and times may be the same where a set was exported anew. It takes less than the
    check of the stored views themselves, which are larger.
    """

    def one(item: str | tuple[str, int]) -> bytes:
        return hashlib.blake2b(Path(item if isinstance(item, str) else item[0]).read_bytes()).digest()

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return hashlib.blake2b(b"".join(pool.map(one, items))).hexdigest()


def key(**facts: Any) -> str:
    """Return the name of views that were computed from these facts, and of no others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------------- reading them
class CachedFeatureDataset(Dataset):
    """A data set whose images are replaced by the stored outputs of the frozen stages; labels are those of the same view.

    Args:
        store: The place of the views.
        writer: Computes them where they are not there yet.
        quiet: Do not say when views are computed, which takes a while.

    Attributes:
        epoch: The epoch that is read; to be set before each.
        report: stored_bytes, and fill_seconds, 0 where the views were there already.

    Raises:
        ConfigError: There is no room for the views, or they are not all of one size.
    """

    def __init__(self, store: Store, writer: CacheWriter, quiet: bool = False):
        self.dataset, self.epoch = writer.dataset, 0
        self._schedule = writer.schedule
        self.report = {"stored_bytes": 0, "fill_seconds": 0.0}
        views = view_file.read(store.file, writer.count, writer.prefix)
        if views is None:
            self._fill(store, writer, quiet)
            views = view_file.read(store.file, writer.count, writer.prefix)
        if views is None:
            raise TrainingError(f"the views in {store.file} are gone, or altered, just after they were written; start anew")
        os.utime(store.file)  # used now
        self.report["stored_bytes"] = store.file.stat().st_size
        self._views = views

    def _fill(self, store: Store, writer: CacheWriter, quiet: bool) -> None:
        began = time.perf_counter()
        store.file.unlink(missing_ok=True)
        store.check_room(needs := writer.bytes)
        if not quiet:
            line = f"computing {writer.count} views of {len(writer.dataset)} images into {store.file} ({size(needs)})"
            print(line, file=sys.stderr)
        with _sentence_if_full(store), _random_states_kept():
            files.replace(store.file, writer.write)
        self.report["fill_seconds"] = round(time.perf_counter() - began, 2)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = int(self._views.places[self._schedule.at(self.epoch), index])
        return join_sample(self._views.vectors[row], {name: column[row] for name, column in self._views.columns.items()})

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the random states, so that a run draws the same numbers, whether its views were there or not."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextmanager
def _sentence_if_full(store: Store) -> Iterator[None]:
    """Say in a sentence that the disk is full: room was made, but others write to it, too."""
    try:
        yield
    except (OSError, DiskFull) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(
            f"cache: {store.file.parent} is full; give a smaller cache, or set VISIONPEFT_CACHE to a folder on a larger disk"
        ) from error
