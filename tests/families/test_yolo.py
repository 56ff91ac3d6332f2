"""Real training runs on tiny images: equal to Ultralytics' own, resumed as if never stopped, merged into a plain file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REAL, ctrl_c, learned_the_same
from PIL import Image
from ultralytics import YOLO
from ultralytics.data.base import BaseDataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import dist

import visionpeft
from visionpeft import cli, lean
from visionpeft.core import class_swap
from visionpeft.core import delta as deltas
from visionpeft.core.attach import is_added
from visionpeft.data import check
from visionpeft.errors import DataError, Interrupted, ModelError, TrainingError
from visionpeft.families.yolo.family import Yolo
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.methods.lora import LoraConfig
from visionpeft.registry import FAMILIES

SMALL = {"epochs": 2, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "optimizer": "AdamW", "lr0": 1e-3}


@pytest.fixture(scope="module")
def lora(boxes: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    folder = tmp_path_factory.mktemp("lora")
    return visionpeft.train(boxes, model=checkpoint, method="lora", r=2, project=folder, **SMALL)


@pytest.fixture(scope="module")
def adapter(boxes: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    folder = tmp_path_factory.mktemp("adapter")
    return visionpeft.train(boxes, model=checkpoint, method="adapter", freeze=3, project=folder, **{**SMALL, "epochs": 1})


@pytest.mark.parametrize("nbs", [4, 8])
def test_full_with_freeze_is_ultralytics_own(boxes: Path, checkpoint: Path, tmp_path: Path, nbs: int) -> None:
    """The same weights, bit for bit, as `YOLO.train(freeze=10)` with the same settings."""
    extra = {"nbs": nbs, "warmup_epochs": 0.0, "warmup_bias_lr": 0.0, "close_mosaic": 1}
    run = visionpeft.train(boxes, model=checkpoint, freeze=10, lean="off", project=tmp_path, **SMALL, **extra)
    args = {
        **SMALL,
        **extra,
        "model": str(checkpoint),
        "data": str(boxes),
        "freeze": 10,
        "save_dir": str(tmp_path / "plain"),
    }
    trainer = DetectionTrainer(overrides=args)
    trainer.train()
    ours, theirs = (load_checkpoint(f)[0].state_dict() for f in (run.merged, tmp_path / "plain" / "weights" / "best.pt"))
    assert ours.keys() == theirs.keys()
    different = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert different == []
    base = load_checkpoint(checkpoint)[0].state_dict()
    assert all(torch.equal(ours[k], base[k]) for k in ours if int(k.split(".")[1]) < 10)


@pytest.mark.parametrize("nbs", [4, 8])
def test_resumed_equals_uninterrupted(boxes: Path, checkpoint: Path, tmp_path: Path, nbs: int) -> None:
    """Stopped after each epoch: the second is the first without mosaic."""
    args = {**SMALL, "epochs": 3, "close_mosaic": 2, "nbs": nbs, "mosaic": 1.0, "method": "lora", "r": 2}
    whole = visionpeft.train(boxes, model=checkpoint, project=tmp_path, name="whole", **args)
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted, match="go on with resume="):
        visionpeft.train(boxes, model=checkpoint, project=tmp_path, name="parts", **args)
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted):
        visionpeft.train(resume=tmp_path / "parts")
    rest = visionpeft.train(resume=tmp_path / "parts")
    one, two = (torch.load(r.folder / "checkpoint.pt", weights_only=True) for r in (whole, rest))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert [k for k in one[part] if not torch.equal(one[part][k], two[part][k])] == []
    assert one["history"] == two["history"] and one["updates"] == two["updates"]
    assert deltas.read(whole.delta).header["checksum"] and whole.after == rest.after
    a, b = (deltas.read(r.delta).tensors for r in (whole, rest))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_lean_keeps_less_and_learns_the_same(boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without it, from Python and on the command line; a resumed run stays at its level."""
    # steps that are smooth in the gradient: AdamW's first ones are its sign, and near zero that is rounding
    arguments = {**SMALL, "method": "lora", "r": 2, "optimizer": "SGD", "delta_dtype": "fp32", "project": tmp_path}
    runs = {x: visionpeft.train(boxes, model=checkpoint, **arguments, lean=x, name=x) for x in ("off", "auto", "memory")}
    levels, real = [], lean.apply
    monkeypatch.setattr(lean, "apply", lambda model, level: levels.append(level) or real(model, level))
    flags = [f"--{k}={v}" for k, v in {**arguments, "lean": "memory", "name": "flags"}.items()]
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--data", str(boxes), "--model", str(checkpoint), *flags])
    assert stopped.value.code == 130
    runs["flags"] = visionpeft.train(resume=tmp_path / "flags")
    assert levels == ["memory", "memory"]

    learned_the_same(runs)


WORKER = """
import sys
sys.path[:0] = {path!r}
import torch.distributed as dist
from torch.nn import parallel
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.patches import torch_load

plain = parallel.DistributedDataParallel
parallel.DistributedDataParallel = lambda model, device_ids, **more: plain(model, **more)
state = torch_load({state!r}, map_location="cpu")
trainer = state["trainer"](cfg={{**DEFAULT_CFG_DICT, "save_dir": ""}}, overrides=state["args"])
trainer._setup_ddp = lambda: dist.init_process_group("gloo")
trainer.world_size = 2
trainer.train()
shared = trainer.model._get_ddp_logging_data()["total_parameter_size_bytes"]
trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
assert shared == trained, (shared, trained)
"""


def test_two_processes(boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Ultralytics starts several processes for GPUs only. Here its own file for them is run by two on the CPU instead, so
    all but the choice of device is as there: the plan travels, each process holds it, the first leaves the delta."""

    def on_cpu(trainer: BaseTrainer) -> None:
        script = Path(dist.generate_ddp_file(trainer))
        script.write_text(WORKER.format(path=sys.path, state=str(script.with_suffix(".pt"))))
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        try:
            subprocess.run([sys.executable, "-m", *launch], check=True)
        finally:
            script.unlink(), script.with_suffix(".pt").unlink()

    args = {**SMALL, "method": "lora+bitfit", "r": 2, "freeze": 2, "quiet": True, "trackers": "tensorboard"}
    one = visionpeft.train(boxes, model=checkpoint, project=tmp_path, **args)
    with monkeypatch.context() as patch:
        patch.setattr(BaseTrainer, "train", on_cpu)
        patch.setattr(PeftTrainerMixin, "ddp", property(lambda self: True, lambda self, value: None), raising=False)
        two = visionpeft.train(boxes, model=checkpoint, project=tmp_path, **args)
        with pytest.raises(TrainingError, match="no longer a number"):
            visionpeft.train(boxes, model=checkpoint, project=tmp_path, **{**args, "box": 1e38})
        said = capfd.readouterr()
        assert "Traceback" not in said.err and said.out == ""
    a, b = (deltas.read(run.delta) for run in (one, two))
    assert a.plan == b.plan and len(two.history) == 2
    logged = [line.split(",")[0] for line in (two.folder / "metrics.csv").read_text().splitlines()]
    assert logged == ["epoch", "1", "2"], "by the first process alone"
    assert len(list(two.folder.glob("events.out.tfevents.*"))) == 3, "its epochs, then from here the result"
    assert sum(two.measured["saved_by_stage"].values()) == two.measured["saved_bytes"] > 0 < two.measured["live_bytes"]
    assert {k for k in a.tensors if is_added(k)} == {k for k in b.tensors if is_added(k)} != set()
    assert not any(int(k.split(".")[1]) < 2 for k in b.tensors)
    assert visionpeft.val(two.delta, boxes, device="cpu") == two.after


def test_interrupted_before_the_first_epoch_ends(
    boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(trainer: PeftTrainerMixin) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftTrainerMixin, "optimizer_step", ctrl_c)
    with pytest.raises(Interrupted, match="start anew"):
        visionpeft.train(boxes, model=checkpoint, project=tmp_path, **SMALL)
    with pytest.raises(TrainingError, match="nothing to resume|no run to resume"):
        visionpeft.train(resume=True, project=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_ultralytics_is_refused(boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """One that calls a method otherwise, or does not have it."""
    said = r"DetectionTrainer\._handle_nan_recovery, on which visionpeft builds, is {}; pip install ultralytics==8\.4\.190"
    monkeypatch.setattr(BaseTrainer, "_handle_nan_recovery", lambda self, number, loss: None)
    with pytest.raises(ModelError, match=said.format(r"\(self, number, loss\)")):
        visionpeft.train(boxes, model=checkpoint, freeze=10, project=tmp_path, **SMALL)
    monkeypatch.delattr(BaseTrainer, "_handle_nan_recovery")
    with pytest.raises(ModelError, match=said.format("gone")):
        visionpeft.train(boxes, model=checkpoint, freeze=10, project=tmp_path, **SMALL)


def test_a_finished_run_has_nothing_to_resume(lora: visionpeft.Run) -> None:
    with pytest.raises(TrainingError, match="nothing is left to resume"):
        visionpeft.train(resume=lora.folder)


def test_loss_that_is_no_number(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no longer a number in epoch 1.*lower lr0"):
        visionpeft.train(boxes, model=checkpoint, project=tmp_path, method="full", box=1e38, **SMALL)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_run_tells_all(lora: visionpeft.Run) -> None:
    said = json.loads((lora.folder / "run.json").read_text())
    assert said["after"] == lora.after and set(lora.before) == {"mAP50", "mAP50-95", "precision", "recall"}
    assert said["measured"]["saved_bytes"] > 1e5 and said["measured"]["peak_measure"] == "bytes saved for backward"
    assert len(lora.history) == 2 and lora.parameters["body"] == lora.plan.trained_body > 0
    assert lora.delta_bytes["file"] == lora.delta.stat().st_size
    assert "mAP50-95" in str(lora) and "saved for backward" in str(lora)


def test_merged_file_needs_no_visionpeft(lora: visionpeft.Run, boxes: Path) -> None:
    """Ultralytics opens it where visionpeft cannot be imported, and measures what the run measured."""
    code = f"""
import sys, json
sys.modules["visionpeft"] = None
from ultralytics import YOLO
stats = YOLO({str(lora.merged)!r}).val(data={str(boxes)!r}, imgsz=64, batch=4, device="cpu", plots=False, verbose=False)
print("RESULT", json.dumps([stats.box.map50, stats.box.map]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=lora.folder)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    assert json.loads(line[7:]) == pytest.approx([lora.after["mAP50"], lora.after["mAP50-95"]], abs=1e-3)
    assert YOLO(lora.merged).names == {0: "red", 1: "green"}


def test_loaded_merged_and_detached(lora: visionpeft.Run, checkpoint: Path, tmp_path: Path, images) -> None:
    adapted = visionpeft.load(lora.delta)
    again = visionpeft.merge(adapted, tmp_path / "merged.pt")
    a, b = (load_checkpoint(f)[0].state_dict() for f in (again, lora.merged))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with torch.no_grad():
        y = adapted.model(images)[0]
        # half precision in the merged file
        assert torch.allclose(load_checkpoint(again)[0](images)[0], y, rtol=1e-2, atol=0.5)
    base = load_checkpoint(checkpoint)[0].state_dict()
    detached = visionpeft.detach(adapted).state_dict()
    assert base.keys() == detached.keys() and all(torch.equal(base[k], detached[k]) for k in base)
    assert deltas.fingerprint(base) == visionpeft.inspect(lora.delta)["base"]["sha256"]


def test_fuse_of_an_attached_model_is_exact(lora: visionpeft.Run, images) -> None:
    """Ultralytics' fuse() folds twins away instead of dropping them silently."""
    model = visionpeft.load(lora.delta).model
    with torch.no_grad():
        y = model(images)[0]
        fused = model.fuse(verbose=False)
        assert torch.allclose(fused(images)[0], y, rtol=1e-4, atol=1e-3)
    assert not any(class_swap.mixins(type(m)) for m in fused.modules())


def test_val_and_predict(lora: visionpeft.Run, adapter: visionpeft.Run, boxes: Path) -> None:
    for run in (lora, adapter):
        assert visionpeft.val(run.delta, boxes, device="cpu") == run.after
        results = visionpeft.predict(run.delta, str(boxes.parent / "images" / "val"), conf=0.001, device="cpu")
        assert len(results) == 4 and results[0].names == {0: "red", 1: "green"}


def test_predicts_what_ultralytics_predicts(lora: visionpeft.Run, tmp_path: Path) -> None:
    """Images that are not square are padded to a rectangle, each by itself."""
    model, family = YOLO(lora.merged), FAMILIES["yolo"]()
    files = [tmp_path / f"{width}.png" for width in (48, 96, 160)]
    for file in files:
        Image.effect_noise((int(file.stem), 64), 100).convert("RGB").save(file)
    for source in (str(files[0]), tmp_path, [str(f) for f in files]):
        theirs = model.predict(source, conf=1e-4, device="cpu", verbose=False)
        ours = family.predict(load_checkpoint(lora.merged)[0], source, conf=1e-4, device="cpu", imgsz=64)
        assert len(ours) == len(theirs) and any(len(r) for r in theirs)
        for mine, own in zip(ours, theirs, strict=True):
            assert torch.equal(mine.boxes.data, own.boxes.data)


def test_a_run_is_measured_by_what_it_was_given(boxes: Path, tmp_path: Path) -> None:
    """Of two classes, one is trained: the other's objects are not counted as missed."""
    given = {**SMALL, "lr0": 0.01, "classes": [0]}
    run = visionpeft.train(boxes, model="scenes/driving.pt", method="full", project=tmp_path, quiet=True, **given)
    assert run.after["mAP50"] == pytest.approx(max(epoch["mAP50"] for epoch in run.history), abs=0.02)
    whole = visionpeft.val(run.delta, boxes, device="cpu")["mAP50"]
    assert run.after["mAP50"] == visionpeft.val(run.delta, boxes, device="cpu", classes=[0])["mAP50"] > whole


def test_checkpoints_that_are_not_as_training_left_them(tmp_path: Path) -> None:
    net, file = FAMILIES["yolo"]().load("scenes/driving.pt").model, tmp_path / "base.pt"
    fused = copy.deepcopy(net).fuse(verbose=False)
    changed = copy.deepcopy(net)
    changed.model[2] = torch.nn.Sequential(changed.model[2])
    for content, said in (
        ({"model": fused}, "was saved fused"),
        ({"model": net.state_dict()}, "weights only"),
        (net.state_dict(), "weights only"),
        (net, "a whole model"),
        ({"model": changed}, "not as its own design has them"),
    ):
        torch.save(content, file)
        with pytest.raises(ModelError, match=said):
            visionpeft.plan(str(file))


def test_a_method_that_cannot_merge(adapter: visionpeft.Run, tmp_path: Path) -> None:
    assert adapter.merged is None and adapter.delta is not None and not list(adapter.folder.glob("merged*"))
    with pytest.raises(visionpeft.VisionpeftError, match="adapter cannot be merged"):
        visionpeft.merge(adapter.delta, tmp_path / "merged.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("which", ["lora", "adapter"])
def test_export_gives_the_same_boxes(which: str, format: str, request, tmp_path: Path) -> None:
    import onnxruntime

    adapted = visionpeft.load(request.getfixturevalue(which).delta)
    out = visionpeft.export(adapted, format, tmp_path / f"model.{format}", device="cpu")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = adapted.model(x)[0]
    if format == "onnx":
        session = onnxruntime.InferenceSession(out)
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        y = torch.jit.load(out)(x)
        y = y[0] if isinstance(y, tuple) else y
    assert torch.allclose(y, expected, rtol=1e-3, atol=1e-2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"model.{format}"]


def test_a_model_without_a_base_gives_no_delta(boxes: Path, tmp_path: Path) -> None:
    run = visionpeft.train(boxes, model="yolo11n.yaml", method="full", project=tmp_path, **{**SMALL, "epochs": 1})
    assert run.delta is None and YOLO(run.merged).names == {0: "red", 1: "green"}


def test_rebuilt_head(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = visionpeft.train(
        boxes, model=checkpoint, method=LoraConfig(r=2), head="rebuild", project=tmp_path, **{**SMALL, "epochs": 1}
    )
    kept = visionpeft.plan(checkpoint, data=boxes, method="lora", r=2)
    assert run.plan.trained_head < kept.trained_head and run.plan.trained_body == kept.trained_body
    assert visionpeft.load(run.delta).delta.header["head"] == "rebuild"


def test_old_classes_keep_their_rows(checkpoint: Path, boxes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    data.write_text(f"train: {boxes.parent}/images/train\nval: {boxes.parent}/images/val\nnames: [other, class 7]\n")
    family = visionpeft.api.find_family(str(checkpoint))
    base = family.load(str(checkpoint))
    model = family.with_head(base, family.read_data(str(data)).names, "keep")
    for kept, old in zip(model.model[-1].cv3, base.model.model[-1].cv3, strict=True):
        assert torch.equal(kept[-1].weight[1], old[-1].weight[7]) and not torch.equal(kept[-1].weight[0], old[-1].weight[0])


@pytest.mark.parametrize(
    "name", ["rtdetr-l.yaml", "yolov8s-world.yaml", "yoloe-v8s.yaml", "yolo26n-sem.yaml", "yolo26n-depth.yaml"]
)
def test_other_models_are_refused_by_name(name: str, boxes: Path) -> None:
    with pytest.raises(ModelError, match="not supported"):
        visionpeft.plan(name, data=boxes)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_unreadable_images_are_left_out_with_a_warning(
    part: str, boxes: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(boxes.parent, tmp_path / "data")
    (tmp_path / "data" / "labels" / "train.cache").unlink(missing_ok=True)
    if part == "images":
        (tmp_path / "data" / "images" / "train" / "3.png").write_bytes(b"not an image")
    else:
        (tmp_path / "data" / "labels" / "train" / "3.txt").write_text("0 0.5 0.5 7.0 0.5\n")
    visionpeft.train(tmp_path / "data" / "data.yaml", model=checkpoint, project=tmp_path, **{**SMALL, "epochs": 1})
    assert "1 of 8 train images cannot be used and are left out" in caplog.text


def test_grey_images(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    """channels: 1 makes an RGB model read grey images, as Ultralytics' `load` does: by the sum of its filters."""
    grey = tmp_path / "grey.yaml"
    grey.write_text(f"path: {boxes.parent}\n{boxes.read_text()}channels: 1\n")
    run = visionpeft.train(grey, model=checkpoint, method="lora", r=2, project=tmp_path, **{**SMALL, "epochs": 1})
    adapted, rgb = visionpeft.load(run.delta), load_checkpoint(checkpoint)[0]
    theirs = type(rgb)(rgb.yaml, ch=1, verbose=False)
    theirs.load(rgb)
    assert torch.equal(adapted.base.state["model.0.conv.weight"], theirs.state_dict()["model.0.conv.weight"])
    assert YOLO(run.merged).model.yaml["channels"] == 1
    assert visionpeft.val(adapted, grey, device="cpu") == run.after
    assert visionpeft.predict(adapted, boxes.parent / "images" / "val", device="cpu")
    with pytest.raises(DataError, match="has images of channels=3, but the model reads 1"):
        visionpeft.val(adapted, boxes, device="cpu")


def test_what_ultralytics_does_not_find_does_not_count(boxes: Path, tmp_path: Path, caplog) -> None:
    """Hidden names and other formats are left out, and links to folders are followed, as in Ultralytics' own reader."""
    shutil.copytree(boxes.parent, tmp_path / "data")
    train = tmp_path / "data" / "images" / "train"
    (train / "._0.png").write_bytes(b"x")
    (train / ".ipynb_checkpoints").mkdir()
    shutil.copy(train / "0.png", train / ".ipynb_checkpoints" / "0.png")
    (train / "0.gif").write_bytes(b"x")
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind / "train").rename(tmp_path / kind)
        (tmp_path / "data" / kind / "train").mkdir()
        (tmp_path / "data" / kind / "train" / "site").symlink_to(tmp_path / kind)
    found = Yolo().read_data(str(tmp_path / "data" / "data.yaml")).train
    assert found == BaseDataset.get_img_files(SimpleNamespace(prefix="", fraction=1.0), str(train))
    assert len(found) == 8 and "1 pictures" in caplog.text and "site/0.gif" in caplog.text
    report = check(tmp_path / "data" / "data.yaml")
    assert report.splits["train"].images == 8 and report.findings[0].kind == "other format"


@pytest.mark.skipif(not REAL.exists(), reason="real weights and images (shared/data) are not here")
def test_real_weights_before_and_after(tmp_path: Path) -> None:
    """On coco8 the base's own classes and rows are kept, so the score before training is the base's."""
    run = visionpeft.train(
        REAL / "coco8" / "data.yaml", model=REAL / "weights" / "yolov8n.pt", method="norm", project=tmp_path,
        **{**SMALL, "epochs": 1, "imgsz": 320, "lr0": 1e-5, "lr_scale": 1.0},
    )  # fmt: skip
    assert run.before["mAP50"] > 0.5 and run.after["mAP50"] == pytest.approx(run.before["mAP50"], abs=0.1)
    plain = YOLO(run.merged).val(data=REAL / "coco8" / "data.yaml", imgsz=320, device="cpu", plots=False)
    assert [plain.box.map50, plain.box.map] == pytest.approx([run.after["mAP50"], run.after["mAP50-95"]], abs=1e-3)


def test_results_on_the_command_line_are_json_alone(lora: visionpeft.Run, boxes: Path) -> None:
    environment = {**os.environ, "YOLO_VERBOSE": "True"}
    given = {"val": ["--data", boxes, "--batch", 4], "predict": [boxes.parent / "images" / "val" / "0.png"]}
    lines = [[str(x) for x in (verb, lora.delta, *more, "--device", "cpu")] for verb, more in given.items()]
    code = f"""
from visionpeft import cli
for line in {lines}:
    try:
        cli.main(line)
    except SystemExit as stopped:
        assert not stopped.code
    print("NEXT")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for said in done.stdout.split("NEXT\n")[:2]:
        json.loads(said)
