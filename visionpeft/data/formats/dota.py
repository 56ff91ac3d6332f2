"""DOTA: labelTxt/P0000.txt beside images/P0000.png, oriented boxes.  Xia et al. 2018, https://arxiv.org/abs/1711.10398

A row is x1 y1 x2 y2 x3 y3 x4 y4 class difficult, in pixels; rows such as "gsd:0.15" stand above. Ultralytics'
convert_dota_to_yolo_obb knows the classes of DOTA itself only and one layout of folders. Large images are not cut here:
`ultralytics.data.split_dota` does that with the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..report import Tally
from .base import FORMATS, Annotation, Format, ImageIndex, Request, Source, image_folders, split_of, text_lines

_HEADER = ("imagesource", "gsd", "acquisition")


@FORMATS.register("dota")
class Dota(Format):
    """DOTA's text files."""

    @staticmethod
    def fits(root: Path) -> bool:
        return bool(_folders(root))

    @staticmethod
    def read(request: Request) -> Source:
        root, source = request.root, Source(("obb", "detect"))
        for folder in [request.annotations] if request.annotations else _folders(root):
            images = ImageIndex([request.images] if request.images else image_folders(root, folder))
            part = split_of(folder.name) or split_of(folder.parent.name)
            for file in sorted(folder.glob("*.txt")):
                if (lines := text_lines(file, source.skipped)) is not None:
                    annotations = list(_annotations(file, lines, request.difficult, source.skipped))
                    source.add(file, images.by_stem(file.stem, folder.parent.name), part, annotations)
        if not source.names:
            raise DataError(f"{root} holds no usable DOTA labels, or their images are elsewhere; give them with --images")
        return source


def _folders(root: Path) -> list[Path]:
    """Return the folders of labels: labelTxt, labelTxt-v2.0, ..., at most two folders down."""
    if not root.is_dir():
        return []
    folders = [f for pattern in ("labelTxt*", "*/labelTxt*", "*/*/labelTxt*") for f in sorted(root.glob(pattern))]
    return [f for f in folders if f.is_dir() and any(f.glob("*.txt"))]


def _annotations(file: Path, lines: list[str], difficult: bool, skipped: Tally) -> Iterable[Annotation]:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].lower().startswith(_HEADER):
            continue
        try:
            corners = np.array(words[:8], float).reshape(4, 2)
            name, hard = words[8], len(words) > 9 and int(words[9]) > 0
            if not np.isfinite(corners).all():
                raise ValueError
        except (ValueError, IndexError):
            skipped.add("row that is malformed", f"{file.name}:{number}: '{line[:40]}'")
            continue
        if hard and not difficult:
            skipped.add("object marked as difficult (--difficult keeps it)", f"{file.name}: {name}")
            continue
        yield Annotation(name, None, (corners,))
