"""Generated scenes: the same seed draws the same, labels say what is seen, and every set is what Ultralytics expects."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import ClassificationDataset, YOLODataset
from ultralytics.data.utils import check_cls_dataset, check_det_dataset, load_dataset_cache_file
from ultralytics.nn.tasks import torch_safe_load

from visionpeft import scenes, sources
from visionpeft.errors import ConfigError
from visionpeft.scenes import sets
from visionpeft.scenes.draw import FINE, Canvas, Frame, ellipse, rectangle

KINDS = [*scenes.satellite.KINDS, "parking"]
PAINTERS = {f"satellite, {kind}": partial(scenes.satellite.scene, kind=kind) for kind in KINDS}
PAINTERS |= {"driving": scenes.driving.scene, "night": partial(scenes.driving.scene, night=True)}


# -------------------------------------------------------------------------------------------------------------- the drawing
@pytest.mark.parametrize("name", PAINTERS)
def test_the_same_seed_draws_the_same(name: str) -> None:
    one, two, other = (PAINTERS[name](np.random.default_rng(seed), 96) for seed in (1, 1, 2))
    assert one.image.shape == (96, 96, 3) and one.image.dtype == np.uint8
    assert one.image.tobytes() == two.image.tobytes() != other.image.tobytes()
    assert [(t.name, t.box) for t in one.things] == [(t.name, t.box) for t in two.things]


@pytest.mark.parametrize("name", PAINTERS)
def test_labels_are_what_is_seen(name: str) -> None:
    found = 0
    for seed in range(4):
        scene = PAINTERS[name](np.random.default_rng(seed), 192)
        for thing in scene.things:
            found += 1
            rows, columns = np.nonzero(scene.ids == thing.id)
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert thing.box == tuple(e / FINE for e in edges)
            assert min(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) >= 5
            low, high = thing.outline.min(0), thing.outline.max(0)  # through the centres of the outermost fine pixels
            assert np.allclose([*(low - 0.5 / FINE), *(high + 0.5 / FINE)], thing.box)
            mask = np.zeros(scene.ids.shape, np.uint8)
            cv2.fillPoly(mask, [np.round(thing.outline * FINE - 0.5).astype(np.int32)], 1)
            assert mask[rows, columns].all(), "the outline leaves something out"
            side = np.roll(thing.corners, -1, 0) - thing.corners
            assert np.allclose(np.sum(side * np.roll(side, 1, 0), 1), 0, atol=1e-6), "corners are those of a rectangle"
            centres = np.stack([columns, rows], 1) / FINE + 0.5 / FINE - thing.corners[0]
            for edge in (side[0], -side[3]):
                along = centres @ edge / (edge @ edge)
                assert 0 <= along.min() and along.max() <= 1, "a pixel lies outside the oriented box"
    assert found or "forest" in name


def _square(*over: tuple[float, float, float, float]) -> scenes.Scene:
    """A square from 10 to 50, and rectangles (length, width, x, y) drawn over it."""
    canvas = Canvas(64)
    with canvas.thing("square", points=[(12, 12), (30, 30), (48, 48), (90, 30)]):
        canvas.polygon(rectangle(40, 40, 30, 30), (200, 200, 200))
    for shape in over:
        canvas.polygon(rectangle(*shape), (20, 20, 20))
    return canvas.scene()


def test_a_thing_is_labelled_by_its_visible_part() -> None:
    (whole,) = _square().things
    assert np.allclose(whole.box, (10, 10, 50, 50), atol=0.5)
    assert whole.points[:, 2].tolist() == [2, 2, 2, 0] and not whole.points[3, :2].any()
    (half,) = _square((30, 64, 15, 32)).things  # its left half is hidden
    assert np.allclose(half.box, (30, 10, 50, 50), atol=0.6)
    assert half.points[:2, 2].tolist() == [1, 2]
    assert np.allclose(half.corners.min(0), (30, 10), atol=0.6)
    assert not _square((45, 64, 22.5, 32)).things, "of which a tenth is seen"


def test_parts_that_something_separates_are_one_outline() -> None:
    scene = _square((4, 64, 24, 32))  # a pole in front
    (thing,) = scene.things
    assert np.allclose(thing.box, (10, 10, 50, 50), atol=0.5)
    mask = np.zeros(scene.ids.shape, np.uint8)
    cv2.fillPoly(mask, [np.round(thing.outline * FINE - 0.5).astype(np.int32)], 1)
    seen = scene.ids == thing.id
    assert (mask.astype(bool) & seen).sum() == seen.sum()
    assert (mask.astype(bool) & ~seen).sum() < 0.02 * seen.sum(), "the line between the parts has no width to speak of"


def test_shadows_and_lights_change_no_labels() -> None:
    canvas = Canvas(64)
    with canvas.thing("disc"):
        canvas.polygon(ellipse(30, 30, 32, 32), (100, 100, 100))
    before = canvas.ids.copy()
    canvas.shade(rectangle(20, 20, 32, 32), 0.5, soft=1.0)
    canvas.shade(rectangle(20, 20, 500, 500), 0.5)
    assert canvas.pixels[64, 64, 0] == 50
    assert np.array_equal(before, canvas.ids)


def test_a_frame_turns_and_scales() -> None:
    frame = Frame(10, 20, np.pi / 2, 2)
    assert np.allclose(frame([(1, 0), (0, 1)]), [(10, 22), (8, 20)])  # forward is down, right is left
    assert np.allclose(frame.at(1, 0, np.pi / 2)([(1, 0)]), [(8, 22)])


def test_points_of_a_plane_are_its_own() -> None:
    scene = scenes.satellite.scene(np.random.default_rng(5), 320, "airport")
    planes = [t for t in scene.things if t.name == "plane" and (t.points[:, 2] > 0).all()]
    assert planes
    for plane in planes:
        nose, left, right, tail = plane.points[:, :2]
        ahead = nose - tail
        assert np.cross([*ahead, 0], [*(right - left), 0])[2] > 0, "right is clockwise of ahead, as rows grow downwards"
        assert np.isclose(np.linalg.norm(nose - left), np.linalg.norm(nose - right), rtol=1e-3)


def test_what_is_drawn_is_what_the_cached_sets_show() -> None:
    """A set is not drawn anew while its version stays, so a change of the pictures needs another one."""
    drawn = [draw(np.random.default_rng(2), 160) for draw in PAINTERS.values()]
    assert sets.VERSION == "e252e9615e"
    assert [len(scene.things) for scene in drawn] == [10, 53, 17, 23, 1, 0, 115, 11, 9]
    means = [scene.image.mean() for scene in drawn]
    assert means == pytest.approx([120.7, 91.3, 136.4, 109.9, 119.0, 69.1, 93.8, 95.2, 39.4], abs=0.5)


# ----------------------------------------------------------------------------------------------------------------- the sets
@pytest.mark.parametrize("name", [n for n, s in scenes.SETS.items() if not s.kinds])
def test_ultralytics_reads_every_set(name: str, tmp_path: Path) -> None:
    path = scenes.write(name, tmp_path / "set", train=4, val=2, size=160)
    data, task = check_det_dataset(str(path)), scenes.SETS[name].task
    assert tuple(data["names"].values()) == scenes.SETS[name].names
    rows = [row for file in sorted((tmp_path / "set/labels/train").iterdir()) for row in file.read_text().splitlines()]
    dataset = YOLODataset(img_path=data["train"], data=data, task=task, imgsz=160, augment=False, hyp=get_cfg())
    facts = load_dataset_cache_file(tmp_path / "set/labels/train.cache")
    assert facts["msgs"] == [] and facts["results"][3] == 0, "Ultralytics has something to say of the labels"
    assert len(dataset) == 4 and sum(len(label["cls"]) for label in dataset.labels) == len(rows) > 0
    sample = dataset[0]
    assert sample["img"].shape == (3, 160, 160)
    if task == "pose":
        assert data["flip_idx"] == [0, 2, 1, 3]
        assert sample["keypoints"].shape == (len(sample["cls"]), 4, 3)
    if task == "obb":
        assert sample["bboxes"].shape == (len(sample["cls"]), 5)
    if task == "segment":
        assert sample["masks"].max() > 0


def test_segments_span_the_boxes_of_the_same_pictures(tmp_path: Path) -> None:
    """The sets of one look share their pictures, so tasks can be compared."""
    one, two = (scenes.write(name, tmp_path / name, train=1, val=1, size=160).parent for name in ("driving", "driving-seg"))
    image, label = "images/train/0000.jpg", "labels/train/0000.txt"
    assert (one / image).read_bytes() == (two / image).read_bytes()
    for box, outline in zip(*((root / label).read_text().splitlines() for root in (one, two)), strict=True):
        x, y, w, h = map(float, box.split()[1:])
        points = np.array(outline.split()[1:], float).reshape(-1, 2)
        assert box.split()[0] == outline.split()[0]
        assert np.allclose([*points.min(0), *points.max(0)], [x - w / 2, y - h / 2, x + w / 2, y + h / 2], atol=0.7 / 160)


def test_ultralytics_reads_the_classification_set(tmp_path: Path) -> None:
    root = scenes.write("satellite-cls", tmp_path / "set", train=2, val=1, size=64)
    data = check_cls_dataset(str(root))
    assert sorted(data["names"].values()) == sorted(scenes.satellite.KINDS)
    dataset = ClassificationDataset(str(root / "train"), args=get_cfg(overrides={"imgsz": 64}))
    assert len(dataset) == 2 * len(scenes.satellite.KINDS) and {s[1] for s in dataset.samples} == set(range(6))
    with Image.open(next((root / "val/forest").iterdir())) as image:
        assert image.size == (64, 64)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="mine exists; give a new folder"):
        scenes.write("driving", tmp_path / "mine")
    with pytest.raises(ConfigError, match="train=0, .* is not usable; train and val must be at least 1"):
        scenes.write("driving", tmp_path / "new", train=0)
    with pytest.raises(ConfigError, match="size=8 is not usable; train and val must"):
        scenes.write("driving", tmp_path / "new", size=8)
    with pytest.raises(ConfigError, match="'scenes/drivin' is not known.*Did you mean 'scenes/driving'"):
        scenes.write("drivin", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


# ------------------------------------------------------------------------------------------------------ names and the cache
@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sets of a few small pictures, kept in a folder of their own, which is returned."""
    for name, made in scenes.SETS.items():
        monkeypatch.setitem(sets.SETS, name, dataclasses.replace(made, train=2, val=1, size=64))
    monkeypatch.setenv("VISIONPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", scenes.SETS)
def test_a_name_is_drawn_once(name: str, small: Path, capsys: pytest.CaptureFixture) -> None:
    path = Path(sources.find(f"scenes/{name}"))
    assert path.is_dir() if scenes.SETS[name].kinds else path.name == "data.yaml" and path.is_file()
    assert "drawing scenes/" in capsys.readouterr().err
    (stamp,) = {p.stat().st_mtime_ns for p in small.iterdir()}
    assert sources.find(f"scenes/{name}") == str(path)
    assert [p.stat().st_mtime_ns for p in small.iterdir()] == [stamp] and not capsys.readouterr().err


def test_other_names_are_left_alone(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("coco8.yaml", "yolo11n.pt", "/data/scenes/satellite", "scenes"):
        assert sources.find(source) == source
    assert sources.find("scenes/driving.pt") == str(scenes.WEIGHTS)
    with pytest.raises(ConfigError, match="'scenes/satelite' is not known; there is .*Did you mean 'scenes/satellite'"):
        sources.find("scenes/satelite")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes/satellite").mkdir(parents=True)
    assert sources.find("scenes/satellite") == "scenes/satellite", "a folder of one's own goes before"
    assert not small.exists() and scenes.find is sources.find


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("a file is no folder, not even for root")
    monkeypatch.delenv("VISIONPEFT_CACHE", raising=False)
    for variable in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.setenv(variable, str(file / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert sources.cache_folder().parent == tmp_path and sources.cache_folder().is_dir()
    monkeypatch.setenv("VISIONPEFT_CACHE", str(file / "cache"))
    with pytest.raises(ConfigError, match="VISIONPEFT_CACHE=.* may write to"):
        sources.cache_folder()


def test_an_interrupted_drawing_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, drawn = scenes.SETS["driving"], []

    def draw(rng: np.random.Generator, size: int) -> scenes.Scene:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(size)
        return made.draw(rng, size)

    monkeypatch.setitem(sets.SETS, "driving", dataclasses.replace(made, draw=draw))
    with pytest.raises(KeyboardInterrupt):
        sources.find("scenes/driving")
    assert drawn and list(small.iterdir()) == []


def test_two_processes_may_draw_at_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, others = scenes.SETS["driving"], []

    def draw(rng: np.random.Generator, size: int) -> scenes.Scene:
        if not others:  # while the first draws, another begins and is ready earlier
            others.append("")
            others.append(sources.find("scenes/driving"))
        return made.draw(rng, size)

    monkeypatch.setitem(sets.SETS, "driving", dataclasses.replace(made, draw=draw))
    assert sources.find("scenes/driving") == others[1]
    assert [p.name for p in small.iterdir()] == [Path(others[1]).parent.name]


# ------------------------------------------------------------------------------------------------------------- the detector
def test_the_packaged_weights_are_small_and_plain() -> None:
    assert scenes.WEIGHTS.stat().st_size <= 2_000_000
    content, _ = torch_safe_load(str(scenes.WEIGHTS), safe_only=True)
    model = content["model"]
    assert tuple(model.names.values()) == scenes.driving.NAMES
    assert len(model.model) == 24 and type(model.model[9]).__name__ == "SPPF", "freeze=10 means the backbone"
    assert not [v for v in content["train_args"].values() if str(v).startswith("/")]


@pytest.mark.slow
def test_what_it_learnt_on_driving_scenes_helps_on_satellite_scenes(tmp_path: Path) -> None:
    import visionpeft

    net = Path(__file__).parents[2] / "benchmarks" / "yolo11n-narrow.yaml"
    plain = {k: v for k, v in scenes.EMBEDDED.items() if k not in ("model", "data")}

    def score(model: str | Path, **options: object) -> tuple[float, float]:
        run = visionpeft.train(
            sources.find(scenes.EMBEDDED["data"]),
            model=model,
            device="cpu",
            project=tmp_path,
            plots=False,
            **plain,
            **options,
        )
        return run.before["mAP50"], run.after["mAP50"]

    before, frozen = score(scenes.WEIGHTS, freeze=10)
    assert frozen > before + 0.3
    assert frozen > score(net, method="full")[1] + 0.1
    assert frozen > score(scenes.WEIGHTS, method="full")[1] - 0.05
