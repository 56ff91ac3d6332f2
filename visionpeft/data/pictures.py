"""Image files: read as Ultralytics reads them, whole or not, how large, and which are copies of one another.

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
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError
from .layout import SUFFIXES
from .report import with_progress

_THUMB = (34, 32)  # width, height: two by two pixels per cell of the hash
_BITS, _MAX_DISTANCE = 256, 26  # of a hash, and in which near copies may differ
_MIN_CORRELATION, _MIN_DEVIATION = 0.985, 4.0  # of the thumbnails of near copies; plainer ones are not compared
_EIGHT_BITS = frozenset("1 L LA La P PA RGB RGBA RGBa CMYK YCbCr".split())  # Pillow's modes
_WIDTH, _HEIGHT, _KIND, _ORIENTATION, _SAMPLES, _EXTRA = 256, 257, 254, 274, 277, 338  # tags of TIFF and EXIF
READ_ERRORS = (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError)  # Pillow's. An
# ImportError is of an unknown format, for which Ultralytics has it look for a HEIF plugin
_SMALLEST = 10  # pixels: Ultralytics leaves out smaller images


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file.

    Attributes:
        size: Width and height as training sees it (turned by its EXIF tag), or None where it cannot be read.
        digest: Hash of the file's bytes.
        thumb: (32, 34), grey, or None.
        fault: Why it cannot be used, or "".
        highest: The largest value of an image of 16 bits.
    """

    size: tuple[int, int] | None = None
    digest: bytes = b""
    thumb: np.ndarray | None = None
    fault: str = ""
    highest: int | None = None


# ------------------------------------------------------------------------------------------------------------ reading
def read_image(source: Any) -> Image.Image:
    """Return a file's, or an image's, RGB: the picture that Ultralytics' own reader gives.

    Raises:
        DataError: Something of it would be lost.
        OSError, ValueError, SyntaxError, ImportError: It is no image that Pillow reads.
    """
    with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
        if why := unfit_reason(image):
            raise DataError(f"{getattr(image, 'filename', '') or 'the image'} {why}")
        return converted(image, "RGB")


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Return an upright image as "RGB" or "L"."""
    image = upright(image)
    if "transparency" in image.info:  # Pillow wants these to be made RGBA first
        image = image.convert("RGBA")
    return image.convert(mode)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned by its EXIF tag and, of 16 bits, the upper 8."""
    deep = _is_16_bit(image)
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image


def unfit_reason(image: Image.Image) -> str:
    """Return why an opened image would be read otherwise than it is meant, or "". Its pixels are not looked at."""
    tags: Any = getattr(image, "tag_v2", {})
    bands, more = tags.get(_SAMPLES, 1), tags.get(_EXTRA, ())
    instead = "give red, green and blue alone"
    if bands - len(more) not in (1, 3, 4) or 0 in more:  # 1 and 2 are alpha, which is left out
        return f"has {bands} bands, of which the further ones would be lost; {instead}"
    if image.mode not in _EIGHT_BITS and not _is_16_bit(image):
        held = {"F": "fractions", "I": "numbers of 32 bits, or with a sign"}.get(image.mode, f"{image.mode} colours")
        return f"holds {held}, which cannot be read without loss; save it as grey or RGB, with 8 or 16 bits"
    if tags.get(_KIND, 0) & 1:
        return "begins with a preview, which would be read in place of the picture; save the picture alone"
    if tags and (pages := _pages(image)) > 1:
        return f"has {pages} pages of one size, of which only the first would be read; {instead}, in one page"
    return ""


def refuse_unfit(files: Iterable[str]) -> None:
    """Refuse images for which there is an `unfit_reason`; only TIFF can hold such.

    Raises:
        DataError: There is one.
    """
    for file in files:
        if file.lower().endswith((".tif", ".tiff", ".dng")):
            why = ""
            with suppress(*READ_ERRORS), Image.open(file) as image:  # what is broken is left out later, and said
                why = unfit_reason(image)
            if why:
                raise DataError(f"{file} {why}")


def _is_16_bit(image: Image.Image) -> bool:
    """Return whether an image has 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pages(image: Any) -> int:
    """Return how many pages of a TIFF are as large as its first; smaller ones are previews of it."""
    size, count = image.size, 0
    for page in range(image.n_frames):
        image.seek(page)
        count += image.size == size
    image.seek(0)
    return count


# ------------------------------------------------------------------------------------------------------------ inspecting
def inspect_image(file: Path) -> ImageFacts:
    """Read a file whole, so that a truncated one is found out; a JPEG at an eighth of its size where that is enough."""
    digest = b""
    try:
        content = file.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with Image.open(io.BytesIO(content)) as image:
            if (form := str(image.format).lower()) not in SUFFIXES | {"jpeg2000"}:
                raise ValueError(f"{form.upper()}, which Ultralytics does not read, whatever its name says")
            width, height = upright_size(image)
            if why := unfit_reason(image):
                return ImageFacts(digest=digest, fault=why)
            image.draft("L", (2 * _THUMB[0], 2 * _THUMB[1]))
            image.load()
            highest = int(np.asarray(image).max()) if _is_16_bit(image) else None
            grey = converted(image, "L").resize(_THUMB, Image.Resampling.BOX)
    except FileNotFoundError:
        return ImageFacts(fault="is not there")
    except Image.DecompressionBombError:  # Ultralytics, too, opens images with Pillow before it trains on them
        return ImageFacts(digest=digest, fault="more pixels than Pillow opens (179 million); cut it into tiles")
    except READ_ERRORS as error:
        words = "no image that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        return ImageFacts(digest=digest, fault=" ".join(words.split())[:80])
    if min(width, height) < _SMALLEST:
        return ImageFacts(None, digest, None, f"{width} x {height}, smaller than {_SMALLEST} pixels")
    return ImageFacts((width, height), digest, np.asarray(grey), highest=highest)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return an image's width and height after its EXIF orientation is applied, as OpenCV and so Ultralytics do."""
    width, height = _stored_size(image)
    return (height, width) if image.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else (width, height)


def _stored_size(image: Any) -> tuple[int, int]:
    """Return an image's width and height as the file says them: of a TIFF, Pillow has turned them already."""
    return (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]) if image.format == "TIFF" else image.size


def image_sizes(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return a file's width and height, as stored and as turned by its EXIF tag, without reading its pixels.

    Raises:
        OSError, ValueError, SyntaxError: It is no image that Pillow knows.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # it guards memory, and no pixel is read here; satellite images are large
    try:
        with Image.open(file) as image:
            return _stored_size(image), upright_size(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def inspect_images(files: Iterable[Path]) -> dict[Path, ImageFacts]:
    """Inspect every file once, in threads: decoding releases Python's lock."""
    unique = list(dict.fromkeys(files))
    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        warnings.simplefilter("ignore")  # Pillow's: satellite images are large, palettes odd
        return dict(zip(unique, with_progress(pool.map(inspect_image, unique), "reading", len(unique)), strict=True))


def find_copies(pictures: Sequence[ImageFacts], groups: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Find images that show the same.

    Args:
        pictures: N of them.
        groups: The split of each.

    Returns:
        For each image with a copy before it in its own group, that copy's index; and for each with one in an earlier
        group, that one's. Exact copies come before near ones.
    """
    within, across = _exact_copies(pictures, groups)
    thumbs = [(i, p.thumb) for i, p in enumerate(pictures) if p.thumb is not None and p.thumb.std() >= _MIN_DEVIATION]
    if not thumbs:
        return within, across
    index = np.array([i for i, _ in thumbs])
    group = np.asarray(groups)[index]
    flat = np.stack([t for _, t in thumbs]).astype(np.float32)  # (M, 32, 34)
    signs = _hash_signs(flat)
    flat = flat.reshape(len(flat), -1)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    step = max(1, 20_000_000 // len(index))  # rows at once: each takes some numbers per image
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        distance = (_BITS - signs[rows] @ signs.T) / 2  # bits that differ
        same_group = group[rows, None] == group[None]
        earlier = np.arange(len(index))[None] < np.arange(len(index))[rows, None]
        for pairs, allowed in ((within, same_group & earlier), (across, group[rows, None] > group[None])):
            masked = np.where(allowed, distance, np.inf)
            best = masked.argmin(1)
            for k in np.flatnonzero(masked[np.arange(len(best)), best] <= _MAX_DISTANCE):
                here, there = start + int(k), int(best[k])
                if flat[here] @ flat[there] >= _MIN_CORRELATION:
                    pairs.setdefault(int(index[here]), int(index[there]))
    return within, across


def _exact_copies(pictures: Sequence[ImageFacts], groups: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
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


def _hash_signs(thumbs: np.ndarray) -> np.ndarray:
    """Return difference hashes as +-1, so that a matrix product counts the bits in which two agree. (M, 256)"""
    cells = thumbs.reshape(len(thumbs), 16, 2, 17, 2).mean((2, 4))
    return np.where(cells[:, :, :-1] < cells[:, :, 1:], 1, -1).reshape(len(thumbs), _BITS).astype(np.float32)
