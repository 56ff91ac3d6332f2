"""Stored views: what the frozen stages make of a few augmented views of every image, computed once, kept in one file on the
disk, and read instead of the images from then on. Registers nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import checkpoint, files
from ..errors import ConfigError
from ..lean.prefix import Prefix
from ..tables import size

LOGGER = logging.getLogger("visionpeft")
_MAGIC = b"vpviews1"
_SPARE = 10**9  # bytes that are left free for the rest of the run


@dataclass(frozen=True)
class Rounds:
    """How many views of every image are stored: of the run's first epochs, and of its last ones, augmented otherwise."""

    first: int
    last: int = 0
    closing: int = 0  # the epoch from which the last ones are read, where there are any
    share: float = 1.0  # of the training images that the run uses; above 1, their number

    @property
    def total(self) -> int:
        """Views of one image."""
        return self.first + self.last

    def at(self, epoch: int) -> int:
        """Return the view that an epoch reads: one after the other, and then again."""
        if self.last and epoch >= self.closing:
            return self.first + (epoch - self.closing) % self.last
        return epoch % self.first


@dataclass(frozen=True)
class Store:
    """Where a run's views lie, and what they may take."""

    file: Path
    rounds: Rounds
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
        kept, gone = sum(f.stat().st_size for f in others), 0
        leaving = []
        for other in others:
            if kept - gone + count > most:
                gone += other.stat().st_size
                leaving.append(other)
        if count + _SPARE > (free := shutil.disk_usage(folder).free + gone):
            raise ConfigError(
                f"cache: the views would take {size(count)}, but {folder} has {size(free)} free, and {size(_SPARE)} stay "
                f"free for the rest of the run; {smaller}, free some, or set VISIONPEFT_CACHE to a folder on a larger disk"
            )
        for other in leaving:
            with suppress(OSError):  # another run reads it, where that matters
                other.unlink()


def key(**facts: Any) -> str:
    """Return the name of views that were computed from these facts, and of no others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------------- reading them
class Views(Dataset):
    """A data set with stored vectors instead of its images; all else is as the augmented views had it.

    Args:
        dataset: Returns samples: a dictionary with "img", or a tuple that begins with the image.
        store: Where the views lie, or will.
        prefix: Turns images into vectors.
        prepare: Turns a list of samples into the batch of images that the model would read, on its device.
        seed: Of the augmentation.
        batch: Images at a time.
        workers: Processes that load images.
        close: Called before the last rounds, to augment otherwise.
        quiet: Do not say when views are computed, which takes a while.

    Attributes:
        epoch: The epoch that is read; to be set before each.
        report: What this did: stored_bytes, and fill_seconds, 0 where the views were there already.

    Raises:
        ConfigError: There is no room for the views, or they are not all of one size.
    """

    buffer = ()  # Ultralytics' images in memory, of which there are none

    def __init__(
        self,
        dataset: Any,
        store: Store,
        prefix: Prefix,
        prepare: Callable[[Sequence[Any]], Tensor],
        *,
        seed: int,
        batch: int,
        workers: int = 0,
        close: Callable[[], object] | None = None,
        quiet: bool = False,
    ):
        self.dataset, self.epoch = dataset, 0
        self._rounds, began = store.rounds, time.perf_counter()
        count = len(dataset) * store.rounds.total
        made = _Made(store.file, count, prefix) if store.file.is_file() else None
        new = made is None or not made.whole
        if new:
            store.file.unlink(missing_ok=True)
            store.check_room(count * prefix.length * prefix.stored.itemsize)
            job = _Filling(dataset, store.rounds, prefix, prepare, seed, batch, workers, close)
            if not quiet:
                needs = size(count * prefix.length * prefix.stored.itemsize)
                print(f"computing {count} views of {len(dataset)} images into {store.file} ({needs})", file=sys.stderr)
            with _polite(store), _random_states_kept():
                files.replace(store.file, job.write)
            made = _Made(store.file, count, prefix)
        assert made is not None and made.whole, "what was just written can be read"
        os.utime(store.file)  # used now
        self._vectors, self._places, self._columns = made.vectors, made.places, made.columns
        seconds = round(time.perf_counter() - began, 2) if new else 0.0
        self.report = {"stored_bytes": store.file.stat().st_size, "fill_seconds": seconds}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = int(self._places[self._rounds.at(self.epoch), index])
        return _together(self._vectors[row], {name: column[row] for name, column in self._columns.items()})

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def close_mosaic(self, hyp: Any) -> None:
        """Do nothing: the last rounds' views were augmented without."""


class _Column:
    """One field of all samples: tensors of any shape in one stretch of bytes, or plain values."""

    def __init__(self, kept: Any):
        self._values, self._shapes, self._bytes = kept["values"], kept["shapes"], kept["bytes"]
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in self._shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()

    def __getitem__(self, row: int) -> Any:
        if not self._shapes:
            return self._values[row]
        dtype, shape = self._shapes[row]
        return self._bytes[self._starts[row] : self._starts[row + 1]].clone().view(dtype).view(shape)


class _Made:
    """A file of views: vectors, then the samples' other fields, then a header, its length and a magic word."""

    def __init__(self, file: Path, count: int, prefix: Prefix):
        self.whole = False
        try:
            header = _header(file)
            expected = {"rows": count, "length": prefix.length, "stored": str(prefix.stored)}
            known = header is not None and {k: header.get(k) for k in expected} == expected
            if header is None or not known or header.get("crc") != _crc(file, header["end"]):
                LOGGER.warning("the stored views %s are damaged; they are computed again", file)
                return
            with open(file, "rb") as opened:
                opened.seek(header["vectors"])
                rest = torch.load(io.BytesIO(opened.read(header["end"] - header["vectors"])), weights_only=True)
        except OSError:
            return
        # mapped, not read: what does not fit into memory stays on the disk
        flat = torch.from_file(str(file), shared=False, size=count * prefix.length, dtype=prefix.stored)
        self.vectors = flat.view(count, prefix.length)
        self.places = rest["places"]
        self.columns = {name: _Column(kept) for name, kept in rest["columns"].items()}
        self.whole = True


def _header(file: Path) -> dict[str, Any] | None:
    """Return the header of a file of views; None where the file is not whole."""
    tail = len(_MAGIC) + 8
    with open(file, "rb") as opened:
        length = opened.seek(0, os.SEEK_END)
        if length < tail:
            return None
        opened.seek(length - tail)
        text, magic = int.from_bytes(opened.read(8), "little"), opened.read()
        if magic != _MAGIC or text + tail > length:
            return None
        opened.seek(length - tail - text)
        try:
            header = json.loads(opened.read(text))
        except ValueError:
            return None
    return header if isinstance(header, dict) and header.get("end") == length - tail - text else None


def _crc(file: Path, end: int) -> int:
    """Return the checksum of a file's first `end` bytes."""
    crc = 0
    with open(file, "rb") as opened:
        while end and (chunk := opened.read(min(end, 1 << 22))):
            crc, end = zlib.crc32(chunk, crc), end - len(chunk)
    return crc


# ---------------------------------------------------------------------------------------------------------- computing them
@dataclass
class _Filling:
    """Computes all views of a data set, and writes them."""

    dataset: Any
    rounds: Rounds
    prefix: Prefix
    prepare: Callable[[Sequence[Any]], Tensor]
    seed: int
    batch: int
    workers: int
    close: Callable[[], object] | None

    def write(self, path: Path) -> None:
        count = len(self.dataset)
        places = torch.empty(self.rounds.total, count, dtype=torch.int64)
        columns: dict[str, dict[str, list]] = {}
        crc = 0
        with open(path, "wb") as file:
            for number in range(self.rounds.total):
                if number == self.rounds.first and self.close:
                    self.close()
                seed = (self.seed * 10007 + number) % 2**32
                random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
                order = torch.randperm(count)  # mosaics mix images that were loaded one after the other
                places[number, order] = torch.arange(number * count, (number + 1) * count)
                # a list, for a collator would join what belongs to different images
                for samples in DataLoader(
                    self.dataset, self.batch, sampler=order.tolist(), num_workers=self.workers, collate_fn=list
                ):
                    crc = self._append(file, samples, columns, crc)
            vectors = file.tell()
            rest = io.BytesIO()
            torch.save({"places": places, "columns": {n: _joined(c) for n, c in columns.items()}}, rest)
            file.write(rest.getbuffer())
            header = {
                "rows": count * self.rounds.total,
                "length": self.prefix.length,
                "stored": str(self.prefix.stored),
                "vectors": vectors,
                "end": file.tell(),
                "crc": zlib.crc32(rest.getbuffer(), crc),
            }
            text = json.dumps(header).encode()
            file.write(text + len(text).to_bytes(8, "little") + _MAGIC)

    def _append(self, file: BinaryIO, samples: Sequence[Any], columns: dict, crc: int) -> int:
        for sample in samples:  # before `prepare`, which may write into them
            for name, value in _apart(sample)[1].items():
                column = columns.setdefault(name, {"values": [], "shapes": [], "bytes": []})
                if isinstance(value, Tensor):
                    column["shapes"].append((value.dtype, tuple(value.shape)))
                    column["bytes"].append(value.detach().cpu().reshape(-1).view(torch.uint8).clone())
                else:
                    column["values"].append(value)
        images = self.prepare(samples)
        if images.shape[1:] != self.prefix.image:
            given, made = ("×".join(map(str, shape[1:])) for shape in (images.shape[1:], self.prefix.image))
            raise ConfigError(f"cache needs images of one size, {made} here, but one is {given}; leave cache out")
        chunk = self.prefix.flatten(self.prefix(images)).cpu().contiguous().view(torch.uint8).numpy().data
        file.write(chunk)
        return zlib.crc32(chunk, crc)


def _joined(column: dict[str, list]) -> dict[str, Any]:
    if column["values"] and column["shapes"]:
        raise ConfigError("cache needs samples of one kind, but a field is a tensor in some and none in others")
    return {**column, "bytes": torch.cat(column["bytes"]) if column["bytes"] else torch.empty(0, dtype=torch.uint8)}


def _apart(sample: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return a sample's image, and the rest by name."""
    if isinstance(sample, Mapping):
        return sample["img"], {k: v for k, v in sample.items() if k != "img"}
    return sample[0], {str(i): v for i, v in enumerate(sample[1:], 1)}


def _together(image: Tensor, rest: dict[str, Any]) -> Any:
    """Return the sample that `_apart` took apart, with another image."""
    return (image, *rest.values()) if "1" in rest else {"img": image, **rest}


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """A run draws the same numbers, whether its views were there or not."""
    states = checkpoint.random_states()
    try:
        yield
    finally:
        checkpoint.set_random_states(states)


@contextmanager
def _polite(store: Store) -> Iterator[None]:
    """Say in a sentence that the disk was full after all: others write to it, too."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(
            f"cache: {store.file.parent} is full; give a smaller cache, or set VISIONPEFT_CACHE to a folder on a larger disk"
        ) from error
