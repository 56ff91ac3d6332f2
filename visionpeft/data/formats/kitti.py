"""KITTI: label_2/000000.txt beside image_2/000000.png.  Geiger et al. 2012, https://www.cvlibs.net/datasets/kitti/eval_object.php

A row is type, truncated, occluded, alpha, left, top, right, bottom (pixels from 0), then 3D values that are not used.
torchvision's Kitti wants the whole devkit's folders, and gives the same rows. DontCare regions are always left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ...errors import DataError
from ..report import Tally
from .base import (
    FORMATS,
    NOT_FOUND,
    Entry,
    Format,
    Images,
    Request,
    Source,
    Thing,
    always,
    image_folders,
    lines_of,
    listed_splits,
)

_CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")  # the devkit's order
_FIELDS = 15


@FORMATS.register("kitti")
class Kitti(Format):
    """KITTI's object labels."""

    @staticmethod
    def fits(root: Path) -> bool:
        return _labels(root) is not None

    @staticmethod
    def read(request: Request) -> Source:
        root, left = request.root, Tally()
        folder = request.annotations or _labels(root) or root
        files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
        if not files:
            raise DataError(f"{folder} holds no KITTI labels; give a folder with label_2/ and image_2/, such as training")
        images = Images([request.images] if request.images else image_folders(root, folder))
        splits = listed_splits(root)
        entries, names = [], set()
        for file in files:
            if splits and file.stem not in splits:
                left.add("image that ImageSets does not list", file.name)
                continue
            if (lines := lines_of(file, left)) is None:
                continue
            things = list(_things(file, lines, left))
            found = images.stemmed(file.stem, folder.name.replace("label", "image"))
            if found is None:
                left.add(NOT_FOUND, f"for {file.name} ({len(things)} objects)")
                continue
            names |= {t.name for t in things}
            entries.append(Entry(found, found.name, splits.get(file.stem, ""), None, always(things)))
        if not names:
            raise DataError(f"{folder} holds no usable KITTI labels, or their images are elsewhere; give them with --images")
        order = list(_CLASSES) if names <= set(_CLASSES) else sorted(names)
        return Source(order, ("detect",), entries, left)


def _labels(root: Path) -> Path | None:
    """Return the folder of labels: label_2, at most two folders down, or the folder itself."""
    if not root.is_dir():
        return None
    found = next((f for pattern in ("label_2", "*/label_2", "*/*/label_2") for f in sorted(root.glob(pattern))), None)
    if found or root.name == "label_2":
        return found or root
    first = next(iter(sorted(root.glob("*.txt"))), None)
    words = first.read_text(encoding="utf-8", errors="replace").split("\n")[0].split() if first else []
    return root if len(words) in (_FIELDS, _FIELDS + 1) else None


def _things(file: Path, lines: list[str], left: Tally) -> Iterable[Thing]:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if words[0] == "DontCare":
            left.add("DontCare region", file.name)
            continue
        try:
            box = (float(words[4]), float(words[5]), float(words[6]), float(words[7]))
            if len(words) < _FIELDS or not all(map(math.isfinite, box)):
                raise ValueError
        except (ValueError, IndexError):
            left.add("row that is malformed", f"{file.name}:{number}: '{line[:40]}'")
            continue
        yield Thing(words[0], box)
