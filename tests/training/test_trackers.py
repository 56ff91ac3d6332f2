"""What trackers hold after a run of either loop: every epoch once, resumed or not, and the same keys."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ctrl_c

import visionpeft
from visionpeft import cli
from visionpeft.errors import ConfigError, Interrupted
from visionpeft.training import trackers

COMMON = ["epoch", "seconds", "lr", "train/loss", "memory"]
FAMILIES = ["yolo", "timm"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, steps in the order in which they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_epoch_once(family: str, loops, tmp_path: Path) -> None:
    """In the CSV and in TensorBoard; also of a run that was killed when an epoch was logged but not in its checkpoint."""
    data, args, owner, method = loops[family]
    args = {**args, "epochs": 3, "method": "norm", "project": tmp_path, "trackers": "csv, tensorboard"}
    whole = visionpeft.train(data, name="whole", **args)
    with ctrl_c(owner, method, after=2), pytest.raises(Interrupted):
        visionpeft.train(data, name="parts", **args)
    log = trackers.Trackers(("tensorboard",), tmp_path / "parts", {})
    with log:  # an epoch that no checkpoint has
        log.open(2)
        log.log({"epoch": 3, "train/loss": 1e9}, 1e9, None)
    time.sleep(1)  # TensorBoard reads a run's files in the order of the seconds in their names
    rest = visionpeft.train(resume=tmp_path / "parts", quiet=True)

    one, two = rows(whole.folder), rows(rest.folder)
    assert [row["epoch"] for row in one] == [row["epoch"] for row in two] == ["1", "2", "3"]
    assert [{**row, "seconds": ""} for row in one] == [{**row, "seconds": ""} for row in two]
    score = "mAP50-95" if family == "yolo" else "top1"
    assert {*COMMON, score} <= set(one[0]) and all(float(row["seconds"]) > 0 for row in one)
    for row, epoch in zip(one, whole.history, strict=True):
        assert float(row[score]) == pytest.approx(epoch[score])
        assert float(row["train/loss"]) == pytest.approx(
            sum(v for k, v in epoch.items() if k.startswith("train/")), rel=1e-4
        )
        assert int(row["memory"]) == whole.measured["peak_bytes"]
    assert 0 < float(one[-1]["lr"]) < float(one[0]["lr"]) <= 1.01 * whole.arguments["lr0"], "the head's"

    for run, held in ((whole, one), (rest, two)):
        seen = scalars(run.folder)
        for key in ("lr", "train/loss", score):
            assert [step for step, _ in seen[key]] == [1, 2, 3], key
            assert [value for _, value in seen[key]] == pytest.approx([float(row[key]) for row in held], rel=1e-4)
        assert seen[f"after/{score}"][-1][1] == pytest.approx(run.after[score])


def test_a_new_run_in_an_old_folder_starts_its_log_anew(loops, tmp_path: Path) -> None:
    data, args, *_ = loops["timm"]
    args = {**args, "method": "head", "project": tmp_path, "name": "same", "exist_ok": True, "trackers": ["tensorboard"]}
    for epochs in (2, 1):
        run = visionpeft.train(data, **{**args, "epochs": epochs})
    assert [row["epoch"] for row in rows(run.folder)] == ["1"]
    assert [step for step, _ in scalars(run.folder)["train/loss"]] == [1]


@pytest.mark.parametrize("given", ["tensorbord", "wandb,nothing", ["csv", "comet"]])
def test_an_unknown_tracker_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not known; there are csv, tensorboard, wandb, mlflow"):
        visionpeft.train(tmp_path / "nowhere", model="timm/resnet18", project=tmp_path, trackers=given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [5, ["csv", 5]])
def test_trackers_are_names(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not understood; give names such as 'tensorboard,wandb'"):
        visionpeft.train(tmp_path / "nowhere", model="timm/resnet18", project=tmp_path, trackers=given)


def test_a_missing_package_is_named_before_anything_trains(loops, tmp_path: Path, lacking, capsys) -> None:
    lacking("wandb")
    data, args, *_ = loops["timm"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--data", str(data), "--model", args["model"], "--trackers", "wandb", "--project", str(tmp_path)])
    assert stopped.value.code == 2
    said = "trackers='wandb' needs wandb, which is not installed: pip install 'visionpeft[trackers]'"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- W&B and MLflow
class FakeRun:
    """A run at W&B; steps must rise, as there."""

    runs: dict[str, FakeRun] = {}

    def __init__(self, **settings: Any):
        self.id, self.settings, self.summary = settings["id"], settings, {}
        self.steps: dict[int, dict] = {}
        self.ended: list[int] = []

    def log(self, values: dict, step: int) -> None:
        assert step not in self.steps, "logged twice"
        self.steps[step] = values

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    """Stands in for the package; returns its runs by id."""
    runs: dict[str, FakeRun] = {}
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.init = lambda **settings: runs.setdefault(settings["id"], FakeRun(**settings))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_wandb(family: str, loops, fake_wandb, tmp_path: Path) -> None:
    data, args, owner, method = loops[family]
    args = {**args, "epochs": 3, "method": "lora", "r": 2, "project": tmp_path, "name": "run", "trackers": "wandb"}
    with ctrl_c(owner, method, after=1), pytest.raises(Interrupted):
        visionpeft.train(data, **args)
    (logged,) = fake_wandb.values()
    assert list(logged.steps) == [1] and logged.ended == [1], "it failed"
    run = visionpeft.train(resume=tmp_path / "run", trackers="wandb", quiet=True)
    assert list(fake_wandb.values()) == [logged], "it went on under its id"
    assert list(logged.steps) == [1, 2, 3] and logged.ended == [1, 0]
    assert all({*COMMON} <= set(row) for row in logged.steps.values())
    assert logged.settings["project"] == "visionpeft" and logged.settings["name"] == "run"
    config = logged.settings["config"]
    assert config["method"] == "lora" and config["method_settings/r"] == 2
    assert config["plan/body"] == run.parameters["body"]
    score = "mAP50-95" if family == "yolo" else "top1"
    assert logged.summary[f"after/{score}"] == run.after[score]
    assert logged.summary["measured/saved_bytes"] == run.measured["saved_bytes"]


def test_a_tracker_that_fails_does_not_end_the_run(loops, fake_wandb, tmp_path: Path, monkeypatch, caplog) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(FakeRun, "log", broken)
    data, args, *_ = loops["timm"]
    with caplog.at_level(logging.WARNING):
        run = visionpeft.train(data, method="head", project=tmp_path, trackers="wandb", **args)
    assert caplog.text.count("wandb failed and is left out from here on (no network)") == 1
    assert len(rows(run.folder)) == 2


def test_a_tracker_that_cannot_be_opened_is_said_before_training(loops, fake_wandb, tmp_path: Path, monkeypatch) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    for data, args, *_ in loops.values():
        with pytest.raises(ConfigError, match=r"trackers='wandb' cannot be opened \(not logged in\)"):
            visionpeft.train(data, method="head", project=tmp_path, trackers="wandb", **args)
    assert not list(tmp_path.rglob("metrics.csv"))


def installed(name: str) -> Callable:
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed (visionpeft[trackers])"
    )


@installed("wandb")
@pytest.mark.parametrize("family", FAMILIES)
def test_wandb_offline(family: str, loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    data, args, *_ = loops[family]
    run = visionpeft.train(data, method="head", project=tmp_path, trackers="wandb", **args)
    (file,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stem.partition("-")[2] == json.loads((run.folder / "trackers.json").read_text())["wandb"]
    until = time.monotonic() + 20  # its own process writes
    while not all(word in file.read_bytes() for word in (b"train/loss", b"after/")):
        assert time.monotonic() < until, "neither epochs nor the result were written"
        time.sleep(0.1)


@installed("mlflow")
@pytest.mark.parametrize("family", FAMILIES)
def test_mlflow_in_files(family: str, loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    data, args, owner, method = loops[family]
    args = {**args, "epochs": 3, "method": "head", "project": tmp_path / "runs", "name": "run", "trackers": "mlflow"}
    with ctrl_c(owner, method, after=2), pytest.raises(Interrupted):
        visionpeft.train(data, **args)
    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    key = json.loads((tmp_path / "runs" / "run" / "trackers.json").read_text())["mlflow"]
    assert client.get_run(key).info.status == "FAILED"
    run = visionpeft.train(resume=tmp_path / "runs" / "run", trackers="mlflow", quiet=True)
    found = client.get_run(key)
    assert found.info.status == "FINISHED" and found.data.params["method"] == "head"
    for name in ("lr", "train/loss", "memory"):
        assert [metric.step for metric in client.get_metric_history(key, name)] == [1, 2, 3]
    score = "mAP50-95" if family == "yolo" else "top1"
    assert found.data.metrics[f"after/{score}"] == pytest.approx(run.after[score])


def test_trackers_that_are_installed_run_only_if_asked_for(loops, tmp_path: Path, monkeypatch) -> None:
    """Ultralytics adds one for each that its settings allow, by default five; here all of them stand in for real ones."""
    from ultralytics.utils import SETTINGS

    called: list[str] = []
    for name in ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wb"):
        module = types.ModuleType(f"ultralytics.utils.callbacks.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.callbacks = {"on_fit_epoch_end": lambda trainer, name=name: called.append(name)}  # type: ignore[attr-defined]
    assert SETTINGS["mlflow"] is True
    data, args, *_ = loops["yolo"]
    visionpeft.train(data, method="head", project=tmp_path, name="csv", trackers="csv", **args)
    assert not called
    assert os.listdir(tmp_path / "csv").count("metrics.csv") == 1


def test_a_run_folder_does_not_say_where_numbers_are_sent(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(trackers, "names", lambda given: tuple(given.split(",")))
    assert trackers.again("csv,tensorboard,wandb", "csv") == ["csv", "tensorboard"]
    assert "wandb is used again only if this call names it, too" in caplog.text
    assert trackers.again("csv,wandb", "wandb,tensorboard") == ["csv", "wandb", "tensorboard"]
    assert trackers.again("csv,wandb", "wandb") == "csv,wandb" and trackers.again("csv", "csv") == "csv"
