"""A contact sheet: images with their labels drawn, to see at a glance whether boxes, classes and splits are right."""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .. import files
from ..errors import ConfigError, printable
from .label_rows import LabelRow
from .pictures import converted

_COLUMNS, _ROWS, _TILE, _CAPTION, _LINE = 4, 4, 360, 18, 20
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Tile:
    """An image of a split with its objects; in a classification set, with its class."""

    file: Path
    split: str
    rows: tuple[LabelRow, ...]
    cls: int | None = None

    @property
    def classes(self) -> set[int]:
        return {self.cls} if self.cls is not None else {row.cls for row in self.rows}


def choose_tiles(tiles: Mapping[str, Sequence[Tile]]) -> list[Tile]:
    """Choose the images to show: half train, half val, rare classes first, then at random but always the same."""
    shown = [part for part in ("train", "val") if tiles.get(part)] or [part for part in tiles if tiles[part]][:1]
    chosen: list[Tile] = []
    for part in shown:
        pool = list(tiles[part])
        random.Random(part).shuffle(pool)  # where train is val, they show different images
        counts = Counter(c for tile in pool for c in tile.classes)
        missing = set(counts)
        picked: list[Tile] = []
        room = _COLUMNS * _ROWS // len(shown)
        for cls in sorted(counts, key=lambda c: counts[c]):
            if cls in missing and len(picked) < room:
                tile = max((t for t in pool if cls in t.classes and t not in picked), key=lambda t: len(t.classes & missing))
                picked.append(tile)
                missing -= tile.classes
        picked += [t for t in pool if t not in picked][: room - len(picked)]
        chosen += picked
    return chosen


def draw_sheet(path: str | Path, tiles: Sequence[Tile], names: Mapping[int, str]) -> Path:
    """Draw tiles, four in a row, each with its file's name, and a legend of their classes below.

    Raises:
        ConfigError: The file's ending is not one of an image, there is nothing to draw, or it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"sheet={path} is no image file; end it in one of {', '.join(_FORMATS)}")
    if not tiles:
        raise ConfigError("there is no readable image to draw on a contact sheet; see the report without it")
    names = {cls: printable(name) for cls, name in names.items()}
    font = ImageFont.load_default(13)
    count = -(-len(tiles) // _COLUMNS)
    legend = _legend(sorted({c for t in tiles for c in t.classes}), names, font)
    height = count * (_TILE + _CAPTION) + (len(legend) + 1) * _LINE
    sheet = Image.new("RGB", (_COLUMNS * _TILE, height), "white")
    for i, tile in enumerate(tiles):
        x, y = i % _COLUMNS * _TILE, i // _COLUMNS * (_TILE + _CAPTION)
        sheet.paste(_draw_tile(tile, names, font), (x, y + _CAPTION))
        caption = printable(f"{tile.split}: {tile.file.name}")
        while font.getlength(caption) > _TILE - 8:
            caption = caption[:-2].rstrip("…") + "…"
        ImageDraw.Draw(sheet).text((x + 4, y + 1), caption, "black", font)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(legend):
        x, y = 4, count * (_TILE + _CAPTION) + _LINE // 2 + i * _LINE
        for cls, width in line:
            pen.rectangle((x, y + 3, x + 11, y + 14), _colour(cls))
            pen.text((x + 16, y), names[cls], "black", font)
            x += width
    form = _FORMATS[path.suffix.lower()]
    try:
        return files.replace(path, lambda temporary: sheet.save(temporary, form))
    except (ConfigError, OSError) as error:
        raise ConfigError(f"the contact sheet {path} cannot be written; give another file with --sheet") from error


def _legend(classes: Sequence[int], names: Mapping[int, str], font: Font) -> list[list[tuple[int, int]]]:
    """Return lines of (class, width)."""
    lines: list[list[tuple[int, int]]] = [[]]
    for cls in classes:
        width = int(font.getlength(names[cls])) + 32
        if sum(w for _, w in lines[-1]) + width > _COLUMNS * _TILE - 8:
            lines.append([])
        lines[-1].append((cls, width))
    return lines


def _draw_tile(tile: Tile, names: Mapping[int, str], font: Font) -> Image.Image:
    """Return an image of a tile's size with its objects."""
    with Image.open(tile.file) as opened:
        opened.draft("RGB", (_TILE, _TILE))
        image = converted(opened, "RGB")
    image = ImageOps.contain(image, (_TILE - 4, _TILE - 4))
    width, height = image.size
    pen = ImageDraw.Draw(image, "RGBA")
    tags = []
    for row in sorted(tile.rows, key=lambda r: -r.side[0] * r.side[1]):  # small ones on top
        colour = _colour(row.cls)
        points = [(float(x) * width, float(y) * height) for x, y in row.outline]
        line = 2 if max(row.side[0] * width, row.side[1] * height) > 12 else 1
        pen.polygon(points, (*colour, 50) if len(points) > 4 else None)
        pen.line([*points, points[0]], (*colour, 255), line)
        for x, y, seen in row.keypoints if row.keypoints is not None else ():
            if seen > 0:
                pen.ellipse((x * width - 3, y * height - 3, x * width + 3, y * height + 3), (*colour, 255), "white")
        tags.append((row, points))
    named: set[int] = set()
    for row, points in tags:  # each class once, and every object that has room for its name
        text = names[row.cls]
        if row.cls not in named or row.side[0] * width > font.getlength(text) + 4:
            _draw_name(pen, min(x for x, _ in points), min(y for _, y in points), text, _colour(row.cls), font, image.size)
            named.add(row.cls)
    if tile.cls is not None:
        _draw_name(pen, 0, 16, names[tile.cls], _colour(tile.cls), font, image.size)
    framed = Image.new("RGB", (_TILE, _TILE), "white")
    framed.paste(image, ((_TILE - width) // 2, (_TILE - height) // 2))
    return framed


def _draw_name(
    pen: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    colour: tuple[int, int, int],
    font: Font,
    size: tuple[int, int],
) -> None:
    """Write a name on its colour, above a point and inside the image."""
    width = font.getlength(text) + 4
    x, y = max(0, min(x, size[0] - width)), max(0, min(y - 16, size[1] - 16))
    pen.rectangle((x, y, x + width, y + 15), (*colour, 255))
    bright = sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11), strict=True)) > 140
    pen.text((x + 2, y), text, "black" if bright else "white", font)


def _colour(cls: int) -> tuple[int, int, int]:
    """Return a class's colour; neighbours differ, as each is a golden angle further on the wheel."""
    red, green, blue = colorsys.hsv_to_rgb(cls * 0.618034 % 1, 0.85, 1.0 - 0.25 * (cls % 3) / 2)
    return int(red * 255), int(green * 255), int(blue * 255)
