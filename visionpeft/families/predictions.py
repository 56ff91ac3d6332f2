"""Predictions for each image of an evaluation, and the score of any resample of the images."""

from __future__ import annotations

import base64
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import DataError

Array = np.ndarray
_RECALLS = np.linspace(0, 1, 101)  # where COCO reads a curve of precision


@dataclass(frozen=True)
class ImagePredictions(ABC):
    """A model's predictions for each image of a set, beside its labels.

    The images are in the order of their names, whatever order they were seen in, so that two models' predictions for one set
    can be compared image by image.
    """

    kind: ClassVar[str]
    images: Array  # (I,) names, sorted

    @abstractmethod
    def score(self, counts: Array | None = None) -> float:
        """Return the family's score; with `counts` (I,), as if each image were in the set that many times."""

    @abstractmethod
    def by_class(self) -> dict[int, float]:
        """Return the score of each class that is in the set, by index."""

    def pack(self) -> dict[str, str]:
        """Return plain JSON values: the kind, and the arrays as a compressed .npz in base64."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **{f.name: getattr(self, f.name) for f in fields(self)})
        return {"kind": self.kind, "data": base64.b64encode(buffer.getvalue()).decode()}


@dataclass(frozen=True)
class Answers(ImagePredictions):
    """One class for each image."""

    kind: ClassVar[str] = "classify"
    label: Array  # (I,) the true class
    guess: Array  # (I,) the model's first

    @classmethod
    def gather(cls, files: Sequence[str], labels: Sequence[int], guesses: Sequence[int]) -> Answers:
        """Make it from lists in any order."""
        names, order = _sorted(files)
        return cls(names, np.asarray(labels, np.int32)[order], np.asarray(guesses, np.int32)[order])

    def score(self, counts: Array | None = None) -> float:
        return float(np.average(self.label == self.guess, weights=counts))

    def by_class(self) -> dict[int, float]:
        return {int(c): self.score(self.label == c) for c in np.unique(self.label)}


@dataclass(frozen=True)
class Detections(ImagePredictions):
    """Boxes (or outlines, or poses) found in each image, and at which of ten overlaps each is a true one."""

    kind: ClassVar[str] = "detect"
    image: Array  # (N,) index of the image that a detection is from
    tp: Array  # (N, 2) bits: at which of the thresholds 0.5, 0.55, ..., 0.95 it is true
    conf: Array  # (N,)
    cls: Array  # (N,)
    target_image: Array  # (T,) index of the image that an object is in
    target_cls: Array  # (T,)

    @classmethod
    def gather(cls, files: Sequence[str], stats: Mapping[str, Sequence[Array]], tp: str) -> Detections:
        """Make them of the statistics that Ultralytics' validator has of each image.

        Args:
            files: The images, in the order in which they were seen.
            stats: Lists of an array per image: `tp` (N_i, 10), conf and pred_cls (N_i,), target_cls (T_i,).
            tp: The name of the true positives that the score is of: "tp", of outlines "tp_m", of poses "tp_p".
        """
        names, order = _sorted(files)

        def joined(name: str, dtype: Any) -> Array:
            return np.concatenate([np.asarray(stats[name][i]) for i in order]).astype(dtype)

        def owners(name: str) -> Array:
            return np.repeat(np.arange(len(names), dtype=np.int32), [len(stats[name][i]) for i in order])

        true = np.packbits(np.concatenate([np.asarray(stats[tp][i], bool).reshape(-1, 10) for i in order]), axis=1)
        detections = owners("conf"), true, joined("conf", np.float32), joined("pred_cls", np.int16)
        return cls(names, *detections, owners("target_cls"), joined("target_cls", np.int16))

    @cached_property
    def _classes(self) -> dict[int, tuple[Array, Array, Array, Array]]:
        """Of each class that is in the set: its objects' images; its detections' images, best first; which of those are true
        at any overlap, and at which."""
        true = np.unpackbits(self.tp, axis=1, count=10)
        best = np.argsort(-self.conf)  # as Ultralytics sorts them
        image, true, cls = self.image[best], true[best], self.cls[best]
        found = {}
        for c in np.unique(self.target_cls):
            hits = np.flatnonzero(true[cls == c].any(1))
            found[int(c)] = self.target_image[self.target_cls == c], image[cls == c], hits, true[cls == c][hits]
        return found

    def _precision(self, counts: Array | None) -> dict[int, float]:
        """Return the mean average precision of each class that has objects.

        The curve of precision over recall is taken at the true detections and just before each, which is all that its area
        depends on: they are few among thousands.
        """
        counts = np.ones(len(self.images)) if counts is None else np.asarray(counts, float)
        found = {}
        for c, (objects, image, hits, true) in self._classes.items():
            if not (total := counts[objects].sum()):
                continue
            weight = counts[image]
            seen = weight.cumsum()[hits]  # detections up to each true one
            times = weight[hits]
            drawn = times > 0
            seen, times = seen[drawn], times[drawn, None]  # (H,), (H, 1)
            right = (true[drawn] * times).cumsum(0)  # (H, 10)
            before = np.concatenate((np.zeros((1, 10)), right[:-1]))[: len(right)]
            hit = np.stack((before, right), 1).reshape(-1, 10)  # (2 H, 10)
            tried = np.stack((seen[:, None] - times, seen[:, None]), 1).reshape(-1, 1)
            precision: Any = np.where(tried > 0, hit / np.maximum(tried, 1e-16), 1.0)
            recall: Any = hit / (total + 1e-16)
            areas = [_area(recall[:, k], precision[:, k]) for k in range(10)] if len(hit) else [0.0]
            found[c] = float(np.mean(areas))
        return found

    def score(self, counts: Array | None = None) -> float:
        return float(np.mean(list(self._precision(counts).values()) or [0.0]))

    def by_class(self) -> dict[int, float]:
        return self._precision(None)


def unpack(packed: Mapping[str, str]) -> ImagePredictions:
    """Return the predictions that `ImagePredictions.pack` packed.

    Raises:
        DataError: It is none.
    """
    kinds: Iterable[Any] = (Answers, Detections)
    try:
        kind = next(k for k in kinds if k.kind == packed["kind"])
        with np.load(io.BytesIO(base64.b64decode(packed["data"])), allow_pickle=False) as arrays:
            return kind(**{f.name: arrays[f.name] for f in fields(kind)})
    except Exception as error:  # numpy and zipfile raise ValueError, BadZipFile, EOFError, OSError, ...
        raise DataError(f"what was seen of each image cannot be read ({type(error).__name__}: {error})") from error


def _area(recall: Array, precision: Array) -> float:
    """Return the area under a curve of precision over recall, not empty, as COCO and Ultralytics compute it, bit for bit."""
    recall = np.concatenate(([0.0], recall, [recall[-1], 1.0]))
    best = np.concatenate(([1.0], precision, [0.0, 0.0]))
    best = np.maximum.accumulate(best[::-1])[::-1]  # the best precision at this recall, or a higher one
    heights = np.interp(_RECALLS, recall, best)
    return float((np.diff(_RECALLS) * (heights[1:] + heights[:-1]) / 2.0).sum())


def _sorted(files: Sequence[str]) -> tuple[Array, Array]:
    """Return the names of the files below the folder that they share, sorted, and the order that sorts them."""
    root = os.path.commonpath([Path(f).parent for f in files])
    names = np.array([Path(f).relative_to(root).as_posix() for f in files])
    order = np.argsort(names)
    return names[order], order
