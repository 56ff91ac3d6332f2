"""YOLO's tasks: real runs on tiny images, merged into files that Ultralytics opens, drawn, exported, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import make_boxes, make_squares, yolo
from PIL import Image
from ultralytics import YOLO

import visionpeft
from visionpeft.errors import DataError
from visionpeft.families.yolo_pictures import read
from visionpeft.families.yolo_tasks import TASKS, fit

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
            assert image.size > (300, 300) and len(set(image.convert("L").resize((40, 40)).getdata())) > 8


def test_predicts_the_tasks_own_results(run: tuple, sets: dict) -> None:
    task, made = run
    images = sorted((sets[task] if task == "classify" else sets[task].parent).rglob("val/**/*.png"))[:2]
    results = visionpeft.predict(made.delta, [str(f) for f in images], conf=1e-4, device="cpu")
    assert len(results) == 2
    for result in results:
        part = {"segment": result.masks, "pose": result.keypoints, "obb": result.obb, "classify": result.probs}[task]
        assert part is not None and (task == "classify" or len(part) > 0)


def test_merged_files_need_no_visionpeft(run: tuple, sets: dict) -> None:
    """Ultralytics opens them where visionpeft cannot be imported, and measures what the run measured."""
    task, made = run
    if made.merged is None:
        return
    code = f"""
import sys, json
sys.modules["visionpeft"] = None
from ultralytics import YOLO
given = dict(data={str(sets[task])!r}, imgsz=64, batch=4, device="cpu", plots=False, verbose=False)
stats = YOLO({str(made.merged)!r}).val(**given)
print("RESULT", json.dumps({{k: float(v) for k, v in stats.results_dict.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=made.folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))[7:])
    assert {ours: said[theirs] for theirs, ours in TASKS[task].metrics.items()} == pytest.approx(made.after, abs=1e-3)


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
    if "26" in Path(adapted.base.source).stem and task != "classify":  # ends in a choice of the best, which ties may reorder
        seen, y = seen[..., 4].sort().values, y[..., 4].sort().values
    assert torch.allclose(seen, y, rtol=1e-2, atol=1e-2)


def test_resumed_equals_uninterrupted(sets: dict, bases: dict, tmp_path: Path, monkeypatch) -> None:
    """A classifier too, whose images have no mosaic to go on with."""
    from visionpeft.families.yolo import Tuned

    args = {**SMALL, "epochs": 3, "method": "lora", "r": 2, "project": tmp_path, "model": bases["yolo26n-cls"]}
    whole = visionpeft.train(sets["classify"], name="whole", **args)
    real, calls = Tuned._model_train, []

    def ctrl_c(trainer: Tuned) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(trainer)

    monkeypatch.setattr(Tuned, "_model_train", ctrl_c)
    with pytest.raises(visionpeft.VisionpeftError, match="go on with resume="):
        visionpeft.train(sets["classify"], name="parts", **args)
    monkeypatch.undo()
    rest = visionpeft.train(resume=tmp_path / "parts", quiet=True)
    one, two = (torch.load(r.folder / "checkpoint.pt", weights_only=True)["ema"] for r in (whole, rest))
    assert all(torch.equal(one[k], two[k]) for k in one) and whole.history == rest.history


@pytest.mark.parametrize("head", ["keep", "rebuild"])
def test_a_classifiers_rows_are_kept(head: str) -> None:
    base = yolo("yolo11n-cls", classes=7)
    new: Any = fit(base, {0: "other", 1: "class 5"}, 3, head, {})
    same = torch.equal(new.model[-1].linear.weight[1], base.model[-1].linear.weight[5])
    assert same == (head == "keep") and torch.equal(new.model[-1].conv.conv.weight, base.model[-1].conv.conv.weight)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ("", "has kpt_shape=None; a pose set says kpt_shape"),
        ("kpt_shape: [2, 5]", r"has kpt_shape=\[2, 5\]"),
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
    for drawn, file in zip(family.draw(None, data, 4), data.facts["val"], strict=True):
        image = read(file)[..., ::-1]
        square = (image.max(2) > 200).astype(np.uint8)
        changed = np.abs(drawn.astype(int) - image).max(2) > 30
        near = cv2.dilate(square, np.ones((201, 201))) > 0  # names stand beside the boxes
        edge = cv2.morphologyEx(square, cv2.MORPH_GRADIENT, np.ones((9, 9))) > 0
        assert not changed[~near].any() and changed[edge].mean() > (0.1 if task == "pose" else 0.3)


def test_yolo_opens_the_merged_file_with_its_task(run: tuple) -> None:
    task, made = run
    if made.merged:
        assert YOLO(made.merged).task == task
