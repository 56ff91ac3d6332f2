"""Satellite scenes: airports, harbours, tank farms, housing, car parks, fields and forest, seen from straight above."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from .above import ASPHALT, CONTAINERS, GRASS, PAVED, SOIL, WATER, AerialPainter
from .draw import Frame, Scene, develop, ellipse, near, noise, rectangle

NAMES = ("plane", "ship", "vehicle", "tank", "court")
POINTS = ("nose", "left tip", "right tip", "tail")  # of a plane
FLIPPED = (0, 2, 1, 3)  # which of them is which in a mirror


# ------------------------------------------------------------------------------------------------------------- the layouts
def _airport(p: AerialPainter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(GRASS)
    far = p.reach
    runway = rng.uniform(70, 110)
    p.sheet(f(rectangle(2 * far, 34, 0, -runway)), p.pick(ASPHALT))
    for x in np.arange(-far, far, 26):
        draw(f(rectangle(13, 1.4, x, -runway)), (222, 222, 216))
    for y in (-15.5, 15.5):
        draw(f(rectangle(2 * far, 0.9, 0, y - runway)), (214, 214, 208))
    end = rng.uniform(-0.4, 0.4) * far
    for y in np.linspace(-13, 13, 9):
        draw(f(rectangle(20, 1.6, end, y - runway)), (222, 222, 216))
    taxi = -runway + rng.uniform(44, 58)
    grey = p.pick(PAVED)
    for x in rng.uniform(-0.5, 0.5, 2) * far:
        p.sheet(f(rectangle(16, taxi + runway, x, (taxi - runway) / 2)), grey)
        p.canvas.line(f([(x, -runway), (x, taxi)]), (206, 170, 60), 0.6)
    p.sheet(f(rectangle(2 * far, 17, 0, taxi)), grey)
    p.canvas.line(f([(-far, taxi), (far, taxi)]), (206, 170, 60), 0.6)
    near_edge, deep = taxi + rng.uniform(12, 22), rng.uniform(90, 150)
    apron = p.pick(PAVED)
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


def _harbour(p: AerialPainter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(WATER, 4, 0.16)
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
        for offset, colour in ((-8, (120, 140, 136)), (0, (206, 190, 154)), (16, p.pick(GRASS))):
            edge = np.concatenate([np.stack([along, line + offset], 1), [(far, 3 * far), (-far, 3 * far)]])
            p.sheet(f(edge), colour)
        p.trees(120)
        return
    p.sheet(f(rectangle(2 * far, 2 * far, 0, shore + far)), p.pick(PAVED))
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
                    draw(box, p.pick(CONTAINERS))
    p.traffic(f.at(0, shore + 16), 2 * far, 18, int(rng.integers(2, 9)))


def _industry(p: AerialPainter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land([*SOIL, *PAVED], 7)
    far, pitch = p.reach, rng.uniform(58, 84)
    half = int(far / pitch / 1.6) + 1
    for i in range(-half, half + 1):
        p.road(f([(-far, (i + 0.5) * pitch), (far, (i + 0.5) * pitch)]), 10, False)
    for i in range(-half, half + 1):
        kind = rng.choice(["tanks", "halls", "yard"], p=[0.55, 0.25, 0.2])
        for j in range(-half, half + 1):
            at = f.at(j * pitch, i * pitch)
            if kind == "tanks":
                draw(at(rectangle(pitch - 12, pitch - 14)), p.pick(SOIL))
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
                    draw(heap, p.pick([*CONTAINERS, *SOIL]))
                for x, y in (rng.random((2, 2)) - 0.5) * pitch * 0.6:  # round, but no tanks: basins
                    draw(at(ellipse(16, 16, x, y)), near(rng, (150, 148, 140)))
                    draw(at(ellipse(14, 14, x, y)), p.pick(WATER))
        p.traffic(f.at(0, (i + 0.5) * pitch), 2 * far, 10, int(rng.integers(0, 5)))


def _housing(p: AerialPainter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(GRASS, 8)
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
                draw(drive, p.pick(PAVED))
                p.house(at)
                if rng.random() < 0.5:
                    turn = np.pi / 2 * rng.choice([-1, 1])
                    p.vehicle(f.at(x + 14, i * block + side * block * 0.36, turn, p.unit * rng.uniform(12.5, 14.5)))
                if rng.random() < 0.22:
                    draw(f(ellipse(11, 7, x - 10, i * block + side * 5)), near(rng, (84, 168, 186)))
        p.traffic(f.at(0, (i + 0.5) * block), 2 * far, 15, int(rng.integers(1, 6)))
    p.trees(150)


def _parking(p: AerialPainter) -> None:
    rng, f, draw = p.rng, p.frame, p.canvas.polygon
    p.land(GRASS if rng.random() < 0.5 else PAVED, 7)
    far = p.reach
    p.sheet(f(rectangle(1.4 * far, 1.1 * far)), p.pick(ASPHALT))
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
            draw(f(rectangle(1.3 * far, 46, 0, y + 23)), p.pick(GRASS))
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


def _fields(p: AerialPainter) -> None:
    rng, f = p.rng, p.frame
    p.land(GRASS, 6)
    far = p.reach
    y = -far
    while y < far:
        deep, x = rng.uniform(70, 150), -far
        while x < far:
            wide = rng.uniform(70, 200)
            colour = np.asarray(p.pick([*GRASS, *SOIL, (170, 156, 92), (92, 124, 58), (188, 170, 110)]))
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


def _forest(p: AerialPainter) -> None:
    rng = p.rng
    p.land([(52, 70, 44), (64, 82, 50), (72, 80, 52)], 6)
    if rng.random() < 0.6:
        p.road(p.frame([(-p.reach, 0), (0, rng.uniform(-40, 40)), (p.reach, rng.uniform(-60, 60))]), 8, False)
    thin = noise(rng, 32, 4, 2)
    for x, y, r in rng.random((900, 3)):
        spot = p.canvas.pixels[int(y * len(p.canvas.ids)), int(x * len(p.canvas.ids))].astype(int)
        if thin[int(y * 32), int(x * 32)] > 0.28 and spot[1] > spot[2] + 6:
            p.tree(x * p.size, y * p.size, (3 + 4.5 * r) * p.unit)


_LAYOUTS: dict[str, tuple[Callable[[AerialPainter], None], float]] = {  # and how often each is drawn for detection
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
    painter = AerialPainter(rng, size)
    _LAYOUTS[kind or rng.choice(kinds, p=weights)][0](painter)
    painter.clouds()
    drawn = painter.canvas.scene()
    return Scene(develop(rng, drawn.image, rng.uniform(2, 6), rng.uniform(0, 0.7)), drawn.ids, drawn.things)
