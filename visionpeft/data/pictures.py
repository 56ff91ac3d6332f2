"""Image files: whole or not, how large, and which are copies of one another.

Near copies are found by a difference hash (256 bits: is each cell of a 17 x 16 thumbnail darker than its right
neighbour; N. Krawetz 2013, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html), and then
confirmed by the correlation of the thumbnails. The hash is six lines here; the library `imagehash` would bring scipy and
PyWavelets for it.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .layout import SUFFIXES
from .report import watched

_THUMB = (34, 32)  # width, height: two by two pixels per cell of the hash
_BITS, _CLOSE, _ALIKE, _PLAIN = 256, 26, 0.985, 4.0
_LEAST = 10  # pixels: Ultralytics leaves out images that are smaller


@dataclass(frozen=True)
class Picture:
    """What was seen of an image file.

    Attributes:
        size: Width and height as training sees it (turned by its EXIF tag), or None where it cannot be read.
        digest: Of the file's bytes.
        thumb: (32, 34), grey, or None.
        fault: Why it cannot be used, or "".
    """

    size: tuple[int, int] | None = None
    digest: bytes = b""
    thumb: np.ndarray | None = None
    fault: str = ""


def look(file: Path) -> Picture:
    """Read a file whole, so that a truncated one is found out, at an eighth of a JPEG's size where that is enough."""
    digest = b""
    try:
        content = file.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with Image.open(io.BytesIO(content)) as image:
            if (form := str(image.format).lower()) not in SUFFIXES | {"jpeg2000"}:
                raise ValueError(f"{form.upper()}, which Ultralytics does not read, whatever its name says")
            width, height = turned(image)
            image.draft("L", (2 * _THUMB[0], 2 * _THUMB[1]))
            image.load()
            grey = ImageOps.exif_transpose(image).convert("L").resize(_THUMB, Image.Resampling.BOX)
    except FileNotFoundError:
        return Picture(fault="is not there")
    except Image.DecompressionBombError:  # Ultralytics, too, opens images with Pillow before it trains on them
        return Picture(digest=digest, fault="more pixels than Pillow opens (179 million); cut it into tiles")
    except (OSError, ValueError, SyntaxError, ImportError) as error:
        words = "no image that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        return Picture(digest=digest, fault=" ".join(words.split())[:80])
    if min(width, height) < _LEAST:
        return Picture(None, digest, None, f"{width} x {height}, smaller than {_LEAST} pixels")
    return Picture((width, height), digest, np.asarray(grey))


def turned(image: Image.Image) -> tuple[int, int]:
    """Return an image's width and height after its EXIF orientation is applied, as OpenCV and so Ultralytics do."""
    width, height = image.size
    return (height, width) if image.getexif().get(0x0112) in (5, 6, 7, 8) else (width, height)


def header(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return a file's width and height, as stored and as turned by its EXIF tag, without reading its pixels.

    Raises:
        OSError, ValueError, SyntaxError: It is no image that Pillow knows.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # it guards memory, and no pixel is read here; satellite images are large
    try:
        with Image.open(file) as image:
            return image.size, turned(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def look_all(files: Iterable[Path]) -> dict[Path, Picture]:
    """Look at every file once; decoding releases Python's lock, so threads help."""
    unique = list(dict.fromkeys(files))
    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        warnings.simplefilter("ignore")  # Pillow's: satellite images are large, palettes odd
        return dict(zip(unique, watched(pool.map(look, unique), "reading", len(unique)), strict=True))


def copies(pictures: Sequence[Picture], groups: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Find images that show the same.

    Args:
        pictures: N of them.
        groups: The split of each.

    Returns:
        For each image with a copy before it in its own group, that copy's index; and for each with one in an earlier
        group, that one's. Exact copies come before near ones.
    """
    within, across = _exact(pictures, groups)
    thumbs = [(i, p.thumb) for i, p in enumerate(pictures) if p.thumb is not None and p.thumb.std() >= _PLAIN]
    if not thumbs:
        return within, across
    index = np.array([i for i, _ in thumbs])
    group = np.asarray(groups)[index]
    flat = np.stack([t for _, t in thumbs]).astype(np.float32)  # (M, 32, 34)
    signs = _signs(flat)
    flat = flat.reshape(len(flat), -1)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    step = max(1, 20_000_000 // len(index))  # rows at once: each takes some numbers per image
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        distance = (_BITS - signs[rows] @ signs.T) / 2  # bits that differ
        own = group[rows, None] == group[None]
        earlier = np.arange(len(index))[None] < np.arange(len(index))[rows, None]
        for found, allowed in ((within, own & earlier), (across, group[rows, None] > group[None])):
            masked = np.where(allowed, distance, np.inf)
            best = masked.argmin(1)
            for k in np.flatnonzero(masked[np.arange(len(best)), best] <= _CLOSE):
                here, there = start + int(k), int(best[k])
                if flat[here] @ flat[there] >= _ALIKE:
                    found.setdefault(int(index[here]), int(index[there]))
    return within, across


def _exact(pictures: Sequence[Picture], groups: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    within: dict[int, int] = {}
    across: dict[int, int] = {}
    first: dict[tuple[bytes, int], int] = {}
    for i, (picture, group) in enumerate(zip(pictures, groups, strict=True)):
        if not picture.digest:
            continue
        before = [first[(picture.digest, g)] for g in range(group) if (picture.digest, g) in first]
        if before:
            across[i] = before[0]
        if (picture.digest, group) in first:
            within[i] = first[(picture.digest, group)]
        else:
            first[(picture.digest, group)] = i
    return within, across


def _signs(thumbs: np.ndarray) -> np.ndarray:
    """Return difference hashes as +-1, so that a matrix product counts the bits in which two agree. (M, 256)"""
    cells = thumbs.reshape(len(thumbs), 16, 2, 17, 2).mean((2, 4))
    return np.where(cells[:, :, :-1] < cells[:, :, 1:], 1, -1).reshape(len(thumbs), _BITS).astype(np.float32)
