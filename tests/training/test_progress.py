"""What is printed where: progress on stderr, results on stdout, JSON alone, nothing when asked; at any width."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_squares
from PIL import Image

import visionpeft
from visionpeft import cli, scenes, tables
from visionpeft.core.base_model import Data
from visionpeft.data import sheet
from visionpeft.errors import ConfigError
from visionpeft.families.yolo.pictures import labelled
from visionpeft.registry import FAMILIES, METHODS
from visionpeft.training import plots as pictures
from visionpeft.training.progress import Progress
from visionpeft.training.result import _measured

SMALL = "--epochs 2 --imgsz 64 --batch 4 --device cpu".split()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "visionpeft", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "YOLO_VERBOSE": "True", **environment})


@pytest.fixture(scope="module")
def given(boxes: Path, checkpoint: Path) -> list[object]:
    return ["--data", boxes, "--model", checkpoint, "--method", "head", *SMALL]


def test_json_is_alone_on_stdout(given: list, boxes: Path, tmp_path: Path) -> None:
    """Also where Ultralytics is imported for the first time, and where it warns."""
    home = {"YOLO_CONFIG_DIR": str(tmp_path / "settings")}
    (tmp_path / "data.yaml").write_text(boxes.read_text().replace("val:", f"path: {boxes.parent}\nvalidation:"))
    given = [given[0], tmp_path / "data.yaml", *given[2:]]
    done = command("train", *given, "--json", "--project", tmp_path, **home)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["after"] and "renaming" in done.stderr and "epoch" not in done.stderr
    assert json.loads(command("plan", "--model", given[3], "--data", given[1], "--json").stdout)["method"] == "lora"


def test_quiet_is_quiet(given: list, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("quiet: true\n")
    for flag in (["--quiet"], ["--config", config]):
        done = command("train", *given, *flag, "--project", tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plan_first_result_last(given: list, tmp_path: Path) -> None:
    done = command("train", *given, "--project", tmp_path, COLUMNS="100")
    plan, result = done.stdout.index("parameters train"), done.stdout.index("mAP50-95")
    assert plan < result and "Overriding" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 2 and all(re.match(r"epoch \d/2   loss [\d.]+ +mAP50-95 0\.\d{4}   [\d.]+ s$", x) for x in lines)


def test_classifiers_show_the_same(tmp_path: Path) -> None:
    data = make_squares(tmp_path / "data")
    model = ["--model", "timm/test_resnet", "--model_args", "{pretrained: false}", "--method", "full", "--workers", "0"]
    done = command("train", "--data", data, *model, *SMALL, "--project", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 2 and all(re.match(r"epoch \d/2   loss [\d.]+ +top1 [01]\.\d{4}   [\d.]+ s$", x) for x in lines)
    assert {f.name for f in (tmp_path / "train").glob("*.[jp][pn]g")} == {"before_after.jpg", "curves.png"}


@pytest.mark.parametrize("columns", [40, 100])
def test_a_bar_on_a_terminal(columns: int) -> None:
    """Epoch, batch, loss, memory and time left on one line; on a narrow terminal less, and never more than it holds."""
    code = """
from visionpeft.training.progress import Progress
import time
with Progress(3, "mAP50") as bar:
    for epoch in range(3):
        bar.start(epoch, 4)
        for i in range(4):
            bar.batch(0.125, 311_000_000)
            time.sleep(0.06)
        bar.end(epoch, 0.125, {"mAP50": 0.5})
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    assert done.wait() == 0 and done.stdout
    with done.stdout:
        assert done.stdout.read() == b""
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()))
    bars = [line.rstrip() for line in lines if "0:0" in line]
    assert bars and max(map(len, lines)) <= columns
    assert any(re.search(r"epoch [123]/3 .*[1-4]/4  loss 0.125", line) for line in bars)
    assert any("memory 311.0 MB" in line for line in bars) == (columns == 100)
    assert sum("mAP50 0.5000" in line for line in lines) == 3


def test_an_epoch_without_validation(capsys: pytest.CaptureFixture) -> None:
    with Progress(1, "mAP50") as progress:
        progress.start(0, 1)
        progress.batch(1.0, None)
        progress.end(0, 1.0, {"mAP50": None})
    assert "mAP50" not in capsys.readouterr().err


def test_tables_fit_narrow_terminals(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = visionpeft.plan(checkpoint, method="lora")
    for columns in (40, 60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = str(made).splitlines()[:-2]  # the last two are sentences
        assert max(map(len, rows)) <= columns and ("statistics" in str(made)) == (columns == 100)
    monkeypatch.setenv("COLUMNS", "7")
    assert tables.columns() == 40


def test_help_fits_80_columns(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--help"])
        assert not stopped.value.code
        return capsys.readouterr().out

    for words in ([], ["train"], ["data"], ["data", "check"], ["data", "convert"], ["data", "draw"], ["export"]):
        assert 40 < max(map(len, shown(*words).splitlines())) <= 80, words
    groups = [shown("train").index(g) for g in ("Model and data", "What trains", "How it trains", "The run")]
    assert groups == sorted(groups)


def test_no_display_and_no_home(given: list, tmp_path: Path) -> None:
    nowhere = {"HOME": "/proc/1", "XDG_CACHE_HOME": "", "DISPLAY": "", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "40"}
    done = command("train", *given, "--project", tmp_path, **nowhere)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_curves_and_sheets(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 1, "train/loss": 2.0, "top1": None},
        {"epoch": 2, "train/loss": 1.0, "top1": 0.5},
    ]
    curves = pictures.curves(history, {"top1": 0.1}, "top1", tmp_path / "c.png", "50 $ on a_b")
    assert curves.stat().st_size > 5000
    assert pictures.spread(list(range(10)), 4) == [0, 3, 6, 9] and pictures.spread([1, 2], 4) == [1, 2]


HARMFUL = "a\x1b[31m\x9b\u202e\u2028\r\nb\0[/red]"
SHOWN = r"a\x1b[31m\x9b\u202e\u2028\r\nb\x00[/red]"


def test_names_steer_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What a name from a file says to a terminal, or to rich, is shown as it is written."""
    assert SHOWN in (table := tables.text(HARMFUL, [HARMFUL], [[HARMFUL]], width=120)) and table.count("\n") == 4
    assert str(ConfigError("\x1b[2J\u2028")) == r"\x1b[2J\u2028"
    for arguments in (["inspect", "\x1b[31m"], ["\x1b[31m"], ["verify", str(tmp_path), "--\x1b[31m", "1"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        said = capsys.readouterr()
        assert r"\x1b[31m" in said.err and "\x1b" not in said.out + said.err
    record = logging.LogRecord("visionpeft", logging.WARNING, "", 0, "%s is left out", (HARMFUL,), None)
    assert cli._Printable("%(message)s").format(record) == f"{SHOWN} is left out"


def test_names_are_drawn_as_they_are_written(tmp_path: Path) -> None:
    """Pillow refuses to measure two lines, and draws one over the other."""
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "a.png")
    tile, row = sheet.Tile(tmp_path / "a.png", "val", (), 0), "0 .5 .5 .5 .5"
    drawn = {
        name: (
            pictures.guessed([image], [name])[0],
            np.asarray(Image.open(sheet.draw_sheet(tmp_path / "sheet.png", [tile], {0: name}))),
            np.asarray(Image.open(pictures.sheet({name: [np.asarray(image)]}, tmp_path / "one.png", name))),
            labelled(str(tmp_path / "a.png"), [row], Data("", "detect", {0: name, 1: "b"}, "")),
        )
        for name in (HARMFUL, SHOWN)
    }
    assert all(np.array_equal(a, b) for a, b in zip(drawn[HARMFUL], drawn[SHOWN], strict=True))


def test_a_cpu_has_one_peak() -> None:
    """It is what is saved for backward, which the table has; a GPU's is another line."""
    common = {"saved_bytes": 4_000, "live_bytes": 9_000}
    assert "peak memory" not in dict(_measured({**common, "peak_bytes": 4_000, "peak_measure": "bytes saved"}))
    assert "20.0 kB" in dict(_measured({**common, "peak_bytes": 20_000, "peak_measure": "CUDA's"}))["peak memory"]


def test_without_docstrings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """They are text to be shown, and ``python -OO`` throws them away; an installation may lack the sources, too."""
    lines = (["methods"], ["methods", "lora"], ["methods", "--markdown"], ["families"])

    def shown() -> str:
        for line in lines:
            with pytest.raises(SystemExit) as stopped:
                cli.main(line)
            assert not stopped.value.code
        return capsys.readouterr().out

    before = shown()
    assert "https://arxiv.org" in before and "rank" in before and "timm/NAME" in before
    for cls in (*METHODS.values(), *FAMILIES.values()):
        monkeypatch.setattr(cls, "__doc__", None)
        monkeypatch.setattr(sys.modules[cls.__module__], "__doc__", None)
    assert shown() == before

    def fails(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(inspect, "getsource", fails)
    assert "https://" not in shown()


def test_neither_data_nor_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The embedded pair is used, and the first line says so, and how to give one's own."""
    monkeypatch.setenv("VISIONPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(scenes.SETS, "satellite", dataclasses.replace(scenes.SETS["satellite"], train=8, val=4))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main("train --freeze 10 --epochs 1 --device cpu".split())
    said = capsys.readouterr().out
    assert not stopped.value.code and "--data YOUR.yaml --model yolo11n.pt" in said.split("\n\n")[0]
    made = json.loads((tmp_path / "runs/visionpeft/train/run.json").read_text())["arguments"]
    assert {k: made[k] for k in ("model", "data", "lr0", "epochs")} == {**_embedded("model", "data", "lr0"), "epochs": 1}
    assert made["options"] == _embedded("close_mosaic") and sorted(f.name for f in tmp_path.iterdir()) == ["cache", "runs"]
    header = visionpeft.load(tmp_path / "runs/visionpeft/train/delta.safetensors").delta.header
    assert header["base"]["model"] == "scenes/driving.pt" and header["data"]["source"] == "scenes/satellite"


def _embedded(*names: str) -> dict[str, Any]:
    return {k: scenes.EMBEDDED[k] for k in names}
