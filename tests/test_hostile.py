"""Files from elsewhere: none runs code, fetches anything, or takes for ever. Attackers' code would leave a canary."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import shutil
import socket
import tempfile
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_boxes, make_squares
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._tensor import _rebuild_from_type_v2
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

import visionpeft
from visionpeft import cli
from visionpeft import presets as recipes
from visionpeft.core import delta as deltas
from visionpeft.errors import ConfigError, DataError, DeltaError, ModelError, TrainingError, VisionpeftError
from visionpeft.families.timm.family import Timm
from visionpeft.families.yolo.family import Yolo
from visionpeft.families.yolo.sources import check_download, check_named, checkpoint
from visionpeft.hfpeft.folder import Adapter
from visionpeft.hfpeft.patterns import matches
from visionpeft.pickles import objection
from visionpeft.training import checkpoint as checkpoints
from visionpeft.training import feature_cache_file as view_file

CANARY = Path(tempfile.gettempdir()) / "visionpeft_canary"
CODE = f"__import__('pathlib').Path({str(CANARY)!r}).touch()"
ACTIVATION = f"{CODE} or nn.SiLU()"
LAYERS = [[-1, 1, "Conv", [8, 3, 2]]] * 5
DESIGN = {"nc": 2, "backbone": LAYERS, "head": [[[2, 3, 4], 1, "Detect", ["nc"]]]}
CLASSIFIER: Any = types.SimpleNamespace(task="classify")
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Makes:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, online: whoever asks the network, runs code or leaves a file in it is found out."""
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[-1])
        raise OSError("no network in tests")

    monkeypatch.delenv("YOLO_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    CANARY.unlink(missing_ok=True)
    yield folder
    ran = CANARY.exists()
    CANARY.unlink(missing_ok=True)
    assert not asked and not ran
    assert not list(folder.glob("*evil*"))


@pytest.fixture(scope="module")
def run(boxes: Path, net: Any, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    folder = tmp_path_factory.mktemp("run")
    small = {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "quiet": True}
    return visionpeft.train(boxes, model=saved(folder / "net.pt", net), method="norm", project=folder, **small)


@pytest.fixture
def altered(run: visionpeft.Run, tmp_path: Path):
    """Returns a copy of the run's delta whose header says something else, its checksum right."""

    def write(part: str, **said: Any) -> Path:
        read = deltas.read(str(run.delta))
        header = {**read.header, part: {**read.header[part], **said}}
        return deltas.write(tmp_path / "evil.safetensors", deltas.Delta(read.plan, read.tensors, header))

    return write


@pytest.fixture(scope="module")
def net() -> Any:
    return DetectionModel(copy.deepcopy(DESIGN), verbose=False)


def saved(path: Path, net: Any, **said: Any) -> Path:
    """Write a checkpoint that says something else of its network."""
    model = copy.deepcopy(net)
    model.yaml = {**model.yaml, **said}
    torch.save({"model": model, "train_args": {"imgsz": 64}}, path)
    return path


# -------------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize(
    "name",
    [
        *("http:/127.0.0.1:9/evil.pt", "http:'//127.0.0.1:9/evil.pt", "HTTP:/127.0.0.1:9/evil.pt", "https://x/evil.pt"),
        *("ul://x/evil.pt", "//127.0.0.1/share/evil.pt", "\\\\127.0.0.1\\evil.pt", "yolo11n.pt", "yolo11n", "yolo11q.pt"),
        *("yolo11n.yaml", "net.yaml", "/dev/zero.pt", "/etc/passwd", ""),
    ],
)
def test_a_delta_alone_fetches_nothing(name: str, altered, here: Path) -> None:
    (here / "net.yaml").write_text(yaml.safe_dump({**DESIGN, "activation": ACTIVATION}))
    delta = altered("base", model=name)
    for verb in (visionpeft.verify, visionpeft.load):
        with pytest.raises(DeltaError, match="names the model .*not here|names the model .*no checkpoint"):
            verb(delta)
    assert [f.name for f in here.iterdir()] == ["net.yaml"]


DESCRIBED = {
    "an activation that is code": {"activation": ACTIVATION},
    "an activation of arguments that are code": {"activation": f"torch.nn.LeakyReLU({CODE} or 0.1)"},
    "a layer that loads a pickle": {"backbone": [*LAYERS, [-1, 1, "torch_safe_load", ["evil.pt"]]]},
    "a layer that is a network": {"backbone": [*LAYERS, [-1, 1, "DetectionModel", ["evil.yaml"]]]},
    "a layer that fetches weights": {"backbone": [*LAYERS, [-1, 1, "TorchVision", [8, "resnet18", "DEFAULT"]]]},
    "so many layers": {"backbone": [[-1, 10**9, "Conv", [8, 3, 2]]]},
    "so many channels": {"backbone": [[-1, 1, "Conv", ["1000000000", 3, 2]]]},
    "much larger layers": {"backbone": [[-1, 1, "Conv", [60000, 3, 2]], *LAYERS]},
    "an activation of its own weights": {"activation": "torch.nn.Linear(60000, 60000)"},
    "no layers": {"backbone": None},
}


@pytest.mark.parametrize("kind", DESCRIBED)
def test_what_a_checkpoint_says_of_its_network_is_not_run(kind: str, net, tmp_path: Path) -> None:
    saved(tmp_path / "good.pt", net)
    assert visionpeft.plan(tmp_path / "good.pt", method="norm").total
    with pytest.raises(ModelError):
        visionpeft.plan(saved(tmp_path / "evil.pt", net, **DESCRIBED[kind]), method="norm")
    if kind not in ("much larger layers",):  # which is anybody's right
        (tmp_path / "net.yaml").write_text(yaml.safe_dump({**DESIGN, **DESCRIBED[kind]}))
        with pytest.raises(ModelError):
            visionpeft.plan(tmp_path / "net.yaml", method="full")


def test_torch_calls_nothing_for_a_checkpoint(net, tmp_path: Path) -> None:
    """Networks are declared safe when Ultralytics has loaded one; torch then makes them from what any file gives."""
    Yolo().load(str(saved(tmp_path / "good.pt", net)))
    design = {**DESIGN, "activation": ACTIVATION}
    for evil in (Makes(DetectionModel, design), Makes(eval, CODE), Makes(torch.load, "evil.pt")):
        torch.save({"model": evil, "done": False}, tmp_path / "evil.pt")
        for error, opens in (
            (TrainingError, lambda: checkpoints.load(tmp_path / "evil.pt")),
            (ModelError, lambda: visionpeft.plan(tmp_path / "evil.pt")),
            (ModelError, lambda: Timm().load("timm/test_resnet", checkpoint_path=str(tmp_path / "evil.pt"))),
        ):
            with pytest.raises(error) as said:
                opens()
            assert "weights_only" not in str(said.value)


def typed(made: Any, *args: Any) -> Makes:
    """Pickles as a tensor with attributes, which torch has made by a function that the file names."""
    return Makes(_rebuild_from_type_v2, made, torch.Tensor, args, {})


OPENED = {
    "a network of a tensor's maker": lambda file: typed(DetectionModel, {**DESIGN, "activation": ACTIVATION}),
    "a network that opens a second file": lambda file: typed(DistillationModel, file, nn.Identity()),
    "a network by half of its name": lambda file: Makes(nn.Linear, 131072, 131072),
    "memory": lambda file: Makes(bytearray, 3_000_000_000),
    "memory for a number": lambda file: np.zeros((), "S3000")[()],
}


@pytest.mark.parametrize("kind", OPENED)
def test_what_torch_allows_is_no_way_in(kind: str, net, tmp_path: Path) -> None:
    saved(tmp_path / "good.pt", net)
    torch.save({"model": Makes(Path(CANARY).touch)}, tmp_path / "second.pt")
    content = {"model": OPENED[kind](str(tmp_path / "second.pt")), "done": False}
    torch.save(content, tmp_path / "evil.pt")
    data = torch._C.PyTorchFileReader(str(tmp_path / "evil.pt")).get_record("data.pkl")
    halves = data.replace(b"ctorch.nn.modules.linear\nLinear", b"ctorch\nnn.modules.linear.Linear")
    assert not objection(tmp_path / "good.pt", networks=True)
    assert objection(pickle.PROTO + b"\x02" + halves[2:], networks=True) and objection(tmp_path / "evil.pt", networks=True)
    with pytest.raises(ModelError):
        visionpeft.plan(tmp_path / "evil.pt")


@pytest.mark.parametrize("name", ["float", "state_dict", "__deepcopy__", "_forward_hooks"])
def test_parts_that_bring_their_own_methods(name: str, net, tmp_path: Path) -> None:
    model = copy.deepcopy(net)
    part = model.model[1] if name == "_forward_hooks" else model
    part.__dict__[name] = {0: nn.Identity} if name == "_forward_hooks" else nn.Identity
    torch.save({"model": model}, file := tmp_path / "evil.pt")
    with pytest.raises(ModelError, match=f"carries {name} of its own"):
        visionpeft.plan(file)


def test_a_file_of_two_formats(tmp_path: Path) -> None:
    """torch looks at the first bytes, other readers of zip files at the last."""
    evil, file = io.BytesIO(), tmp_path / "evil.pth"
    torch.save(
        {"x": Makes(DetectionModel, {**DESIGN, "activation": ACTIVATION})}, evil, _use_new_zipfile_serialization=False
    )
    torch.save({"x": 1}, file)
    file.write_bytes(evil.getvalue() + file.read_bytes())
    assert zipfile.is_zipfile(file) and "something else than tensors" in objection(file, networks=True)


def test_views_that_somebody_else_stored(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "resnet.views"
    content, header = golden.read_bytes(), view_file._header(golden)
    prefix = types.SimpleNamespace(length=header["length"], stored=getattr(torch, header["stored"].removeprefix("torch.")))
    assert view_file.read(golden, header["rows"], prefix) is not None
    torch.save({"places": Makes(DetectionModel, {**DESIGN, "activation": ACTIVATION})}, evil := io.BytesIO())
    file, rest = tmp_path / "evil.views", content[header["end"] :]
    kept = json.dumps({**header, "crc": 0, "end": header["vectors"] + len(evil.getvalue())})
    file.write_bytes(content[: header["vectors"]] + evil.getvalue() + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_file, "_header", lambda _: json.loads(kept))
        patch.setattr(view_file, "_crc", lambda *_: 0)
        assert view_file.read(file, header["rows"], prefix) is None


@pytest.mark.parametrize(
    "named",
    [
        {"layers": [2, 2, 2, 10**6]},
        {"layers": [64, 64, 1, 1], "channels": [8192, 8192, 8192, 8192]},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/evil.pth"}},
        {"checkpoint_path": "http:/127.0.0.1:9/evil.pth"},
        {"checkpoint_path": "evil.pth"},
        {"cache_dir": "//127.0.0.1/share"},
        {"act_layer": ACTIVATION},
        {"img_size": 10**6},
        {"num_classes": 10**9},
        {"pretrained": "yes"},
        {"scriptable": True},
        {"pretrained": False},
        {},  # its weights are not here
    ],
    ids=str,
)
def test_what_a_file_may_say_of_a_timm_model(named: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        Timm().check_named("timm/test_resnet", named, {})


def test_a_timm_model_that_is_here(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "own.pth")
    named = {"checkpoint_path": str(tmp_path / "own.pth"), "pad_type": "same", "layers": [1, 1, 1, 1]}
    assert Timm().check_named("timm/test_resnet", named, {}) == {}
    assert Timm().check_named(None, {}, {"layers": [10**6]}) == {}  # the user's own


# --------------------------------------------------------------------------------------------------------------- the data
def test_images_are_fetched_only_where_the_user_says_so(run: visionpeft.Run, tmp_path: Path, capsys) -> None:
    data = make_boxes(tmp_path / "data")
    asked = data.read_text()
    shutil.move(data.parent / "images" / "val", tmp_path / "val")
    for code in (f"bash {CANARY}.sh", "http://127.0.0.1:9/evil.zip", CODE):
        data.write_text(f"{asked}test: images/test\ndownload: {json.dumps(code)}\n")
        with pytest.raises(DataError, match="val images .*'download:' is code or an address.*--allow-download"):
            Yolo().read_data(str(data))
    for verb in (["train", "--model"], ["plan", "--model"], ["val"], ["forgetting"]):
        file = [run.arguments["model"], "--data", data] if "--model" in verb else [run.delta, data]
        file = [run.delta, "--data", data] if verb == ["val"] else file
        with pytest.raises(SystemExit) as stopped:
            cli.main([*verb, *map(str, file)])
        assert stopped.value.code == 2 and "--allow-download" in capsys.readouterr().err
    shutil.move(tmp_path / "val", data.parent / "images" / "val")
    assert Yolo().read_data(str(data)).names  # they are here: nothing to ask
    with pytest.raises(DataError, match="test images .*--allow-download"):
        check_download(str(data), "test")


def test_labels_that_were_cached_elsewhere(run: visionpeft.Run, tmp_path: Path) -> None:
    """Ultralytics unpickles what it finds beside the labels."""
    data, folders = make_boxes(tmp_path / "data"), make_squares(tmp_path / "squares")
    Yolo().read_data(str(data))
    for cache, base in ((data.parent / "labels" / "val.cache", None), (folders / "train.cache", CLASSIFIER)):
        source = str(data if base is None else folders)
        with open(cache, "wb") as file:
            np.save(file, np.array({"labels": [{"cls": np.ones(2), "im_file": "0.png", "shape": (4, 4)}], "hash": "x"}))
        Yolo().read_data(source, base)
        for evil in (np.array(Makes(Path(CANARY).touch), dtype=object), {"labels": Makes(eval, CODE)}):
            with open(cache, "wb") as file:
                np.save(file, evil) if isinstance(evil, np.ndarray) else pickle.dump(evil, file)
            with pytest.raises(DataError, match="the cache of labels .*is not as Ultralytics writes it"):
                Yolo().read_data(source, base)


def test_with_leave_it_is_run(tmp_path: Path) -> None:
    data = make_boxes(tmp_path / "data")
    shutil.rmtree(data.parent / "images" / "val")
    back = (
        f"import shutil; shutil.copytree({str(data.parent / 'images' / 'train')!r}, {str(data.parent / 'images' / 'val')!r})"
    )
    data.write_text(f"{data.read_text()}download: {json.dumps(back)}\n")
    assert len(Yolo().read_data(str(data), allow_download=True).val) == 8


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "http:/127.0.0.1:9/evil.pt"},
        {"model": "evil.pt"},
        {"model": "net.yaml"},
        {"model": "timm/test_resnet", "model_args": {"checkpoint_path": "evil.pth"}},
        {"data": "data.yaml"},
        {"data": "http:/127.0.0.1:9/evil.yaml"},
        {"data": "https://127.0.0.1:9/evil.yaml"},
        {"options": {"distill_model": "evil.pt"}},
        {"options": {"cfg": "evil.yaml"}},
    ],
    ids=str,
)
def test_a_run_folder_from_elsewhere(changed: dict[str, Any], run: visionpeft.Run, here: Path) -> None:
    (here / "net.yaml").write_text(yaml.safe_dump({**DESIGN, "activation": ACTIVATION}))
    (here / "data.yaml").write_text(f"train: x\nval: y\nnames: [a]\ndownload: {json.dumps(CODE)}\n")
    folder = here / "run"
    folder.mkdir()
    shutil.copy(run.folder / "checkpoint.pt", folder)
    said = json.loads((run.folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**said, **changed}))
    with pytest.raises(VisionpeftError):
        visionpeft.train(resume=folder)


# ---------------------------------------------------------------------------------------------------------- time and size
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))
TEXTS = {
    "aliases": BOMB,
    "merged": MERGED,
    "itself": "a: &a [*a]",
    "nested": "a: " + "[" * 20000,
    "digits": f"a: {'9' * 9999}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_yaml_that_takes_for_ever(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(TEXTS[kind])
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="not readable YAML"):
        recipes.read(file, "train")
    with pytest.raises(DataError, match="is not readable YAML"):
        Yolo().read_data(str(file))
    with pytest.raises(ModelError, match=r"evil\.yaml"):
        Yolo().load(str(file))
    assert time.perf_counter() - began < 10  # seconds, on a busy machine


def test_aliases_that_repeat_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: &base {epochs: 3, lr0: 1e-3}\nmore: {<<: *base, epochs: 4}\n")
    assert recipes.read(tmp_path / "own.yaml", "train")["more"] == {"epochs": 4, "lr0": 1e-3}


@pytest.mark.parametrize(
    "pattern", ["(([a-z.0-9_])+)+!", "(.*)*(.*)*!", ".*" * 20 + "!", "((.{1,99}){1,99}){1,99}!", "(.|.)" * 40 + "!"]
)
def test_patterns_that_take_for_ever(pattern: str) -> None:
    names = [f"model.{i}.m.{j}.cv1.conv" for i in range(20) for j in range(5)]
    began = time.perf_counter()
    for config in ({"target_modules": pattern}, {"target_modules": names, "exclude_modules": pattern}):
        Adapter(config, {}, {}).targets(names)
    Adapter({"r": 1, "rank_pattern": {pattern: 2}}, {}, {}).fields(names[0])
    assert time.perf_counter() - began < 10
    with pytest.raises(DeltaError, match="write out the names"):
        Adapter({"target_modules": "(?=a)b"}, {}, {}).targets(names)


TOKENS = [
    "a",
    "b",
    ".",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "^",
    "$",
    "{2}",
    "{,2}",
    "{1,}",
    "[ab.]",
    r"\.",
    r"\w",
    "(?:",
    "*?",
    "{",
]


@settings(FUZZ, max_examples=150)
@given(st.lists(st.sampled_from(TOKENS), max_size=8).map("".join), st.text("ab.", max_size=6))
def test_patterns_mean_what_python_says(pattern: str, name: str) -> None:
    try:
        expected = re.match(pattern, name) is not None
        found = matches(pattern, name, "(")  # as if it could take for ever
    except (re.error, ValueError):
        return  # possessive, or none at all
    assert found == expected


def test_sizes_that_only_a_file_says(altered, boxes: Path) -> None:
    image = next((boxes.parent / "images" / "val").iterdir())
    for said in ({"imgsz": 8000}, {"batch": 10**9}):
        with pytest.raises(DeltaError, match=f"the delta says {next(iter(said))}="):
            visionpeft.val(altered("train_args", **said), boxes)
    adapted = visionpeft.load(altered("train_args", imgsz=9000))
    with pytest.raises(DeltaError, match="imgsz=9000"):
        visionpeft.predict(adapted, image)
    assert len(visionpeft.predict(adapted, image, imgsz=64)) == 1


# -------------------------------------------------------------------------------------------------------------- whatever
WORDS = st.one_of(
    st.sampled_from(
        [CODE, "http:/127.0.0.1:9/evil.zip", "images/train", "../..", "/", "", "yolo11n.pt", "None", "bash evil"]
    ),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
)
VALUES = st.recursive(
    WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
KEYS = st.sampled_from("path train val test names nc channels kpt_shape download yaml_file".split())


@FUZZ
@given(st.dictionaries(KEYS, VALUES))
def test_any_data_yaml(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"train": "x", "val": "x", "names": ["a"], "download": CODE, **fields})
    )
    with pytest.raises(DataError):
        Yolo().read_data(str(tmp_path / "data.yaml"))


@settings(FUZZ, max_examples=100)
@given(
    st.lists(st.sampled_from([*"h:/'\\ .~%@", "http", "HTTPS", "ul", "gs", "127.0.0.1:9", "evil", ".pt", ".yaml"])).map(
        "".join
    )
)
def test_any_name_of_a_base(name: str) -> None:
    for scratch in (False, True):
        with pytest.raises(ModelError):
            check_named(name, scratch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelError):
        patch.setenv("YOLO_OFFLINE", "1")
        checkpoint(name)
