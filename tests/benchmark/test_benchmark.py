"""The benchmark: the very same runs whatever interrupts a sweep, scores of any resample, and what is forgotten."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import make_squares, yolo
from filelock import FileLock
from golden_nets import FOLDER
from safetensors.torch import save_file
from ultralytics.utils.metrics import ap_per_class

import visionpeft
from visionpeft import benchmark, cli, files, scenes, sources
from visionpeft import presets as recipes
from visionpeft.benchmark import cell as cells
from visionpeft.benchmark import grid, sweep
from visionpeft.errors import ConfigError, DataError, DiskFull, OutOfMemory, TrainingError, VisionpeftError
from visionpeft.families.predictions import Answers, Detections, unpack
from visionpeft.families.timm.trainer import Trainer
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.registry import FAMILIES

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "benchmark").glob("*.yaml"))
RUN: dict[str, Any] = {"imgsz": 160, "batch": 4, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small drawn sets: what the packaged detector knows, and what it does not."""
    folder = tmp_path_factory.mktemp("drawn")
    return {
        "old": scenes.write("driving", folder / "old", train=1, val=6, size=160),
        "new": scenes.write("satellite", folder / "new", train=8, val=4, size=160),
    }


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder to be a sweep's root: squares of two colours, and a small random net of seven classes."""
    root = tmp_path_factory.mktemp("root")
    make_squares(root / "squares", train=8, val=6)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), root / "net.safetensors")
    config = {
        "model": {"model": "timm/test_resnet", "model_args": {"checkpoint_path": "net.safetensors"}},
        "data": "squares",
        "method": ["full", "bitfit"],
        "epochs": 2,
        **{**RUN, "imgsz": 32},
    }
    return {"root": root, "config": config}


@pytest.fixture(scope="module")
def adapted(drawn: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], visionpeft.Run]:
    """Returns a run of a method: the packaged detector on the new set, one epoch."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(method: str) -> visionpeft.Run:
        if method not in made:
            model, more = "scenes/driving.pt", {"name": method, "quiet": True, "epochs": 1}
            made[method] = visionpeft.train(drawn["new"], model=model, method=method, project=folder, **more, **RUN)
        return made[method]

    return run


# ----------------------------------------------------------------------------------------------------------- the evidence
def stats(images: int, classes: int, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """What Ultralytics' validator keeps of images: made up, some without objects, some without detections."""
    random = np.random.default_rng(seed)
    found = random.integers(0, 30, images) * (random.random(images) > 0.2)
    there = random.integers(0, 6, images)
    first = [random.random((n, 1)) > 0.5 for n in found]  # what is true at one overlap is so at all smaller ones
    return {
        "tp": [t & (np.arange(10) < random.integers(1, 11, (len(t), 1))) for t in first],
        "conf": [random.random(n).astype(np.float32) for n in found],
        "pred_cls": [random.integers(0, classes, n).astype(float) for n in found],
        "target_cls": [random.integers(0, classes, n).astype(float) for n in there],
    }


@pytest.mark.parametrize("classes", [1, 5])
def test_the_score_of_any_resample_is_ultralytics_own(classes: int) -> None:
    kept = stats(40, classes)
    names = [f"images/{i * 7919 % 40:02}.jpg" for i in range(40)]  # seen in another order than sorted
    evidence = unpack(Detections.gather(names, kept, "tp").pack())
    order = np.argsort(names)
    random = np.random.default_rng(1)
    for counts in (np.ones(40, int), *random.multinomial(40, np.full(40, 1 / 40), size=5)):
        picks = np.repeat(order, counts)
        joined = {k: np.concatenate([v[i] for i in picks]) for k, v in kept.items()}
        ap = ap_per_class(joined["tp"], joined["conf"], joined["pred_cls"], joined["target_cls"])[5]
        assert evidence.score(counts) == pytest.approx(ap.mean(), abs=1e-9)
    assert evidence.images.tolist() == sorted(f"{i:02}.jpg" for i in range(40))
    assert np.mean(list(evidence.by_class().values())) == pytest.approx(evidence.score())


def test_evidence_gives_the_score_that_was_reported(drawn: dict[str, Path]) -> None:
    family = FAMILIES["yolo"]()
    base = family.load("scenes/driving.pt")
    judged = family.evaluate(base.model, family.read_data(str(drawn["old"]), base), **RUN)
    assert judged.metrics["mAP50-95"] > 0.1
    assert judged.predictions.score() == pytest.approx(judged.metrics["mAP50-95"], abs=6e-6)  # which is rounded
    assert len(judged.predictions.images) == 6


@pytest.mark.parametrize("task", ["seg", "obb", "pose", "cls"])
def test_every_task_leaves_evidence(task: str, tmp_path: Path) -> None:
    family = FAMILIES["yolo"]()
    source = scenes.write(f"satellite-{task}", tmp_path / "set", train=2, val=2, size=64)
    base = family.load(f"yolov8n-{task}.yaml")
    data = family.read_data(str(source), base)
    model = family.with_head(base, data.names, "keep", **data.outputs)
    judged = family.evaluate(model, data, imgsz=64, batch=2, device="cpu")
    assert judged.predictions.score() == pytest.approx(judged.metrics[family.primary_metric(base.task)], abs=6e-6)
    assert len(judged.predictions.images) == len(data.val)
    if task == "cls":
        assert 0 < judged.metrics["top1"] < 1  # of some, by chance


def test_a_classifiers_evidence(tiles: dict[str, Any]) -> None:
    family = FAMILIES["timm"]()
    base = family.load("timm/test_resnet", checkpoint_path=str(tiles["root"] / "net.safetensors"))
    data = family.read_data(str(tiles["root"] / "squares"))
    torch.manual_seed(3)
    judged = family.evaluate(family.with_head(base, data.names, "rebuild"), data, imgsz=32)
    evidence = unpack(judged.predictions.pack())
    assert isinstance(evidence, Answers) and evidence.images[0] == "blue/0.png"
    assert evidence.score() == pytest.approx(judged.metrics["top1"], abs=6e-6)
    wrong = (evidence.label != evidence.guess).astype(int)
    assert 0 < wrong.sum() < 12 and evidence.score(wrong) == 0 and evidence.score(1 - wrong) == 1


def test_evidence_that_is_none() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        unpack({"kind": "detect", "data": "AAAA"})


# ------------------------------------------------------------------------------------------------------------- forgetting
@pytest.mark.parametrize("method", ["full", "lora", "side", "head"])
def test_forgetting_is_the_adapted_body_under_the_old_head(method: str, adapted: Any, drawn: dict[str, Path]) -> None:
    run = adapted(method)
    found = visionpeft.forgetting(run.delta, drawn["old"], device="cpu")
    own = visionpeft.load(run.delta)
    data = own.family.read_data(str(drawn["old"]), own.base)
    before = own.family.evaluate(own.base.model, data, **RUN).metrics
    assert found.before == found.detached == before["mAP50-95"] > 0.1
    if method == "head":  # its body is the base's, statistics included
        assert found.after == found.before and all(b == a for b, a in found.per_class.values())
    else:
        assert found.after != found.before
    if run.merged:  # the same by other means: all of the merged model but its head
        model = copy.deepcopy(own.base.model)
        merged = visionpeft.api.attaching.merge(copy.deepcopy(own.model)).state_dict()
        heads = tuple(f"{h}." for h in run.plan.heads)
        model.load_state_dict({**model.state_dict(), **{k: v for k, v in merged.items() if not k.startswith(heads)}})
        assert found.after == own.family.evaluate(model, data, **RUN).metrics["mAP50-95"]
    assert np.mean([a for _, a in found.per_class.values()]) == pytest.approx(found.after, abs=1e-5)
    assert set(found.per_class) <= set(data.names.values()) and "change" in str(found)


def test_a_classifier_forgets(tiles: dict[str, Any], tmp_path: Path) -> None:
    first = visionpeft.train(
        tiles["root"] / "squares", model="timm/test_resnet", project=tmp_path, method="full", quiet=True,
        model_args={"checkpoint_path": tiles["root"] / "net.safetensors"}, **{**RUN, "imgsz": 32}, epochs=8, lr0=1e-2,
    )  # fmt: skip
    assert first.after["top1"] == 1.0
    other = make_squares(tmp_path / "other")
    for part in ("train", "val"):
        (other / part / "blue").rename(other / part / "sky")
    args = {"checkpoint_path": str(first.merged), "num_classes": 2}
    more = {"method": "full", "quiet": True, "epochs": 3, "lr0": 3e-2, **RUN, "imgsz": 32}
    run = visionpeft.train(other, model="timm/test_resnet", project=tmp_path, model_args=args, **more)
    found = visionpeft.forgetting(run.delta, tiles["root"] / "squares", device="cpu")
    assert found.metric == "top1" and found.before == found.detached == 1.0
    own = visionpeft.load(run.delta)
    model, heads = copy.deepcopy(own.base.model), tuple(f"{h}." for h in run.plan.heads)
    model.load_state_dict(
        {k: model.state_dict()[k] if k.startswith(heads) else v for k, v in own.model.state_dict().items()}
    )
    data = own.family.read_data(str(tiles["root"] / "squares"))
    assert found.after == own.family.evaluate(model, data, imgsz=32).metrics["top1"] < 1
    assert found.per_class.keys() == {"blue", "red"}
    with pytest.raises(DataError, match="'sky', which this model does not know"):
        visionpeft.forgetting(run.delta, other)


# --------------------------------------------------------------------------------------------------------------- fairness
@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_a_seed_gives_every_method_the_same_batches(
    family: str, drawn: dict[str, Path], tiles: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    prepare, step = PeftTrainerMixin.preprocess_batch, Trainer._step

    def note(trainer: Any, batch: dict) -> dict:
        seen.append(batch["img"].clone())
        return prepare(trainer, batch)

    def note_step(loop: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
        seen.append(images.clone())
        return step(loop, images, labels)

    monkeypatch.setattr(PeftTrainerMixin, "preprocess_batch", note)
    monkeypatch.setattr(Trainer, "_step", note_step)
    net: dict[str, Any] = {"model": "timm/test_resnet", "model_args": {"checkpoint_path": tiles["root"] / "net.safetensors"}}
    net = {"data": tiles["root"] / "squares", **net, **RUN, "imgsz": 32}
    given = net if family == "timm" else {"data": drawn["new"], "model": "scenes/driving.pt", **RUN}

    def batches(method: str, seed: int) -> list[torch.Tensor]:
        seen.clear()
        visionpeft.train(**given, method=method, seed=seed, epochs=2, quiet=True, project=tmp_path)
        return list(seen)

    full, other, another = batches("full", 0), batches("lora+norm" if family == "timm" else "side", 0), batches("full", 1)
    assert len(full) == len(other) == len(another) >= 4
    assert all(torch.equal(a, b) for a, b in zip(full, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(full, another, strict=True))
    assert not torch.equal(full[0], full[2])  # augmented anew in each epoch


@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_what_is_held_back_is_of_the_training_images_alone(
    family: str, drawn: dict[str, Path], tiles: dict[str, Any], tmp_path: Path
) -> None:
    owner = FAMILIES[family]()
    source = {"yolo": drawn["new"], "timm": tiles["root"] / "squares"}[family]
    data = owner.read_data(str(source))
    parts = []
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        split = owner.read_data(owner.holdout_split(data, tmp_path / name, 0.25))
        real = {
            p: [Path(f[0] if isinstance(f, tuple) else f).resolve() for f in getattr(split, p)] for p in ("train", "val")
        }
        parts.append(real)
        assert split.names == data.names
    train = {Path(f[0] if isinstance(f, tuple) else f).resolve() for f in data.train}
    assert parts[0] == parts[1]
    assert set(parts[0]["train"]) | set(parts[0]["val"]) == train and not set(parts[0]["train"]) & set(parts[0]["val"])
    assert len(parts[0]["val"]) == round(0.25 * len(train))


def test_a_trial_never_sees_the_validation_images(tiles: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    made = grid.make_grid({**tiles["config"], "search": {"lr0": [1e-3, 1e-2]}}, "x", tiles["root"])
    cell = made.cells[0]
    first, second = made.trials(cell)
    assert [t.spec["trial"] for t in (first, second)] == [{"lr0": 1e-3}, {"lr0": 1e-2}]
    given, train = {}, visionpeft.api.train

    def note(**arguments: Any) -> Any:
        data = FAMILIES["timm"]().read_data(str(arguments["data"]))
        given.update(arguments, files={str(Path(f).resolve()) for f, _ in (*data.train, *data.val)})
        return train(**arguments)

    def diverges(**arguments: Any) -> Any:
        raise TrainingError("the loss is no longer a number")

    monkeypatch.setattr(visionpeft.api, "train", note)
    content = cells.run_trial(second, tmp_path)
    train_images = {str(f.resolve()) for f in (tiles["root"] / "squares" / "train").rglob("*.png")}
    assert given["files"] == train_images and given["lr0"] == 1e-2 and 0 <= content["score"] <= 1
    monkeypatch.setattr(visionpeft.api, "train", diverges)
    assert cells.run_trial(first, tmp_path)["score"] is None  # a rate that diverges is a result, the worst

    state = sweep._Sweep(made, tmp_path, False, 1, None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none of the 2 trials"):
        state._searched_options(cell)
    for trial, score in ((first, None), (second, 0.5)):
        said = {"format": 1, "hash": trial.hash, "cell": trial.spec, "score": score, "seconds": 1}
        files.write(tmp_path / "trials" / f"{trial.hash}.json", json.dumps(said))
    assert state._searched_options(cell) == {"lr0": 1e-2}


def test_equal_time(tiles: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = grid.make_grid({**tiles["config"], "equal": "time"}, "x", tiles["root"])
    full, other = made.cells
    assert made.reference(full) is None and made.reference(other) == full
    speed = cells._epoch_seconds
    monkeypatch.setattr(cells, "_epoch_seconds", lambda run, images: 1.0)
    content = cells.run_cell(other, tmp_path, {}, 3.7)
    assert content["chosen"] == {"epochs": 3} and len(content["run"]["history"]) == 3 and "--epochs 3" in content["command"]
    assert content["train_seconds"] == 3.0
    run = SimpleNamespace(measured=content["run"]["measured"], arguments={"batch": 4})
    parts = run.measured["seconds_by_part"]
    assert speed(run, 17) == pytest.approx(5 * sum(parts.values()))  # type: ignore[arg-type]  # five batches
    run.measured = {"step_seconds": None}
    monkeypatch.setattr(cells, "_epoch_seconds", speed)
    with pytest.raises(ConfigError, match="2 epochs have one step only"):
        cells._epochs_within(1.0, run, 4)  # type: ignore[arg-type]
    state = sweep._Sweep(made, tmp_path, False, 1, None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="full · seed 0, whose time this cell would have, failed"):
        state._time_limit(other)
    for seconds in (2.5, None):
        said = {**content, "hash": full.hash, "cell": full.spec, "train_seconds": seconds}
        files.write(tmp_path / "cells" / f"{full.hash}.json", json.dumps(said))
        if seconds:
            assert state._time_limit(other) == seconds and state._time_limit(full) is None
    with pytest.raises(ConfigError, match="trained in one step only"):
        state._time_limit(other)
    with pytest.raises(ConfigError, match="needs 'full' in the grid"):
        grid.make_grid({**tiles["config"], "equal": "time", "method": "bitfit"}, "x", tiles["root"])


# --------------------------------------------------------------------------------------------------------------- the grid
def test_a_cells_hash_is_of_what_it_is(tiles: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(tiles["root"], tmp_path / "root")

    def hashes(**more: Any) -> list[str]:
        config = {**tiles["config"], **more}
        turned = dict(reversed(config.items()))
        made = [[c.hash for c in grid.make_grid(c, "x", tmp_path / "root").cells] for c in (config, turned)]
        assert made[0] == made[1]
        return made[0]

    base = hashes()
    assert base == [c.hash for c in grid.make_grid(tiles["config"], "y", tiles["root"]).cells]  # wherever it lies
    assert hashes(seed=[0, 1])[:2] == base and len(set(hashes(seed=[0, 1]))) == 4
    assert not {*base} & {*hashes(epochs=3)}
    (tmp_path / "root" / "squares" / "val" / "red" / "0.png").unlink()
    assert not {*base} & {*hashes()}


def test_the_axes(tiles: dict[str, Any]) -> None:
    config = {
        **tiles["config"],
        "method": ["full", {"method": "lora", "r": 2, "bn": "frozen"}, {"method": "norm", "freeze": 2}],
        "freeze": [0, 1, [0, 2]],
        "seed": [3, 4],
    }
    config["method"][2:] = [{"method": "lora", "r": 2, "freeze": 0}]
    made = grid.make_grid({**config, "method": config["method"][:2]}, "x", tiles["root"])
    assert len(made.cells) == 12 and [c.spec["seed"] for c in made.cells] == [3] * 6 + [4] * 6
    labels = [c.names["method"] for c in made.cells[:6]]
    assert labels[0] == "full" and labels[1] == "lora, r 2, bn frozen"
    assert set(labels) >= {"full, freeze 1", "full, freeze 0+2", "lora, freeze 1, r 2, bn frozen"}
    arguments = made.cells[1].arguments()
    assert arguments["r"] == 2 and arguments["bn"] == "frozen" and Path(arguments["data"]).is_absolute()
    assert arguments["model_args"]["checkpoint_path"] == str(tiles["root"].resolve() / "net.safetensors")


BAD = {
    "no method": ({"method": None}, "the config has no method"),
    "an empty axis": ({"method": []}, r"method: \[\] is empty"),
    "an option of none": ({"epohcs": 3}, "'epohcs' is no setting.*Did you mean 'epochs'"),
    "an option of another method": ({"r": 4}, "'r' is no setting.*'full' has no settings"),
    "what the sweep settles": ({"project": "here"}, "'project' is settled by the sweep"),
    "a method twice": ({"method": ["full", "full"]}, "holds .* full .* twice"),
    "no such method": ({"method": "lore"}, "no method 'lore'.*Did you mean 'lora'"),
    "a model of no family": ({"model": "resnet999"}, "no family knows"),
    "no data": ({"data": "nowhere"}, "nowhere is no folder"),
    "equal": ({"equal": "steps"}, "equal='steps' is not known; it is epochs or time"),
    "search": ({"search": {"lr0": 1}}, "search=.* is not understood"),
    "search of nothing": ({"search": {"lr9": [1]}}, "'lr9' is no setting"),
    "classes that the base lacks": ({"retain": "squares"}, "'blue', which this model does not know"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_mistake_in_a_config(kind: str, tiles: dict[str, Any], tmp_path: Path, monkeypatch, capsys) -> None:
    more, says = BAD[kind]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tiles["config"], **more}))
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing starts
    arguments = ["benchmark", "--config", tmp_path / "mine.yaml", "--root", tiles["root"], "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    with pytest.raises(VisionpeftError, match=says):
        raise VisionpeftError(error)


@pytest.fixture(scope="module")
def places(drawn: dict[str, Path], tiles: dict[str, Any], boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is laid out as the packaged configurations want it, everything in it small and random."""
    root = tmp_path_factory.mktemp("places")
    (root / "weights").mkdir()
    torch.manual_seed(0)
    model = yolo("yolov8n")
    torch.save({"model": model.half(), "train_args": {"imgsz": 64, "task": "detect"}}, root / "weights" / "yolov8n.pt")
    for name, file, classes in (
        ("mobilenetv2_100", "mobilenetv2_100.tf2_in1k_dequant", 1000),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224.tinyimagenet200", 200),
    ):
        save_file(timm.create_model(name, num_classes=classes).state_dict(), root / "weights" / f"{file}.safetensors")
    for name in ("aerial_airport", "road_signs"):
        (root / name).symlink_to(drawn["new"].parent)
    shutil.copytree(boxes.parent, root / "coco128_640", ignore=shutil.ignore_patterns("*.cache"))
    said = yaml.safe_load((root / "coco128_640" / "data.yaml").read_text())
    said["names"] = {i: f"class {i}" for i in range(80)}
    (root / "coco128_640" / "data.yaml").write_text(yaml.safe_dump(said))
    (root / "eurosat_rgb_2000").symlink_to(tiles["root"] / "squares")
    return root


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_packaged_config_runs_in_small(
    path: Path, places: Path, drawn: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    find = sources.find
    pictures = {"scenes/satellite": str(drawn["new"]), "scenes/driving": str(drawn["old"])}
    monkeypatch.setattr(sources, "find", lambda source: pictures.get(str(source)) or find(source))
    config = recipes.read(path.stem, "benchmark")
    made = grid.make_grid(config, path.stem, places)
    models = config["model"] if isinstance(config["model"], list) else [config["model"]]
    assert made.name == path.stem and len(made.cells) == len(models) * len(config["method"]) * len(config["seed"])
    assert {"full", "head", "lora"} < {c.names["method"] for c in made.cells}
    for cell in {c.names["model"]: c for c in made.cells}.values():  # the last method on each model
        options = {**cell.spec["options"], "epochs": 1, "batch": 4, "device": "cpu"}
        options |= {"imgsz": 64} if "imgsz" in options else {}
        content = cells.run_cell(dataclasses.replace(cell, spec={**cell.spec, "options": options}), tmp_path, {}, None)
        assert bool(content["retained"]) == ("retain" in config)
        results = json.loads(json.dumps([content]))
        assert benchmark.compare(results, resamples=5)[0].names == cell.names


# -------------------------------------------------------------------------------------------------------------- the sweep
def alike(found: list[dict[str, Any]]) -> str:
    """All that does not depend on the clock."""
    rows = benchmark.compare(found, resamples=50)
    return repr([{**vars(r), "step_seconds": 0, "seconds": 0, "cells": 0} for r in rows])


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tiles: dict[str, Any], tmp_path: Path) -> None:
    config = {**tiles["config"], "method": ["full", "bitfit", "prompt"]}  # the last does not fit
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    arguments = ["benchmark", "--config", tmp_path / "mine.yaml", "--root", tiles["root"], "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "visionpeft", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait(lambda: len(list((tmp_path / "out" / "cells").glob("[!.]*.json"))) == 1)
        wait(lambda: len(list((tmp_path / "out" / "runs").glob("*/log.txt"))) == 2)  # in the midst of the second
        child = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[0])
        process.send_signal(signal.SIGKILL)
    wait(lambda: gone(child), 10)
    first = next((tmp_path / "out" / "cells").glob("*.json"))
    written = first.stat().st_mtime_ns
    (tmp_path / "out" / "cells" / ".x.abcd_123.json").write_text("{")  # what a kill in the midst of writing leaves
    resumed = benchmark.run(config, tmp_path / "out", root=tiles["root"], quiet=True, jobs=2)
    assert first.stat().st_mtime_ns == written
    fit = {**config, "method": config["method"][:2]}
    whole = benchmark.run(fit, tmp_path / "whole", root=tiles["root"], quiet=True, jobs=2)
    assert len(resumed) == 2 and alike(resumed) == alike(whole)
    [failed] = benchmark.read(tmp_path / "out", "failed")
    assert failed["cell"]["method"] == "prompt" and "does not fit" in failed["error"] and failed["kind"] == "ConfigError"
    assert benchmark.table(resumed).count("\n| ") == 4
    content = resumed[0]
    assert content["states"].keys() == {"bn", "head", "lean"} and len(content["pictures"]["after"]) == 4
    assert content["environment"]["threads"] >= 1 and content["command"].startswith("visionpeft train --data ")
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoint.pt"))


def wait(for_: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not for_():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns what lets every cell's process be a line of shell."""

    def make(line: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sweep.sys, "executable", str(script))

    return make


def test_a_process_that_dies_is_a_cell_that_failed(tiles: dict[str, Any], tmp_path: Path, instead, monkeypatch) -> None:
    given = {"config": tiles["config"], "out": tmp_path / "out", "root": tiles["root"], "quiet": True}
    instead("echo last words; kill -9 $$")
    assert benchmark.run(**given) == []
    found = benchmark.read(tmp_path / "out", "failed")
    assert [f["kind"] for f in found] == ["Died", "Died"] and "SIGKILL" in found[0]["error"]
    assert found[0]["log"] == "last words"
    instead("exit 7")
    benchmark.run(**given)
    assert "SIGKILL" in benchmark.read(tmp_path / "out", "failed")[0]["error"]  # not again without retry
    counts = iter(range(9))
    monkeypatch.setattr(sweep, "_killed_for_memory", lambda: next(counts))
    instead("kill -9 $$")
    benchmark.run(**given, retry=True)
    assert {f["kind"] for f in benchmark.read(tmp_path / "out", "failed")} == {"OutOfMemory"}


def test_a_full_disk(tiles: dict[str, Any], tmp_path: Path, instead, monkeypatch) -> None:
    given = {"config": tiles["config"], "out": tmp_path / "out", "root": tiles["root"], "quiet": True}
    instead(f"exit {cells.FULL}")
    with pytest.raises(DiskFull, match="is full; free some and give the same command again"):
        benchmark.run(**given)
    assert not benchmark.read(tmp_path / "out", "failed")
    kept = tmp_path / "kept.json"
    kept.write_text("old")

    def no_room(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match="kept.json cannot be written"):
        files.replace(kept, no_room)
    assert kept.read_text() == "old" and sorted(f.name for f in tmp_path.iterdir()) == ["kept.json", "out", "python"]


def test_what_memory_lacks_is_told_from_other_failures() -> None:
    torchs = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ...")
    errors = torchs, torch.OutOfMemoryError("x"), MemoryError(), OutOfMemory("x"), KeyError(1)
    kinds = [cells.error_kind(e) for e in errors]
    assert kinds == ["OutOfMemory"] * 4 + ["KeyError"]


def test_two_sweeps_on_one_folder(tiles: dict[str, Any], tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(ConfigError, match="another sweep is writing into"):
        benchmark.run(tiles["config"], tmp_path, root=tiles["root"])


FOREIGN = {
    "truncated": ('{"format": 1, "ha', "0123456789abcdef.json is not a file of a benchmark's cells .*Unterminated"),
    "another's": ('{"a": 1}', "it has no cell"),
    "no mapping": ("[]", "it is .., but must be a mapping"),
    "altered": (min((FOLDER / "results" / "cells").glob("*.json")).read_text(), "altered or renamed"),
    "newer": ('{"format": 2}', "has format 2"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_ours(kind: str, tiles: dict[str, Any], tmp_path: Path, instead) -> None:
    content, says = FOREIGN[kind]
    file = tmp_path / "cells" / "0123456789abcdef.json"
    file.parent.mkdir()
    file.write_text(content)
    instead("exit 9")
    for call in (lambda: benchmark.read(tmp_path), lambda: benchmark.run(tiles["config"], tmp_path, root=tiles["root"])):
        with pytest.raises(ConfigError, match=says) as told:
            call()
        assert file.name in str(told.value)
    assert file.read_text() == content and not list((tmp_path / "failed").glob("*"))


# -------------------------------------------------------------------------------------------------------------- the table
def made_up(method: str, right: np.ndarray, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A cell whose model answers these images rightly."""
    names = [f"{i:03}.png" for i in range(len(right))]
    evidence = Answers.gather(names, [1] * len(right), right.astype(int).tolist())
    spec = {
        "model": "m",
        "model_args": {},
        "weights_sha256": "",
        "data": "d",
        "data_sha256": "",
        "method": method,
        "freeze": 0,
    }
    spec |= {"seed": seed, "options": more, "own": [], "retain": None, "retain_sha256": "", "equal": "epochs", "search": {}}
    measured = {"saved_bytes": 1000, "peak_bytes": 2000, "peak_measure": "x", "step_seconds": 0.1}
    return {
        "hash": grid.hash_of(spec), "cell": spec, "names": {"model": "m", "data": "d", "method": method}, "score": "top1",
        "run": {
            "after": {"top1": float(right.mean())}, "parameters": {"body": 1, "head": 2, "total": 3}, "measured": measured,
            "delta_bytes": {"file": 10}, "history": [{"epoch": 1}],
        },
        "states": {"bn": "train", "head": "keep", "lean": "auto"}, "evidence": evidence.pack(),
        "retained": None, "seconds": 1.0,
    }  # fmt: skip


def test_intervals_over_images() -> None:
    random = np.random.default_rng(0)
    right = random.random(400) < 0.8
    better = right | (random.random(400) < 0.2)
    full, other = benchmark.compare([made_up("other", better), made_up("full", right)], resamples=2000)
    assert full.method == "full" and full.difference is None
    expected = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)  # of a share
    assert (full.high - full.low) / 2 == pytest.approx(expected, rel=0.15)
    assert full.low < full.score_mean < full.high
    gain = better.astype(int) - right
    assert other.difference == pytest.approx(gain.mean())
    # paired: what both get right or wrong does not blur the difference
    assert (other.difference_high - other.difference_low) / 2 == pytest.approx(1.96 * gain.std() / 20, rel=0.15)
    assert other.difference_high - other.difference_low < 0.7 * (full.high - full.low)


def test_intervals_over_seeds() -> None:
    right = [np.arange(100) < count for count in (90, 50)]
    [one] = benchmark.compare([made_up("full", right[0])])
    [both] = benchmark.compare([made_up("full", r, seed) for seed, r in enumerate(right)])
    assert both.seeds == 2 and both.score_mean == pytest.approx(0.7) and both.score_by_seed == {0: 0.9, 1: 0.5}
    assert both.low < 0.55 and one.low > 0.7 and both.high > 0.85  # seeds this far apart say little
    again = benchmark.compare([made_up("full", r, seed) for seed, r in enumerate(right)])
    assert (again[0].low, again[0].high) == (both.low, both.high)


def test_rows_that_are_called_alike() -> None:
    right = np.arange(50) < 30
    found = [made_up(m, right[:50] if m == "full" else ~right, epochs=e) for m in ("full", "lora") for e in (2, 4)]
    rows = benchmark.compare(found, resamples=20)
    assert sorted(r.method for r in rows) == ["full, epochs 2", "full, epochs 4", "lora, epochs 2", "lora, epochs 4"]
    assert [r.difference for r in rows if r.method.startswith("lora")] == [pytest.approx(-0.2)] * 2
    alone = benchmark.compare([made_up("lora", right, 1), made_up("full", right, 0)], resamples=20)
    assert [r.difference for r in alone] == [None, None]  # no seed that both have
    assert benchmark.table(found, resamples=20).splitlines()[0] == "**d, m**"


def test_only_some_methods_and_other_seeds(tiles) -> None:
    config = {**tiles["config"], "method": ["full", "bitfit", {"method": "lora", "r": 2}], "seed": [1, 2]}
    chosen = grid.make_grid(config, "x", tiles["root"], only="full|lora, r 2")
    assert [(c.names["method"], c.spec["seed"]) for c in chosen.cells] == [
        (method, seed) for seed in (1, 2) for method in ("full", "lora, r 2")
    ]
    every = {c.hash for c in grid.make_grid(config, "x", tiles["root"]).cells}
    assert {c.hash for c in chosen.cells} < every  # the same cells
    with pytest.raises(ConfigError, match="only='dora' matches none of the grid's methods: full; bitfit; lora, r 2"):
        grid.make_grid(config, "x", tiles["root"], only="dora")
