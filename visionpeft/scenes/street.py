"""The painter of things on a street: vehicles, people, signs, lights, trees and houses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .camera import Pose, RoadPainter
from .draw import Colour, Floats, ellipse, rectangle

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


class StreetPainter(RoadPainter):
    """Draws one thing at a time, in metres: x to the right, z ahead."""

    # ------------------------------------------------------------------------------------------------------------ vehicles
    def solid(
        self, pose: Pose, size: ArrayLike, profile: ArrayLike, paint: Floats, panes: Sequence[int] = ()
    ) -> Pose | None:
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
                return Pose(pose.x, pose.z, pose.yaw, side)
        return None

    def ends(self, pose: Pose, size: ArrayLike, low: float) -> None:
        """Draw lamps, plate and grille of the end that faces the camera, lamps at the height `low`."""
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

    def wheels(self, pose: Pose, spots: Sequence[float], radius: float, wide: float) -> None:
        t = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        for a in spots:
            for r, colour in ((radius, (26, 26, 28)), (radius * 0.55, (120, 122, 126))):
                self.face(
                    pose(np.stack([a + r * np.cos(t), radius + r * np.sin(t), np.full(14, wide / 2 + 0.02)], 1)), colour
                )

    def under(self, pose: Pose, size: ArrayLike) -> None:
        """Draw the shadow on the ground."""
        long, wide, _ = np.asarray(size, float)
        flat = rectangle(long * 1.02, wide * 1.12)
        points = pose(np.stack([flat[:, 0], flat[:, 0] * 0, flat[:, 1]], 1))
        if points[:, 2].min() > 1:
            soft = 0.03 * self.view.focal / pose.z
            self.canvas.shade(self.view(points), 0.35 if self.weather == "clear" else 0.55, soft)

    def car(self, pose: Pose) -> None:
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

    def truck(self, pose: Pose) -> None:
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

    def bus(self, pose: Pose) -> None:
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
        """Draw a traffic light, on a mast or on an arm over the road."""
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
        """Draw a street lamp, and by night the light under it."""
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
        """Draw a building whose wall along the road stands at x, from z on."""
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
