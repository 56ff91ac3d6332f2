"""The writer of images and labels in Ultralytics' layout: shares of the image, clipped boxes, files linked or copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from .formats.base import Annotation, Sample
from .label_rows import area
from .layout import SUFFIXES
from .pictures import image_sizes
from .report import Tally

_THINNEST = 1e-3  # pixels: a thinner object has no width


@dataclass(frozen=True)
class SampleWriter:
    """Writes images and labels, and counts what it skips and changes."""

    task: str
    numbers: Mapping[str, int]  # of the source's classes
    dropped: frozenset[str]  # classes that are left out on request
    skipped: Tally
    changed: Tally
    copy: bool

    def write(self, sample: Sample, folder: Path) -> list[int] | None:
        """Write an image and its labels; return the classes of its objects, or None where it is skipped."""
        size = self._size(sample)
        if size is None:
            return None
        rows = [row for one in sample.annotations(self.task) if (row := self._row(one, size, sample.name))]
        image = self._unused_name(folder / "images" / sample.split, sample)
        label = folder / "labels" / image.relative_to(folder / "images").with_suffix(".txt")
        for file in (image, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        self._link_or_copy(sample.file, image)
        label.write_text("".join(f"{cls} {' '.join(f'{v:.8g}' for v in values)}\n" for cls, values in rows))
        return [cls for cls, _ in rows]

    def _size(self, sample: Sample) -> tuple[int, int] | None:
        """Return the size that the annotations refer to, or None where the image cannot be used with them."""
        if sample.file.suffix[1:].lower() not in SUFFIXES:
            self.skipped.add("image of a format that Ultralytics does not read", sample.name)
            return None
        try:
            stored, size = image_sizes(sample.file)
        except (OSError, ValueError, SyntaxError) as error:
            self.skipped.add("image that is not readable", f"{sample.name}: {' '.join(str(error).split())[:80]}")
            return None
        stated = sample.size or size
        if stated == size or _same_shape(stated, size):  # the same, or resized
            return stated
        turned_after = stored != size and _same_shape(stated, stored)
        why = "was annotated before its EXIF tag turned it" if turned_after else "is not of the shape its annotations state"
        self.skipped.add(f"image that {why}", f"{sample.name}: {size[0]}x{size[1]}, not {stated[0]}x{stated[1]}")
        return None

    def _row(self, annotation: Annotation, size: tuple[int, int], image: str) -> tuple[int, list[float]] | None:
        """Return an object's class and numbers, or None where it is skipped."""
        cls = self.numbers.get(annotation.name)
        if cls is None:
            kind = f"class {annotation.name}" if annotation.name in self.dropped else "a class that is not named"
            self.skipped.add(f"object of {kind}", image)
            return None
        numbers = (self._polygon if self.task in ("segment", "obb") else self._box)(annotation, size, image)
        if isinstance(numbers, str):
            self.skipped.add(numbers, image)
            return None
        return cls, numbers

    def _polygon(self, annotation: Annotation, size: tuple[int, int], image: str) -> list[float] | str:
        """Return x and y of each corner as shares of the image, or why the object is skipped."""
        if not (outlines := _usable(annotation.outlines)):
            return "object without an outline (task=detect takes its box)"
        clipped = [o if self.task == "obb" and _mostly_inside(o, size) else self._clip(o, size, image) for o in outlines]
        outlines = [o for o in clipped if abs(area(o)) > _THINNEST**2]
        return list((join_parts(outlines) / size).ravel()) if outlines else "object without area"

    def _box(self, annotation: Annotation, size: tuple[int, int], image: str) -> list[float] | str:
        """Return x, y, width, height and keypoints as shares of the image, or why the object is skipped."""
        points = annotation.keypoints if self.task == "pose" else np.zeros((0, 3))
        if points is None:
            return "object without keypoints (task=detect takes its box)"
        if annotation.box is not None:
            corners = np.array(annotation.box).reshape(2, 2)
        elif outlines := _usable(annotation.outlines):
            around = np.concatenate(outlines)
            corners = np.stack((around.min(0), around.max(0)))
        else:
            return "object without a box"
        (left, top), (right, bottom) = self._clip(corners, size, image)
        if right - left < _THINNEST or bottom - top < _THINNEST:
            return "object without width or height"
        width, height = size
        values = [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
        points = points.copy()
        points[:, :2] = np.where(points[:, 2:] > 0, np.clip(points[:, :2] / size, 0, 1), 0)
        return [*values, *points.ravel()]

    def _clip(self, points: np.ndarray, size: tuple[int, int], image: str) -> np.ndarray:
        clipped = np.clip(points, 0, size)
        if np.abs(clipped - points).max() > 0.01:  # pixels; less is rounding
            self.changed.add("outline or box clipped to its image", image)
        return clipped

    def _unused_name(self, folder: Path, sample: Sample) -> Path:
        """Return where an image goes: under its own name, folders included, unless another has that name or stem."""
        named = PurePosixPath(sample.name).with_suffix(sample.file.suffix)
        safe = not named.is_absolute() and not {"..", "images"} & set(named.parts)  # Ultralytics looks for `images`
        image = folder.joinpath(*(named.parts if safe else (named.name,)))
        stem, count = image.stem, 1
        while (folder.parents[1] / "labels" / folder.name / image.relative_to(folder)).with_suffix(".txt").exists():
            count += 1
            image = image.with_stem(f"{stem}-{count}")
        if count > 1:
            self.changed.add("image renamed, as another has its name", f"{sample.name} to {image.name}")
        return image

    def _link_or_copy(self, file: Path, image: Path) -> None:
        if not self.copy:
            try:
                os.link(file.resolve(), image)
                return
            except OSError:  # another disk, or a file system without hard links
                self.changed.add("image copied, as it could not be linked", file.name)
        shutil.copy2(file, image)


def _usable(outlines: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [o for o in outlines if len(o) >= 3]


def join_parts(outlines: list[np.ndarray]) -> np.ndarray:
    """Return one polygon (N, 2), Ultralytics' way: thin lines connect each part with the next where the two are nearest."""
    if len(outlines) == 1:
        return outlines[0]
    nearest = [_nearest(a, b) for a, b in pairwise(outlines)]
    there, back = [_from(outlines[0], nearest[0][0])], [_from(outlines[-1], nearest[-1][1])]
    for part, (_, enter), (leave, _) in zip(outlines[1:-1], nearest[:-1], nearest[1:], strict=True):
        if enter > leave:  # the other way around
            part, enter, leave = part[::-1], len(part) - 1 - enter, len(part) - 1 - leave
        around = _from(part, enter)
        there.append(around[: leave - enter + 1])
        back.append(around[leave - enter :])
    return np.concatenate([*there, back[0], *reversed(back[1:])])


def _nearest(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Return which corners of two outlines (N, 2) and (M, 2) are nearest to each other."""
    distances = ((a[:, None] - b[None]) ** 2).sum(-1)
    i, j = np.unravel_index(np.argmin(distances), distances.shape)
    return int(i), int(j)


def _from(outline: np.ndarray, start: int) -> np.ndarray:
    """Return an outline that begins and ends at one of its corners."""
    return np.concatenate([np.roll(outline, -start, axis=0), outline[start : start + 1]])


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) < 0.01


def _mostly_inside(outline: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether Ultralytics takes an oriented box as it is: cutting its corners off would turn it."""
    low, high = outline.min(0), outline.max(0)
    return bool((low + high >= 0).all() and (low + high <= 2 * np.array(size)).all() and (high - low <= size).all())
