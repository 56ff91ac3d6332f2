"""Every recipe runs, flags override it, and a mistake in one is said in one sentence that names the file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from ultralytics import YOLO

from visionpeft import cli

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
SMALL = "--epochs 1 --imgsz 64 --batch 4 --workers 0 --device cpu".split()


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Run the command line in this process; returns its exit code and what it said on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    return int(stopped.value.code or 0), capsys.readouterr().err.strip()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, boxes: Path) -> Any:
    """Returns the flags that make a recipe's model and data small ones of the same kind."""
    folder = tmp_path_factory.mktemp("small")

    def make(model: str) -> list[object]:
        if model.startswith("timm/"):
            weights = folder / "vit.safetensors"
            save_file(timm.create_model("test_vit", num_classes=7).state_dict(), weights)
            return [
                "--model",
                "timm/test_vit",
                "--model_args",
                f"{{checkpoint_path: {weights}, img_size: 64}}",
                "--data",
                tiles(),
            ]
        name = re.sub(r"(?<=\d)[nsmlx](?=[.-])", "n", model).removesuffix(".pt")  # the nano net of its kind
        weights = folder / f"{name}.pt"
        if not weights.exists():
            torch.manual_seed(0)
            net = YOLO(f"{name}.yaml")
            torch.save({"model": net.model.half(), "train_args": {"imgsz": 64, "task": net.task}, "epoch": -1}, weights)
        data = boxes if YOLO(weights).task == "detect" else corners()
        return ["--model", weights, "--data", data, "--plots", "false"]

    def corners() -> Path:
        """The set of boxes, each by its four corners: labels of oriented boxes, and of outlines."""
        if not (folder / "corners").exists():
            shutil.copytree(boxes.parent, folder / "corners", ignore=shutil.ignore_patterns("*.cache"))
            for label in (folder / "corners" / "labels").rglob("*.txt"):
                rows = [[float(x) for x in row.split()] for row in label.read_text().splitlines()]
                ends = [(int(k), x - w / 2, y - h / 2, x + w / 2, y + h / 2) for k, x, y, w, h in rows]
                label.write_text("".join(f"{k} {a} {b} {c} {b} {c} {d} {a} {d}\n" for k, a, b, c, d in ends))
        return folder / "corners" / "data.yaml"

    def tiles() -> Path:
        random = np.random.default_rng(0)
        for part, kind, i in ((p, k, i) for p in ("train", "val") for k in (0, 2) for i in range(4)):
            image = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            image[8:-8, 8:-8, kind] = 250
            (folder / "tiles" / part / f"class {kind}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "tiles" / part / f"class {kind}" / f"{i}.png")
        return folder / "tiles"

    return make


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_in_small(path: Path, small: Any, tmp_path: Path, capsys) -> None:
    said = yaml.safe_load(path.read_text())
    given = ["--config", path.stem, *SMALL, *small(said["model"]), "--project", tmp_path]
    code, error = run(capsys, "train", *given)
    assert code == 0, error
    made = json.loads((tmp_path / "train" / "run.json").read_text())
    arguments = {**made["arguments"], **made["arguments"]["options"], **made["arguments"]["method_settings"]}
    overridden = {"model", "model_args", "data", "epochs", "imgsz", "batch", "workers"}
    assert {k: arguments[k] for k in said if k not in overridden} == {k: v for k, v in said.items() if k not in overridden}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_recipe_says_why_and_what_it_takes(path: Path) -> None:
    text = path.read_text()
    gb = int(re.search(r"-(\d+)gb$", path.stem).group(1))  # type: ignore[union-attr]
    one, total, batch = re.search(r"keeps (\d+) MB per image in bf16, ([\d.]+) GB with (\d+) of them", text).groups()  # type: ignore[union-attr]
    assert int(batch) == yaml.safe_load(text)["batch"]
    assert int(one) * int(batch) / 1e3 < float(total) < 0.8 * gb  # a fifth stays free


def test_a_flag_overrides_a_config(boxes: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"data: {boxes}\nmodel: {checkpoint}\nmethod: lora\nr: 4\nlr-scale: 0.5\nproject: {tmp_path}\nplots: false\n"
    )
    code, error = run(capsys, "train", "--config", mine, *SMALL, "--r", "2", "--lr_scale", "0.25")
    assert code == 0, error
    arguments = json.loads((tmp_path / "train" / "run.json").read_text())["arguments"]
    assert arguments["method_settings"]["r"] == 2 and arguments["lr_scale"] == 0.25 and arguments["method"] == "lora"


MISTAKES = {
    "unknown key": ("epohcs: 3", "'epohcs' is no setting.*Did you mean 'epochs'"),
    "unknown field of the method": ("method: lora\nrank: 3", "'rank' is no setting.*method 'lora' has r, "),
    "text for a number": ("epochs: many", "epochs=many is not usable; it must be a whole number"),
    "text for a field": ("method: lora\nr: many", "lora: r='many' is not of the right type; it must be int"),
    "list for a number": ("imgsz: [64, 64]", "imgsz=.*is not usable; it must be a whole number"),
    "bad value of Ultralytics'": ("mosaic: 7", "mosaic"),
    "a list": ("- epochs", "holds no options"),
    "keys that are no names": ("1: 2", "holds no options"),
    "not YAML": ("epochs: [", "is not readable YAML"),
    "not text": (b"\xff\xfe\x00", "is not readable YAML"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_a_config(kind: str, boxes: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    content, says = MISTAKES[kind]
    mine = tmp_path / "mine.yaml"
    mine.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, error = run(
        capsys,
        "train",
        "--config",
        mine,
        "--data",
        boxes,
        "--model",
        checkpoint,
        "--project",
        tmp_path / "runs",
        "--device",
        "cpu",
    )
    assert code == 2 and len(error.splitlines()) == 1, error
    assert re.search(says, error) and "mine.yaml" in error, error
    assert not (tmp_path / "runs").exists()
