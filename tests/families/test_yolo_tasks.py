"""YOLO's tasks: real runs on tiny images, merged into files that Ultralytics opens, drawn, exported, and refused."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ctrl_c, flat, make_boxes, make_squares, yolo
from PIL import Image
from ultralytics import YOLO
from ultralytics.engine.results import Results

import visionpeft
from visionpeft.data import check
from visionpeft.errors import DataError, Interrupted
from visionpeft.families.yolo.pictures import predicted, scaled
from visionpeft.families.yolo.tasks import TASKS, with_head
from visionpeft.registry import FAMILIES

SMALL: dict[str, Any] = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "quiet": True}
MODELS = {"segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets by task."""
    root = tmp_path_factory.mktemp("sets")
    made = {task: make_boxes(root / task, task) for task in TASKS if task != "classify"}
    return {**made, "classify": make_squares(root / "classify", size=64)}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain checkpoints of random networks by name, of classes other than the sets'."""
    root = tmp_path_factory.mktemp("bases")
    made = {}
    for name in [f"yolo{v}n{suffix}" for v in ("v8", "26") for suffix in MODELS.values()]:
        torch.manual_seed(0)
        model = yolo(name, classes=7)
        model.args = {"imgsz": 64}
        made[name] = root / f"{name}.pt"
        torch.save({"model": model.half(), "train_args": {"imgsz": 64}, "epoch": -1}, made[name])
    return made


@pytest.fixture(scope="session", params=[f"yolo{v}n{s}" for v in ("v8", "26") for s in MODELS.values()])
def run(request, sets: dict, bases: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, visionpeft.Run]:
    task = next(t for t, suffix in MODELS.items() if request.param.endswith(suffix))
    method = {"method": "lora", "r": 2} if "v8" in request.param else {"method": "adapter", "freeze": 2}
    folder = tmp_path_factory.mktemp(request.param)
    return task, visionpeft.train(sets[task], model=bases[request.param], project=folder, **SMALL, **method)


def test_a_run_of_each_task(run: tuple, sets: dict) -> None:
    task, made = run
    assert set(made.after) == set(TASKS[task].metrics.values()) and TASKS[task].score in made.after
    header = visionpeft.inspect(made.delta)
    assert header["task"] == task and header["outputs"] == ({"kpt_shape": [2, 3]} if task == "pose" else {})
    assert visionpeft.val(made.delta, sets[task], device="cpu") == made.after
    for picture in made.pictures.values():
        with Image.open(picture) as image:
            assert image.size > (300, 300) and len(set(image.convert("L").resize((40, 40)).tobytes())) > 8


def test_predicts_the_tasks_own_results(run: tuple, sets: dict) -> None:
    task, made = run
    images = sorted((sets[task] if task == "classify" else sets[task].parent).rglob("val/**/*.png"))[:2]
    results = visionpeft.predict(made.delta, [str(f) for f in images], conf=1e-4, device="cpu")
    assert len(results) == 2
    for result in results:
        part = {"segment": result.masks, "pose": result.keypoints, "obb": result.obb, "classify": result.probs}[task]
        assert part is not None and (task == "classify" or len(part) > 0)


def test_merged_files_need_no_visionpeft(run: tuple, sets: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics opens them where visionpeft cannot be imported, and measures what the run measured."""
    task, made = run
    if made.merged is None:
        return
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "visionpeft"]:
            patch.setitem(sys.modules, name, None)
        patch.chdir(made.folder)
        given = {"data": str(sets[task]), "imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "verbose": False}
        said = YOLO(made.merged).val(**given).results_dict
    assert {ours: said[theirs] for theirs, ours in TASKS[task].metrics.items()} == pytest.approx(made.after, abs=1e-3)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():  # those may all be zero so early; the outputs are not
        merged, adapted = (flat(m.float().eval()(x)) for m in (YOLO(made.merged).model, visionpeft.load(made.delta).model))
    for a, b in zip(merged, adapted, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-3 * float(b.abs().max())) and b.abs().max() > 0


def test_exported_files_see_the_same(run: tuple, tmp_path: Path) -> None:
    import onnxruntime

    task, made = run
    adapted = visionpeft.load(made.delta)
    out = visionpeft.export(adapted, "onnx", tmp_path / "model.onnx", device="cpu")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        y = adapted.model(x)
    while isinstance(y, tuple | list):
        y = y[0]
    session = onnxruntime.InferenceSession(out)
    seen = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.allclose(seen, y, rtol=1e-3, atol=1e-4)


def test_resumed_equals_uninterrupted(sets: dict, bases: dict, tmp_path: Path) -> None:
    """A classifier too, whose images have no mosaic to go on with."""
    from visionpeft.families.yolo.trainer import PeftTrainerMixin

    args = {**SMALL, "epochs": 3, "method": "lora", "r": 2, "project": tmp_path, "model": bases["yolo26n-cls"]}
    whole = visionpeft.train(sets["classify"], name="whole", **args)
    with ctrl_c(PeftTrainerMixin, "_model_train", after=2), pytest.raises(Interrupted, match="go on with resume="):
        visionpeft.train(sets["classify"], name="parts", **args)
    rest = visionpeft.train(resume=tmp_path / "parts", quiet=True)
    one, two = (torch.load(r.folder / "checkpoint.pt", weights_only=True)["ema"] for r in (whole, rest))
    assert all(torch.equal(one[k], two[k]) for k in one) and whole.history == rest.history


@pytest.mark.parametrize("head", ["keep", "rebuild"])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_classifiers_rows_are_kept(classes: int, head: str) -> None:
    base: Any = yolo("yolo11n-cls", classes=classes)
    new: Any = with_head(base, {0: "other", 1: "Class 0"}, 3, head, {})
    rows, old = new.model[-1].linear.weight, base.model[-1].linear.weight
    assert torch.equal(rows[1], old[0]) == (head == "keep")
    assert not any(torch.equal(rows[0], row) for row in old)
    assert torch.equal(new.model[-1].conv.conv.weight, base.model[-1].conv.conv.weight)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ("", "has kpt_shape=None; a pose set says kpt_shape"),
        ("kpt_shape: [2, 5]", r"has kpt_shape=\[2, 5\]"),
        ("kpt_shape: [a, 3]", r"has kpt_shape=\['a', 3\]"),
        (
            "kpt_shape: [2, 3]\nkpt_oks_sigmas: [0.1]",
            r"has kpt_oks_sigmas=\[0.1\]; it must hold a number above 0",
        ),
        ("kpt_shape: [2, 3]\nflip_idx: [0, 2]", r"has flip_idx=\[0, 2\]; it must name each of the keypoints 0 to 1"),
    ],
)
def test_keypoints_that_are_not_described(points: str, said: str, sets: dict, tmp_path: Path) -> None:
    root = sets["pose"].parent
    data = tmp_path / "data.yaml"
    data.write_text(f"train: {root}/images/train\nval: {root}/images/val\nnames: [red, green]\n{points}\n")
    with pytest.raises(DataError, match=said):
        visionpeft.plan("yolo11n-pose.yaml", data=data)


def test_a_folder_for_a_classifier(sets: dict, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; give one that holds train/CLASS"):
        visionpeft.plan("yolo11n-cls.yaml", data=sets["detect"])
    with pytest.raises(DataError, match="is no data YAML"):
        visionpeft.plan("yolo11n.yaml", data=sets["classify"])


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_labels_are_drawn_where_they_are(task: str, sets: dict) -> None:
    family = visionpeft.api.find_family("yolo11n.pt")
    data = family.read_data(str(sets[task]), family.load(f"yolo11n{MODELS.get(task, '')}.yaml"))
    nameless = dataclasses.replace(data, names={0: "", 1: ""})
    for drawn, file in zip(family.draw(None, nameless, 4), data.val, strict=True):
        image = scaled(cv2.imread(file))[..., ::-1]
        square = (image.max(2) > 200).astype(np.uint8)
        changed = np.abs(drawn.astype(int) - image).max(2) > 30
        near = cv2.dilate(square, np.ones((25, 25))) > 0
        edge = cv2.morphologyEx(square, cv2.MORPH_GRADIENT, np.ones((9, 9))) > 0
        assert not changed[~near].any() and changed[edge].mean() > (0.1 if task == "pose" else 0.3)


def test_predictions_are_drawn_where_they_are() -> None:
    """Found on the image as it is, drawn on a smaller one."""
    image = np.zeros((600, 1200, 3), np.uint8)
    found = {
        "boxes": {"boxes": torch.tensor([[300.0, 150, 900, 450, 0.9, 0]])},
        "obb": {"obb": torch.tensor([[600.0, 300, 600, 300, 0.0, 0.9, 0]])},
        "masks": {"boxes": torch.zeros(1, 6), "masks": torch.zeros(1, 600, 1200)},
        "keypoints": {"boxes": torch.zeros(1, 6), "keypoints": torch.tensor([[[300.0, 150, 1], [900, 450, 1]]])},
    }
    found["masks"]["masks"][:, 150:450, 300:900] = 1
    for given in found.values():
        drawn = predicted(Results(image, "x.png", {0: ""}, **given))
        height, width = drawn.shape[:2]
        marked = drawn.max(2) > 60
        marked[:24, :80] = False  # what is drawn of boxes without size
        rows, columns = np.nonzero(marked)
        span = (rows.min() / height, rows.max() / height, columns.min() / width, columns.max() / width)
        assert span == pytest.approx((0.25, 0.75, 0.25, 0.75), abs=0.12)  # a score stands above boxes, kind


def test_yolo_opens_the_merged_file_with_its_task(run: tuple) -> None:
    task, made = run
    if made.merged:
        assert YOLO(made.merged).task == task


def test_keypoints_of_another_number(sets: dict, bases: dict, tmp_path: Path) -> None:
    run = visionpeft.train(sets["pose"], model=bases["yolov8n-pose"], method="head", project=tmp_path, **SMALL)
    data = tmp_path / "data.yaml"
    root = sets["pose"].parent
    shutil.copytree(root, tmp_path / "three", ignore=shutil.ignore_patterns("*.cache"))
    for label in (tmp_path / "three").rglob("*.txt"):
        label.write_text("".join(f"{row} 0 0 0\n" for row in label.read_text().splitlines()))
    names = "[red, green]"
    data.write_text(f"path: {tmp_path}/three\ntrain: images/train\nval: images/val\nnames: {names}\nkpt_shape: [3, 3]\n")
    with pytest.raises(DataError, match=r"kpt_shape=\[3, 3\], but the model's are \[2, 3\]"):
        visionpeft.val(run.delta, data, device="cpu")


@pytest.mark.pictures
def test_what_spoils_pictures_does_not_spoil_runs(tmp_path: Path, bases: dict) -> None:
    """An unreadable image to validate on, and a name that matplotlib would take for a formula."""
    data = make_boxes(tmp_path / "$a_$", "obb")
    (data.parent / "images" / "val" / "0.png").write_bytes(b"x")
    run = visionpeft.train(data, model=bases["yolov8n-obb"], method="head", project=tmp_path, **SMALL)
    assert all(f.is_file() for f in run.pictures.values())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train/.ipynb_checkpoints/x.png", True, "the hidden folder .*ipynb_checkpoints for a class"),
        ("train/red/.ipynb_checkpoints/x.png", True, "would train on .*x.png, though .ipynb_checkpoints is hidden"),
        ("val/red/.x.png", True, "would train on .*x.png, though .x.png is hidden"),
        ("val/red/._x.png", False, ""),  # of macOS, no image
        ("train/red/.notes/x.txt", False, ""),
    ],
)
def test_what_is_hidden_is_no_part_of_a_set(name: str, content: bool, said: str, sets: dict, tmp_path: Path) -> None:
    shutil.copytree(sets["classify"], tmp_path / "data")
    (file := tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    file.write_bytes((tmp_path / "data/train/red/0.png").read_bytes() if content else b"x")
    ours = FAMILIES["timm"]().read_data(str(tmp_path / "data"))
    assert len(ours.train) == 16 and len(ours.val) == 6 and list(ours.names.values()) == ["blue", "red"]
    assert list(check(tmp_path / "data").names.values()) == ["blue", "red"]
    with pytest.raises(DataError, match=said) if said else nullcontext():
        visionpeft.plan("yolo11n-cls.yaml", data=tmp_path / "data")


def test_accents_are_written_in_two_ways(sets: dict, tmp_path: Path) -> None:
    shutil.copytree(sets["classify"], tmp_path / "data")
    for part, way in (("train", "NFC"), ("val", "NFD")):
        (tmp_path / "data" / part / "red").rename(tmp_path / "data" / part / unicodedata.normalize(way, "r\u00f6t"))
    assert FAMILIES["timm"]().read_data(str(tmp_path / "data")).names == {0: "blue", 1: "r\u00f6t"}
    report = check(tmp_path / "data")
    assert list(report.names.values()) == ["blue", "r\u00f6t"] and [f.kind for f in report.findings] == ["spelling"]
    with pytest.raises(DataError, match="decomposed Unicode"):
        visionpeft.plan("yolo11n-cls.yaml", data=tmp_path / "data")


def test_names_of_files_decide_nothing(bases: dict, tmp_path: Path) -> None:
    path = tmp_path / "yolo-world-cars-semi.pt"
    shutil.copyfile(bases["yolov8n-obb"], path)
    assert visionpeft.plan(path, method="head").trained_head > 0


def test_channels_at_odds(sets: dict, tmp_path: Path) -> None:
    root = sets["obb"].parent
    data = tmp_path / "data.yaml"
    data.write_text(f"train: {root}/images/train\nval: {root}/images/val\nnames: [red, green]\nchannels: 4\n")
    with pytest.raises(DataError, match=r"has images of channels=4, but yolo11n-obb.yaml reads 3.* 1 \(grey\)"):
        visionpeft.plan("yolo11n-obb.yaml", data=data)
