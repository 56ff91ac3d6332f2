"""The canvas of all painters: finer than its picture, with a map beside it of the thing that each fine pixel shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

FINE = 2  # canvas pixels along each pixel of the picture: what smooths every edge
_SUB = 4  # bits of a canvas pixel that OpenCV draws with
_SEEN = 0.3  # an object of which less than this is seen goes without a label
_LEAST = 5.0  # and one whose visible part is thinner than this many pixels

Colour = ArrayLike  # RGB, 0 to 255
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Thing:
    """A labelled object; all coordinates are pixels of the picture, (0, 0) being its upper left corner.

    Attributes:
        name: Its class.
        id: Its number in the scene's `ids`.
        box: x0, y0, x1, y1 around its visible part.
        outline: (N, 2), around its visible part; parts that something in front separates are joined by a line without width.
        corners: (4, 2), the tightest box in the object's own direction around the same, from front left clockwise.
        points: (K, 3), x, y and 2 (seen), 1 (hidden by something) or 0 (outside the picture).
    """

    name: str
    id: int
    box: tuple[float, float, float, float]
    outline: Floats
    corners: Floats
    points: Floats


@dataclass(frozen=True)
class Scene:
    """A picture and its labelled objects.

    Attributes:
        image: uint8, (size, size, 3), RGB.
        ids: int16, (FINE * size, FINE * size): the id of the thing that each fine pixel shows, 0 for none.
        things: Its labelled objects, in the order of drawing.
    """

    image: NDArray[np.uint8]
    ids: NDArray[np.int16]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Frame:
    """A place, a direction and a scale: called with (N, 2) points of its own, returns them in the picture.

    Its x axis points forward, its y axis to the right (as rows grow downwards).
    """

    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0

    def __call__(self, points: ArrayLike) -> Floats:
        c, s = np.cos(self.angle) * self.scale, np.sin(self.angle) * self.scale
        return np.asarray(points, float) @ np.array([[c, s], [-s, c]]) + (self.x, self.y)

    def at(self, x: float, y: float, turn: float = 0.0, scale: float | None = None) -> Frame:
        """Return a frame at a point of this one, turned, with a scale of its own."""
        ((px, py),) = self([(x, y)])
        return Frame(float(px), float(py), self.angle + turn, self.scale if scale is None else scale)


@dataclass
class _Draft:
    """A thing while others may still be drawn over it; the bounds are fine pixels."""

    name: str
    id: int
    angle: float
    points: Floats
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    drawn: int = 0

    def window(self) -> tuple[slice, slice]:
        return slice(int(self.low[1]), int(self.high[1])), slice(int(self.low[0]), int(self.high[0]))


@dataclass
class Canvas:
    """A picture on which shapes are drawn from back to front, in its pixels."""

    size: int
    pixels: NDArray[np.uint8] = field(init=False)
    ids: NDArray[np.int16] = field(init=False)

    def __post_init__(self) -> None:
        side = self.size * FINE
        self.pixels = np.zeros((side, side, 3), np.uint8)
        self.ids = np.zeros((side, side), np.int16)
        self._drafts: list[_Draft] = []
        self._draft: _Draft | None = None

    @property
    def owner(self) -> int:
        """Id of the thing being drawn, 0 for none."""
        return self._draft.id if self._draft else 0

    @contextmanager
    def thing(self, name: str, angle: float = 0.0, points: ArrayLike = ()) -> Iterator[None]:
        """Let all that is drawn inside belong to one thing, which looks along `angle` and has `points` (K, 2)."""
        side = len(self.ids)
        low, high = np.array([side, side]), np.array([0, 0])
        draft = _Draft(name, len(self._drafts) + 1, angle, np.asarray(points, float).reshape(-1, 2), low, high)
        self._drafts.append(draft)
        self._draft = draft
        try:
            yield
        finally:
            self._draft = None
            draft.low, draft.high = np.clip(draft.low, 0, side), np.clip(draft.high, 0, side)
            draft.drawn = int(np.count_nonzero(self.ids[draft.window()] == draft.id))

    def polygon(self, points: ArrayLike, colour: Colour) -> None:
        """Fill a polygon, (N, 2)."""
        fixed = [self._claim(np.asarray(points, float))]
        cv2.fillPoly(self.pixels, fixed, _rgb(colour), shift=_SUB)
        cv2.fillPoly(self.ids, fixed, float(self.owner), shift=_SUB)

    def line(self, points: ArrayLike, colour: Colour, width: float = 1.0) -> None:
        """Draw a line through (N, 2) points, never thinner than a fine pixel."""
        thick = max(1, round(width * FINE))
        fixed = [self._claim(np.asarray(points, float), thick)]
        cv2.polylines(self.pixels, fixed, False, _rgb(colour), thick, shift=_SUB)
        cv2.polylines(self.ids, fixed, False, float(self.owner), thick, shift=_SUB)

    def shade(self, points: ArrayLike, factor: Colour | float, soft: float = 0.0) -> None:
        """Multiply what is there by `factor` inside a polygon: a shadow below 1, a light above; nothing changes hands."""
        window, mask = self._inside(points, int(3 * soft * FINE) + 2)
        if not mask.size:
            return
        if soft:
            mask[:] = cv2.GaussianBlur(mask, (0, 0), soft * FINE)
        weight = 1 + (np.asarray(factor, np.float32) - 1) * (mask.astype(np.float32) / 255)[..., None]
        self.pixels[window] = np.minimum(self.pixels[window] * weight, 255)

    def sheet(self, points: ArrayLike, colour: Colour, texture: NDArray[Any]) -> None:
        """Fill a polygon of the background with `colour` times the fine `texture`."""
        window, mask = self._inside(points)
        if mask.size:
            ground = np.minimum(texture[window][..., None] * np.asarray(colour, np.float32), 255)
            np.copyto(self.pixels[window], ground.astype(np.uint8), where=mask[..., None] > 0)

    def paint(self, picture: NDArray[np.floating[Any]]) -> None:
        """Lay a picture (any size, float RGB) over all."""
        side = len(self.ids)
        fine = np.clip(picture, 0, 255).astype(np.uint8)
        self.pixels[:] = cv2.resize(fine, (side, side), interpolation=cv2.INTER_LINEAR)

    def scene(self) -> Scene:
        """Return the picture, and every thing of which enough is seen."""
        image = cv2.resize(self.pixels, (self.size, self.size), interpolation=cv2.INTER_AREA)
        things = [thing for draft in self._drafts if (thing := _finish(draft, self.ids))]
        return Scene(image.astype(np.uint8, copy=False), self.ids, tuple(things))

    def _inside(self, points: ArrayLike, pad: int = 2) -> tuple[tuple[slice, slice], NDArray[np.uint8]]:
        """Return the window of fine pixels around a polygon, and in it 255 where the polygon is."""
        fixed = _fixed(np.asarray(points, float))
        low = np.clip((fixed.min(0) >> _SUB) - pad, 0, len(self.ids))
        high = np.clip((fixed.max(0) >> _SUB) + pad, 0, len(self.ids))
        mask = np.zeros(np.maximum(high - low, 0)[::-1], np.uint8)
        if mask.size:
            cv2.fillPoly(mask, [fixed - (low << _SUB).astype(np.int32)], 255, shift=_SUB)
        return (slice(low[1], high[1]), slice(low[0], high[0])), mask

    def _claim(self, points: Floats, width: float = 0.0) -> NDArray[np.int32]:
        if self._draft:
            reach = width / 2 + 2
            self._draft.low = np.minimum(self._draft.low, (points.min(0) * FINE - reach).astype(int))
            self._draft.high = np.maximum(self._draft.high, (points.max(0) * FINE + reach).astype(int))
        return _fixed(points)


def _fixed(points: Floats) -> NDArray[np.int32]:
    """OpenCV counts from the centre of the first pixel, in fractions of a pixel."""
    return np.rint((np.minimum(np.maximum(points, -1e4), 1e4) * FINE - 0.5) * 2**_SUB).astype(np.int32)


def _rgb(colour: Colour) -> tuple[float, ...]:
    return tuple(float(min(max(c, 0), 255)) for c in np.asarray(colour))


def _finish(draft: _Draft, ids: NDArray[np.int16]) -> Thing | None:
    mask = (ids[draft.window()] == draft.id).astype(np.uint8)
    if not draft.drawn or mask.sum() < _SEEN * draft.drawn:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0 = draft.low[0] + columns[0], draft.low[1] + rows[0]
    x1, y1 = draft.low[0] + columns[-1] + 1, draft.low[1] + rows[-1] + 1
    if min(x1 - x0, y1 - y0) < _LEAST * FINE:
        return None
    parts, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = (_joined([part[:, 0] for part in parts]) + draft.low + 0.5) / FINE
    forward = np.array([np.cos(draft.angle), np.sin(draft.angle)])
    axes = np.stack([forward, [-forward[1], forward[0]]])  # the second points to the right of the first
    along = outline @ axes.T
    low, high = along.min(0) - 0.5 / FINE, along.max(0) + 0.5 / FINE
    corners = np.array([[high[0], low[1]], [high[0], high[1]], [low[0], high[1]], [low[0], low[1]]]) @ axes
    points = np.zeros((len(draft.points), 3))
    for i, (x, y) in enumerate(draft.points):
        row, column = int(y * FINE), int(x * FINE)
        if 0 <= x < len(ids) / FINE and 0 <= y < len(ids) / FINE:
            near = ids[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]  # an extreme point lies on the edge
            points[i] = x, y, 2 if (near == draft.id).any() else 1
    return Thing(draft.name, draft.id, (x0 / FINE, y0 / FINE, x1 / FINE, y1 / FINE), outline, corners, points)


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Return one closed line around all parts: from the largest to each other one, at the nearest points, and back."""
    parts = sorted(parts, key=len, reverse=True)
    whole = parts[0]
    for part in parts[1:]:
        distance = ((whole[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        whole = np.concatenate([whole[: i + 1], part[j:], part[: j + 1], whole[i:]])
    return whole


# ------------------------------------------------------------------------------------------------------- texture and light
def noise(rng: np.random.Generator, size: int, cells: float, octaves: int = 4, stretch: float = 1.0) -> NDArray[np.float32]:
    """Return smooth noise, (size, size), about 0 to 1, with `cells` bumps across (`stretch` times fewer along a row)."""
    total = np.zeros((size, size), np.float32)
    weight = 1.0
    for octave in range(octaves):
        count = int(min(max(cells * 2**octave, 2), size))
        grid = rng.random((count, max(2, int(count / stretch))), np.float32)
        total += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        weight *= 0.55
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low + 1e-6)


def blend(amount: NDArray[np.floating[Any]], first: Colour, second: Colour) -> NDArray[np.float32]:
    """Return the RGB picture between two colours that `amount` (H, W), 0 to 1, gives."""
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return a + (b - a) * np.asarray(amount, np.float32)[..., None]


def near(rng: np.random.Generator, colour: Colour, spread: float = 12.0) -> Floats:
    """Return a colour close to another, somewhat lighter or darker, and slightly of another hue."""
    return np.clip(np.asarray(colour) + rng.normal(0, spread) + rng.normal(0, spread / 3, 3), 0, 255)


def rectangle(length: float, width: float, x: float = 0.0, y: float = 0.0) -> Floats:
    """Return the corners of a rectangle around (x, y), `length` along x."""
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (length / 2, width / 2) + (x, y)


def ellipse(length: float, width: float, x: float = 0.0, y: float = 0.0, count: int = 24) -> Floats:
    """Return points on an ellipse around (x, y), `length` along x."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(t) * length / 2 + x, np.sin(t) * width / 2 + y], 1)


def develop(rng: np.random.Generator, image: NDArray[np.uint8], grain: float, blur: float = 0.0) -> NDArray[np.uint8]:
    """Return a picture as a camera would take it: with blur, contrast, a tint, and grain."""
    picture = image.astype(np.float32)
    if blur > 0.2:
        picture[:] = cv2.GaussianBlur(picture, (0, 0), blur)
    mean = picture.mean()
    picture = (picture - mean) * rng.uniform(0.85, 1.15) + mean * rng.uniform(0.88, 1.12)
    picture *= rng.normal(1, 0.025, 3).astype(np.float32)
    picture += grain * rng.standard_normal((*picture.shape[:2], 1), np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)
