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
    split_of,
)

_HEADER = ("imagesource", "gsd", "acquisition")


@FORMATS.register("dota")
class Dota(Format):
    """DOTA's text files."""

    @staticmethod
    def fits(root: Path) -> bool:
        return bool(_folders(root))

    @staticmethod
    def read(request: Request) -> Source:
        root, left = request.root, Tally()
        folders = [request.annotations] if request.annotations else _folders(root)
        entries, names = [], set()
        for folder in folders:
            images = Images([request.images] if request.images else image_folders(root, folder))
            part = split_of(folder.name) or split_of(folder.parent.name)
            for file in sorted(folder.glob("*.txt")):
                if (lines := lines_of(file, left)) is None:
                    continue
                things = list(_things(file, lines, request.difficult, left))
                found = images.stemmed(file.stem, folder.parent.name)
                if found is None:
                    left.add(NOT_FOUND, f"for {file.name} ({len(things)} objects)")
                    continue
                names |= {t.name for t in things}
                entries.append(Entry(found, found.name, part, None, always(things)))
        if not names:
            raise DataError(f"{root} holds no usable DOTA labels, or their images are elsewhere; give them with --images")
        return Source(sorted(names), ("obb", "detect"), entries, left)


def _folders(root: Path) -> list[Path]:
    """Return the folders of labels: labelTxt, labelTxt-v2.0, ..., at most two folders down."""
    if not root.is_dir():
        return []
    found = [f for pattern in ("labelTxt*", "*/labelTxt*", "*/*/labelTxt*") for f in sorted(root.glob(pattern))]
    return [f for f in found if f.is_dir() and any(f.glob("*.txt"))]


def _things(file: Path, lines: list[str], difficult: bool, left: Tally) -> Iterable[Thing]:
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
            left.add("row that is malformed", f"{file.name}:{number}: '{line[:40]}'")
            continue
        if hard and not difficult:
            left.add("object marked as difficult (--difficult keeps it)", f"{file.name}: {name}")
            continue
        yield Thing(name, None, (corners,))
