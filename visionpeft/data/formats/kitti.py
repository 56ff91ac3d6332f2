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
from .base import FORMATS, Annotation, Format, ImageIndex, Request, Source, image_folders, listed_splits, text_lines

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
        root, source = request.root, Source(("detect",))
        folder = request.annotations or _labels(root) or root
        files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
        if not files:
            raise DataError(f"{folder} holds no KITTI labels; give a folder with label_2/ and image_2/, such as training")
        images = ImageIndex([request.images] if request.images else image_folders(root, folder))
        splits = listed_splits(root)
        for file in files:
            if splits and file.stem not in splits:
                source.skipped.add("image that ImageSets does not list", file.name)
            elif (lines := text_lines(file, source.skipped)) is not None:
                image = images.by_stem(file.stem, folder.name.replace("label", "image"))
                annotations = list(_annotations(file, lines, source.skipped))
                source.add(file, image, splits.get(file.stem, ""), annotations)
        if not source.names:
            raise DataError(f"{folder} holds no usable KITTI labels, or their images are elsewhere; give them with --images")
        if set(source.names) <= set(_CLASSES):
            source.names = list(_CLASSES)
        return source


def _labels(root: Path) -> Path | None:
    """Return the folder of labels: label_2, at most two folders down, or the folder itself."""
    if not root.is_dir():
        return None
    folder = next((f for pattern in ("label_2", "*/label_2", "*/*/label_2") for f in sorted(root.glob(pattern))), None)
    if folder or root.name == "label_2":
        return folder or root
    first = next(iter(sorted(root.glob("*.txt"))), None)
    words = first.read_text(encoding="utf-8", errors="replace").split("\n")[0].split() if first else []
    return root if len(words) in (_FIELDS, _FIELDS + 1) else None


def _annotations(file: Path, lines: list[str], skipped: Tally) -> Iterable[Annotation]:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if words[0] == "DontCare":
            skipped.add("DontCare region", file.name)
            continue
        try:
            box = (float(words[4]), float(words[5]), float(words[6]), float(words[7]))
            if len(words) < _FIELDS or not all(map(math.isfinite, box)):
                raise ValueError
        except (ValueError, IndexError):
            skipped.add("row that is malformed", f"{file.name}:{number}: '{line[:40]}'")
            continue
        yield Annotation(words[0], box)
