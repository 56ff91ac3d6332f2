"""The bases and the images of tests/golden: made anew wherever they are needed, bit for bit the same on every machine.

Every value is a whole number of NumPy's oldest generator, whose stream never changes, divided by a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from visionpeft.core.plan import applicable_methods
from visionpeft.families.yolo.tasks import TASKS, build
from visionpeft.registry import FAMILIES, METHODS

FOLDER = Path(__file__).parent / "golden"
DESIGN: dict[str, Any] = {
    "nc": 3,
    "reg_max": 1,
    "end2end": False,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "C3k2", [16, False, 0.5]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2PSA", [16]],
    ],
    "head": [[[2, 4], 1, "Detect", ["nc"]]],
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
RESNET = {"channels": [8, 8, 8, 8]}
SIZES = {"yolo": 64, "vit": 32, "resnet": 32}  # of images
FAMILY = {"yolo": "yolo", "vit": "timm", "resnet": "timm"}


def make_base(net: str, folder: Path) -> dict[str, Any]:
    """Write a base; returns the arguments of `train` and `load` that name it."""
    if net == "yolo":
        model = build(TASKS["detect"], DESIGN, {0: "red", 1: "blue", 2: "grey"}, 3)
        model.load_state_dict(_filled(model.state_dict()))
        torch.save({"model": model.half(), "train_args": {"imgsz": 64, "task": "detect"}, "epoch": -1}, folder / "yolo.pt")
        return {"model": str(folder / "yolo.pt")}
    name, own = ("vit_tiny_patch16_224", VIT) if net == "vit" else ("test_resnet", RESNET)
    path = folder / f"{net}.safetensors"
    save_file(_filled(timm.create_model(name, num_classes=3, **own).state_dict()), path)
    return {"model": f"timm/{name}", "model_args": {**own, "checkpoint_path": str(path)}}


def make_data(net: str, folder: Path) -> Path:
    """Write coloured squares, to detect or to classify; returns what `train` is given as data."""
    numbers, side = np.random.RandomState(0), SIZES[net]
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            for kind, (name, channel) in enumerate((("red", 0), ("green", 1))):
                pixels = numbers.randint(0, 60, (side, side, 3)).astype(np.uint8)
                x, y, w = numbers.randint(0, side // 2, 2).tolist() + [side // 3]
                pixels[y : y + w, x : x + w, channel] = 250
                places = [folder / part / name / f"{i}.png"]
                if net == "yolo":
                    places = [folder / "images" / part / f"{name}{i}.png", folder / "labels" / part / f"{name}{i}.txt"]
                for place in places:
                    place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(places[0])
                for label in places[1:]:
                    label.write_text(f"{kind} {(x + w / 2) / side} {(y + w / 2) / side} {w / side} {w / side}\n")
    if net != "yolo":
        return folder
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: {0: red, 1: green}\n")
    return folder / "data.yaml"


def images(net: str) -> Tensor:
    """Return two images."""
    side = SIZES[net]
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 3, side, side)) / 256).float()


@torch.no_grad()
def outputs(net: str, model: nn.Module) -> Tensor:
    """Return some of what a model says of two images: (2, numbers)."""
    given = model.eval()(images(net))
    return (given[0] if isinstance(given, list | tuple) else given).flatten(1)[:, :: 8 if net == "yolo" else 1]


def nets_of(family: str, folder: Path) -> dict[str, str]:
    """Return a net of a family for each method, by the method's name."""
    found: dict[str, str] = {}
    for net in [n for n, f in FAMILY.items() if f == family]:
        own = FAMILIES[family]()
        given = make_base(net, folder)
        base = own.load(given["model"], **given.get("model_args", {}))
        fits = applicable_methods(own.anatomy(own.with_head(base, base.names, "keep"), base.source))
        found |= {name: net for name in METHODS if name in fits and name not in found}
    return found


def _filled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    numbers, made = np.random.RandomState(2), {}
    for name, value in sorted(state.items()):
        if not value.is_floating_point():
            made[name] = value
            continue
        drawn = torch.from_numpy(numbers.randint(-64, 64, tuple(value.shape)) / 64).float()  # (-1, 1)
        if value.ndim > 1:  # divided by about the square root of what is summed up
            made[name] = drawn / 2 ** round(math.log2(value[0].numel() ** 0.5))
        else:
            plain = name.endswith(("running_var", "weight", "gamma"))
            made[name] = drawn / 8 + 1 if plain else drawn / 8
    return made
