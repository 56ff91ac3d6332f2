"""Every mistake gets one clear sentence, no traceback, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_boxes, make_squares
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import visionpeft
from visionpeft import cli, files
from visionpeft.core import delta as deltas
from visionpeft.errors import ConfigError, DataError
from visionpeft.registry import FAMILIES
from visionpeft.session import TrainSession

SMALL = "--epochs 1 --imgsz 64 --batch 4 --device cpu --plots false".split()


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Run the command line in this process; returns its exit code and what it said on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    return int(stopped.value.code or 0), capsys.readouterr().err.strip()


@pytest.fixture
def data(boxes: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may spoil."""
    shutil.copytree(boxes.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def delta(boxes: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    small = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False}
    made = visionpeft.train(boxes, model=checkpoint, method="norm", project=folder, **small).delta
    assert made is not None
    return made


ROWS = {  # the numbers behind the class, by task
    "detect": ".5 .5 .1 .1",
    "segment": ".1 .1 .5 .1 .5 .5",
    "pose": ".5 .5 .1 .1 .5 .5 2 .4 .4 2",
    "obb": ".1 .1 .5 .1 .5 .5 .1 .5",
}
SPOILED = {
    "no such file": (lambda d, row: (d / "data.yaml").unlink(), "cannot be used"),
    "no images": (lambda d, row: [f.unlink() for f in (d / "images" / "train").iterdir()], "no train images"),
    "no folder": (lambda d, row: shutil.rmtree(d / "images" / "val"), "cannot be used: .*val"),
    "no labels": (lambda d, row: shutil.rmtree(d / "labels"), "no labels.*put one .txt per image"),
    "class outside": (lambda d, row: _label(d, f"2 {row}"), "class 2, but .* names 2 classes"),
    "text for a class": (lambda d, row: _label(d, f"red {row}"), "row 'red .*; a row is: class x.*, all numbers"),
    "numbers missing": (
        lambda d, row: _label(d, "0 .5 .5 .5"),
        "row of 4 numbers; a row of an? [a-z]* set is: class",
    ),
    "class-count mismatch": (lambda d, row: _names(d, "nc: 3\nnames: [red, green]"), "nc: 3, but names 2 classes"),
    "no names": (lambda d, row: _names(d, ""), "names no classes; it must hold 'names:'"),
    "all images corrupt": (lambda d, row: [f.write_bytes(b"x") for f in (d / "images/train").iterdir()], "cannot be used"),
}


def _label(folder: Path, row: str) -> None:
    (folder / "labels" / "train" / "0.txt").write_text(row + "\n")


def _names(folder: Path, text: str) -> None:
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\n{text}\n")


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("kind", SPOILED)
def test_data(kind: str, task: str, checkpoint: Path, tmp_path: Path, capsys) -> None:
    data = make_boxes(tmp_path / "data", task)
    spoil, says = SPOILED[kind]
    spoil(data.parent, ROWS[task])
    suffix = {"segment": "-seg", "pose": "-pose", "obb": "-obb"}.get(task)
    model = ["--model", f"yolo11n{suffix}.yaml", "--method", "full"] if suffix else ["--model", checkpoint]
    code, said = run(capsys, "train", "--data", data, *model, "--project", tmp_path / "runs", *SMALL)
    assert code == 2 and len(said.splitlines()) == 1
    assert re.search(says, said), said
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("merged*"))


FOLDERS = {
    "no such folder": (lambda d: shutil.rmtree(d), "is no folder; give one that holds train/CLASS"),
    "no val": (lambda d: shutil.rmtree(d / "val"), "has no folder val"),
    "a class in one part only": (lambda d: shutil.rmtree(d / "train" / "red"), "has red in val, but not in train"),
    "one class": (lambda d: [shutil.rmtree(d / part / "red") for part in ("train", "val")], "has one class only"),
    "an empty class": (lambda d: [f.unlink() for f in (d / "train" / "red").iterdir()], "red holds no images"),
    "all images corrupt": (lambda d: [f.write_bytes(b"x") for f in (d / "train").rglob("*.png")], "can be read"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path, capsys) -> None:
    data = make_squares(tmp_path / "data")
    spoil, says = FOLDERS[kind]
    spoil(data)
    given = ["--data", data, "--model", "yolo11n-cls.yaml", "--method", "full", "--project", tmp_path / "runs"]
    code, said = run(capsys, "train", *given, *SMALL)
    assert code == 2 and len(said.splitlines()) == 1
    assert re.search(says, said), said
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("merged*"))


ARGUMENTS = {
    "unknown model": (["--model", "yolo11q"], "yolo11q is not here|no family knows"),
    "unknown architecture": (["--model", "resnt18"], "Did you mean"),
    "not a checkpoint": (["--model", "TEXT.pt"], "not a checkpoint that Ultralytics can read"),
    "missing checkpoint": (["--model", "nowhere/x.pt"], "is not here, nor one of Ultralytics'"),
    "unknown method": (["--method", "loar"], "no method 'loar'; there are: adapter.*Did you mean 'lora'"),
    "unknown setting": (["--rr", "4"], "'rr' is no setting.*Did you mean 'r'"),
    "another method's setting": (["--method", "head", "--r", "4"], "'r' is no setting.*method 'head' has no settings"),
    "setting of the wrong type": (["--r", "many"], "r='many' is not of the right type; it must be int"),
    "rank below one": (["--r", "0"], "r=0 is out of range"),
    "rank too large": (["--r", "5000"], "as large as every layer.*r may be up to"),
    "loha's rank too large": (["--method", "loha", "--r", "5000"], "as large as every layer.*r may be up to"),
    "lokr's rank too large": (["--method", "lokr", "--r", "5000"], "as large as every layer.*r may be up to 256"),
    "one layer's rank too large": (
        ["--rank_pattern", "{'model.0.conv': 500}"],
        "rank 500, which is above what model.0.conv allows; it may be up to 10 there",
    ),
    "a factor that divides nothing": (["--method", "lokr", "--decompose_factor", "0"], "decompose_factor=0 divides nothing"),
    "unknown start of LoRA": (["--init_lora_weights", "svd"], "init_lora_weights='svd' is not known; it is one of kaiming"),
    "target that matches nothing": (["--target_modules", "nowhere"], "matches none of its"),
    "pattern that is none": (["--target_modules", "(("], "not a regular expression"),
    "freeze beyond the stages": (["--freeze", "24"], "goes beyond.*23 stages"),
    "freeze a stage that is not": (["--freeze", "1,40"], "no stage 40"),
    "freeze a name that is not": (["--freeze", "modle.3"], "nothing called 'modle.3'.*Did you mean 'model.3'"),
    "everything frozen": (["--method", "full", "--freeze", "0,1,model"], "leaves nothing to train"),
    "body frozen under lora": (["--method", "lora", "--freeze", "23"], "leaves 'lora' nothing to work on"),
    "method without its parts": (["--method", "prompt"], "does not fit.*no plain token sequence.*these fit: adapter"),
    "a method twice": (["--method", "lora+lora"], "twice"),
    "tokens added to what is a map": (["--method", "prompt+mona"], "'prompt' adds tokens .* that 'mona' takes for a map"),
    "more tokens than can be meant": (["--method", "prefix", "--num_virtual_tokens", "900"], "give at most 800"),
    "even kernel": (["--method", "conv_adapter", "--kernel_size", "4"], "kernel_size=4 is even.*give 3, 5 or 7"),
    "blocks that are not": (["--method", "mona", "--blocks", "C4"], "blocks='C4' matches none of its 10 blocks"),
    "optimizer auto": (["--optimizer", "auto"], "ignores lr0"),
    "unknown bn": (["--bn", "maybe"], "'frozen' or 'train'"),
    "unknown head": (["--head", "none"], "'keep' or 'rebuild'"),
    "unknown level of lean": (["--lean", "nonsense"], "lean='nonsense' is not known; it is 'off' or 'auto' or 'memory'"),
    "no epochs": (["--epochs", "0"], "epochs=0"),
    "negative rate": (["--lr0", "-1"], "lr0=-1"),
    "unknown optimizer": (["--optimizer", "Adamm"], "Adamm"),
    "unknown device": (["--device", "17"], "17"),
    "unknown option of Ultralytics": (["--mozaic", "0"], "Did you mean 'mosaic'"),
    "bad value for Ultralytics": (["--mosaic", "7"], "mosaic"),
    "negative seed": (["--seed", "-1"], "seed=-1"),
    "no batch": (["--batch", "0"], "batch=0"),
    "text for a rate": (["--lr_scale", "much"], "much"),
    "unknown amp": (["--amp", "tru"], "amp='tru' is not known"),
    "an argument that would undo ours": (["--single_cls", "true"], "let the data YAML name one class"),
    "unknown config": (["--config", "nothing"], "no config 'nothing'"),
    "resume of nothing": (["--resume", "nowhere"], "no run that can be resumed"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(kind: str, boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXT.pt").write_text("no checkpoint")
    arguments, says = ARGUMENTS[kind]
    given = ["--data", str(boxes), "--model", str(checkpoint), "--project", "runs", *SMALL]
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        if flag in given:
            del given[given.index(flag) : given.index(flag) + 2]
        given += [flag, value]
    code, said = run(capsys, "train", *given)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert re.search(says, said), said
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.*"))


def test_no_data_and_unknown_command(capsys) -> None:
    code, said = run(capsys, "train", "--model", "yolo11n.pt")
    assert code == 2 and "data is missing: give a data YAML" in said
    code, said = run(capsys, "trian")
    assert code == 2 and "train" in said


def test_a_run_that_exists_is_not_written_over(boxes: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    code, said = run(
        capsys, "train", "--data", boxes, "--model", checkpoint, "--project", tmp_path, "--name", "mine", *SMALL
    )
    assert code == 2 and "exists; give another name" in said and not list((tmp_path / "mine").iterdir())


def test_unwritable_folder(boxes: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    code, said = run(
        capsys, "train", "--data", boxes, "--model", checkpoint, "--project", tmp_path / "file" / "runs", *SMALL
    )
    assert code == 2 and "cannot write to" in said


def test_numbers_as_people_write_them(boxes: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    """YAML 1.1 takes 1e-3 for text."""
    (tmp_path / "mine.yaml").write_text("lr0: 1e-3\nexist_ok: true\nworkers: 0\n")
    given = [
        "--data",
        boxes,
        "--model",
        checkpoint,
        "--project",
        tmp_path,
        "--name",
        "twice",
        "--weight_decay",
        "5e-4",
        *SMALL,
    ]
    for _ in range(2):
        code, said = run(capsys, "train", "--config", tmp_path / "mine.yaml", *given)
        assert code == 0, said
    arguments = json.loads((tmp_path / "twice" / "run.json").read_text())["arguments"]
    assert arguments["lr0"] == 1e-3 and arguments["options"]["weight_decay"] == 5e-4 and arguments["workers"] == 0


USES = {
    "unknown argument": (["val", "--data", "DATA", "--bach", "4"], "'bach' is no argument.*Did you mean 'batch'"),
    "bad value": (["val", "--data", "DATA", "--iou", "7"], "iou"),
    "no such device": (["val", "--data", "DATA", "--device", "7"], "device=7"),
    "no such image": (["predict", "nowhere.jpg"], "nowhere.jpg"),
    "unknown format": (["export", "--format", "onx"], "Did you mean 'onnx'"),
    "no folder for it": (["export", "--out", "DATA/x/model.onnx"], "cannot write to"),
    "model_args that are none": (["verify", "--model_args", "much"], "model_args='much' is not understood"),
}


@pytest.mark.parametrize("kind", USES)
def test_using_a_delta(kind: str, delta: Path, boxes: Path, capsys) -> None:
    (command, *rest), says = USES[kind]
    code, said = run(capsys, command, delta, *(r.replace("DATA", str(boxes)) for r in rest))
    assert code == 2 and len(said.splitlines()) == 1 and re.search(says, said), said


def test_classes_in_another_order_are_refused(delta: Path, data: Path, capsys) -> None:
    _names(data, "names: [green, red]")
    code, said = run(capsys, "val", delta, "--data", data / "data.yaml")
    assert code == 2 and "same classes in the same order" in said


@pytest.mark.parametrize("row", ("0 nan .5 .1 .1", "0 1e400 .5 .1 .1", "nan .5 .5 .1 .1", "0 .5 .5 .1 \xfc"))
def test_a_row_that_is_no_numbers(row: str, data: Path) -> None:
    (data / "labels" / "train" / "0.txt").write_bytes(row.encode("latin-1"))
    with pytest.raises(DataError, match="train/0.txt (has the row|cannot be read as UTF-8)"):
        FAMILIES["yolo"]().read_data(str(data / "data.yaml"))


def test_what_ultralytics_reads_is_read(data: Path, checkpoint: Path, capsys, caplog) -> None:
    """Boxes of poses, a share of each part, images of one name, and in the end no images to train on."""
    for file in (data / "labels").rglob("*.txt"):
        file.write_text("".join(f"{row} .5 .5 2\n" for row in file.read_text().splitlines()))
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        for folder in "ab":
            shutil.copytree(data / kind / "train", data / kind / "more" / folder)
        shutil.rmtree(data / kind / "train")
        (data / kind / "more").rename(data / kind / "train")
        assert (data / kind / "train" / "b" / f"0.{suffix}").is_file()
    (data / "images/train/a/0.png").write_bytes(b"broken")
    (data / "images/val/0.png").write_bytes(b"broken")
    shutil.copy(data / "images/train/a/1.png", data / "images/train/a/1.jpg")
    _names(data, "names: [red, red]\nkpt_shape: [1, 3]")
    small = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "plots": False, "quiet": True}
    run_ = visionpeft.train(
        data / "data.yaml", model=checkpoint, method="norm", project=data / "runs", fraction=[0.5, 0.5], **small
    )
    said = " ".join(caplog.messages)
    assert "1 of 8 train images cannot be used and are left out: " + str(data / "images/train/a/0.png") in said
    assert "1 of 4 val images cannot be used" in said and "labels/train/a/1.txt, so all but one" in said
    assert "classes of the same name" in said
    shutil.rmtree(data / "images/train")
    caplog.clear()
    assert visionpeft.val(run_.delta, data / "data.yaml", workers=0) == run_.after
    assert visionpeft.val(run_.delta, data / "data.yaml", split="val", fraction=[1.0, 0.5], workers=0)
    assert [m for m in caplog.messages if "left out" in m] == [m for m in caplog.messages if "val images" in m] != []


def test_a_class_without_images_to_measure_on(tmp_path: Path, caplog) -> None:
    data = make_squares(tmp_path / "data")
    (data / "train" / "green").mkdir()
    (data / "train" / "green" / "0.png").write_bytes((data / "train" / "red" / "0.png").read_bytes())
    for _ in range(2):  # no folder, and an empty one
        read = FAMILIES["timm"]().read_data(str(data))
        assert read.names == {0: "blue", 1: "green", 2: "red"} and {i for _, i in read.val} == {0, 2}
        assert "no val images of green" in caplog.text
        (data / "val" / "green").mkdir(exist_ok=True)
    shutil.rmtree(data / "train")
    assert FAMILIES["timm"]().read_data(str(data), train=False).names == {0: "blue", 1: "red"}


def test_a_classifier_says_what_it_leaves_out(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    make_squares(tmp_path / "data")
    Image.new("RGB", (32, 32)).save(tmp_path / "data/val/red/0.png", "GIF")  # Pillow reads it, Ultralytics does not
    family = FAMILIES["yolo"]()
    base = family.load("yolo11n-cls.yaml")
    read = family.read_data("data", base)
    family.evaluate(family.with_head(base, read.names, "rebuild"), read, imgsz=32, device="cpu", workers=0)
    assert caplog.messages == ["1 of 6 val images cannot be used and are left out: data/val/red/0.png"]


def test_a_list_of_images(data: Path, checkpoint: Path, capsys) -> None:
    listed = sorted((data / "images" / "train").iterdir())
    listed[0].rename(listed[0].with_name("with space.png"))
    (data / "labels" / "train" / "0.txt").rename(data / "labels" / "train" / "with space.txt")
    lines = ["# ./images/train/old.png", ".//images/train/with space.png", "", *map(str, listed[1:])]
    (data / "train.txt").write_text("\n".join(lines))
    (data / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [red, green]\n")
    given = ["train", "--data", data / "data.yaml", "--model", checkpoint, "--project", data / "runs", *SMALL]
    assert run(capsys, *given)[0] == 0
    listed[1].unlink()
    code, said = run(capsys, *given)
    assert code == 2 and "which is not there" in said


# ------------------------------------------------------------------------------------------------------------ the delta
def test_a_delta_cannot_send_its_user_to_an_address(delta: Path, tmp_path: Path, capsys) -> None:
    """Nor is its base unpickled: Ultralytics' allow-list refuses code in a checkpoint."""
    read = deltas.read(delta)
    for address in ("http://127.0.0.1:9/evil.pt", "HTTPS://x/y.pt"):
        evil = {**read.header, "base": {**read.header["base"], "model": address}}
        deltas.write(tmp_path / "evil.safetensors", deltas.Delta(read.plan, read.tensors, evil))
        code, said = run(capsys, "verify", tmp_path / "evil.safetensors")
        assert code == 2 and f"names the model {address}, which is not here" in said
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "evil.pt")
    code, said = run(capsys, "verify", delta, "--model", tmp_path / "evil.pt")
    assert code == 2 and "not a checkpoint" in said and not (tmp_path / "owned").exists()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def test_wrong_base_exits_with_one(delta: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    content = torch.load(checkpoint, weights_only=False)
    content["model"].model[0].conv.weight.data[0, 0, 0, 0] += 1
    torch.save(content, tmp_path / "other.pt")
    assert run(capsys, "verify", delta)[0] == 0
    code, said = run(capsys, "verify", delta, "--model", tmp_path / "other.pt")
    assert code == 1 and "wrong base" in said
    with pytest.raises(visionpeft.VisionpeftError, match="wrong base"):
        visionpeft.load(delta, model=tmp_path / "other.pt")
    code, said = run(capsys, "merge", delta, tmp_path / "merged.pt", "--model", tmp_path / "other.pt")
    assert code == 1 and "wrong base" in said and not (tmp_path / "merged.pt").exists()


def test_truncated_delta(delta: Path, tmp_path: Path, capsys) -> None:
    for kept in (4, 100, delta.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(delta.read_bytes()[:kept])
        code, said = run(capsys, "verify", tmp_path / "cut.safetensors")
        assert code == 2 and "damaged" in said


def test_altered_tensor_and_altered_header(delta: Path, tmp_path: Path, capsys) -> None:
    raw = bytearray(delta.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(raw)
    text = delta.read_bytes().replace(b'\\"red\\"', b'\\"rad\\"', 1)
    (tmp_path / "b.safetensors").write_bytes(text)
    for name in "ab":
        code, said = run(capsys, "verify", tmp_path / f"{name}.safetensors")
        assert code == 1 and "altered" in said


def test_newer_format_and_foreign_files(delta: Path, tmp_path: Path, capsys) -> None:
    with safe_open(str(delta), "pt") as file:
        header = json.loads(file.metadata()[deltas.KEY])
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    save_file(tensors, tmp_path / "new.safetensors", {deltas.KEY: json.dumps({**header, "format": 99})})
    save_file(tensors, tmp_path / "foreign.safetensors")
    for name, says in (("new", "upgrade"), ("foreign", "no delta of visionpeft"), ("absent", "there is no delta file")):
        code, said = run(capsys, "inspect", tmp_path / f"{name}.safetensors")
        assert code == 2 and says in said


# -------------------------------------------------------------------------------------------------- interrupted by force
def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    files.write(target, "first")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        files.replace(target, fails)
    assert target.read_text() == "first" and [f.name for f in tmp_path.iterdir()] == ["file"]
    (tmp_path / "plain").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        files.write(tmp_path / "plain" / "deeper", "x")


START = """
import pathlib, signal, sys, torch, visionpeft
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
real, calls = torch.save, []
def slow(content, path, **more):
    calls.append(1)
    if len(calls) == 2:  # the second epoch's checkpoint is half on disk ...
        pathlib.Path(path).write_bytes(b"half a checkpoint")
        print("HALF", flush=True)
        import time; time.sleep({seconds})
    real(content, path, **more)  # after Ctrl-C, all of it after all
torch.save = slow
visionpeft.train({data!r}, model={model!r}, method="norm", project={project!r}, epochs=3, imgsz=64, batch=4,
                 device="cpu", plots=False)
"""


@pytest.mark.parametrize(("by", "epoch", "seconds"), [(signal.SIGKILL, 0, 60), (signal.SIGINT, 1, 3)])
def test_killed_in_mid_save_and_resumed(
    by: signal.Signals, epoch: int, seconds: int, boxes: Path, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    code = START.format(data=str(boxes), model=str(checkpoint), project=str(tmp_path), seconds=seconds)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        began = time.monotonic()
        while "HALF" not in process.stdout.readline():  # ... and the process is gone
            assert time.monotonic() - began < 120 and process.poll() is None
        os.kill(process.pid, by)
        process.wait(timeout=60)
    folder = tmp_path / "train"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == epoch
    deltas.read(folder / "delta.safetensors")
    code_, said = run(capsys, "train", "--resume", folder)
    assert code_ == 0, said
    assert len(json.loads((folder / "run.json").read_text())["history"]) == 3


def test_a_crash_after_the_last_epoch(boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """Training is not repeated: resuming finishes what was left to do."""
    small = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "method": "norm"}

    def crash(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(TrainSession, "_result", crash)
    with pytest.raises(MemoryError):
        visionpeft.train(boxes, model=checkpoint, project=tmp_path, **small)
    monkeypatch.undo()
    with pytest.raises(visionpeft.VisionpeftError, match="epochs was given; leave it out"):
        visionpeft.train(resume=tmp_path / "train", epochs=7)
    before = (tmp_path / "train" / "delta.safetensors").read_bytes()
    done = visionpeft.train(resume=tmp_path / "train")
    assert done.merged and done.merged.exists() and done.delta and done.delta.read_bytes() == before
    with pytest.raises(visionpeft.VisionpeftError, match="nothing is left to resume"):
        visionpeft.train(resume=tmp_path / "train")


def test_an_earlier_runs_files_are_not_taken_for_this_ones(
    boxes: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    given = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "name": "one", "exist_ok": True}
    visionpeft.train(boxes, model=checkpoint, method="norm", project=tmp_path, **given)
    assert (tmp_path / "one" / "merged.pt").exists()
    visionpeft.train(boxes, model=checkpoint, method="adapter", project=tmp_path, **given)
    assert not (tmp_path / "one" / "merged.pt").exists() and (tmp_path / "one" / "delta.safetensors").exists()


class Given:
    """What nobody can use, of a size that nobody reads."""

    def __repr__(self) -> str:
        return "layer\n" * 10_000


WRONG = "data model method freeze bn head epochs imgsz batch lr0 lr_scale optimizer workers seed amp delta_dtype cache"
WRONG += " frozen_dtype lean trackers project name resume memory model_args r"


@pytest.mark.parametrize("name", WRONG.split())
def test_a_value_of_the_wrong_type(name: str, loops: dict, tmp_path: Path) -> None:
    data, given, *_ = loops["timm"]
    for value in (Given(), [1, None]):
        with pytest.raises(visionpeft.VisionpeftError, match=name) as said:
            visionpeft.train(**{"data": data, **given, "method": "lora", "project": tmp_path / "runs", name: value})
        assert len(str(said.value)) < 700 and "\n" not in str(said.value)
    assert not (tmp_path / "runs").exists()


def test_a_delta_of_the_wrong_type() -> None:
    for verb in (visionpeft.load, visionpeft.inspect, visionpeft.verify, visionpeft.export, visionpeft.import_peft):
        with pytest.raises(visionpeft.VisionpeftError, match="is of the type Given, which cannot be used"):
            verb(Given())  # type: ignore[operator]


def test_methods_share_no_name_with_other_arguments() -> None:
    """A setting that both a method and Ultralytics (or train) have would be taken by the wrong one."""
    import dataclasses
    import inspect

    from visionpeft.registry import FAMILIES, METHODS

    taken = set(inspect.signature(visionpeft.train).parameters)
    for family in FAMILIES.values():
        taken |= set(family().train_options())
    for name, cls in METHODS.items():
        assert not taken & {f.name for f in dataclasses.fields(cls)}, name
