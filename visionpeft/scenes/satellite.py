"""Satellite scenes: airports, harbours, tank farms, housing, car parks, fields and forest, seen from straight above."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from .draw import FINE, Canvas, Colour, Floats, Frame, Scene, blend, develop, ellipse, near, noise, rectangle

NAMES = ("plane", "ship", "vehicle", "tank", "court")
POINTS = ("nose", "left tip", "right tip", "tail")  # of a plane
FLIPPED = (0, 2, 1, 3)  # which of them is which in a mirror

_GRASS = [(96, 112, 62), (120, 122, 76), (84, 98, 60), (140, 130, 92), (110, 118, 84)]
_SOIL = [(150, 128, 98), (168, 148, 118), (130, 112, 86), (176, 160, 132)]
_WATER = [(38, 68, 88), (28, 52, 76), (52, 88, 98), (36, 76, 80), (64, 92, 96)]
_PAVED = [(150, 150, 146), (128, 128, 126), (172, 168, 158), (112, 114, 116)]
_ASPHALT = [(84, 86, 88), (98, 98, 96), (72, 74, 78), (108, 106, 102)]
_ROOFS = [(156, 84, 62), (176, 108, 82), (122, 78, 66), (118, 116, 116), (150, 142, 134), (92, 92, 98)]
_HALLS = [(196, 198, 200), (168, 172, 176), (140, 148, 156), (178, 168, 150), (112, 132, 148), (214, 212, 206)]
_PAINTS = [(228, 228, 226), (200, 202, 204), (60, 62, 66), (34, 36, 40), (150, 40, 38), (48, 72, 120), (130, 134, 138)]
_PAINTS += [(236, 236, 232), (92, 92, 94), (178, 160, 120), (60, 92, 80)]
_CONTAINERS = [(170, 60, 44), (44, 84, 130), (60, 110, 84), (206, 150, 60), (190, 190, 186), (120, 58, 46)]


class Painter:
    """One scene being drawn: its canvas, its random numbers, its sun."""

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
        """A polygon of the ground in the picture."""
        self.canvas.sheet(points, colour, self.grain)

    def fall(self, points: Floats, height: float) -> None:
        """The shadow of a flat thing whose edge is `points`, at a height in the frame's units."""
        step = self.sun * height * self.unit
        for part in (0.5, 1.0):
            self.canvas.shade(points + step * part, self.dark**0.5)

    def free(self, at: Frame, width: float) -> bool:
        """Whether no object is where one of length 1 and `width` would come to lie."""
        grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 7), np.linspace(-0.5, 0.5, 3) * width), -1).reshape(-1, 2)
        x, y = np.clip(at(grid) * FINE, 0, len(self.canvas.ids) - 1).astype(int).T
        return not self.canvas.ids[y, x].any()

    # ------------------------------------------------------------------------------------------------------------- objects
    def plane(self, at: Frame) -> None:
        """One of length 1; none where another stands."""
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
        """A hull of length 1, drawn by what it carries; none where another lies."""
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
                            draw(at(rectangle(step * 0.86, half * 0.46, left + step / 2, y)), self.pick(_CONTAINERS))
            elif kind == "tanker":
                draw(at(rectangle(0.62, half * 0.12, 0.02)), deck * 0.7)
                for left in np.arange(-0.24, 0.34, 0.12):
                    draw(at(rectangle(0.015, half * 1.3, left)), deck * 1.25)
                    draw(at(ellipse(0.03, half * 0.35, left + 0.06, half * 0.4, 8)), deck * 1.3)
            else:
                draw(at(rectangle(0.3, half * 0.9, -0.05)), deck * 0.8)
            draw(at(rectangle(0.13, half * 1.55, x)), white)
            draw(at(rectangle(0.03, half * 1.5, x + 0.05)), (70, 80, 90))
            draw(at(rectangle(0.045, half * 0.5, x - 0.03)), self.pick(_CONTAINERS))

    def vehicle(self, at: Frame, long: bool = False) -> None:
        """A car of length 1, or a lorry; none where something stands."""
        if not self.free(at, 0.45):
            return
        rng, draw = self.rng, self.canvas.polygon
        half = 0.14 if long else 0.225
        paint = np.asarray(self.pick(_PAINTS))
        glass = np.array([48, 56, 66])
        edge = [(0.5, half * 0.7), (0.44, half), (-0.46, half), (-0.5, half * 0.8)]
        body = np.array(edge + [(x, -y) for x, y in edge[::-1]])
        self.canvas.shade(at(body) + self.sun * 0.22 * at.scale * (1.3 if long else 1), self.dark)
        with self.canvas.thing("vehicle", at.angle):
            draw(at(body), paint * 0.82)
            if long:
                draw(at(rectangle(0.16, half * 1.9, 0.39)), self.pick(_PAINTS))
                draw(at(rectangle(0.03, half * 1.7, 0.46)), glass)
                draw(at(rectangle(0.72, half * 2.05, -0.12)), near(rng, (206, 206, 200), 14))
                return
            draw(at(body * (0.94, 0.86)), paint)
            draw(at([(0.24, half * 0.8), (0.12, half * 0.66), (0.12, -half * 0.66), (0.24, -half * 0.8)]), glass)
            draw(at([(-0.36, half * 0.74), (-0.26, half * 0.66), (-0.26, -half * 0.66), (-0.36, -half * 0.74)]), glass)
            draw(at(rectangle(0.38, half * 1.36, -0.07)), np.minimum(paint * 1.1, 255))

    def tank(self, at: Frame) -> None:
        """A storage tank of diameter 1."""
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
        """A tennis court of length 1."""
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
        """In pixels of the picture."""
        rng = self.rng
        crown = ellipse(2 * radius, 2 * radius, x, y, 9) + rng.normal(0, radius * 0.12, (9, 2))
        self.canvas.shade(crown + self.sun * radius * 1.4, self.dark)
        green = np.asarray(self.pick([(58, 82, 44), (74, 92, 52), (48, 70, 46), (92, 100, 58)], 6))
        self.canvas.polygon(crown, green * 0.82)
        self.canvas.polygon((crown - (x, y)) * 0.62 + (x, y) - self.sun * radius * 0.3, green * 1.22)

    def hall(self, at: Frame, length: float, width: float, height: float = 8, units: bool = True) -> None:
        """A flat roof in the frame's units, with what stands on it."""
        rng, draw = self.rng, self.canvas.polygon
        edge = at(rectangle(length, width))
        self.fall(edge, height)
        roof = np.asarray(self.pick(_HALLS))
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
        roof = np.asarray(self.pick(_ROOFS))
        lit = 1.12 if np.dot(self.sun, (-np.sin(at.angle), np.cos(at.angle))) < 0 else 0.82
        hip = rng.choice([0.0, 0.28]) * length
        front = [(-length / 2, width / 2), (length / 2, width / 2), (length / 2 - hip, 0), (-length / 2 + hip, 0)]
        draw(at(rectangle(length, width)), roof * 0.94)
        draw(at(front), np.minimum(roof * (1.94 - lit), 255))
        draw(at([(x, -y) for x, y in front]), np.minimum(roof * lit, 255))
        if rng.random() < 0.5:
            draw(at(rectangle(3, 3, *rng.uniform(-5, 5, 2))), roof * 0.6)

    def road(self, points: Floats, width: float, lines: bool = True) -> None:
        """Through points in the picture; `width` in the frame's units."""
        colour, wide = np.asarray(self.pick(_ASPHALT)), width * self.unit
        self.canvas.line(points, near(self.rng, (150, 142, 128)), wide * 1.25)
        self.canvas.line(points, colour, wide)
        if lines:
            for a, b in zip(points[:-1], points[1:], strict=True):
                steps = np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / (9 * self.unit))) * 2)
                for first, second in zip(steps[::4], steps[1::4], strict=False):
                    self.canvas.line([first, second], (206, 204, 196), 0.5)

    def traffic(self, at: Frame, length: float, width: float, count: int) -> None:
        """Vehicles on a straight road along the frame's x axis."""
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
        """Now and then thin clouds, each with its shadow."""
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


# ------------------------------------------------------------------------------------------------------------- the layouts
def _airport(p: Painter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(_GRASS)
    far = p.reach
    runway = rng.uniform(70, 110)
    p.sheet(f(rectangle(2 * far, 34, 0, -runway)), p.pick(_ASPHALT))
    for x in np.arange(-far, far, 26):
        draw(f(rectangle(13, 1.4, x, -runway)), (222, 222, 216))
    for y in (-15.5, 15.5):
        draw(f(rectangle(2 * far, 0.9, 0, y - runway)), (214, 214, 208))
    end = rng.uniform(-0.4, 0.4) * far
    for y in np.linspace(-13, 13, 9):
        draw(f(rectangle(20, 1.6, end, y - runway)), (222, 222, 216))
    taxi = -runway + rng.uniform(44, 58)
    grey = p.pick(_PAVED)
    for x in rng.uniform(-0.5, 0.5, 2) * far:
        p.sheet(f(rectangle(16, taxi + runway, x, (taxi - runway) / 2)), grey)
        p.canvas.line(f([(x, -runway), (x, taxi)]), (206, 170, 60), 0.6)
    p.sheet(f(rectangle(2 * far, 17, 0, taxi)), grey)
    p.canvas.line(f([(-far, taxi), (far, taxi)]), (206, 170, 60), 0.6)
    near_edge, deep = taxi + rng.uniform(12, 22), rng.uniform(90, 150)
    apron = p.pick(_PAVED)
    p.sheet(f(rectangle(2 * far, deep, 0, near_edge + deep / 2)), apron)
    for x in np.arange(-far, far, 22):
        p.canvas.line(f([(x, near_edge), (x, near_edge + deep)]), np.asarray(apron) * 0.9, 0.5)
    for y in np.arange(near_edge, near_edge + deep, 22):
        p.canvas.line(f([(-far, y), (far, y)]), np.asarray(apron) * 0.9, 0.5)
    hall = near_edge + deep + 14
    for x in np.arange(-far, far, 130):
        p.hall(f.at(x, hall + 12), rng.uniform(90, 125), 44, 12)
    step = rng.uniform(58, 80)
    for y, turn, chance in ((hall - 52, np.pi / 2, 0.8), (near_edge + 30, -np.pi / 2, 0.35 if deep > 118 else 0.0)):
        for x in np.arange(-far / 1.6, far / 1.6, step):
            if rng.random() > chance:
                continue
            where = f.at(x + rng.normal(0, 3), y + rng.normal(0, 3), turn + rng.normal(0, 0.08))
            length = rng.uniform(36, 66) if rng.random() < 0.75 else rng.uniform(20, 36)
            if turn > 0 and rng.random() < 0.6:
                bridge = f([(x + 6, y + 20), (x + 12, y + 30), (x + 12, hall - 6), (x + 6, hall - 6)])
                p.fall(bridge, 4)
                draw(bridge, near(rng, (176, 178, 182)))
            p.canvas.line(f([(x, y - 40), (x, y + 30)]), (206, 170, 60), 0.5)
            p.plane(where.at(0, 0, 0, p.unit * length))
            for _ in range(rng.integers(0, 4)):
                along, aside = rng.uniform(-20, 30), rng.uniform(17, 25) * rng.choice([-1, 1])
                p.vehicle(where.at(along, aside, rng.uniform(0, 6.3), p.unit * rng.uniform(10, 13)))
    for y in (taxi, -runway):
        if rng.random() < 0.5:
            way = rng.choice([0, np.pi])
            p.plane(f.at(rng.uniform(-0.5, 0.5) * far, y, way, p.unit * rng.uniform(34, 62)))
    p.trees(25)


def _harbour(p: Painter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(_WATER, 4, 0.16)
    ripple = noise(rng, p.size, 70, 2, rng.uniform(1, 4))
    p.canvas.paint(p.canvas.pixels[::2, ::2] * (0.9 + 0.2 * ripple)[..., None])
    far, shore = p.reach, rng.uniform(20, 110)
    beach = rng.random() < 0.25
    for _ in range(rng.integers(2, 9)):
        away = rng.uniform(50, 260) if beach else rng.uniform(150, 290)
        at = f.at(rng.uniform(-0.6, 0.6) * far, shore - away, rng.uniform(0, 2 * np.pi))
        length = rng.uniform(16, 34) if rng.random() < 0.6 else rng.uniform(50, 95)
        p.ship(at.at(0, 0, 0, p.unit * length), rng.random() < 0.6)
    if beach:
        along = np.linspace(-far, far, 60)
        line = shore + 18 * np.interp(along, np.linspace(-far, far, 14), rng.normal(0, 1, 14))
        for offset, colour in ((-8, (120, 140, 136)), (0, (206, 190, 154)), (16, p.pick(_GRASS))):
            edge = np.concatenate([np.stack([along, line + offset], 1), [(far, 3 * far), (-far, 3 * far)]])
            p.sheet(f(edge), colour)
        p.trees(120)
        return
    p.sheet(f(rectangle(2 * far, 2 * far, 0, shore + far)), p.pick(_PAVED))
    draw(f(rectangle(2 * far, 3, 0, shore)), near(rng, (190, 186, 176)))
    marina = rng.random() < 0.5
    gap = rng.uniform(60, 80) if marina else rng.uniform(95, 130)
    for x in np.arange(-far, far, gap):
        length = rng.uniform(80, 130)
        width = 5 if marina else rng.uniform(16, 24)
        pier = f(rectangle(width, length, x, shore - length / 2))
        p.fall(pier, 3)
        draw(pier, near(rng, (168, 158, 142) if marina else (160, 160, 156)))
        for side in (-1, 1):
            if marina:
                for y in np.arange(shore - length + 5, shore - 10, 13):
                    if rng.random() < 0.6:
                        size = rng.uniform(15, 26)
                        turn = 0.0 if rng.random() < 0.7 else np.pi
                        p.ship(f.at(x + side * (width / 2 + size / 2 + 1), y, turn + rng.normal(0, 0.04), p.unit * size))
            elif rng.random() < 0.7:
                size = rng.uniform(60, 100)
                turn = np.pi / 2 * rng.choice([-1, 1]) + rng.normal(0, 0.02)
                across, down = x + side * (width / 2 + size * 0.1 + 2), shore - length * rng.uniform(0.4, 0.7)
                p.ship(f.at(across, down, turn, p.unit * size))
    for x in np.arange(-far, far, 46):  # the yard behind: stacks of containers, sheds, lorries
        y = shore + 34
        if rng.random() < 0.45:
            p.hall(f.at(x, y + 26), 36, rng.uniform(24, 40), 9)
        else:
            for row in range(rng.integers(2, 6)):
                for column in range(3):
                    box = f(rectangle(12, 5, x - 13 + 13 * column, y + 6 * row))
                    p.fall(box, rng.uniform(2, 6))
                    draw(box, p.pick(_CONTAINERS))
    p.traffic(f.at(0, shore + 16), 2 * far, 18, int(rng.integers(2, 9)))


def _industry(p: Painter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land([*_SOIL, *_PAVED], 7)
    far, pitch = p.reach, rng.uniform(58, 84)
    half = int(far / pitch / 1.6) + 1
    for i in range(-half, half + 1):
        p.road(f([(-far, (i + 0.5) * pitch), (far, (i + 0.5) * pitch)]), 10, False)
    for i in range(-half, half + 1):
        kind = rng.choice(["tanks", "halls", "yard"], p=[0.55, 0.25, 0.2])
        for j in range(-half, half + 1):
            at = f.at(j * pitch, i * pitch)
            if kind == "tanks":
                draw(at(rectangle(pitch - 12, pitch - 14)), p.pick(_SOIL))
                p.canvas.line(at(rectangle(pitch - 12, pitch - 14)[[0, 1, 2, 3, 0]]), (176, 170, 158), 1)
                if rng.random() < 0.62:
                    wide = rng.uniform(26, pitch - 20)
                    p.tank(at.at(rng.normal(0, 2), rng.normal(0, 2), rng.uniform(0, 6.3), p.unit * wide))
                elif rng.random() < 0.7:
                    small = rng.uniform(14, 20)
                    for x, y in rectangle(pitch * 0.42, pitch * 0.42):
                        if rng.random() < 0.85:
                            p.tank(at.at(x, y, rng.uniform(0, 6.3), p.unit * small))
                for y in pitch / 2 - np.array([10.5, 9, 7.5]):  # pipes
                    p.canvas.line(at([(-pitch / 2, y), (pitch / 2, y)]), (196, 192, 184), 0.6)
            elif kind == "halls":
                p.hall(at, pitch * rng.uniform(0.6, 0.82), pitch * rng.uniform(0.5, 0.7), 9)
            else:
                for x, y in (rng.random((int(rng.integers(3, 9)), 2)) - 0.5) * pitch * 0.7:
                    heap = at(rectangle(rng.uniform(5, 14), rng.uniform(3, 6), x, y))
                    p.fall(heap, 3)
                    draw(heap, p.pick([*_CONTAINERS, *_SOIL]))
                for x, y in (rng.random((2, 2)) - 0.5) * pitch * 0.6:  # round, but no tanks: basins
                    draw(at(ellipse(16, 16, x, y)), near(rng, (150, 148, 140)))
                    draw(at(ellipse(14, 14, x, y)), p.pick(_WATER))
        p.traffic(f.at(0, (i + 0.5) * pitch), 2 * far, 10, int(rng.integers(0, 5)))


def _housing(p: Painter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(_GRASS, 8)
    far, block, lot = p.reach, rng.uniform(96, 116), 42
    half = int(far / block / 1.5) + 1
    cross = rng.uniform(-60, 60)
    streets = [f([(-far, (i + 0.5) * block), (far, (i + 0.5) * block)]) for i in range(-half, half + 1)]
    for points in [*streets, f([(cross, -far), (cross, far)])]:
        p.road(points, 15)
    for i in range(-half, half + 1):
        for x in np.arange(-far, far, lot):
            if abs(x - cross) < 34:
                continue
            for side in (-1, 1):
                at = f.at(
                    x + rng.normal(0, 2), i * block + side * block * 0.2, rng.normal(0, 0.04) + rng.choice([0, np.pi / 2])
                )
                if rng.random() < 0.07:
                    p.court(f.at(x, i * block + side * block * 0.2, 0, p.unit * 36))
                    continue
                drive = f(rectangle(6, 18, x + 14, i * block + side * block * 0.36))
                draw(drive, p.pick(_PAVED))
                p.house(at)
                if rng.random() < 0.5:
                    turn = np.pi / 2 * rng.choice([-1, 1])
                    p.vehicle(f.at(x + 14, i * block + side * block * 0.36, turn, p.unit * rng.uniform(12.5, 14.5)))
                if rng.random() < 0.22:
                    draw(f(ellipse(11, 7, x - 10, i * block + side * 5)), near(rng, (84, 168, 186)))
        p.traffic(f.at(0, (i + 0.5) * block), 2 * far, 15, int(rng.integers(1, 6)))
    p.trees(150)


def _parking(p: Painter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(_GRASS if rng.random() < 0.5 else _PAVED, 7)
    far = p.reach
    p.sheet(f(rectangle(1.4 * far, 1.1 * far)), p.pick(_ASPHALT))
    bay, deep = 8.2, 17.0
    y = -0.55 * far
    while y < 0.55 * far:
        kind = rng.choice(["cars", "hall", "courts"], p=[0.5, 0.28, 0.22])
        if kind == "hall":
            width = rng.uniform(60, 90)
            for x in np.arange(-0.6 * far, 0.6 * far, 150):
                p.hall(f.at(x, y + width / 2), rng.uniform(100, 140), width - 8, 10)
            y += width + 12
        elif kind == "courts":
            draw(f(rectangle(1.3 * far, 46, 0, y + 23)), p.pick(_GRASS))
            for x in np.arange(-0.6 * far, 0.6 * far, 34):
                if rng.random() < 0.4:
                    p.court(f.at(x, y + 23, np.pi / 2, p.unit * rng.uniform(36, 42)))
            y += 54
        else:
            full = rng.uniform(0.05, 0.55)
            for x in np.arange(-0.65 * far, 0.65 * far, bay):
                for side, turn in ((0, -np.pi / 2), (1, np.pi / 2)):
                    middle = y + deep * (side + 0.5)
                    p.canvas.line(f([(x, middle - deep / 2), (x, middle + deep / 2)]), (196, 196, 190), 0.5)
                    if rng.random() < full:
                        way = turn + rng.choice([0, np.pi]) + rng.normal(0, 0.04)
                        where = f.at(x + bay / 2, middle + rng.normal(0, 0.8), way, p.unit * rng.uniform(12.5, 14.5))
                        p.vehicle(where)
            y += 2 * deep
            p.traffic(f.at(0, y + 8), far, 14, int(rng.integers(0, 3)))
            y += 18
    p.trees(60)


def _fields(p: Painter) -> None:
    rng, f = p.rng, p.frame
    p.land(_GRASS, 6)
    far = p.reach
    y = -far
    while y < far:
        deep, x = rng.uniform(70, 150), -far
        while x < far:
            wide = rng.uniform(70, 200)
            colour = np.asarray(p.pick([*_GRASS, *_SOIL, (170, 156, 92), (92, 124, 58), (188, 170, 110)]))
            p.sheet(f(rectangle(wide - 3, deep - 3, x + wide / 2, y + deep / 2)), colour)
            if rng.random() < 0.75:
                for row in np.arange(3, deep - 3, rng.uniform(3.5, 8)):
                    p.canvas.line(f([(x + 3, y + row), (x + wide - 4, y + row)]), colour * rng.uniform(0.86, 0.94), 0.6)
            x += wide
        y += deep
    road = f([(-far, 0), (far, rng.uniform(-30, 30))])
    p.road(road, 12)
    along = np.arctan2(*(road[1] - road[0])[::-1]) - f.angle
    x, y = map(float, road.mean(0))
    p.traffic(Frame(x, y, f.angle + along, p.unit), far, 12, int(rng.integers(1, 5)))
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-0.4, 0.4, 2) * far
        p.hall(f.at(x, y, rng.choice([0, np.pi / 2])), rng.uniform(26, 50), 18, 7, False)
    for _ in range(rng.integers(0, 3)):
        start = rng.uniform(-0.5, 0.5, 2) * far
        for x, y in f(start + np.linspace(0, 1, 14)[:, None] * rng.uniform(-0.6, 0.6, 2) * far):
            p.tree(x, y, rng.uniform(2.5, 5) * p.unit)
    p.trees(20)


def _forest(p: Painter) -> None:
    rng = p.rng
    p.land([(52, 70, 44), (64, 82, 50), (72, 80, 52)], 6)
    if rng.random() < 0.6:
        p.road(p.frame([(-p.reach, 0), (0, rng.uniform(-40, 40)), (p.reach, rng.uniform(-60, 60))]), 8, False)
    thin = noise(rng, 32, 4, 2)
    for x, y, r in rng.random((900, 3)):
        spot = p.canvas.pixels[int(y * len(p.canvas.ids)), int(x * len(p.canvas.ids))].astype(int)
        if thin[int(y * 32), int(x * 32)] > 0.28 and spot[1] > spot[2] + 6:
            p.tree(x * p.size, y * p.size, (3 + 4.5 * r) * p.unit)


_LAYOUTS: dict[str, tuple[Callable[[Painter], None], float]] = {  # and how often each is drawn for detection
    "airport": (_airport, 0.3),
    "harbour": (_harbour, 0.27),
    "industry": (_industry, 0.17),
    "residential": (_housing, 0.1),
    "parking": (_parking, 0.08),
    "farmland": (_fields, 0.08),
    "forest": (_forest, 0.0),
}
KINDS = tuple(name for name in _LAYOUTS if name != "parking")  # as classes of whole pictures


def scene(rng: Generator, size: int = 320, kind: str | None = None) -> Scene:
    """Draw a scene, `size` pixels square; of a kind drawn by lot where none is given.

    Things are those of `NAMES`; planes carry `POINTS`.
    """
    kinds, weights = list(_LAYOUTS), [weight for _, weight in _LAYOUTS.values()]
    painter = Painter(rng, size)
    _LAYOUTS[kind or rng.choice(kinds, p=weights)][0](painter)
    painter.clouds()
    drawn = painter.canvas.scene()
    return Scene(develop(rng, drawn.image, rng.uniform(2, 6), rng.uniform(0, 0.7)), drawn.ids, drawn.things)
