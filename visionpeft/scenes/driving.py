"""Driving scenes: a road in perspective, its traffic, signs and lights, by day, dusk and night, in rain and fog."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from .camera import Pose
from .draw import FINE, Colour, Floats, Scene, blend, develop, near, noise
from .street import StreetPainter

NAMES = ("car", "truck", "bus", "cyclist", "person", "sign", "light")


class DrivingPainter(StreetPainter):
    """Draws a whole scene, from the sky to the rain."""

    def backdrop(self) -> None:
        """Draw sky, clouds, hills and ground."""
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
        """Draw asphalt with kerbs, pavements and markings."""
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
        """Put something z metres away on the list that is drawn from the far end."""
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

        def along(x: float, z: float) -> Pose:
            return Pose(x, z, (0 if x > 0 else np.pi) - np.arctan(2 * self.view.bend * z) + rng.normal(0, 0.03))

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
            self.add(z, self.car, Pose(rng.uniform(-edge, edge), z, turn))
        if rng.random() < 0.45:  # some are parked
            side = rng.choice([-1, 1])
            for z in np.arange(rng.uniform(6, 14), 60, 6.2):
                if rng.random() < 0.6:
                    self.add(z, self.car, along(side * (edge + 0.9), z))

    def shine(self, picture: Floats) -> Floats:
        """Return a picture with the light of one's own headlights and of all lamps."""
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
    painter = DrivingPainter(rng, size, light, weather)
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
