"""Rows of Ultralytics' label files, of every task: read, checked, and parsed into outlines.

detect: class x y w h. segment: class x1 y1 x2 y2 x3 y3 ... obb: class and four corners. pose: class x y w h, then per
keypoint x y or x y visible. All are shares of the image's width and height. https://docs.ultralytics.com/datasets/
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TOLERANCE = 0.01  # Ultralytics leaves out images with a value further outside than this (verify_image_label)


@dataclass(frozen=True)
class LabelRow:
    """An object of a label file.

    Attributes:
        cls: Index of its class.
        outline: (N, 2): its polygon, or the corners of its box.
        keypoints: (K, 3): x, y, visible; of a pose set.
    """

    cls: int
    outline: np.ndarray
    keypoints: np.ndarray | None = None

    @property
    def side(self) -> tuple[float, float]:
        """Width and height of its upright box, as shares of the image's."""
        width, height = np.ptp(self.outline, axis=0)
        return float(width), float(height)


@dataclass(frozen=True)
class RowFault:
    """A fault of a row: its kind (a key of `checking.KINDS`), where it is, and why."""

    kind: str
    line: int
    reason: str


def read_rows(file: Path) -> tuple[dict[int, list[float]], list[RowFault]]:
    """Return a label file's rows as numbers, by line (from 1), and the faults of those that are none."""
    rows: dict[int, list[float]] = {}
    faults = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return {}, [RowFault("malformed", 0, f"cannot be read as UTF-8 ({type(error).__name__})")]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            faults.append(RowFault("malformed", number, f"'{line.strip()[:40]}' is not numbers only"))
            continue
        if values:
            rows[number] = values
    return rows, faults


def guess_task(files: Iterable[Mapping[int, list[float]]], kpt_shape: tuple[int, int] | None) -> str:
    """Return the task that label files are of.

    Args:
        files: The rows of each, as numbers.
        kpt_shape: The data YAML's.

    Rows of nine numbers can be oriented boxes or polygons of four corners: where all rows have nine, they are taken for
    the former.
    """
    lengths = Counter(len(values) for rows in files for values in rows.values())
    if kpt_shape:
        return "pose"
    if set(lengths) == {9}:
        return "obb"
    polygons = sum(n for length, n in lengths.items() if length > 5)
    return "segment" if polygons > lengths.total() / 2 else "detect"


def parse_row(
    values: list[float], line: int, task: str, classes: int, kpt_shape: tuple[int, int] | None
) -> LabelRow | RowFault:
    """Return the object that a row's numbers say, or their fault."""
    expected = {"detect": 5, "pose": 5 + math.prod(kpt_shape or (0, 0))}.get(task)
    count = len(values)
    if task == "detect" and count > 6 and count % 2:
        expected = None  # Ultralytics takes the box around a polygon
    if count != expected if expected else count < 7 or not count % 2:
        wanted = f"{expected}" if expected else "a class and at least three points"
        return RowFault("malformed", line, f"{count} numbers, not {wanted}")
    if not all(map(math.isfinite, values)) or values[0] != int(values[0]):
        return RowFault("malformed", line, "the class is no whole number, or a number is not finite")
    cls = int(values[0])
    if not 0 <= cls < classes:
        return RowFault("class", line, f"class {cls} of 0 to {classes - 1}")
    if task in ("detect", "pose") and (count == 5 or task == "pose"):
        return _parse_box(cls, values, line, kpt_shape if task == "pose" else None)
    outline = np.array(values[1:]).reshape(-1, 2)
    low, high = outline.min(0), outline.max(0)
    if fault := _outside(np.concatenate(((low + high) / 2, high - low)), line):  # as of a box: Ultralytics looks at that
        return fault
    if abs(area(outline)) < 1e-12:
        return RowFault("empty", line, "its outline has no area")
    return LabelRow(cls, outline)


def _parse_box(cls: int, values: list[float], line: int, kpt_shape: tuple[int, int] | None) -> LabelRow | RowFault:
    """Return an object from x y w h, and the keypoints of a pose set."""
    x, y, width, height = values[1:5]
    if fault := _outside(np.array(values[1:5]), line):
        return fault
    if width <= 0 or height <= 0:
        return RowFault("empty", line, f"width {width:g}, height {height:g}")
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    outline = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    if kpt_shape is None:
        return LabelRow(cls, outline)
    points = np.array(values[5:]).reshape(kpt_shape)
    if kpt_shape[1] == 2:
        points = np.concatenate((points, np.ones((len(points), 1))), 1)
    if fault := _outside(points[:, :2], line):
        return fault
    return LabelRow(cls, outline, points)


def _outside(numbers: np.ndarray, line: int) -> RowFault | None:
    wrong = numbers[(numbers < -_TOLERANCE) | (numbers > 1 + _TOLERANCE)]
    return RowFault("outside", line, f"{wrong[0]:g} is not between 0 and 1") if wrong.size else None


def sticks_out(row: LabelRow) -> bool:
    """Return whether an outline reaches out of its image by more than rounding does."""
    return bool((row.outline < -_TOLERANCE).any() or (row.outline > 1 + _TOLERANCE).any())


def area(outline: np.ndarray) -> float:
    """Return the signed area that a polygon encloses."""
    x, y = outline.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
