"""Data sets of generated scenes in Ultralytics' formats, drawn on first use and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from ..errors import ConfigError, nearest
from ..files import writable
from . import driving, satellite
from .draw import Floats, Scene, Thing

WEIGHTS = Path(__file__).with_name("driving.pt")  # made by benchmarks/embedded.py
PREFIX = "scenes/"
VERSION = "e252e9615e"  # of the pictures, in the names of cached sets: give another where they change
EMBEDDED: dict[str, Any] = {  # arguments of `visionpeft.train` where the user names neither data nor model
    "model": "scenes/driving.pt",
    "data": "scenes/satellite",
    "epochs": 14,
    "imgsz": 320,
    "batch": 4,
    "lr0": 5e-3,
    "workers": 0,
    "close_mosaic": 4,  # most epochs see four pictures in one: there are not many
}


@dataclass(frozen=True)
class SceneSet:
    """A set of generated scenes.

    Attributes:
        task: Ultralytics' name of the task.
        names: Classes; other things are not labelled.
        draw: Draws a scene, of random numbers and a size in pixels.
        kinds: The pictures' own classes, for classification; `draw` takes one as `kind`.
        train: Pictures to train on (of each kind).
        val: Pictures to measure on (of each kind).
        size: Pixels along each side.
    """

    task: str
    names: tuple[str, ...]
    draw: Callable[..., Scene]
    kinds: tuple[str, ...] = ()
    train: int = 160
    val: int = 64
    size: int = 320

    def entry(self, root: Path) -> Path:
        """Return what `train` takes of a drawn set: its data YAML, or its folder for classification."""
        return root if self.kinds else root / "data.yaml"


SETS = {
    "satellite": SceneSet("detect", satellite.NAMES, satellite.scene),
    "satellite-seg": SceneSet("segment", satellite.NAMES, satellite.scene),
    "satellite-obb": SceneSet("obb", satellite.NAMES, satellite.scene),
    "satellite-pose": SceneSet("pose", ("plane",), partial(satellite.scene, kind="airport")),
    "satellite-cls": SceneSet("classify", (), satellite.scene, satellite.KINDS, train=40, val=16, size=128),
    "driving": SceneSet("detect", driving.NAMES, driving.scene),
    "driving-seg": SceneSet("segment", driving.NAMES, driving.scene),
    "night": SceneSet("detect", driving.NAMES, partial(driving.scene, night=True)),
}


def find_set(name: str) -> SceneSet:
    """Return the set of a name, without the "scenes/" before it.

    Raises:
        ConfigError: There is none.
    """
    if name not in SETS:
        known = [PREFIX + n for n in (*SETS, WEIGHTS.name)]
        raise ConfigError(f"'{PREFIX}{name}' is not known; there is {', '.join(known)}.{nearest(PREFIX + name, known)}")
    return SETS[name]


def write(
    name: str, root: str | Path, *, train: int | None = None, val: int | None = None, size: int | None = None, seed: int = 0
) -> Path:
    """Draw a set into a new folder, which is there when it is complete and not before.

    Args:
        name: One of `SETS`, such as satellite.
        root: The folder to make.
        train: Pictures to train on; for classification of each kind.
        val: Pictures to measure on; for classification of each kind.
        size: Pixels along each side.
        seed: The same one draws the same pictures.

    Returns:
        The data YAML; for classification the folder.

    Raises:
        ConfigError: The name is not known, a number is not usable, or the folder exists or cannot be written.
    """
    scene_set, root = find_set(name), Path(root)
    counts = {"train": scene_set.train if train is None else train, "val": scene_set.val if val is None else val}
    side = scene_set.size if size is None else size
    if min(counts.values()) < 1 or not 32 <= side <= 4096:
        given = f"train={counts['train']}, val={counts['val']}, size={side}"
        raise ConfigError(f"{given} is not usable; train and val must be at least 1, size 32 to 4096")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root} exists; give a new folder to draw {PREFIX}{name} into")
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=writable(root.resolve().parent)))
    try:
        _draw(scene_set, temporary, counts, side, seed)
        temporary.chmod(0o755)
        try:
            os.replace(temporary, root)
        except OSError:
            if not scene_set.entry(root).exists():  # it does where another process has drawn the same meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return scene_set.entry(root)


# --------------------------------------------------------------------------------------------------------------- on disk
def _draw(scene_set: SceneSet, root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    names = scene_set.names
    for number, (part, count) in enumerate(counts.items()):
        for k, kind in enumerate(scene_set.kinds):
            folder = root / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                scene = scene_set.draw(np.random.default_rng([seed, number, k, i]), size, kind=kind)
                _save(scene, folder / f"{i:04d}.jpg")
        if scene_set.kinds:
            continue
        for folder in (root / "images" / part, root / "labels" / part):
            folder.mkdir(parents=True)
        for i in range(count):
            scene = scene_set.draw(np.random.default_rng([seed, number, i]), size)
            _save(scene, root / "images" / part / f"{i:04d}.jpg")
            rows = [f"{names.index(t.name)} {_row(t, scene_set.task, size)}\n" for t in scene.things if t.name in names]
            (root / "labels" / part / f"{i:04d}.txt").write_text("".join(rows))
    if not scene_set.kinds:
        facts: dict[str, object] = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
        if scene_set.task == "pose":
            facts |= {"kpt_shape": [len(satellite.POINTS), 3], "flip_idx": list(satellite.FLIPPED)}
            facts |= {"kpt_names": {i: list(satellite.POINTS) for i in range(len(names))}}
        (root / "data.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))


def _save(scene: Scene, path: Path) -> None:
    """Write a JPEG, not through OpenCV's own files, which know no paths beyond ASCII on Windows."""
    good, data = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    if not good:
        raise OSError(f"{path} could not be encoded")
    path.write_bytes(data.tobytes())


def _row(thing: Thing, task: str, size: int) -> str:
    """Return a label without its class, as shares of the picture."""
    if task == "segment":
        return _numbers(_simple(thing.outline) / size)
    if task == "obb":  # Ultralytics refuses corners outside the picture
        return _numbers(thing.corners / size)
    x0, y0, x1, y1 = thing.box
    box = _numbers(np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / size)
    if task != "pose":
        return box
    return " ".join([box, *(f"{_numbers(np.array([x, y]) / size)} {int(seen)}" for x, y, seen in thing.points)])


def _simple(outline: Floats) -> Floats:
    """Return an outline with fewer points, the same to a third of a pixel."""
    short = np.asarray(cv2.approxPolyDP(outline.astype(np.float32)[:, None], 0.33, True), float)[:, 0]
    return short if len(short) > 2 else outline


def _numbers(values: Floats | Sequence[float]) -> str:
    return " ".join(f"{v:.5f}" for v in np.clip(np.ravel(values), 0, 1))
