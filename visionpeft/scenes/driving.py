"""Driving scenes: a road in perspective, its traffic, signs and lights, by day, dusk and night, in rain and fog."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from .draw import FINE, Canvas, Colour, Floats, Scene, blend, develop, ellipse, near, noise, rectangle

NAMES = ("car", "truck", "bus", "cyclist", "person", "sign", "light")

_PAINTS = [(214, 216, 218), (176, 180, 184), (44, 46, 50), (26, 28, 32), (156, 36, 34), (40, 66, 122), (96, 100, 106)]
_PAINTS += [(232, 230, 224), (64, 92, 78), (196, 150, 60), (120, 84, 62), (70, 110, 140)]
_WALLS = [(176, 150, 124), (150, 98, 80), (196, 190, 178), (128, 128, 132), (206, 186, 150), (110, 96, 90), (160, 168, 172)]
_CLOTHES = [(40, 44, 60), (150, 40, 44), (60, 90, 140), (200, 196, 186), (90, 110, 70), (220, 170, 60), (30, 30, 34)]
_SKIN = [(224, 180, 150), (180, 130, 100), (120, 84, 64)]
_GLASS = np.array([52, 62, 74])

# The side view from the front bumper over the roof to the rear: how far along, how high, how wide (0 to 1). The windscreen
# lies between the points 2 and 3, the rear window between 4 and 5.
_SEDAN = np.array(
    [(0, 0.14, 1), (0, 0.5, 0.96), (0.27, 0.62, 0.94), (0.42, 0.98, 0.7)]
    + [(0.7, 1, 0.7), (0.86, 0.66, 0.92), (1, 0.62, 0.94), (1, 0.16, 1)]
)
_HATCH = np.array(
    [(0, 0.14, 1), (0, 0.48, 0.96), (0.22, 0.6, 0.94), (0.4, 0.97, 0.72)]
    + [(0.82, 1, 0.72), (0.98, 0.64, 0.94), (1, 0.16, 1)]
)  # fmt: skip
_SUV = np.array(
    [(0, 0.18, 1), (0, 0.54, 0.97), (0.24, 0.6, 0.95), (0.36, 0.97, 0.78)]
    + [(0.92, 1, 0.78), (1, 0.6, 0.96), (1, 0.2, 1)]
)  # fmt: skip
_VAN = np.array(
    [(0, 0.12, 1), (0, 0.42, 0.97), (0.1, 0.52, 0.96), (0.24, 0.97, 0.84)]
    + [(0.97, 1, 0.86), (1, 0.55, 0.97), (1, 0.14, 1)]
)  # fmt: skip
_CARS = [  # length, width and height in metres
    ((4.5, 1.8, 1.42), _SEDAN),
    ((4.0, 1.75, 1.48), _HATCH),
    ((4.6, 1.88, 1.72), _SUV),
    ((5.1, 1.95, 2.05), _VAN),
]


@dataclass(frozen=True)
class _View:
    """A camera over a road that may bend; x to the right, y up, z ahead, in metres."""

    size: int
    focal: float
    height: float
    horizon: float
    middle: float
    bend: float
    roll: float

    def __call__(self, points: ArrayLike) -> Floats:
        """(N, 3) in space -> (N, 2) in the picture."""
        x, y, z = np.asarray(points, float).T
        z, centre = np.maximum(z, 0.6), self.size / 2
        u = self.focal * (x + self.bend * z * z) / z + self.middle - centre
        v = self.focal * (self.height - y) / z + self.horizon - centre
        c, s = math.cos(self.roll), math.sin(self.roll)
        return np.array([c * u - s * v + centre, s * u + c * v + centre]).T

    def eye(self, z: float) -> Floats:
        """Where the camera seems to be from a thing at z: a bend moves it aside."""
        return np.array([-self.bend * z**2, self.height, 0.0])

    def depth(self) -> Floats:
        """Return how far the ground is at each pixel of the picture; above the horizon 1e4."""
        v, u = np.mgrid[0 : self.size, 0 : self.size] + 0.5 - self.size / 2
        below = -np.sin(self.roll) * u + np.cos(self.roll) * v + self.size / 2 - self.horizon
        return np.where(below > 0.5, self.focal * self.height / np.maximum(below, 0.5), 1e4)


@dataclass(frozen=True)
class _Pose:
    """Where a vehicle stands: its own (forward, up, right) points in space."""

    x: float
    z: float
    yaw: float
    side: int = 1  # which of its sides the camera sees

    def __call__(self, points: ArrayLike) -> Floats:
        """(N, 3) -> (N, 3)."""
        a, b, r = np.asarray(points, float).T
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([self.x + a * s + r * self.side * c, b, self.z + a * c - r * self.side * s], 1)


class Painter:
    """One scene being drawn: its canvas, camera, weather and light."""

    def __init__(self, rng: Generator, size: int, light: str, weather: str) -> None:
        self.rng, self.size, self.canvas = rng, size, Canvas(size)
        self.light, self.weather, self.dark = light, weather, light != "day"
        raised = rng.random() < 0.3  # a camera on a mast looks down, one in a car ahead
        self.view = _View(
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

    # ------------------------------------------------------------------------------------------------------------ vehicles
    def solid(
        self, pose: _Pose, size: ArrayLike, profile: ArrayLike, paint: Floats, panes: Sequence[int] = ()
    ) -> _Pose | None:
        """Draw a side view with width; its edges `panes` are of glass.

        Returns the pose with the side that the camera sees; None where it sees neither.
        """
        long, wide, high = np.asarray(size, float)
        along, up, half = (np.asarray(profile, float) * (-long, high, wide / 2)).T
        left, right = (pose(np.stack([along + long / 2, up, half * side], 1)) for side in (-1, 1))
        centre, eye = (left.mean(0) + right.mean(0)) / 2, self.view.eye(pose.z)
        for i in range(len(along) - 1):
            quad = np.stack([left[i], left[i + 1], right[i + 1], right[i]])
            middle = quad.mean(0)
            normal = np.cross(quad[1] - quad[0], quad[3] - quad[0])
            normal = normal * np.sign(normal @ (middle - centre)) / max(float(np.linalg.norm(normal)), 1e-9)
            if normal @ (eye - middle) > 0:
                bright = 0.78 + 0.3 * normal[1]
                self.face(quad, paint * bright)
                if i in panes:
                    self.face(middle + (quad - middle) * 0.88, _GLASS * (1.3 if bright > 0.9 else 1.0))
        for side, hull in ((-1, left), (1, right)):
            out = np.array([np.cos(pose.yaw), 0, -np.sin(pose.yaw)]) * side
            if out @ (eye - hull.mean(0)) > 0:
                self.face(hull, paint * 0.8)
                return _Pose(pose.x, pose.z, pose.yaw, side)
        return None

    def ends(self, pose: _Pose, size: ArrayLike, low: float) -> None:
        """Lamps, plate and grille of the end that faces the camera, lamps at the height `low`."""
        long, wide, high = np.asarray(size, float)
        eye = self.view.eye(pose.z)[[0, 2]] - (pose.x, pose.z)
        ahead = float(eye @ (np.sin(pose.yaw), np.cos(pose.yaw)))
        if abs(ahead) < long / 2:
            return
        front, lit = ahead > 0, self.dark or self.weather != "clear"
        end = (long / 2 + 0.01) * (1 if front else -1)

        def flat(points: Floats, colour: Colour, shine: float = 0.0) -> None:
            self.face(pose(np.stack([np.full(len(points), end), points[:, 1], points[:, 0]], 1)), colour, shine)

        colour: Colour = (228, 232, 236) if front else (150, 30, 28)
        if lit:
            colour = (255, 246, 214) if front else (236, 40, 30)
        if front:
            flat(rectangle(wide * 0.5, high * 0.09, 0, low * 0.92), (38, 40, 44))
        flat(rectangle(0.5, 0.12, 0, low * 0.62), (212, 210, 196))
        for side in (-1, 1):
            flat(rectangle(wide * 0.17, high * 0.09, side * wide * 0.41, low), colour, 0.9 if lit else 0.15)
            if lit:
                self.glow(pose([(end, low, side * wide * 0.41)])[0], 0.4 if front else 0.2, colour)

    def wheels(self, pose: _Pose, spots: Sequence[float], radius: float, wide: float) -> None:
        t = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        for a in spots:
            for r, colour in ((radius, (26, 26, 28)), (radius * 0.55, (120, 122, 126))):
                self.face(
                    pose(np.stack([a + r * np.cos(t), radius + r * np.sin(t), np.full(14, wide / 2 + 0.02)], 1)), colour
                )

    def under(self, pose: _Pose, size: ArrayLike) -> None:
        """The shadow on the ground."""
        long, wide, _ = np.asarray(size, float)
        flat = rectangle(long * 1.02, wide * 1.12)
        points = pose(np.stack([flat[:, 0], flat[:, 0] * 0, flat[:, 1]], 1))
        if points[:, 2].min() > 1:
            soft = 0.03 * self.view.focal / pose.z
            self.canvas.shade(self.view(points), 0.35 if self.weather == "clear" else 0.55, soft)

    def car(self, pose: _Pose) -> None:
        rng = self.rng
        measures, profile = _CARS[int(rng.integers(len(_CARS)))]
        size, paint = np.array(measures) * rng.uniform(0.94, 1.06), self.pick(_PAINTS)
        long, wide, high = size
        self.under(pose, size)
        with self.canvas.thing("car"):
            if seen := self.solid(pose, size, profile, paint, (2, 4)):
                along = long / 2 - profile[2:6, 0] * long  # bonnet, roof, roof, boot
                middle, low, up = (along[1] + along[2]) / 2, 0.6 * high, 0.93 * high
                for a, b, c, d in (
                    (along[0] - 0.3, along[1] - 0.05, middle + 0.05, middle + 0.05),
                    (middle - 0.05, middle - 0.05, along[2] + 0.1, along[3] + 0.2),
                ):
                    inner, outer = wide * 0.385, wide * 0.475
                    self.face(seen([(a, low, outer), (b, up, inner), (c, up, inner), (d, low, outer)]), _GLASS)
                self.wheels(seen, (long * 0.31, -long * 0.3), 0.33, wide)
            self.ends(pose, size, 0.44 * high)

    def truck(self, pose: _Pose) -> None:
        rng = self.rng
        long, wide, high = size = rng.uniform((6.5, 2.3, 3.0), (11, 2.55, 3.8))
        cab, paint = min(2.1 / long, 0.3), self.pick(_PAINTS)
        load = self.pick([(226, 226, 222), (200, 198, 188), (60, 90, 140), (170, 60, 50), (70, 110, 80)])
        front = [(0, 0.12, 1), (0, 0.42, 1), (0.02, 0.82, 0.96), (0.05, 0.86, 0.94), (cab, 0.86, 0.94), (cab, 0.12, 1)]
        top = (1.0, 1.0) if rng.random() < 0.8 else (0.66, 0.6)  # a tipper is lower
        box = [(cab + 0.03, 0.2, 1), (cab + 0.03, top[0], 1), (1, top[1], 1), (1, 0.2, 1)]
        self.under(pose, size)
        with self.canvas.thing("truck"):
            parts: list[tuple[ArrayLike, Floats, Sequence[int]]] = [(front, paint, (1,)), (box, load, ())]
            seen = [self.solid(pose, size, *part) for part in (parts if np.cos(pose.yaw) > 0 else parts[::-1])]
            if side := seen[0] or seen[1]:
                a, b, low, up = long / 2 - 0.3, long / 2 - cab * long * 0.8, high * 0.5, high * 0.8
                window = [(a, low, wide / 2), (a - 0.1, up, wide * 0.48), (b, up, wide * 0.48), (b, low, wide / 2)]
                self.face(side(window), _GLASS)
                self.wheels(side, (long / 2 - 1.1, 1.2 - long / 2, 2.3 - long / 2), 0.48, wide)
            self.ends(pose, size, 0.24 * high)

    def bus(self, pose: _Pose) -> None:
        rng = self.rng
        long, wide, high = size = rng.uniform((9.5, 2.5, 2.9), (12.5, 2.55, 3.3))
        paint = self.pick([(206, 50, 44), (230, 190, 60), (60, 120, 170), (226, 226, 222), (70, 140, 90)])
        body = [(0, 0.1, 1), (0, 0.32, 1), (0.012, 0.8, 0.98), (0.02, 1, 0.94), (0.98, 1, 0.94), (0.99, 0.85, 0.98)]
        body += [(1, 0.5, 1), (1, 0.1, 1)]
        self.under(pose, size)
        with self.canvas.thing("bus"):
            if seen := self.solid(pose, size, body, paint, (1, 5)):
                pane, shine = ((226, 206, 150), 0.75) if self.dark else (_GLASS, 0.0)
                edges = np.linspace(long / 2 - 0.3, 0.3 - long / 2, int(rng.integers(6, 9)))

                def band(a: float, b: float, low: float, up: float, colour: ArrayLike, shine: float = 0.0) -> None:
                    corners = [(a, low, wide / 2), (a, up, wide * 0.49), (b, up, wide * 0.49), (b, low, wide / 2)]
                    self.face(seen(corners), colour, shine)

                for a, b in zip(edges[:-1], edges[1:], strict=True):
                    band(a - 0.07, b + 0.07, high * 0.48, high * 0.84, pane, shine)
                band(long / 2 - 0.1, 0.1 - long / 2, high * 0.3, high * 0.36, paint * 0.55)
                self.wheels(seen, (long * 0.28, -long * 0.28), 0.48, wide)
            self.ends(pose, size, 0.22 * high)

    # -------------------------------------------------------------------------------------------------------------- people
    def person(self, x: float, z: float, cyclist: bool = False) -> None:
        rng = self.rng
        tall, step, lean, lift = rng.uniform(1.55, 1.9), rng.uniform(-0.22, 0.22), rng.normal(0, 0.03), 0.28 * cyclist
        coat, legs = self.pick(_CLOTHES), self.pick(_CLOTHES)
        ground = self.view([(x - 0.35, 0, z), (x + 0.35, 0, z - 0.1), (x + 0.4, 0, z + 0.3), (x - 0.3, 0, z + 0.3)])
        self.canvas.shade(ground, 0.6, 0.01 * self.view.focal / z)
        with self.canvas.thing("cyclist" if cyclist else "person"):
            if cyclist:
                turned = rng.choice([-1, 1]) * rng.uniform(0.15, 1.0)  # 1: seen from the side
                for a in (-0.52, 0.52):
                    for r, colour in ((0.34, (24, 24, 26)), (0.27, (130, 132, 134))):
                        self.upright(x, z, ellipse(2 * r * abs(turned) + 0.06, 2 * r, a * turned, 0.34, 14), colour)
                frame = [(-0.52, 0.34), (-0.2, 0.86), (0.36, 0.88), (0.52, 0.34), (0.44, 0.36), (0.3, 0.8), (-0.1, 0.76)]
                self.upright(x, z, np.array(frame) * (turned, 1), self.pick(_PAINTS))
            hip, neck = tall * 0.5, tall * 0.8
            for way in (-1, 1):
                leg = [(-0.09, hip), (0.09, hip), (way * step + 0.07, 0.04), (way * step - 0.08, 0)]
                self.upright(x, z, leg, legs * (0.9 if way < 0 else 1), lift=lift)
            torso = [(lean - 0.2, neck), (lean + 0.2, neck), (0.17, hip - 0.05), (-0.17, hip - 0.05)]
            self.upright(x, z, torso, coat, lift=lift)
            for way in (-1, 1):
                hand = way * (0.24 - step * 0.5)
                arm = [(way * 0.19 + lean, neck), (way * 0.25 + lean, neck - 0.03), (hand + 0.04, hip), (hand - 0.04, hip)]
                self.upright(x, z, arm, coat * 0.82, lift=lift)
            head = ellipse(0.23, 0.27, lean, tall * 0.91, 14)
            self.upright(x, z, head, self.pick(_SKIN), lift=lift)
            hair = self.pick([(40, 30, 26), (90, 66, 40), (190, 60, 50), (60, 60, 64)])
            self.upright(x, z, head[head[:, 1] > tall * 0.92], hair, lift=lift)

    # ------------------------------------------------------------------------------------------------------ beside the road
    def pole(self, x: float, z: float, height: float, width: float = 0.09) -> None:
        self.upright(x, z, rectangle(width, height, 0, height / 2), (112, 114, 116))

    def sign(self, x: float, z: float, height: float, radius: float) -> None:
        rng = self.rng
        kind = rng.choice(["speed", "warning", "stop", "blue", "yield", "board", "board"])
        red, white, blue, black = (196, 36, 34), (236, 236, 232), (36, 80, 160), (30, 30, 32)
        disc, triangle = ellipse(2, 2, count=20), np.array([(-1, -0.75), (1, -0.75), (0, 1)])
        self.pole(x, z, height)

        def flat(points: ArrayLike, colour: Colour, scale: float = 1.0) -> None:
            self.upright(x, z, np.asarray(points) * scale * radius, colour, 0.35 * self.dark, height)

        with self.canvas.thing("sign"):
            if kind == "speed":
                flat(disc, red)
                flat(disc, white, 0.76)
                for side in (-0.26, 0.26):
                    flat(rectangle(0.3, 0.7, side), black)
            elif kind in ("warning", "yield"):
                up = triangle * (1, 1 if kind == "warning" else -1)
                flat(up, red)
                flat(up, white if rng.random() < 0.7 else (236, 196, 60), 0.66)
                if kind == "warning":
                    flat(rectangle(0.14, 0.5, 0, -0.12), black)
            elif kind == "stop":
                t = np.arange(8) * np.pi / 4 + np.pi / 8
                octagon = np.stack([np.cos(t), np.sin(t)], 1) * 1.05
                flat(octagon, white)
                flat(octagon, red, 0.92)
                for i in range(4):
                    flat(rectangle(0.24, 0.42, -0.54 + 0.36 * i), white)
            elif kind == "blue":
                flat(disc, blue)
                flat([(-0.12, -0.6), (0.12, -0.6), (0.12, 0.1), (0.4, 0.1), (0, 0.65), (-0.4, 0.1), (-0.12, 0.1)], white)
            else:
                paint = ((36, 110, 74), blue, (232, 190, 60), white)[rng.integers(4)]
                ink, wide = (white if sum(paint) < 420 else black), rng.uniform(1.0, 2.2)
                flat(rectangle(2 * wide, 1.7), ink)
                flat(rectangle(2 * wide - 0.12, 1.58), paint)
                for y in (-0.35, 0.3):
                    flat(rectangle(wide * rng.uniform(0.8, 1.5), 0.24, 0, y), ink)

    def signal(self, x: float, z: float, height: float, arm: float = 0.0) -> None:
        """A traffic light, on a mast or on an arm over the road."""
        self.pole(x, z, height + 0.5, 0.13)
        if arm:
            self.upright(x, z, rectangle(abs(arm), 0.1, arm / 2, height + 0.45), (104, 106, 108))
        lit = int(self.rng.integers(3))
        with self.canvas.thing("light"):
            self.upright(x + arm, z, rectangle(0.46, 1.1), (28, 32, 30), lift=height)
            for i, colour in enumerate([(240, 50, 40), (248, 180, 50), (70, 230, 130)]):
                y = 0.34 - 0.34 * i
                dim = np.asarray(colour) * 0.24 + 20
                lamp = ellipse(0.27, 0.27, 0, y, 12)
                self.upright(x + arm, z, lamp, colour if i == lit else dim, 0.95 * (i == lit), height)
                if i == lit:
                    self.glow((x + arm, height + y, z), 0.4 if self.dark else 0.2, colour)

    def lamp(self, x: float, z: float) -> None:
        """A street lamp, and by night the light under it."""
        reach = -np.sign(x) * 1.8
        self.pole(x, z, 7.5, 0.14)
        self.upright(x, z, [(0, 7.4), (reach, 7.8), (reach, 7.9), (0, 7.5)], (104, 106, 108))
        shine = (255, 226, 170) if self.dark else (150, 150, 150)
        self.upright(x, z, rectangle(0.8, 0.16, reach, 7.78), shine, 0.9 * self.dark)
        if self.dark:
            self.glow((x + reach, 7.7, z), 0.7, (255, 206, 130))
            pool = ellipse(9, 9, x + reach, z, 16)
            ground = np.stack([pool[:, 0], 0 * pool[:, 0], np.maximum(pool[:, 1], 1)], 1)
            self.canvas.shade(self.view(ground), (1.9, 1.75, 1.45), min(1.0 * self.view.focal / z, 14))

    def tree(self, x: float, z: float) -> None:
        rng = self.rng
        tall, wide = rng.uniform(3.5, 9), rng.uniform(1.2, 2.4)
        green = self.pick([(70, 96, 50), (92, 112, 58), (58, 84, 56), (130, 110, 56), (110, 124, 72)])
        self.upright(x, z, [(-0.14, 0), (0.14, 0), (0.1, tall * 0.6), (-0.1, tall * 0.6)], (92, 74, 58))
        if rng.random() < 0.3:  # a conifer
            for i in range(4):
                y, half = tall * (0.2 + 0.2 * i), wide * (1 - 0.22 * i) * 0.8
                self.upright(x, z, [(-half, y), (half, y), (0, y + tall * 0.36)], green * (0.7 + 0.08 * i))
            return
        for i in range(12):
            a, r = rng.uniform(0, 6.3), rng.uniform(0, 0.75)
            along, up = np.cos(a) * r * wide, tall * (0.68 + np.sin(a) * r * 0.26)
            leaf = ellipse(rng.uniform(0.8, 1.3) * wide, rng.uniform(0.7, 1.1) * wide, along, up, 10)
            bright = 0.72 + 0.4 * (up / tall - 0.4) + 0.02 * i
            self.upright(x, z, leaf + rng.normal(0, 0.06, leaf.shape), green * bright)

    def building(self, x: float, z: float, wide: float, deep: float, high: float) -> None:
        """One whose wall along the road stands at x, from z on."""
        rng, wall, side = self.rng, self.pick(_WALLS), np.sign(x)
        start = max(z, 1.5)
        sides = (((0.0, 1.0), z + deep - start, 0.72), ((side, 0.0), wide, 0.9))  # along the road, and across it
        for (dx, dz), length, tint in sides[::-1]:
            ends = [(x, start), (x + dx * length, start + dz * length)]
            (a, b), (c, d) = ends
            self.face([(a, 0, b), (c, 0, d), (c, high, d), (a, high, b)], wall * tint)
            across, rows = max(1, int(length / 3)), int(high / 3)
            i, floor = np.divmod(np.arange(across * rows), max(rows, 1))
            q = (i[:, None] + (0.25, 0.75, 0.75, 0.25)) * length / across
            y = floor[:, None] * 3 + np.array([1.0, 1.0, 2.4, 2.4])
            panes = self.view(np.stack([x + dx * q, y, start + dz * q], -1).reshape(-1, 3)).reshape(-1, 4, 2)
            lit = rng.random(len(panes)) < 0.35 * self.dark
            for pane, warm, bright in zip(panes, lit, rng.uniform(0.8, 1.1, len(panes)), strict=True):
                glass = (236, 204, 130) if warm else np.array([86, 98, 112]) * (tint + 0.1) * bright
                self.canvas.polygon(pane, self.tone(glass, start + dz * length / 2, 0.8 * warm))

    # ------------------------------------------------------------------------------------------------------------ the whole
    def backdrop(self) -> None:
        """Sky, clouds, hills, ground."""
        rng, size = self.rng, self.size
        ends: dict[str, tuple[Colour, Colour]] = {
            "day": ((96, 146, 206), (190, 212, 230)),
            "dusk": ((72, 66, 108), (226, 146, 100)),
            "night": ((8, 10, 22), (30, 32, 48)),
        }
        top, bottom = ends[self.light] if self.weather == "clear" else (self.mist * 0.86, self.mist)
        rows = np.clip(np.arange(size) / max(self.view.horizon, size * 0.25), 0, 1)
        picture = blend(np.repeat(rows[:, None], size, 1), near(rng, top, 8), near(rng, bottom, 8))
        if self.light != "night":
            clouds = np.clip(noise(rng, size, 5, 5, 2.2) - rng.uniform(0.35, 0.7), 0, 0.42)[..., None] * 2
            picture += (np.array([250, 248, 246] if self.light == "day" else [240, 170, 140]) - picture) * clouds
        earth = [(104, 118, 68), (130, 126, 84), (120, 112, 96), (144, 132, 108), (88, 104, 66)]
        depth = self.view.depth()
        land = blend(noise(rng, size, 24, 4, 2.5), self.pick(earth), self.pick(earth)) * self.ambient
        land += (self.mist - land) * (1 - np.exp(-depth / self.sight))[..., None]
        picture[depth < 1e4] = land[depth < 1e4]
        self.canvas.paint(picture)
        x = np.linspace(-900, 900, 60)
        for distance, high, colour in ((420, 70, (96, 112, 124)), (300, 30, (78, 96, 72))):
            if rng.random() < 0.7:
                y = np.interp(x, np.linspace(-900, 900, 16), rng.uniform(0, 1, 16)) * high * rng.uniform(0.3, 1)
                ridge = np.stack([x - self.view.bend * distance**2, y, np.full(60, distance)], 1)
                outline = self.view(np.concatenate([ridge, ridge[::-1] * (1, 0, 1)]))
                self.canvas.polygon(outline, self.tone(near(rng, colour), distance * 0.4))

    def road(self, lanes: int, wide: float) -> None:
        """Asphalt with kerbs, pavements and markings."""
        rng, edge, pavement = self.rng, lanes * wide / 2, self.rng.uniform(1.6, 3.2)
        self.edge, self.path = edge, pavement
        asphalt = self.pick([(88, 88, 92), (104, 102, 100), (74, 76, 82), (118, 116, 112)])
        beside, white = self.pick([(152, 148, 142), (134, 128, 120)]) if self.paved else asphalt * 1.12, (214, 214, 208)
        for side in (-1, 1):
            self.strip(side * edge, side * (edge + pavement), beside)
            if self.paved:
                self.strip(side * edge, side * (edge + 0.2), (176, 174, 168))
        self.strip(-edge, edge, asphalt)
        worn = np.where(self.view.depth() < 200, 0.92 + 0.16 * noise(rng, self.size, 36, 3, 3), 1).astype(np.float32)
        fine = cv2.resize(worn, self.canvas.ids.shape, interpolation=cv2.INTER_LINEAR)
        self.canvas.pixels[:] = cv2.multiply(self.canvas.pixels, cv2.merge([fine] * 3), dtype=cv2.CV_8U)
        for lane in range(lanes + 1):
            x = -edge + lane * wide
            if lane in (0, lanes):
                x -= np.sign(x) * 0.3
                self.strip(x - 0.07, x + 0.07, white, 0.6, 150)
            elif lanes == 2 * lane and rng.random() < 0.5:
                for shift in (-0.14, 0.14):
                    self.strip(x + shift - 0.06, x + shift + 0.06, (220, 190, 90), 0.6, 150)
            else:
                for z in np.arange(rng.uniform(0.6, 6), 90, 7.5):
                    self.strip(x - 0.08, x + 0.08, white, z, z + 3)
        if rng.random() < 0.35:  # a zebra crossing
            z = rng.uniform(7, 24)
            for x in np.arange(-edge + 0.5, edge - 0.4, 1.1):
                self.strip(x, x + 0.55, white, z, z + 3)

    def add(self, z: float, what: Callable[..., None], *arguments: object) -> None:
        """Put something z metres away on the list, which is drawn from the far end."""
        self.items.append((z, lambda: what(*arguments)))

    def roadside(self) -> None:
        rng, edge, beyond = self.rng, self.edge, self.edge + self.path
        city = rng.random() < 0.55
        for side in (-1, 1):
            z = rng.uniform(4, 16)
            while z < 110:
                if city and rng.random() < 0.72:
                    deep = rng.uniform(9, 24)
                    x = side * (beyond + rng.uniform(0.5, 4))
                    self.add(z + deep * 0.5, self.building, x, z, rng.uniform(8, 20), deep, rng.uniform(5, 22))
                    z += deep + rng.uniform(0, 6)
                else:
                    self.add(z, self.tree, side * (beyond + rng.uniform(1, 14)), z)
                    z += rng.uniform(2.5, 9)
            for z in np.arange(rng.uniform(8, 24), 70, 22) if rng.random() < 0.5 else ():
                self.add(z, self.lamp, side * (edge + 0.5), z)
            for z in rng.uniform(6, 32, rng.poisson(1.5)):
                place = side * (edge + rng.uniform(0.5, 1.2))
                self.add(z, self.sign, place, z, rng.uniform(1.9, 2.9), rng.uniform(0.33, 0.55))
            for z in rng.uniform(5, 36, rng.poisson(1.3 if self.paved else 0.4)):
                self.add(z, self.person, side * rng.uniform(edge + 0.2, beyond), z)
        if rng.random() < 0.5:
            z = rng.uniform(9, 30)
            for side in (-1, 1):
                self.add(z, self.signal, side * (edge + 0.5), z, rng.uniform(2.4, 3.2))
                if rng.random() < 0.5:
                    arm = -side * rng.uniform(2.5, 4.5)
                    self.add(z, self.signal, side * (edge + 0.5), z, rng.uniform(4.6, 5.6), arm)

    def traffic(self, lanes: int, wide: float) -> None:
        rng, edge = self.rng, self.edge
        vehicles = {"car": (self.car, 4.5, 0.66), "truck": (self.truck, 9.0, 0.16), "bus": (self.bus, 12.0, 0.09)}

        def along(x: float, z: float) -> _Pose:
            return _Pose(x, z, (0 if x > 0 else np.pi) - np.arctan(2 * self.view.bend * z) + rng.normal(0, 0.03))

        for lane in range(lanes):
            x, z = -edge + (lane + 0.5) * wide, rng.uniform(5, 22)
            while z < 110:
                kind = str(rng.choice([*vehicles, "cyclist"], p=[*(v[2] for v in vehicles.values()), 0.09]))
                draw, long, _ = vehicles.get(kind, (None, 2.0, 0))
                middle = z + long / 2
                if draw is None:
                    self.add(middle, self.person, x + np.sign(x) * rng.uniform(0.6, 1.2), middle, True)
                else:
                    self.add(middle, draw, along(x + rng.normal(0, 0.15), middle))
                z += long + rng.exponential(16) + 3
        if rng.random() < 0.3:  # one crosses
            z = rng.uniform(10, 34)
            turn = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.3)
            self.add(z, self.car, _Pose(rng.uniform(-edge, edge), z, turn))
        if rng.random() < 0.45:  # some are parked
            side = rng.choice([-1, 1])
            for z in np.arange(rng.uniform(6, 14), 60, 6.2):
                if rng.random() < 0.6:
                    self.add(z, self.car, along(side * (edge + 0.9), z))

    def shine(self, picture: Floats) -> Floats:
        """Add the light of one's own headlights and of all lamps."""
        size = self.size
        if self.light == "night":
            depth, off = self.view.depth(), np.abs(np.linspace(-1, 1, size))
            cone = np.exp(-np.maximum(depth - 6, 0) / 16) * np.clip(1.2 - off * 1.1, 0, 1) * (depth < 1e3)
            picture = picture * (1 + 1.6 * cv2.GaussianBlur(cone, (0, 0), size / 60)[..., None])
        halo = np.zeros((size, size, 3), np.float32)
        for u, v, radius, colour, owner in self.glows:
            if owner and self.canvas.ids[int(v * FINE), int(u * FINE)] != owner:
                continue
            spot, paint = (int(u * 16), int(v * 16)), np.asarray(colour, float)
            cv2.circle(halo, spot, int(radius * 16), paint.tolist(), -1, cv2.LINE_8, 4)
            if self.weather == "rain":  # a wet road mirrors what shines
                end = spot[0], int((v + radius * 9) * 16)
                cv2.line(halo, spot, end, (0.28 * paint).tolist(), max(1, int(radius)), cv2.LINE_8, 4)
        tight, wide = cv2.GaussianBlur(halo, (0, 0), size / 100), cv2.GaussianBlur(halo, (0, 0), size / 36)
        return picture + (0.7 * tight + 0.5 * wide) * (0.9 if self.dark else 0.3)

    def rain(self, picture: Floats) -> Floats:
        rng, size = self.rng, self.size
        drops, slant = np.zeros((size, size), np.float32), rng.uniform(-0.3, 0.3)
        for x, y, length in rng.random((int(rng.integers(120, 420)), 3)) * (size, size, 1):
            long = (5 + 15 * length) * size / 320
            start, end = (int(x * 16), int(y * 16)), (int((x + slant * long) * 16), int((y + long) * 16))
            cv2.line(drops, start, end, 1.0, 1, cv2.LINE_8, 4)
        return picture + (cv2.GaussianBlur(drops, (0, 0), 0.6) * rng.uniform(18, 50))[..., None]


def scene(rng: Generator, size: int = 320, night: bool = False) -> Scene:
    """Draw a scene, `size` pixels square: by day in any weather, or by `night` and at dusk.

    Things are those of `NAMES`.
    """
    light = str(rng.choice(["night", "dusk"], p=[0.7, 0.3])) if night else "day"
    weather = str(rng.choice(["clear", "rain", "fog"], p=[0.35, 0.55, 0.1] if night else [0.66, 0.18, 0.16]))
    painter = Painter(rng, size, light, weather)
    lanes, wide = int(rng.integers(1, 3)) * 2, rng.uniform(3.0, 3.7)
    painter.backdrop()
    painter.road(lanes, wide)
    painter.roadside()
    painter.traffic(lanes, wide)
    for _, draw in sorted(painter.items, key=lambda item: -item[0]):
        draw()
    drawn = painter.canvas.scene()
    picture = painter.shine(drawn.image.astype(np.float32)) if painter.glows or night else drawn.image.astype(np.float32)
    image = np.clip(painter.rain(picture) if weather == "rain" else picture, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:  # motion
        image[:] = cv2.blur(image, (int(rng.integers(2, 5)), 1) if rng.random() < 0.5 else (1, int(rng.integers(2, 5))))
    grain = rng.uniform(2, 6) + 4 * (light == "night")
    return Scene(develop(rng, image, grain, rng.uniform(0, 0.8)), drawn.ids, drawn.things)
