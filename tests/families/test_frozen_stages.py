"""The frozen prefix: run apart it gives the rest of the model what it always gave, stored or not, and a run that reads
stored views is one that reads images in all but its time."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import NETS, ctrl_c, flat, make_boxes, make_squares
from conftest import yolo as random_yolo
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import visionpeft
from visionpeft import lean
from visionpeft.core import class_swap
from visionpeft.core import delta as deltas
from visionpeft.core.attach import WrappedForward
from visionpeft.core.base_model import Base
from visionpeft.errors import ConfigError, Interrupted
from visionpeft.families.timm import trainer as loop
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.lean import frozen_stages as prefixes
from visionpeft.lean.frozen_stages import FrozenStages, FrozenStagesMixin, PrecomputedOutput
from visionpeft.registry import FAMILIES
from visionpeft.training import checkpoint as checkpoints
from visionpeft.training import feature_cache as views
from visionpeft.training import feature_cache_file as view_file

SMALL = {"epochs": 3, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "lr0": 1e-3, "quiet": True}
STILL = {  # what makes a view of an image that image
    "yolo": dict.fromkeys(("mosaic", "degrees", "translate", "scale", "fliplr", "hsv_h", "hsv_s", "hsv_v"), 0.0)
    | {"erasing": 0.0, "auto_augment": None},
    "timm": {"scale": 0.0, "fliplr": 0.0, "color_jitter": 0.0},
}
RUNS = ({}, {"frozen_dtype": "fp32"}, {"cache": 1, "frozen_dtype": "fp32"})
CUTS = [(name, stages) for name in NETS for stages in (1, 3)] + [("yolo11n", 10), ("yolo11n", 23), ("yolo26n", 23)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISIONPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "views"


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"), size=64)


def cut(
    model: nn.Module, name: str, stages: int, dtype: torch.dtype = torch.float32, side: int = 64, **more: Any
) -> FrozenStages:
    family = FAMILIES[NETS[name][0]]()
    leading = family.leading_stages(Base(name, model, "", {}, {"channels": 3}), stages, side)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    return FrozenStages(model, leading.modules, x, leading.read, dtype, **more)


def save_resnet(file: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), file)
    return file


def train_resnet(data: Path, project: Path, **more: Any) -> visionpeft.Run:
    weights = project.parent / "resnet.safetensors"
    source = {"checkpoint_path": weights if weights.is_file() else save_resnet(weights)}
    args: dict[str, Any] = {"freeze": 3, "method": "full", "model_args": source}
    return visionpeft.train(data, model="timm/test_resnet", project=project, **{**SMALL, **args, **more})


def losses(run: visionpeft.Run) -> Tensor:
    return torch.tensor([[v for k, v in row.items() if "loss" in k] for row in run.history])


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.is_dir() else []


# ----------------------------------------------------------------------------------------------------------- the prefix
@pytest.mark.parametrize(("name", "stages"), CUTS)
def test_run_apart_or_given_a_model_returns_the_same(net, name: str, stages: int) -> None:
    model = net(name)
    side = 224 if name == "convnext_atto" else 64
    x = torch.rand(2, 3, side, side)
    prefix = cut(model, name, stages, side=side)
    before = {k: type(m) for k, m in model.named_modules()}
    keys = model.state_dict().keys()
    with torch.no_grad():
        expected = flat(model(x))
        vectors = prefix.flatten(prefix(x))
        assert vectors.shape == (2, prefix.length)
        apart = copy.deepcopy(prefix.install(model))
        assert apart.state_dict().keys() == keys
        for given in (x, vectors):
            for a, b in zip(flat(apart(given)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        prefix.uninstall(model)
        assert {k: type(m) for k, m in model.named_modules()} == before
        assert all(torch.equal(a, b) for a, b in zip(flat(model(x)), expected, strict=True))


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n-seg", "resnet18", "mobilenetv2", "mobilenetv1"])
def test_every_batchnorm_of_the_prefix_is_folded(net, name: str) -> None:
    fast = cut(net(name), name, 3)._fast
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    kept = sum(p.numel() for p in fast.parameters())
    assert 0 < kept < sum(p.numel() for p in net(name).parameters()) / 2  # what comes behind is not carried along


def test_outputs_are_rounded_to_the_stored_type_and_to_no_less(net, images: Tensor) -> None:
    model = net("yolo11n")
    exact, rounded = cut(model, "yolo11n", 10)(images), cut(model, "yolo11n", 10, stored=torch.bfloat16)(images)
    coarse = cut(model, "yolo11n", 10, torch.bfloat16)
    for name, output in exact.items():
        assert rounded[name].dtype is torch.bfloat16 and torch.equal(rounded[name], output.bfloat16())
        assert 0 < (coarse(images)[name].float() - output).norm() / output.norm() < 0.02
    back = coarse.unflatten(coarse.flatten(outputs := coarse(images)))
    assert all(torch.equal(back[name], outputs[name]) for name in outputs)


def test_gradients_behind_the_prefix_are_those_of_the_whole(net, images: Tensor) -> None:
    whole = net("resnet18").requires_grad_(False)
    whole.layer4.requires_grad_(True)
    apart = (prefix := cut(whole, "resnet18", 4)).install(copy.deepcopy(whole))
    whole(images).square().sum().backward()
    for given in (images, prefix.flatten(prefix(images))):
        apart.zero_grad()
        apart(given).square().sum().backward()
        for a, b in zip(apart.layer4.parameters(), whole.layer4.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


class Secret(nn.Module):
    """Its last layer reads what lies between its first two modules, and not what they put out."""

    def __init__(self, both: bool = False):
        super().__init__()
        self.one, self.two, self.three, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), both

    def forward(self, x: Tensor) -> Tensor:
        between = self.one(x)
        y = self.two(between + 1)
        y = self.two(y) if self.both else y
        return self.three(y + between)


@pytest.mark.parametrize(("both", "why"), [(False, "in between"), (True, "two runs twice")])
def test_a_model_that_cannot_be_cut_is_refused(both: bool, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot run apart from the rest \(.*{why}.*; leave cache and frozen_dtype out"):
        FrozenStages(Secret(both), ["one", "two"], torch.rand(2, 3, 8, 8))
    FrozenStages(Secret(), ["one"], torch.rand(2, 3, 8, 8))


def test_a_norm_after_two_convolutions_or_of_a_computed_weight_is_not_folded(images: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(self.norm(y) + self.other(y))

    model = Shared().eval()
    model.norm.running_var.fill_(2.0)
    prefix = FrozenStages(model, ["conv", "norm", "other"], images, read=["norm", "other"])
    assert sum(isinstance(m, nn.BatchNorm2d) for m in prefix._fast.modules()) == 2
    torch.testing.assert_close(prefix.install(copy.deepcopy(model))(images), model(images))


def test_ultralytics_may_fuse_what_runs_apart(net, images: Tensor) -> None:
    model = net("yolo11n")
    apart = (prefix := cut(model, "yolo11n", 1)).install(copy.deepcopy(model))  # its output is that of a plain Conv
    apart.fuse(verbose=False)
    with torch.no_grad():
        for given in (images, prefix.flatten(prefix(images))):
            torch.testing.assert_close(flat(apart(given))[0], flat(model(images))[0], rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------- runs of both families
@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_stored_views_train_as_their_images_would(tmp_path: Path, task: str) -> None:
    """Without augmentation the one view is the image, labels and all, so the losses are those of a run without cache."""
    data = make_boxes(tmp_path / "data", task)
    suffix = {"detect": "", "segment": "-seg"}.get(task, f"-{task}")
    weights = tmp_path / f"yolo11n{suffix}.pt"
    torch.manual_seed(0)
    torch.save({"model": random_yolo(f"yolo11n{suffix}").half(), "train_args": {"imgsz": 64, "task": task}}, weights)
    args = {
        "model": weights,
        "freeze": 10,
        "project": tmp_path / "runs",
        **SMALL,
        **STILL["yolo"],
        "optimizer": "SGD",
        "epochs": 2,
    }
    alike(*(visionpeft.train(data, **args, **more) for more in RUNS))


def test_stored_views_of_classes_train_as_their_images_would(squares: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "yolo11n-cls.pt"
    torch.save({"model": random_yolo("yolo11n-cls").half(), "train_args": {"imgsz": 64, "task": "classify"}}, weights)
    args: dict[str, Any] = {
        "model": weights,
        "freeze": 5,
        "project": tmp_path / "runs",
        **SMALL,
        **STILL["yolo"],
        "epochs": 2,
    }
    alike(*(visionpeft.train(squares, **args, **more) for more in RUNS))
    alike(*(train_resnet(squares, tmp_path / "runs", **STILL["timm"], **more) for more in RUNS))


def alike(plain: visionpeft.Run, apart: visionpeft.Run, kept: visionpeft.Run) -> None:
    torch.testing.assert_close(losses(kept), losses(apart), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses(kept)[0], losses(plain)[0], rtol=2e-3, atol=2e-3)  # later rounding grows


@pytest.mark.parametrize("more", [{"cache": 2}, {"frozen_dtype": "bf16"}], ids=str)
def test_a_run_gives_a_delta_of_what_was_planned_and_says_that_it_approximates(
    boxes: Path, checkpoint: Path, tmp_path: Path, more: dict
) -> None:
    args = {"model": checkpoint, "method": "lora", "r": 2, "freeze": 10, "close_mosaic": 1, "project": tmp_path / "runs"}
    run = visionpeft.train(boxes, **args, **SMALL, **more)
    delta = deltas.read(run.delta)
    planned = {*run.plan.train} | {k for k in delta.tensors if "peft_" in k}
    moved = {k for k in delta.tensors if k.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(delta.tensors) <= planned | moved
    assert not [k for k in delta.tensors if int(k.split(".")[1]) < 10]
    assert all(torch.isfinite(t).all() for t in delta.tensors.values())
    assert torch.isfinite(losses(run)).all()
    said = run.measured["prefix"]
    assert said["stages"] == 10 and said["dtype"] == "bfloat16" and said["exact"] == run.before["mAP50-95"]
    assert "10 run in bfloat16" in (text := " ".join(str(run).split())) or "10, 3 views" in text
    assert "approximate; before, mAP50-95 is " in text
    if "cache" in more:
        assert said["views"] == 3  # two with mosaic, and one of the epoch without
        assert said["fill_seconds"] > 0 and said["stored_bytes"] > 3 * 8 * 11264 * 2
    base = visionpeft.load(run.delta).base.state
    merged = torch.load(run.merged, weights_only=False)["model"].float().state_dict()
    assert all(torch.equal(merged[k], base[k]) for k in merged if int(k.split(".")[1]) < 10)


@pytest.mark.parametrize("more", [{"cache": 2}, {"frozen_dtype": "bf16"}], ids=str)
def test_what_is_learned_is_useful(squares: Path, tmp_path: Path, more: dict) -> None:
    run = train_resnet(squares, tmp_path / "runs", **{"epochs": 12, "freeze": 2, "lr0": 3e-3, "fliplr": 0.5, **more})
    assert run.after["top1"] >= 0.9 and run.after["loss"] < 0.5 * run.before["loss"]


def test_the_change_in_score_is_measured_on_the_model_that_trains(squares: Path, tmp_path: Path) -> None:
    run = train_resnet(squares, tmp_path / "runs", frozen_dtype="bf16")
    said = run.measured["prefix"]
    assert said["metric"] == "top1" and said["exact"] == run.before["top1"] and 0 <= said["approximate"] <= 1
    assert "views" not in said and "3 run in bfloat16: approximate; before, top1 is" in " ".join(str(run).split())


def test_resumed_equals_uninterrupted(boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    args = {"model": checkpoint, "freeze": 10, "cache": 2, "close_mosaic": 1, "project": tmp_path / "runs", **SMALL}
    whole = visionpeft.train(boxes, name="whole", **args)
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted):
        visionpeft.train(boxes, name="parts", **args)
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted):
        visionpeft.train(resume=tmp_path / "runs" / "parts", quiet=True)
    monkeypatch.setenv("VISIONPEFT_CACHE", str(tmp_path / "another"))  # the views are gone, and made again
    equal(whole, visionpeft.train(resume=tmp_path / "runs" / "parts", quiet=True))


def test_resumed_equals_uninterrupted_for_timm(squares: Path, tmp_path: Path) -> None:
    whole = train_resnet(squares, tmp_path / "runs", name="whole", cache=2)
    with ctrl_c(loop.Trainer, "_epoch", after=2), pytest.raises(Interrupted):
        train_resnet(squares, tmp_path / "runs", name="parts", cache=2)
    equal(whole, visionpeft.train(resume=tmp_path / "runs" / "parts", quiet=True))


def equal(one: visionpeft.Run, two: visionpeft.Run) -> None:
    a, b = (checkpoints.load(run.folder / "checkpoint.pt") for run in (one, two))
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert a["history"] == b["history"] and one.after == two.after


def test_each_epoch_reads_another_view_and_the_last_ones_views_without_mosaic(
    boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int, int]] = []
    real = views.CachedFeatureDataset.__getitem__

    def note(self: Any, index: int) -> Any:
        read.append((self.epoch, index, int(self._views.places[self._schedule.at(self.epoch), index])))
        return real(self, index)

    monkeypatch.setattr(views.CachedFeatureDataset, "__getitem__", note)
    args = {**SMALL, "epochs": 6, "close_mosaic": 3, "cache": 2, "freeze": 22, "method": "head"}
    visionpeft.train(boxes, model=checkpoint, project=tmp_path / "runs", **args)
    rows = {(epoch, image): row for epoch, image, row in read}
    assert len(read) == len(rows) == 6 * 8
    assert [{rows[epoch, i] // 8 for i in range(8)} for epoch in range(6)] == [{0}, {1}, {0}, {2}, {3}, {2}]
    assert all(len({rows[epoch, i] for i in range(8)}) == 8 for epoch in range(6))


# ------------------------------------------------------------------------------------------------------------- the store
def test_a_second_run_reads_what_the_first_has_stored(squares: Path, tmp_path: Path, cache: Path, monkeypatch) -> None:
    first = train_resnet(squares, tmp_path / "runs", cache=2)
    [file] = files(cache)
    monkeypatch.setattr(view_file.CacheWriter, "write", lambda *_: pytest.fail("the views are there"))
    second = train_resnet(squares, tmp_path / "runs", cache=2, weight_decay=0.05)
    assert files(cache) == [file] and second.measured["prefix"]["fill_seconds"] == 0
    assert first.measured["prefix"]["fill_seconds"] > 0
    equal(first, second)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"imgsz": 96},
        {"freeze": 4},
        {"cache": 1},
        {"fliplr": 0.1},
        {"frozen_dtype": "bf16"},
        {"model_args": {}},  # another base
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_run_stores_its_own(squares: Path, tmp_path: Path, cache: Path, other: dict) -> None:
    train_resnet(squares, tmp_path / "runs", epochs=2, cache=2)
    if "model_args" in other:
        other = {"model_args": {"checkpoint_path": save_resnet(tmp_path / "other.safetensors", seed=1)}}
    train_resnet(squares, tmp_path / "runs", **{"epochs": 2, "cache": 2, **other})
    assert len(files(cache)) == 2


def test_other_data_are_stored_anew(squares: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(squares, tmp_path / "fewer")
    (tmp_path / "fewer" / "train" / "red" / "0.png").unlink()
    for data in (squares, tmp_path / "fewer"):
        train_resnet(data, tmp_path / "runs", epochs=1, cache=1)
    assert len(files(cache)) == 2


def test_images_exported_anew_are_stored_anew(squares: Path, tmp_path: Path, cache: Path) -> None:
    """Of the same names, sizes and times: what a run trains on is what is there."""
    data = shutil.copytree(squares, tmp_path / "data")
    for turn in (False, True):
        for file in sorted(data.rglob("*.[pb][nm][gp]")):
            image = Image.open(file).convert("RGB")
            file.unlink()
            (image.transpose(Image.Transpose.ROTATE_180) if turn else image).save(file.with_suffix(".bmp"))
            os.utime(file.with_suffix(".bmp"), (0, 0))
        run = train_resnet(data, tmp_path / "runs", epochs=1, cache=1)
        assert run.measured["prefix"]["fill_seconds"] > 0
    assert len(files(cache)) == 2
    read = views.content(images := sorted(map(str, data.rglob("*.bmp"))))
    os.utime(images[0], (1, 1))  # touched only
    assert views.content([(file, 0) for file in images]) == read


@pytest.mark.parametrize("harm", ["truncated", "flipped", "header", "empty"])
def test_a_damaged_store_is_noticed_and_made_again(
    squares: Path, tmp_path: Path, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = train_resnet(squares, tmp_path / "runs", cache=1)
    [file] = files(cache)
    whole = file.read_bytes()
    bad = {"truncated": whole[:-9], "header": whole[:-20] + b"x" + whole[-19:], "empty": b""}
    middle = len(whole) // 3
    bad["flipped"] = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes(bad[harm])
    second = train_resnet(squares, tmp_path / "runs", cache=1)
    assert "damaged" in caplog.text and second.measured["prefix"]["fill_seconds"] > 0
    assert files(cache) == [file] and file.read_bytes() == whole
    equal(first, second)


def test_more_than_the_limit_is_refused_before_anything_is_made(squares: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"the views would take 196.6 kB, but cache_limit=0.0001 allows 100.0 kB; give"):
        train_resnet(squares, tmp_path / "runs", cache=2, cache_limit=0.0001)
    assert not files(cache) and not (tmp_path / "runs").exists()


def test_a_full_disk_is_refused_before_anything_is_made(squares: Path, tmp_path: Path, cache: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * 10**9, 10**9, 10**9))
    with pytest.raises(ConfigError, match=r"the views would take 196.6 kB, but .* has 1.00 GB free, and 1.00 GB stay free"):
        train_resnet(squares, tmp_path / "runs", cache=2)
    assert not files(cache) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_fails_while_it_is_written_leaves_nothing(
    squares: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = view_file.CacheWriter._append, []

    def fails(*args: Any) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(view_file.CacheWriter, "_append", fails)
    with pytest.raises((ConfigError, Interrupted), match="is full; give a smaller cache|interrupted"):
        train_resnet(squares, tmp_path / "runs", cache=2)
    assert not files(cache)


def test_the_views_used_longest_ago_make_room(squares: Path, tmp_path: Path, cache: Path) -> None:
    names = []
    for seed in range(3):
        train_resnet(squares, tmp_path / "runs", epochs=1, cache=1, seed=seed, cache_limit=1.0)
        names += [file for file in files(cache) if file not in names]
    for age, file in enumerate((names[1], names[2], names[0])):  # the first was used last
        os.utime(file, (10**9 + age, 10**9 + age))
    limit = 3.5 * names[0].stat().st_size / 1e9
    train_resnet(squares, tmp_path / "runs", epochs=1, cache=1, seed=3, cache_limit=limit)
    assert names[1] not in files(cache) and {names[0], names[2]} < set(files(cache)) and len(files(cache)) == 3


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    store = views.Store(tmp_path / "views" / "a.views", views.ViewSchedule(1), limit=1e-6)
    (tmp_path / "views").mkdir()
    new, old = (tmp_path / "views" / name for name in (".b.1.views", ".c.2.views"))
    for file in (new, old):
        file.write_bytes(bytes(900))
    os.utime(old, (10**9, 10**9))  # of a run that was killed
    store.check_room(500)
    assert new.is_file() and not old.is_file()


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache": 2}, "cache=2 needs frozen stages before the first that trains, .* but with freeze=0 and method='full'"),
        ({"frozen_dtype": "bf16"}, "frozen_dtype='bf16' needs frozen stages .* there are none; freeze more"),
        ({"cache": 2, "freeze": 10, "method": "side"}, "freeze=10 and method='side' there are none"),
        ({"cache": 2, "freeze": [1, 2]}, r"freeze=\(1, 2\) and method='full' there are none"),
        ({"cache": -1, "freeze": 10}, "cache=-1 is not usable; give the number of views"),
        ({"cache": 1.5, "freeze": 10}, "cache=1.5 is not known; give the number of views .*, or 'ram', 'disk' or True"),
        ({"cache": "RAM", "freeze": 10}, "cache='RAM' is not known"),
        ({"cache": 1, "freeze": 10, "cache_limit": 0}, "cache_limit=0 is not usable"),
        ({"frozen_dtype": "int8", "freeze": 10}, "frozen_dtype='int8' is not known; it is 'bf16', 'fp16', 'fp32'"),
        ({"cache": 1, "freeze": 10, "multi_scale": 0.5}, "multi_scale=0.5 does not go with cache"),
        ({"cache": 1, "freeze": 10, "rect": True}, "rect=True does not go with cache"),
        ({"cache": 1, "freeze": 10, "compile": True}, "compile=True does not go with cache or frozen_dtype"),
        ({"cache": 1, "freeze": 10, "device": "cpu,cpu"}, "device="),
    ],
    ids=lambda given: "-".join(map(str, given)) if isinstance(given, dict) else None,
)
def test_what_cannot_be_is_said_in_a_sentence(boxes: Path, checkpoint: Path, tmp_path: Path, given: dict, said: str) -> None:
    args = {"model": checkpoint, "method": "full", "project": tmp_path / "runs", **SMALL}
    with pytest.raises(ConfigError, match=said) as refused:
        visionpeft.train(boxes, **{**args, **given})
    assert "\n" not in str(refused.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache": "ram"}, "cache='ram' is not known; give the number of views of every image to keep$"),
        ({"cache": 1, "mixup": 0.2}, "mixup=0.2 mixes images, but with cache there are none to mix"),
        ({"cache": 1, "device": "cpu,cpu"}, "device='cpu,cpu' does not go with cache, which serves one device"),
    ],
    ids=lambda given: "-".join(map(str, given)) if isinstance(given, dict) else None,
)
def test_what_cannot_be_for_timm_is_said_in_a_sentence(squares: Path, tmp_path: Path, given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train_resnet(squares, tmp_path / "runs", **given)


def test_ultralytics_own_cache_is_still_its_own(boxes: Path, checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(boxes.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache", "*.npy"))
    args = {**SMALL, "epochs": 1, "model": checkpoint, "project": tmp_path / "runs", "freeze": 10}
    run = visionpeft.train(tmp_path / "data" / "data.yaml", cache="disk", **args)
    assert run.arguments["options"]["cache"] == "disk" and "prefix" not in run.measured and not files(cache)
    assert list((tmp_path / "data" / "images" / "train").glob("*.npy"))


def test_on_the_command_line(boxes: Path, checkpoint: Path, tmp_path: Path, cache: Path, capsys) -> None:
    from visionpeft.cli import main

    args = ["train", "--data", str(boxes), "--model", str(checkpoint), "--project", str(tmp_path / "runs"), "--cache", "2"]
    small = ["--epochs", "1", "--imgsz", "64", "--device", "cpu", "--workers", "0", "--batch", "4"]
    with pytest.raises(SystemExit) as left:
        main([*args, *small])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("visionpeft: cache=2 needs frozen stages")
    with pytest.raises(SystemExit) as left:
        main([*args, *small, "--freeze", "10", "--frozen-dtype", "bf16", "--cache-limit", "1"])
    said = capsys.readouterr()
    assert left.value.code == 0 and "1 views of each image kept in bfloat16" in " ".join(said.out.split())
    assert "computing 8 views of 8 images" in said.err and len(files(cache)) == 1


def test_frozen_stages_run_outside_of_mixins_that_record() -> None:
    module = nn.Linear(1, 1)
    for mixin in (lean.LeanForward, WrappedForward, FrozenStagesMixin):
        class_swap.add_mixin(module, mixin)
    assert class_swap.mixins(type(module)) == (FrozenStagesMixin, WrappedForward, lean.LeanForward)
    assert "__call__" in vars(PrecomputedOutput)
    assert prefixes.DTYPES.keys() == {"bf16", "fp16", "fp32"}


def test_views_of_earlier_versions_are_found(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of their file is a hash of what they are; how a schedule is called in it must not change."""
    seen: list[Any] = []
    monkeypatch.setattr("visionpeft.families.frozen_stages.key", lambda **facts: seen.append(facts["rounds"]) or "name")
    train_resnet(squares, tmp_path / "runs", cache=2)
    assert seen == ["Rounds(first=2, last=0, closing=0, share=1.0)"]
