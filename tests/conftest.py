"""Small random nets of every kind, generated images, and no network."""

from __future__ import annotations

import os

os.environ.setdefault("YOLO_OFFLINE", "True")
os.environ.setdefault("YOLO_VERBOSE", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from ultralytics.nn.tasks import guess_model_task, yaml_model_load

from visionpeft.core import delta as deltas
from visionpeft.core.anatomy import Anatomy, GradientStats
from visionpeft.families.timm.trainer import Trainer
from visionpeft.families.yolo.tasks import TASKS, build
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.session import TrainSession

torch.set_num_threads(1)  # more threads than free cores make small nets many times slower

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def yolo(name: str, classes: int = 80) -> nn.Module:
    design = yaml_model_load(f"{name}.yaml")
    names = {i: f"class {i}" for i in range(classes)}
    return build(TASKS[guess_model_task(design)], design, names, 3)


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
NETS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "yolo11n": ("yolo", lambda: yolo("yolo11n")),
    "yolov8n": ("yolo", lambda: yolo("yolov8n")),
    "yolo26n": ("yolo", lambda: yolo("yolo26n")),
    **{
        f"yolo{version}n-{task}": ("yolo", partial(yolo, f"yolo{version}n-{task}"))
        for task in ("seg", "pose", "obb", "cls")
        for version in ("v8", "11", "26")
    },
    "resnet18": ("timm", lambda: timm.create_model("resnet18", num_classes=5)),
    "vit_tiny": ("timm", lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=3)),
    "swin": ("timm", lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN)),
    "convnext_atto": ("timm", lambda: timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 2, 1))),
    "mobilenetv2": ("timm", lambda: timm.create_model("mobilenetv2_035", num_classes=5)),
    "mobilenetv1": ("timm", lambda: timm.create_model("mobilenetv1_100", num_classes=5)),  # depthwise throughout
}


@cache
def _net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name][1]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # statistics and scales that are not all the same make merging a real test
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures take a fifth of a small one's time, so only tests that are marked draw them."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(TrainSession, "_pictures", lambda *_: {})


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function after which a package counts as not installed."""
    real = importlib.util.find_spec

    def lack(package: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))

    return lack


@pytest.fixture
def net() -> Callable[[str], nn.Module]:
    """Returns a fresh copy of a net by name."""
    return lambda name: copy.deepcopy(_net(name))


def seen(anatomy: Anatomy, **lengths: float) -> Anatomy:
    """Return the anatomy with gradients as long as the weights; of stage 3, given ``s3=5.0``, five times as long."""
    gradient = {p.name: lengths.get(f"s{p.stage}", 1.0) for p in anatomy.params}
    product = {p.name: p.numel * lengths.get(f"s{p.stage}", 1.0) for p in anatomy.params}
    return dataclasses.replace(anatomy, gradient_stats=GradientStats(1, dict.fromkeys(gradient, 1.0), gradient, product))


def flat(output: object) -> list[Tensor]:
    """All floating-point tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [t for v in values for t in flat(v)]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@contextmanager
def ctrl_c(owner: type, method: str, after: int) -> Iterator[None]:
    """Let `after` calls of a method pass; the next is interrupted."""
    real, calls = getattr(owner, method), []

    def call(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, call)
        yield


def learned_the_same(runs: dict[str, Any]) -> None:
    """Check that runs at a level of lean kept less than the one without, and that their deltas are its."""
    saved = {x: run.measured["saved_bytes"] for x, run in runs.items()}
    assert saved["memory"] <= saved["auto"] < saved["off"] and saved["memory"] < 0.6 * saved["off"], saved
    tensors = {x: deltas.read(run.delta).tensors for x, run in runs.items()}
    for level, run in runs.items():
        said = json.loads((run.folder / "run.json").read_text())
        assert said["arguments"]["lean"] == {"flags": "memory"}.get(level, level)
        assert tensors[level].keys() == tensors["off"].keys()
        for key, value in tensors[level].items():
            assert torch.allclose(value, tensors["off"][key], rtol=2e-3, atol=1e-3), key
        moved, apart = (  # all lora_B start at 0
            torch.cat([(v - without * tensors["off"][k]).flatten() for k, v in tensors[level].items() if "lora_B" in k])
            for without in (0, 1)
        )
        assert apart.norm() <= 0.01 * moved.norm() > 0
    assert all(torch.equal(value, tensors["memory"][key]) for key, value in tensors["flags"].items())


@pytest.fixture(scope="session")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detection set of bright squares: 8 images to train on, 4 to check, two classes. Returns its YAML."""
    return make_boxes(tmp_path_factory.mktemp("boxes"))


def make_boxes(root: Path, task: str = "detect") -> Path:
    """Write such a set with the labels of a task (keypoints: two corners); returns its YAML."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            image, rows = random.integers(0, 60, (64, 64, 3), dtype=np.uint8), []
            for kind in (0, 1):
                x, y, side = *random.integers(0, 40, 2), random.integers(12, 24)
                image[y : y + side, x : x + side, kind] = 250
                rows.append(f"{kind} {_label(task, x / 64, y / 64, (x + side) / 64, (y + side) / 64)}")
            Image.fromarray(image).save(root / "images" / part / f"{i}.png")
            (root / "labels" / part / f"{i}.txt").write_text("\n".join(rows) + "\n")
    yaml = root / "data.yaml"
    points = "kpt_shape: [2, 3]\nflip_idx: [0, 1]\n" if task == "pose" else ""
    yaml.write_text(f"train: images/train\nval: images/val\nnames: {{0: red, 1: green}}\n{points}")
    return yaml


def _label(task: str, left: float, top: float, right: float, bottom: float) -> str:
    box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    corners = (left, top, right, top, right, bottom, left, bottom)
    points = (left, top, 2, right, bottom, 2)
    numbers = {"detect": box, "segment": corners, "obb": corners, "pose": (*box, *points)}[task]
    return " ".join(f"{n:.4f}" for n in numbers)


def make_squares(root: Path, train: int = 8, val: int = 3, size: int = 32) -> Path:
    """Write squares of two colours as a classification set; returns its folder."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for channel, name in ((2, "blue"), (0, "red")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
                pixels[4:-4, 4:-4, channel] = 250
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Ultralytics checkpoint of a random yolo11n with 80 classes."""
    torch.manual_seed(0)
    model = yolo("yolo11n")
    model.args = {"imgsz": 64, "task": "detect"}
    path = tmp_path_factory.mktemp("weights") / "random11n.pt"
    torch.save({"model": model.half(), "train_args": {"imgsz": 64, "task": "detect"}, "epoch": -1}, path)
    return path


@pytest.fixture(scope="session")
def loops(
    boxes: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict, type, str]]:
    """A tiny run of both training loops, by family: data, arguments of `train`, and where its loop begins an epoch."""
    weights = tmp_path_factory.mktemp("timm") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), weights)
    common = {"epochs": 2, "batch": 4, "device": "cpu", "workers": 0, "quiet": True}
    named = {"model": "timm/test_resnet", "model_args": {"checkpoint_path": str(weights)}, "imgsz": 32}
    squares = make_squares(tmp_path_factory.mktemp("squares"))
    return {
        "yolo": (boxes, {**common, "model": checkpoint, "imgsz": 64}, PeftTrainerMixin, "_model_train"),
        "timm": (squares, {**common, **named}, Trainer, "_epoch"),
    }
