"""An image and its labels in Ultralytics' layout: coordinates become shares, boxes are clipped, files linked or copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from .formats.base import Entry, Thing
from .layout import SUFFIXES
from .pictures import header
from .report import Tally
from .rows import area

_LEAST = 1e-3  # pixels: what is thinner has no width


@dataclass(frozen=True)
class Writer:
    """Writes images and labels, and counts what it leaves out and changes."""

    task: str
    numbers: Mapping[str, int]  # of the source's classes
    dropped: frozenset[str]  # classes that are left out on request
    left: Tally
    changed: Tally
    copy: bool

    def write(self, entry: Entry, folder: Path) -> list[int] | None:
        """Write an image and its labels; return the classes of its objects, or None where it is left out."""
        size = self._size(entry)
        if size is None:
            return None
        rows = [row for thing in entry.things(self.task) if (row := self._row(thing, size, entry.name))]
        image = self._free(folder / "images" / entry.split, entry)
        label = folder / "labels" / image.relative_to(folder / "images").with_suffix(".txt")
        for file in (image, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        self._place(entry.file, image)
        label.write_text("".join(f"{cls} {' '.join(f'{v:.8g}' for v in values)}\n" for cls, values in rows))
        return [cls for cls, _ in rows]

    def _size(self, entry: Entry) -> tuple[int, int] | None:
        """Return the size that the annotations refer to, or None where the image cannot be used with them."""
        if entry.file.suffix[1:].lower() not in SUFFIXES:
            self.left.add("image of a format that Ultralytics does not read", entry.name)
            return None
        try:
            raw, size = header(entry.file)
        except (OSError, ValueError, SyntaxError) as error:
            self.left.add("image that is not readable", f"{entry.name}: {' '.join(str(error).split())[:80]}")
            return None
        stated = entry.size or size
        if stated == size or abs(stated[0] * size[1] / (stated[1] * size[0]) - 1) < 0.01:  # the same, or resized
            return stated
        turned_after = raw != size and abs(stated[0] * raw[1] / (stated[1] * raw[0]) - 1) < 0.01
        why = "was annotated before its EXIF tag turned it" if turned_after else "is not of the shape its annotations state"
        self.left.add(f"image that {why}", f"{entry.name}: {size[0]}x{size[1]}, not {stated[0]}x{stated[1]}")
        return None

    def _row(self, thing: Thing, size: tuple[int, int], image: str) -> tuple[int, list[float]] | None:
        """Return an object's class and numbers, as shares of the image."""
        cls = self.numbers.get(thing.name)
        if cls is None:
            asked = thing.name in self.dropped
            self.left.add(f"object of class {thing.name}" if asked else "object of a class that is not named", image)
            return None
        outlines = [o for o in thing.outlines if len(o) >= 3]
        if self.task in ("segment", "obb") and not outlines:
            self.left.add("object without an outline (task=detect takes its box)", image)
            return None
        if self.task == "pose" and thing.keypoints is None:
            self.left.add("object without keypoints (task=detect takes its box)", image)
            return None
        if self.task in ("segment", "obb"):
            outlines = [
                o if self.task == "obb" and _mostly_inside(o, size) else self._clip(o, size, image) for o in outlines
            ]
            if not (outlines := [o for o in outlines if abs(area(o)) > _LEAST**2]):
                self.left.add("object without area", image)
                return None
            return cls, list((join_parts(outlines) / size).ravel())
        if thing.box is None and not outlines:
            self.left.add("object without a box", image)
            return None
        corners = np.concatenate(outlines) if thing.box is None else np.array(thing.box).reshape(2, 2)
        if thing.box is None:
            corners = np.stack((corners.min(0), corners.max(0)))
        (left, top), (right, bottom) = self._clip(corners, size, image)
        if right - left < _LEAST or bottom - top < _LEAST:
            self.left.add("object without width or height", image)
            return None
        width, height = size
        values = [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
        if self.task == "pose" and thing.keypoints is not None:
            points = thing.keypoints.copy()
            points[:, :2] = np.where(points[:, 2:] > 0, np.clip(points[:, :2] / size, 0, 1), 0)
            values += list(points.ravel())
        return cls, values

    def _clip(self, points: np.ndarray, size: tuple[int, int], image: str) -> np.ndarray:
        clipped = np.clip(points, 0, size)
        if np.abs(clipped - points).max() > 0.01:  # pixels; less is rounding
            self.changed.add("outline or box clipped to its image", image)
        return clipped

    def _free(self, folder: Path, entry: Entry) -> Path:
        """Return where an image goes: under its own name, folders included, unless another has that name or stem."""
        named = PurePosixPath(entry.name).with_suffix(entry.file.suffix)
        safe = not named.is_absolute() and not {"..", "images"} & set(named.parts)  # Ultralytics looks for `images`
        image = folder.joinpath(*(named.parts if safe else (named.name,)))
        stem, count = image.stem, 1
        while (folder.parents[1] / "labels" / folder.name / image.relative_to(folder)).with_suffix(".txt").exists():
            count += 1
            image = image.with_stem(f"{stem}-{count}")
        if count > 1:
            self.changed.add("image renamed, as another has its name", f"{entry.name} to {image.name}")
        return image

    def _place(self, file: Path, image: Path) -> None:
        if not self.copy:
            try:
                os.link(file.resolve(), image)
                return
            except OSError:  # another disk, or a file system without hard links
                self.changed.add("image copied, as it could not be linked", file.name)
        shutil.copy2(file, image)


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


def _mostly_inside(outline: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether Ultralytics takes an oriented box as it is: cutting its corners off would turn it."""
    low, high = outline.min(0), outline.max(0)
    return bool((low + high >= 0).all() and (low + high <= 2 * np.array(size)).all() and (high - low <= size).all())
