"""The file that stored views lie in: computed, written, checked and read.

Vectors come first, then the other fields of all samples, then a header of JSON, its length, and a magic word. What is not
whole has no magic word; what was altered has another checksum.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import schema
from ..errors import ConfigError
from ..lean.frozen_stages import FrozenStages
from ..pickles import objection

LOGGER = logging.getLogger("visionpeft")
_MAGIC = b"vpviews1"


@dataclass(frozen=True)
class ViewSchedule:
    """The number of stored views of every image: of the run's first epochs, and of its last ones, augmented otherwise."""

    first: int
    last: int = 0
    closing: int = 0  # the epoch from which the last ones are read, where there are any
    share: float = 1.0  # of the training images that the run uses; above 1, their number

    @property
    def total(self) -> int:
        """The views of one image."""
        return self.first + self.last

    def at(self, epoch: int) -> int:
        """Return the view that an epoch reads: one after the other, and then again."""
        if self.last and epoch >= self.closing:
            return self.first + (epoch - self.closing) % self.last
        return epoch % self.first


# ------------------------------------------------------------------------------------------------------------- the samples
def split_sample(sample: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return a sample's image, and the rest by name."""
    if isinstance(sample, Mapping):
        return sample["img"], {k: v for k, v in sample.items() if k != "img"}
    return sample[0], {str(i): v for i, v in enumerate(sample[1:], 1)}


def join_sample(image: Tensor, rest: dict[str, Any]) -> Any:
    """Return the sample that `split_sample` split, with another image."""
    return (image, *rest.values()) if "1" in rest else {"img": image, **rest}


# -------------------------------------------------------------------------------------------------------------- reading it
class _Column:
    """One field of all samples: tensors of any shape in one stretch of bytes, or plain values."""

    def __init__(self, column: Any):
        self._values, self._shapes, self._bytes = column["values"], column["shapes"], column["bytes"]
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in self._shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()

    def __getitem__(self, row: int) -> Any:
        if not self._shapes:
            return self._values[row]
        dtype, shape = self._shapes[row]
        return self._bytes[self._starts[row] : self._starts[row + 1]].clone().view(dtype).view(shape)


@dataclass(frozen=True)
class StoredViews:
    """Views that were computed."""

    vectors: Tensor  # one row per view, (rows, length)
    places: Tensor  # the row of every view of every image, (views, images)
    columns: Mapping[str, _Column]  # the samples' other fields, one value per row


def read(file: Path, rows: int, prefix: FrozenStages) -> StoredViews | None:
    """Return the views in a file; None where there are none, or they are not whole."""
    try:
        header = _header(file)
        expected = {"rows": rows, "length": prefix.length, "stored": str(prefix.stored)}
        known = header is not None and {k: header.get(k) for k in expected} == expected
        if header is None or not known or header.get("crc") != _crc(file, header["end"]):
            LOGGER.warning("the stored views %s are damaged; they are computed again", file)
            return None
        with open(file, "rb") as opened:
            opened.seek(header["vectors"])
            content = opened.read(header["end"] - header["vectors"])
        if why := objection(content):
            LOGGER.warning("the stored views %s are not read (%s); they are computed again", file, why)
            return None
        rest = torch.load(io.BytesIO(content), weights_only=True)
    except FileNotFoundError:
        return None
    # mapped, not read: what does not fit into memory stays on the disk
    vectors = torch.from_file(str(file), shared=False, size=rows * prefix.length, dtype=prefix.stored)
    columns = {name: _Column(column) for name, column in rest["columns"].items()}
    return StoredViews(vectors.view(rows, prefix.length), rest["places"], columns)


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
            header = schema.parse(opened.read(text))
        except schema.Malformed:
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
class CacheWriter:
    """Computes all views of a data set, and writes them."""

    dataset: Any  # returns samples: a dictionary with "img", or a tuple that begins with the image
    schedule: ViewSchedule
    prefix: FrozenStages  # turns images into vectors
    prepare: Callable[[Sequence[Any]], Tensor]  # turns samples into the batch that the model would read, on its device
    seed: int  # of the augmentation
    batch: int  # images at a time
    workers: int = 0  # processes that load images
    close: Callable[[], object] | None = None  # called before the last views, to augment otherwise

    @property
    def count(self) -> int:
        """The views of all images."""
        return len(self.dataset) * self.schedule.total

    @property
    def bytes(self) -> int:
        """The bytes of all vectors."""
        return self.count * self.prefix.length * self.prefix.stored.itemsize

    def write(self, path: Path) -> None:
        count = len(self.dataset)
        places = torch.empty(self.schedule.total, count, dtype=torch.int64)
        columns: dict[str, dict[str, list]] = {}
        crc = 0
        with open(path, "wb") as file:
            for number in range(self.schedule.total):
                if number == self.schedule.first and self.close:
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
                "rows": self.count,
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
            for name, value in split_sample(sample)[1].items():
                column = columns.setdefault(name, {"values": [], "shapes": [], "bytes": []})
                if isinstance(value, Tensor):
                    column["shapes"].append((value.dtype, tuple(value.shape)))
                    column["bytes"].append(value.detach().cpu().reshape(-1).view(torch.uint8).clone())
                else:
                    column["values"].append(value)
        images = self.prepare(samples)
        if images.shape[1:] != self.prefix.image:
            this, usual = ("×".join(map(str, shape[1:])) for shape in (images.shape[1:], self.prefix.image))
            raise ConfigError(f"cache needs images of one size, {usual} here, but one is {this}; leave cache out")
        chunk = self.prefix.flatten(self.prefix(images)).cpu().contiguous().view(torch.uint8).numpy().data
        file.write(chunk)
        return zlib.crc32(chunk, crc)


def _joined(column: dict[str, list]) -> dict[str, Any]:
    if column["values"] and column["shapes"]:
        raise ConfigError("cache needs samples of one kind, but a field is a tensor in some and none in others")
    return {**column, "bytes": torch.cat(column["bytes"]) if column["bytes"] else torch.empty(0, dtype=torch.uint8)}
