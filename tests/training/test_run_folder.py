"""What happens to runs: signals, two at a time, other weights or labels when one goes on, files and images that vanish."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import ctrl_c, make_boxes, make_squares

import visionpeft
from visionpeft import cli, files
from visionpeft.core import delta as deltas
from visionpeft.errors import ConfigError, DataError, Interrupted, Stopped, TrainingError
from visionpeft.families.base import Family
from visionpeft.families.timm.trainer import Trainer
from visionpeft.families.yolo.family import Yolo
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.training import checkpoint as checkpoints
from visionpeft.training import run_folder
from visionpeft.training.shuffling import Order

STEP = {"yolo": (PeftTrainerMixin, "optimizer_step"), "timm": (Trainer, "_step")}
SMALL = {"epochs": 2, "batch": 4, "device": "cpu", "workers": 0, "quiet": True}
RESNET = {"model": "timm/test_resnet", "model_args": {"pretrained": False}, "method": "full", "imgsz": 32, **SMALL}


@contextmanager
def after(family: str, calls: int, happens: Callable[[], object]) -> Iterator[None]:
    """Have something happen after so many steps."""
    owner, method = STEP[family]
    real, count = getattr(owner, method), []

    def call(*args: Any) -> Any:
        found = real(*args)
        count.append(1)
        if len(count) == calls:
            happens()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, call)
        yield


def usr1() -> None:
    signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are not evaluated before and after training, which takes much of a small one's time."""
    monkeypatch.setattr(Family, "evaluate", lambda *_, **__: {})


# --------------------------------------------------------------------------------------------------------------- signals
MOSAIC = {"mosaic": 1.0, "close_mosaic": 1, "method": "lora", "r": 2, "batch": 2, "nbs": 4}
MIXED = {"method": "lora", "lora_dropout": 0.1, "mixup": 0.4, "erasing": 0.5}


slow = pytest.mark.slow


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
@pytest.mark.parametrize(
    ("family", "options", "asked", "saved"),
    [
        ("yolo", MOSAIC, 1, (-1, 2)),  # gradients are gathered over two batches
        pytest.param("yolo", MOSAIC, 5, (0, 2), marks=slow),  # where mosaic is over
        ("timm", {**MIXED, "nbs": 8}, 5, (0, 2)),
        pytest.param("timm", {**MIXED, "workers": 2}, 3, (-1, 3), marks=slow),
        ("timm", MIXED, 4, (-1, 4)),  # the last step
    ],
)
def test_stopped_within_an_epoch_equals_uninterrupted(
    family: str, options: dict, asked: int, saved: tuple[int, int], loops: dict, tmp_path: Path, brief: None
) -> None:
    """Bit for bit; and so does a run that saves after every step."""
    data, arguments, *_ = loops[family]
    given = {**arguments, **options, "project": tmp_path}
    whole = visionpeft.train(data, **given, name="whole", save_every=1e-9)
    earlier = signal.getsignal(signal.SIGUSR1)
    with after(family, asked, usr1), pytest.raises(Stopped, match="stopped by SIGUSR1; go on with resume=") as stopped:
        visionpeft.train(data, **given, name="parts", save_every=0)
    assert signal.getsignal(signal.SIGUSR1) is earlier
    assert (stopped.value.code, stopped.value.folder) == (75, tmp_path / "parts")
    content = checkpoints.load(tmp_path / "parts" / "checkpoint.pt")
    assert (content["epoch"], content["within"]["steps"]) == saved
    rest = visionpeft.train(resume=tmp_path / "parts", quiet=True)
    one, two = (torch.load(r.folder / "checkpoint.pt", weights_only=True) for r in (whole, rest))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert [k for k in one[part] if not torch.equal(one[part][k], two[part][k])] == []
    assert one["history"] == two["history"] and one["updates"] == two["updates"]
    assert str(one["optimizer"]) == str(two["optimizer"]) and str(one["random"]) == str(two["random"])
    one, two = (deltas.read(r.delta).tensors for r in (whole, rest))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_stopped_on_the_command_line(loops: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    """While it trains: a code of its own, and how to go on. Before there is anything to go on from: the signal's."""
    data, arguments, *_ = loops["yolo"]
    flags = [f"--{k}={v}" for k, v in {**arguments, "method": "norm", "project": tmp_path / "runs of mine"}.items()]
    command = ["train", "--data", str(data), *flags]
    with after("yolo", 1, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(SystemExit) as ended:
        cli.main(command)
    folder = tmp_path / "runs of mine" / "train"
    said = f"visionpeft: stopped by SIGTERM; go on with: visionpeft train --resume '{folder}'\n"
    assert ended.value.code == 75 and said in capsys.readouterr().err
    monkeypatch.setattr(Yolo, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before anything was saved; start anew" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------------------------ the folder
def test_one_run_at_a_time(squares: Path, tmp_path: Path, brief: None) -> None:
    given = {**RESNET, "project": tmp_path, "name": "one", "exist_ok": True}
    with ctrl_c(Trainer, "_epoch", after=1), pytest.raises(Interrupted):
        visionpeft.train(squares, **given)
    with files.locked(tmp_path / "one", "unused"):
        for again in ({"resume": tmp_path / "one"}, {"data": squares, **given}):
            with pytest.raises(ConfigError, match="another run is under way in"):
                visionpeft.train(**again)
        assert checkpoints.load(tmp_path / "one" / "checkpoint.pt")["epoch"] == 0
    assert len(visionpeft.train(resume=tmp_path / "one", quiet=True).history) == 2


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_each_process_takes_up_its_own_batches(shares: int, steps: int) -> None:
    """accelerate gives each process its share of the batches; the order counts those of all."""

    def share(rank: int, passed: int) -> list[list[int]]:
        order = Order(range(24), 2, torch.Generator().manual_seed(0), drop_last=False, ahead=False, shares=shares)
        order.go_to(passed * shares, [])
        return list(BatchSamplerShard(order, shares, rank))

    for rank in range(shares):
        assert share(rank, steps) == share(rank, 0)[steps:]


def test_a_run_whose_base_has_moved_is_resumed(checkpoint: Path, tmp_path: Path, brief: None) -> None:
    """And one that has no limit, or lines in train.json that are no run's."""
    data, base, folder = make_boxes(tmp_path / "data"), tmp_path / "base.pt", tmp_path / "train"
    shutil.copy(checkpoint, base)
    given = {**SMALL, "model": base, "method": "lora", "r": 2, "imgsz": 64, "cache_limit": math.inf, "batch": 4}
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted):
        visionpeft.train(data, project=tmp_path, **given)
    base.rename(tmp_path / "moved.pt")
    said = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**said, "quiet": False, "stop": 1, "held": 2, "unheard": 3}))
    with pytest.raises(TrainingError, match="or give model=..."):
        visionpeft.train(resume=folder)
    run = visionpeft.train(resume=folder, model=tmp_path / "moved.pt", quiet=True)
    assert len(run.history) == 2 and visionpeft.inspect(run.delta)["base"]["model"].endswith("moved.pt")


@pytest.mark.pictures
def test_what_a_killed_run_left_is_removed_and_made_up_for(squares: Path, tmp_path: Path) -> None:
    run = visionpeft.train(squares, **{**RESNET, "epochs": 1}, project=tmp_path)
    left = [run.folder / name for name in (".checkpoint.ab3_d5gh.pt", ".curves.abcdefgh.png")]
    for file in (*left, *(own := [run.folder / name for name in (".hidden", ".env.template", ".git.settings")])):
        file.write_bytes(b"half")
    run.pictures["curves"].unlink()
    merged = run.merged.read_bytes()
    again = visionpeft.train(resume=run.folder, quiet=True)
    assert again.pictures["curves"].is_file() and again.merged.read_bytes() == merged
    assert all(file.is_file() for file in own) and not any(file.exists() for file in left)
    with pytest.raises(TrainingError, match="nothing is left to resume"):
        visionpeft.train(resume=run.folder)


@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_a_folder_that_is_removed_is_not_made_again(family: str, loops: dict, tmp_path: Path, brief: None) -> None:
    data, arguments, *_ = loops[family]
    gone = after(family, 1, lambda: shutil.rmtree(tmp_path / "train"))
    with gone, pytest.raises(TrainingError, match="was removed, or emptied, while it trained"):
        visionpeft.train(data, **arguments, method="head", project=tmp_path)
    assert not (tmp_path / "train" / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------------------------- what it is made of
def test_resumed_on_something_else(checkpoint: Path, tmp_path: Path, brief: None) -> None:
    """Is refused; a checkpoint that does not say what it was made of is helped out by the delta."""
    data, base = make_boxes(tmp_path / "data"), tmp_path / "base.pt"
    shutil.copy(checkpoint, base)
    label, folder = tmp_path / "data" / "labels" / "train" / "0.txt", tmp_path / "train"
    with ctrl_c(PeftTrainerMixin, "_model_train", after=1), pytest.raises(Interrupted):
        visionpeft.train(data, model=base, method="lora", r=2, imgsz=64, project=tmp_path, **SMALL)
    saved, content = checkpoints.load(folder / "checkpoint.pt"), torch.load(checkpoint, weights_only=False)
    with torch.no_grad():
        next(content["model"].parameters()).mul_(0.5)
    others: list[tuple[Path, Callable[[Path], object], str]] = [
        (label, lambda f: f.write_text("0 0.5 0.5 0.2 0.2\n"), "images or labels of .* were added, removed or replaced"),
        (base, lambda f: torch.save(content, f), "its base .*base.pt was replaced by other weights"),
    ]
    for file, replace, said in others:
        before = file.read_bytes()
        replace(file)
        with pytest.raises(TrainingError, match=f"cannot be resumed: {said}"):
            visionpeft.train(resume=folder, quiet=True)
        file.write_bytes(before)
        checkpoints.save(folder / "checkpoint.pt", {k: v for k, v in saved.items() if k != "origin"})
    assert len(visionpeft.train(resume=folder, quiet=True).history) == 2


@pytest.mark.parametrize(
    ("part", "said"), [("base", "weights"), ("names", "classes"), ("data", "labels"), ("plan", "is planned otherwise")]
)
def test_each_thing_a_run_is_made_of_is_compared(part: str, said: str, tmp_path: Path) -> None:
    then = dict.fromkeys(("base", "names", "data", "plan"), "one")
    run_folder.check_origin(tmp_path, json.dumps(then), json.dumps(then), "base.pt", "data.yaml")
    with pytest.raises(TrainingError, match=said):
        run_folder.check_origin(tmp_path, json.dumps(then), json.dumps({**then, part: "another"}), "base.pt", "data.yaml")


# ---------------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_an_image_that_is_lost_on_the_way(family: str, checkpoint: Path, tmp_path: Path, brief: None) -> None:
    """Gone, or damaged, and read by another process: a sentence names it, and with it the run goes on."""
    given: dict[str, Any] = {**SMALL, "model": checkpoint, "method": "norm", "imgsz": 64, "mosaic": 0.0}
    if family == "timm":
        data, lost = make_squares(tmp_path / "data"), tmp_path / "data" / "train" / "red" / "1.png"
        given = {**RESNET, "workers": 2}
    else:  # its training images are all in memory
        data, lost = make_boxes(tmp_path / "data"), tmp_path / "data" / "images" / "val" / "1.png"
    whole, steps = lost.read_bytes(), {"yolo": 3, "timm": 4}[family]
    loses = lost.unlink if family == "yolo" else lambda: lost.write_bytes(whole[:-60])
    said = f"the image {lost} " + {"yolo": "is no longer there", "timm": "can no longer be read"}[family]
    with after(family, steps, loses), pytest.raises(DataError, match=said):
        visionpeft.train(data, project=tmp_path, **given)
    lost.write_bytes(whole)
    assert len(visionpeft.train(resume=tmp_path / "train", quiet=True).history) == 2
