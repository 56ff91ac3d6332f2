"""The painter of things seen from straight above: aircraft, ships, vehicles, tanks, courts, and what only resembles them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator

from .draw import FINE, Canvas, Colour, Floats, Frame, blend, ellipse, near, noise, rectangle

GRASS = [(96, 112, 62), (120, 122, 76), (84, 98, 60), (140, 130, 92), (110, 118, 84)]
SOIL = [(150, 128, 98), (168, 148, 118), (130, 112, 86), (176, 160, 132)]
WATER = [(38, 68, 88), (28, 52, 76), (52, 88, 98), (36, 76, 80), (64, 92, 96)]
PAVED = [(150, 150, 146), (128, 128, 126), (172, 168, 158), (112, 114, 116)]
ASPHALT = [(84, 86, 88), (98, 98, 96), (72, 74, 78), (108, 106, 102)]
ROOFS = [(156, 84, 62), (176, 108, 82), (122, 78, 66), (118, 116, 116), (150, 142, 134), (92, 92, 98)]
HALLS = [(196, 198, 200), (168, 172, 176), (140, 148, 156), (178, 168, 150), (112, 132, 148), (214, 212, 206)]
PAINTS = [(228, 228, 226), (200, 202, 204), (60, 62, 66), (34, 36, 40), (150, 40, 38), (48, 72, 120), (130, 134, 138)]
PAINTS += [(236, 236, 232), (92, 92, 94), (178, 160, 120), (60, 92, 80)]
CONTAINERS = [(170, 60, 44), (44, 84, 130), (60, 110, 84), (206, 150, 60), (190, 190, 186), (120, 58, 46)]


class AerialPainter:
    """Draws one scene from above, with a canvas, random numbers and a sun of its own."""

    def __init__(self, rng: Generator, size: int) -> None:
        self.rng, self.size, self.canvas = rng, size, Canvas(size)
        self.unit = size / 320 * rng.uniform(0.8, 1.35)  # pixels per something like 0.4 m: how near the picture is
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.9)
        self.sun = np.array([np.cos(angle), np.sin(angle)]) * length  # the shadow of a thing of height 1
        self.dark = rng.uniform(0.4, 0.65)
        self.frame = Frame(size * rng.uniform(0.4, 0.6), size * rng.uniform(0.4, 0.6), rng.uniform(0, 2 * np.pi), self.unit)
        self.reach = size / self.unit  # in the frame's units: further than any corner
        side = len(self.canvas.ids)
        self.grain = cv2.resize(0.88 + 0.2 * noise(rng, size, 24, 4), (side, side), interpolation=cv2.INTER_LINEAR)

    def pick(self, colours: list[tuple[int, int, int]], spread: float = 8.0) -> Colour:
        return near(self.rng, colours[self.rng.integers(len(colours))], spread)

    # ------------------------------------------------------------------------------------------------------ what lies flat
    def land(self, colours: list[tuple[int, int, int]], cells: float = 5, contrast: float = 0.22) -> None:
        first, second = np.asarray(self.pick(colours)), np.asarray(self.pick(colours))
        texture = blend(noise(self.rng, self.size, cells, 5), first, second)
        self.canvas.paint(texture * (1 - contrast / 2 + contrast * noise(self.rng, self.size, 60, 3))[..., None])

    def sheet(self, points: Floats, colour: Colour) -> None:
        """Draw a polygon of the ground in the picture."""
        self.canvas.sheet(points, colour, self.grain)

    def fall(self, points: Floats, height: float) -> None:
        """Draw the shadow of a flat thing whose edge is `points`, at a height in the frame's units."""
        step = self.sun * height * self.unit
        for part in (0.5, 1.0):
            self.canvas.shade(points + step * part, self.dark**0.5)

    def free(self, at: Frame, width: float) -> bool:
        """Return whether no object is where one of length 1 and `width` would come to lie."""
        grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 7), np.linspace(-0.5, 0.5, 3) * width), -1).reshape(-1, 2)
        x, y = np.clip(at(grid) * FINE, 0, len(self.canvas.ids) - 1).astype(int).T
        return not self.canvas.ids[y, x].any()

    # ------------------------------------------------------------------------------------------------------------- objects
    def plane(self, at: Frame) -> None:
        """Draw a plane of length 1; none where another stands."""
        if not self.free(at, 0.7):
            return
        rng, draw = self.rng, self.canvas.polygon
        kind = rng.choice(["airliner", "wide", "prop", "jet"], p=[0.5, 0.2, 0.18, 0.12])
        sweep = {"airliner": 0.2, "wide": 0.24, "prop": 0.02, "jet": 0.34}[kind] * rng.uniform(0.85, 1.15)
        span = {"airliner": 0.48, "wide": 0.5, "prop": 0.52, "jet": 0.32}[kind] * rng.uniform(0.93, 1.05)
        width = {"airliner": 0.05, "wide": 0.062, "prop": 0.055, "jet": 0.06}[kind]
        chord, root = {"jet": 0.3, "prop": 0.15}.get(kind, 0.24), rng.uniform(0.08, 0.14)
        tip = root - sweep
        wings = [(root, 0), (tip, span), (tip - 0.06, span), (root - chord * 0.75, width), (root - chord, 0)]
        wings += [(x, -y) for x, y in wings[-2::-1]]
        tail = [(-0.36, 0), (-0.45, 0.19), (-0.5, 0.19), (-0.46, 0)]
        tail += [(x, -y) for x, y in tail[-2:0:-1]]
        t = np.linspace(0, np.pi, 10)
        nose = np.stack([0.36 + 0.14 * np.sin(t), -width * np.cos(t)], 1)
        body = np.array([(-0.5, 0.012), (-0.36, width), *nose[::-1], (-0.36, -width), (-0.5, -0.012)])
        paint = np.asarray(near(rng, (226, 228, 230) if rng.random() < 0.8 else (150, 156, 160), 8))
        accent = self.pick([(40, 70, 140), (180, 40, 40), (30, 110, 90), (230, 160, 40), (226, 228, 230)])
        # the tips of a swept wing lie behind its leading edge
        points = at([(0.5, 0), (tip - 0.03, -span), (tip - 0.03, span), (-0.5, 0)])
        for part in (wings, tail, body):
            self.canvas.shade(at(part) + self.sun * 0.09 * at.scale, self.dark)
        with self.canvas.thing("plane", at.angle, points):
            draw(at(wings), paint * 0.86)
            draw(at([(root - 0.05, 0), (tip - 0.02, span), (tip - 0.06, span), (root - chord * 0.75, width)]), paint * 0.76)
            draw(at(tail), paint * 0.84)
            count = {"wide": (0.16, 0.29), "airliner": (0.17,), "prop": (0.16,), "jet": ()}[kind]
            for y in [y * side for y in count for side in (-1, 1)]:
                x = root - sweep * abs(y) / span
                if kind == "prop":
                    draw(at(rectangle(0.12, 0.03, x, y)), paint * 0.7)
                    draw(at(rectangle(0.012, 0.15, x + 0.06, y)), (90, 90, 90))
                else:
                    draw(at(ellipse(0.1, 0.05, x + 0.02, y, 10)), paint * 0.62)
            draw(at(body), paint * 0.94)
            draw(at(body * (0.97, 0.45)), np.minimum(paint * 1.08, 255))
            draw(at([(-0.32, 0), (-0.5, 0.014), (-0.52, 0), (-0.5, -0.014)]), accent)
            draw(at(rectangle(0.02, width * 1.1, 0.43, 0)), (60, 66, 74))

    def ship(self, at: Frame, wake: bool = False) -> None:
        """Draw a ship of length 1 with its load; none where another lies."""
        if not self.free(at, 0.3):
            return
        rng, draw = self.rng, self.canvas.polygon
        kind = rng.choice(["cargo", "tanker", "boat"] if at.scale > 34 * self.unit else ["boat", "yacht"])
        half = {"cargo": 0.085, "tanker": 0.09, "boat": 0.16, "yacht": 0.14}[kind] * rng.uniform(0.9, 1.15)
        bow = rng.uniform(0.2, 0.34)
        stern = rng.uniform(0.6, 1.0) * half
        edge = [(0.5, 0), (0.5 - bow * 0.4, half * 0.62), (0.5 - bow, half), (-0.45, half), (-0.5, stern)]
        hull = np.array(edge + [(x, -y) for x, y in edge[:0:-1]])
        if wake:
            for side in (-1, 1):
                trail = np.array([(0.35, 1), (-2.2, 4.5), (-2.4, 3.2), (-0.5, 0.5)]) * (1, side * half)
                self.canvas.shade(at(trail), 1.32, 0.7)
            self.canvas.shade(at([(-0.45, -half), (-2.6, -half * 1.2), (-2.6, half * 1.2), (-0.45, half)]), 1.7, 1.0)
        self.canvas.shade(at(hull) + self.sun * 0.05 * at.scale, self.dark)
        deck = np.asarray(self.pick([(150, 70, 56), (120, 124, 120), (90, 104, 110), (176, 172, 160)]))
        white = np.asarray(near(rng, (228, 228, 224), 6))
        with self.canvas.thing("ship", at.angle):
            if kind == "yacht" or (kind == "boat" and rng.random() < 0.5):
                draw(at(hull), white)
                draw(at(hull * (0.82, 0.7)), self.pick([(196, 170, 130), (214, 214, 210), (150, 158, 164)]))
                draw(at(rectangle(0.34, half * 1.1, -0.05)), white * 0.93)
                draw(at(rectangle(0.06, half, 0.13)), (70, 82, 96))
                return
            draw(at(hull), deck * 0.62)
            draw(at(hull * (0.965, 0.84)), deck)
            x = rng.choice([-0.36, 0.2]) if kind == "boat" else -0.38
            if kind == "cargo":
                step, rows = rng.uniform(0.045, 0.07), 3
                for left in np.arange(-0.28, 0.32, step):
                    for row in range(rows):
                        y = (row - 1) * half * 0.52
                        if rng.random() < 0.86:
                            draw(at(rectangle(step * 0.86, half * 0.46, left + step / 2, y)), self.pick(CONTAINERS))
            elif kind == "tanker":
                draw(at(rectangle(0.62, half * 0.12, 0.02)), deck * 0.7)
                for left in np.arange(-0.24, 0.34, 0.12):
                    draw(at(rectangle(0.015, half * 1.3, left)), deck * 1.25)
                    draw(at(ellipse(0.03, half * 0.35, left + 0.06, half * 0.4, 8)), deck * 1.3)
            else:
                draw(at(rectangle(0.3, half * 0.9, -0.05)), deck * 0.8)
            draw(at(rectangle(0.13, half * 1.55, x)), white)
            draw(at(rectangle(0.03, half * 1.5, x + 0.05)), (70, 80, 90))
            draw(at(rectangle(0.045, half * 0.5, x - 0.03)), self.pick(CONTAINERS))

    def vehicle(self, at: Frame, long: bool = False) -> None:
        """Draw a car of length 1, or a lorry; none where something stands."""
        if not self.free(at, 0.45):
            return
        rng, draw = self.rng, self.canvas.polygon
        half = 0.14 if long else 0.225
        paint = np.asarray(self.pick(PAINTS))
        glass = np.array([48, 56, 66])
        edge = [(0.5, half * 0.7), (0.44, half), (-0.46, half), (-0.5, half * 0.8)]
        body = np.array(edge + [(x, -y) for x, y in edge[::-1]])
        self.canvas.shade(at(body) + self.sun * 0.22 * at.scale * (1.3 if long else 1), self.dark)
        with self.canvas.thing("vehicle", at.angle):
            draw(at(body), paint * 0.82)
            if long:
                draw(at(rectangle(0.16, half * 1.9, 0.39)), self.pick(PAINTS))
                draw(at(rectangle(0.03, half * 1.7, 0.46)), glass)
                draw(at(rectangle(0.72, half * 2.05, -0.12)), near(rng, (206, 206, 200), 14))
                return
            draw(at(body * (0.94, 0.86)), paint)
            draw(at([(0.24, half * 0.8), (0.12, half * 0.66), (0.12, -half * 0.66), (0.24, -half * 0.8)]), glass)
            draw(at([(-0.36, half * 0.74), (-0.26, half * 0.66), (-0.26, -half * 0.66), (-0.36, -half * 0.74)]), glass)
            draw(at(rectangle(0.38, half * 1.36, -0.07)), np.minimum(paint * 1.1, 255))

    def tank(self, at: Frame) -> None:
        """Draw a storage tank of diameter 1."""
        rng, draw, height = self.rng, self.canvas.polygon, self.rng.uniform(0.25, 0.6)
        rim = at(ellipse(1, 1, count=36))
        step = self.sun * height * at.scale
        for part in np.linspace(0.15, 1, 6):
            self.canvas.shade(rim + step * part, self.dark**0.3)
        paint = np.asarray(self.pick([(214, 214, 208), (190, 192, 190), (150, 120, 96), (226, 226, 222), (140, 150, 150)]))
        with self.canvas.thing("tank", at.angle):
            draw(rim, paint * 0.78)
            draw(at(ellipse(0.92, 0.92, count=32)), paint)
            if rng.random() < 0.5:  # a floating roof lies deep: the wall throws a crescent on it
                draw(at(ellipse(0.84, 0.84, count=32)), paint * 0.6)
                draw(at(ellipse(0.78, 0.78, count=32)) + step * 0.12, paint * 0.92)
                draw(at(rectangle(0.4, 0.03, 0.2)), paint * 0.7)
            else:  # a cone, one side of it in the light
                light = np.arctan2(*(-self.sun[::-1])) - at.angle
                for i in range(12):
                    a, b = 2 * np.pi * i / 12, 2 * np.pi * (i + 1) / 12
                    bright = 0.96 + 0.1 * np.cos((a + b) / 2 - light)
                    wedge = np.array([(0, 0), (np.cos(a), np.sin(a)), (np.cos(b), np.sin(b))]) * 0.45
                    draw(at(wedge), paint * bright)
                draw(at(ellipse(0.1, 0.1, count=10)), paint * 0.7)
            draw(at(rectangle(0.05, 0.14, 0.48)), paint * 0.55)

    def court(self, at: Frame) -> None:
        """Draw a tennis court of length 1."""
        draw = self.canvas.polygon
        outer, inner = self.pick([(62, 108, 76), (150, 84, 62), (70, 100, 130)]), self.pick([(70, 110, 150), (168, 96, 70)])
        white = (204, 206, 204)
        with self.canvas.thing("court", at.angle):
            draw(at(rectangle(1, 0.52)), outer)
            draw(at(rectangle(0.68, 0.32)), inner)
            width = max(0.6, at.scale / 60)
            for line in (rectangle(0.68, 0.32), rectangle(0.68, 0.24), rectangle(0.36, 0.24)):
                self.canvas.line(at([*line, line[0]]), white, width)
            self.canvas.line(at([(-0.18, 0), (0.18, 0)]), white, width)
            self.canvas.line(at([(0, -0.19), (0, 0.19)]), (60, 64, 62), width)

    # ------------------------------------------------------------------------------------------------------------- clutter
    def tree(self, x: float, y: float, radius: float) -> None:
        """Draw a tree, in pixels of the picture."""
        rng = self.rng
        crown = ellipse(2 * radius, 2 * radius, x, y, 9) + rng.normal(0, radius * 0.12, (9, 2))
        self.canvas.shade(crown + self.sun * radius * 1.4, self.dark)
        green = np.asarray(self.pick([(58, 82, 44), (74, 92, 52), (48, 70, 46), (92, 100, 58)], 6))
        self.canvas.polygon(crown, green * 0.82)
        self.canvas.polygon((crown - (x, y)) * 0.62 + (x, y) - self.sun * radius * 0.3, green * 1.22)

    def hall(self, at: Frame, length: float, width: float, height: float = 8, units: bool = True) -> None:
        """Draw a flat roof in the frame's units, with units of machinery on it."""
        rng, draw = self.rng, self.canvas.polygon
        edge = at(rectangle(length, width))
        self.fall(edge, height)
        roof = np.asarray(self.pick(HALLS))
        draw(edge, roof * 0.8)
        draw(at(rectangle(length - 2, width - 2)), roof)
        ribs = rng.random() < 0.5
        for x in np.arange(-length / 2 + 4, length / 2 - 2, 4) if ribs else ():
            self.canvas.line(at([(x, -width / 2 + 1.5), (x, width / 2 - 1.5)]), roof * 0.92, 0.5)
        for _ in range(int(rng.integers(1, 7)) if units else 0):
            x, y = (rng.random(2) - 0.5) * (length * 0.8, width * 0.75)
            unit = at.at(x, y)
            if rng.random() < 0.3:
                shape = ellipse(4, 4, count=10)
            else:
                shape = rectangle(rng.uniform(3, 9), rng.uniform(2.5, 5))
            self.canvas.shade(unit(shape) + self.sun * 2 * self.unit, self.dark)
            draw(unit(shape), roof * rng.uniform(0.7, 1.15))

    def house(self, at: Frame) -> None:
        rng, draw = self.rng, self.canvas.polygon
        length, width = rng.uniform(22, 34), rng.uniform(16, 22)
        self.fall(at(rectangle(length, width)), 7)
        roof = np.asarray(self.pick(ROOFS))
        lit = 1.12 if np.dot(self.sun, (-np.sin(at.angle), np.cos(at.angle))) < 0 else 0.82
        hip = rng.choice([0.0, 0.28]) * length
        front = [(-length / 2, width / 2), (length / 2, width / 2), (length / 2 - hip, 0), (-length / 2 + hip, 0)]
        draw(at(rectangle(length, width)), roof * 0.94)
        draw(at(front), np.minimum(roof * (1.94 - lit), 255))
        draw(at([(x, -y) for x, y in front]), np.minimum(roof * lit, 255))
        if rng.random() < 0.5:
            draw(at(rectangle(3, 3, *rng.uniform(-5, 5, 2))), roof * 0.6)

    def road(self, points: Floats, width: float, lines: bool = True) -> None:
        """Draw a road through points in the picture; `width` is in the frame's units."""
        colour, wide = np.asarray(self.pick(ASPHALT)), width * self.unit
        self.canvas.line(points, near(self.rng, (150, 142, 128)), wide * 1.25)
        self.canvas.line(points, colour, wide)
        if lines:
            for a, b in zip(points[:-1], points[1:], strict=True):
                steps = np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / (9 * self.unit))) * 2)
                for first, second in zip(steps[::4], steps[1::4], strict=False):
                    self.canvas.line([first, second], (206, 204, 196), 0.5)

    def traffic(self, at: Frame, length: float, width: float, count: int) -> None:
        """Draw vehicles on a straight road along the frame's x axis."""
        taken: list[float] = []
        for _ in range(count):
            x, way = self.rng.uniform(-length / 2, length / 2), self.rng.choice([-1, 1])
            long = self.rng.random() < 0.22
            if all(abs(x * way + 1e4 * way - t) > 30 for t in taken):
                taken.append(x * way + 1e4 * way)
                turn = 0.0 if way > 0 else np.pi
                self.vehicle(at.at(x, way * width * 0.23, turn, self.unit * (24 if long else 13.5)), long)

    def trees(self, count: int, radius: tuple[float, float] = (2.5, 6)) -> None:
        for x, y, r in self.rng.random((count, 3)):
            spot = int(min(y, 0.999) * len(self.canvas.ids)), int(min(x, 0.999) * len(self.canvas.ids))
            green = self.canvas.pixels[spot].astype(int)
            if green[1] >= green[0] - 2 and green[1] > green[2] + 12 and not self.canvas.ids[spot]:  # grass, not a roof
                self.tree(x * self.size, y * self.size, (radius[0] + r * (radius[1] - radius[0])) * self.unit)

    def clouds(self) -> None:
        """Draw thin clouds now and then, each with its shadow."""
        rng = self.rng
        if rng.random() > 0.25:
            return
        reach = int(60 * self.unit)
        alpha = np.clip((noise(rng, self.size + 2 * reach, 4, 4) - rng.uniform(0.6, 0.74)) * 2.5, 0, 0.6)
        side = len(self.canvas.ids)
        layers = []
        for x, y in ((reach, reach), (reach - self.sun * reach).astype(int)):  # the shadow is what lies towards the sun
            part = alpha[y : y + self.size, x : x + self.size]
            layers.append(cv2.resize(part, (side, side), interpolation=cv2.INTER_LINEAR)[..., None])
        pixels = self.canvas.pixels * (1 - 0.5 * layers[1])
        self.canvas.pixels[:] = pixels + (238 - pixels) * layers[0]
