"""A run's files are written behind its back: whole, in order, and with their errors told; an optimizer's state fits."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_squares
from torch import nn
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator
from ultralytics.utils.ops import process_mask

import visionpeft
from visionpeft import files
from visionpeft.errors import TrainingError
from visionpeft.families.timm.trainer import Trainer
from visionpeft.families.yolo.validator import with_fast_nms
from visionpeft.process import random_states, set_random_states
from visionpeft.training import checkpoint as checkpoints


# ------------------------------------------------------------------------------------------------------------ the writer
def test_the_newest_is_written_last(tmp_path: Path) -> None:
    """However slow the older ones are; and what is written is what there was when it was handed over."""
    path, weights, written = tmp_path / "checkpoint.pt", torch.zeros(3), []

    def save(content: dict[str, Any], seconds: float) -> None:
        time.sleep(seconds)
        written.append(content["epoch"])
        checkpoints.save(path, content)

    with checkpoints.Writer() as writer:
        for epoch, seconds in enumerate((0.2, 0.1, 0.0)):
            content = checkpoints.snapshot({"epoch": epoch, "more": [{"weights": weights}]})
            writer.put(lambda c=content, s=seconds: save(c, s))
            weights += 1
    saved = torch.load(path, weights_only=True)
    assert written == [0, 1, 2] and saved["epoch"] == 2 and saved["more"][0]["weights"].tolist() == [2.0] * 3


def test_random_states_of_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be resumed on a machine with fewer."""
    put_back: list[Any] = []
    states = {**random_states(), "cuda": ["one", "two"]}
    for name, made in (("is_available", lambda: True), ("device_count", lambda: 1), ("set_rng_state_all", put_back.extend)):
        monkeypatch.setattr(torch.cuda, name, made)
    set_random_states(states)
    assert put_back == ["one"]


def test_training_goes_on_while_it_writes() -> None:
    with checkpoints.Writer() as writer:
        began = time.monotonic()
        writer.put(lambda: time.sleep(0.5))
        assert time.monotonic() - began < 0.4
    assert time.monotonic() - began >= 0.5


def test_a_failed_write_is_told_once_and_leaves_what_was_there(tmp_path: Path) -> None:
    target = files.write(tmp_path / "file", "first")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TrainingError, match=r"cannot be saved \(the disk is full\); make room"):
        with checkpoints.Writer() as writer:
            writer.put(lambda: files.replace(target, full), lambda: files.write(target, "never"))
            with pytest.raises(TrainingError, match="the disk is full"):
                writer.put(lambda: files.write(target, "never"))
            writer.put(lambda: files.replace(target, full))
    assert target.read_text() == "first" and [f.name for f in tmp_path.iterdir()] == ["file"]


def test_an_exception_waits_for_the_write_and_is_the_one_to_hear_of(tmp_path: Path) -> None:
    def slow() -> None:
        time.sleep(0.3)
        files.write(tmp_path / "file", "whole")
        raise OSError("not heard of")

    with pytest.raises(KeyboardInterrupt), checkpoints.Writer() as writer:
        writer.put(slow)
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes by fork here")
def test_processes_start_between_two_writes() -> None:
    done: list[bool] = []
    with checkpoints.Writer() as writer:
        writer.put(lambda: (time.sleep(0.3), done.append(True)))
        if not (child := os.fork()):
            os._exit(0 if done else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("family", ["timm", "yolo"])
def test_a_full_disk_ends_a_run(
    family: str, boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, more = boxes, {"model": checkpoint, "method": "norm", "imgsz": 64}
    if family == "timm":
        more = {"model": "timm/test_resnet", "model_args": {"pretrained": False}, "method": "full", "imgsz": 32}
        data = make_squares(tmp_path / "data")
    real, calls = torch.save, []

    def full(content: Any, path: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, path, **options)

    monkeypatch.setattr(torch, "save", full)
    given = {"epochs": 3, "batch": 4, "device": "cpu", "workers": 0, "quiet": True, "project": tmp_path, **more}
    with pytest.raises(TrainingError, match="the disk is full"):
        visionpeft.train(data, **given)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path / "train" / "checkpoint.pt")["epoch"] == 0
    assert not [f for f in (tmp_path / "train").iterdir() if f.name.startswith(".")] and not gc.get_freeze_count()
    assert len(visionpeft.train(resume=tmp_path / "train", quiet=True).history) == 3


# --------------------------------------------------------------------------------------------------------- the optimizer
def test_classifiers_train_with_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has one: not for lamb, which is timm's."""
    seen: dict[str, Any] = {}
    real = Trainer.run

    def look(loop: Trainer) -> None:
        seen[loop.job.config.optimizer] = loop.optimizer.param_groups[0].get("fused")
        real(loop)

    monkeypatch.setattr(Trainer, "run", look)
    data = make_squares(tmp_path / "data")
    for optimizer in ("adamw", "sgd", "lamb"):
        visionpeft.train(
            data, model="timm/test_resnet", model_args={"pretrained": False}, method="full", epochs=1, imgsz=32, batch=4,
            device="cpu", workers=0, quiet=True, optimizer=optimizer, project=tmp_path,
        )  # fmt: skip
    assert seen == {"adamw": True, "sgd": True, "lamb": None}


@pytest.mark.parametrize("saved_fused", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizers_state_fits_either_kind(fused: bool, saved_fused: bool, tmp_path: Path) -> None:
    """Fused or not is how it computes, which a checkpoint does not decide; of the same kind, it goes on bit for bit."""

    def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, first: int, last: int) -> torch.Tensor:
        for i in range(first, last):
            weight.grad = torch.randn(500, generator=torch.Generator().manual_seed(i))
            optimizer.step()
        return weight.detach().clone()

    begin = torch.randn(500)
    weight = nn.Parameter(begin.clone())
    whole = torch.optim.AdamW([weight], lr=1e-2, fused=saved_fused)
    steps(whole, weight, 0, 3)
    content = checkpoints.snapshot({"weight": weight, "optimizer": whole.state_dict()})
    checkpoints.save(tmp_path / "checkpoint.pt", content)
    expected = steps(whole, weight, 3, 6)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    weight = nn.Parameter(saved["weight"])
    rest = torch.optim.AdamW([weight], lr=1e-1, fused=fused)
    checkpoints.restore_optimizer(rest, saved["optimizer"])
    assert rest.param_groups[0]["fused"] is fused and rest.param_groups[0]["lr"] == 1e-2
    found = steps(rest, weight, 3, 6)
    assert torch.equal(found, expected) if fused == saved_fused else torch.allclose(found, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ validation
@pytest.mark.parametrize("crowd", [30, 3000])
@pytest.mark.parametrize("task", ["detect", "segment", "pose"])
def test_fewer_boxes_give_the_same_detections(
    task: str, crowd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, among many boxes of equal scores, of which many overlap (or, in a crowd, nearly all); and fewer are
    compared."""
    kinds = {"detect": DetectionValidator, "segment": SegmentationValidator, "pose": PoseValidator}
    classes, extra, boxes = (1 if task == "pose" else 5), {"detect": 0, "segment": 32, "pose": 6}[task], 4000
    random = torch.Generator().manual_seed(crowd)
    y = torch.rand(3, 4 + classes + extra, boxes, generator=random)
    y[:, :2] *= 9000 / crowd
    y[:, 2:4] = 20 + 5 * y[:, 2:4]
    y[:, 4 : 4 + classes] = (y[:, 4 : 4 + classes] * 200).round() / 200  # ties
    y[2, 4 : 4 + classes, 20:] = 0  # an image with few
    compared: list[int] = []
    import torchvision

    real = torchvision.ops.nms
    monkeypatch.setattr("ultralytics.utils.nms.time.time", lambda: 0.0)  # it gives up on a slow machine
    monkeypatch.setattr(torchvision.ops, "nms", lambda b, s, t: (compared.append(len(b)), real(b, s, t))[1])

    def detections(kind: type) -> list[dict[str, torch.Tensor]]:
        compared.clear()
        validator = kind(args={"task": task, "iou": 0.7, "max_det": 50}, save_dir=tmp_path)
        validator.nc, validator.end2end, validator.kpt_shape = classes, False, [2, 3]
        validator.process = process_mask
        proto = torch.rand(3, 32, 16, 16, generator=torch.Generator().manual_seed(1))
        preds = {"segment": ((y.clone(), proto), {})}.get(task, (y.clone(), {}))
        with torch.no_grad():
            return validator.postprocess(preds)

    expected, all_compared = detections(kinds[task]), sum(compared)
    found = detections(with_fast_nms(kinds[task]))
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(found) == 3 and len(found[0]["cls"]) == (50 if crowd == 30 else len(expected[0]["cls"]))
    if crowd == 30:
        assert sum(compared) < all_compared / 2


# --------------------------------------------------------------------------------------------------------------- the rest
def test_the_collector_is_as_it_was_after_a_run(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    given = {"model": checkpoint, "method": "head", "epochs": 1, "imgsz": 64, "batch": 4, "quiet": True}
    visionpeft.train(boxes, project=tmp_path, **given)
    assert not gc.get_freeze_count()
    with pytest.raises(visionpeft.VisionpeftError):
        visionpeft.train(boxes, project=tmp_path, **{**given, "epochs": 0})
    assert not gc.get_freeze_count()
