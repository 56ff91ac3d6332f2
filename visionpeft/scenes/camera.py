"""A camera over a road: its view of points in space, and a painter whose weather and light tint them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from .draw import Canvas, Colour, Floats, near


@dataclass(frozen=True)
class View:
    """A camera over a road that may bend; x to the right, y up, z ahead, in metres."""

    size: int
    focal: float
    height: float
    horizon: float
    middle: float
    bend: float
    roll: float

    def __call__(self, points: ArrayLike) -> Floats:
        """Return points in the picture, (N, 2), of (N, 3) in space."""
        x, y, z = np.asarray(points, float).T
        z, centre = np.maximum(z, 0.6), self.size / 2
        u = self.focal * (x + self.bend * z * z) / z + self.middle - centre
        v = self.focal * (self.height - y) / z + self.horizon - centre
        c, s = math.cos(self.roll), math.sin(self.roll)
        return np.array([c * u - s * v + centre, s * u + c * v + centre]).T

    def eye(self, z: float) -> Floats:
        """Return where the camera seems to be from a thing at z: a bend moves it aside."""
        return np.array([-self.bend * z**2, self.height, 0.0])

    def depth(self) -> Floats:
        """Return how far the ground is at each pixel of the picture; above the horizon 1e4."""
        v, u = np.mgrid[0 : self.size, 0 : self.size] + 0.5 - self.size / 2
        below = -np.sin(self.roll) * u + np.cos(self.roll) * v + self.size / 2 - self.horizon
        return np.where(below > 0.5, self.focal * self.height / np.maximum(below, 0.5), 1e4)


@dataclass(frozen=True)
class Pose:
    """The place of a vehicle: turns its own (forward, up, right) points to points in space."""

    x: float
    z: float
    yaw: float
    side: int = 1  # which of its sides the camera sees

    def __call__(self, points: ArrayLike) -> Floats:
        """Return (N, 3) points in space of (N, 3) of the vehicle's own."""
        a, b, r = np.asarray(points, float).T
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([self.x + a * s + r * self.side * c, b, self.z + a * c - r * self.side * s], 1)


class RoadPainter:
    """Draws shapes in space on a canvas, as a camera sees them in some weather and light."""

    def __init__(self, rng: Generator, size: int, light: str, weather: str) -> None:
        self.rng, self.size, self.canvas = rng, size, Canvas(size)
        self.light, self.weather, self.dark = light, weather, light != "day"
        raised = rng.random() < 0.3  # a camera on a mast looks down, one in a car ahead
        self.view = View(
            size=size,
            focal=size * rng.uniform(0.8, 1.35),
            height=rng.uniform(4.5, 10) if raised else rng.uniform(1.2, 2.2),
            horizon=size * (rng.uniform(-0.05, 0.3) if raised else rng.uniform(0.36, 0.54)),
            middle=size * rng.uniform(0.38, 0.62),
            bend=rng.normal(0, 0.0012),
            roll=rng.normal(0, 0.03),
        )
        sun = {"day": (1.0, 1.0, 1.0), "dusk": (0.62, 0.5, 0.52), "night": (0.22, 0.24, 0.32)}[light]
        self.ambient = np.array(sun) * rng.uniform(0.85, 1.08) * rng.normal(1, 0.04, 3) * (1 if weather == "clear" else 0.86)
        grey = {"day": (196, 202, 208), "dusk": (128, 110, 116), "night": (26, 28, 36)}[light]
        self.mist = np.array(grey) * rng.uniform(0.92, 1.06)
        self.sight = rng.uniform(*{"clear": (200, 500), "rain": (70, 160), "fog": (22, 60)}[weather])
        self.edge = self.path = 0.0  # where the road ends, and how wide the pavement is
        self.paved = rng.random() < 0.6
        self.glows: list[tuple[float, float, float, Colour, int]] = []
        self.items: list[tuple[float, Callable[[], None]]] = []

    def pick(self, colours: Sequence[tuple[int, int, int]], spread: float = 8.0) -> Floats:
        return near(self.rng, colours[int(self.rng.integers(len(colours)))], spread)

    def tone(self, colour: ArrayLike, z: float, shine: float = 0.0) -> Floats:
        """Return a colour as it looks `z` metres away; `shine` is how much of it is light of its own."""
        veil = 1 - np.exp(-max(z, 0) / self.sight)
        lit = np.asarray(colour) * (self.ambient * (1 - shine) + shine)
        return lit + (self.mist - lit) * veil * (1 - 0.5 * shine)

    def face(self, points: ArrayLike, colour: ArrayLike, shine: float = 0.0) -> None:
        """Fill a polygon of (N, 3) points in space."""
        corners = np.asarray(points, float)
        self.canvas.polygon(self.view(corners), self.tone(colour, float(corners[:, 2].mean()), shine))

    def strip(self, left: float, right: float, colour: ArrayLike, z0: float = 0.6, z1: float = 300.0) -> None:
        """Fill a strip of the ground along the road."""
        z = np.geomspace(z0, z1, 24) if z1 / z0 > 3 else np.array([z0, z1])
        edges = [np.stack([np.full(len(z), x), 0 * z, z], 1) for x in (left, right)]
        outline = self.view(np.concatenate([edges[0], edges[1][::-1]]))
        self.canvas.polygon(outline, self.tone(colour, (z0 * min(z1, 60)) ** 0.5))

    def upright(
        self, x: float, z: float, points: ArrayLike, colour: ArrayLike, shine: float = 0.0, lift: float = 0.0
    ) -> None:
        """Fill a flat shape that faces the camera: (N, 2), metres to the right of and above (x, lift, z)."""
        flat = np.asarray(points, float)
        self.face(np.stack([flat[:, 0] + x, flat[:, 1] + lift, np.full(len(flat), z)], 1), colour, shine)

    def glow(self, point: ArrayLike, radius: float, colour: Colour) -> None:
        """Note a lamp at (x, y, z), whose halo is added when all is drawn, unless something hides it by then."""
        u, v = map(float, self.view(np.atleast_2d(point))[0])
        if 0 <= u < self.size and 0 <= v < self.size:
            radius *= self.view.focal / float(np.asarray(point)[2])
            self.glows.append((u, v, float(np.clip(radius, 0.6, self.size / 40)), colour, self.canvas.owner))
