"""Whatever stands in a file from elsewhere, it is read, or refused with one of our own errors: nothing else comes out."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_nets import FOLDER, make_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

import visionpeft
from visionpeft import hfpeft
from visionpeft.benchmark.grid import hash_of
from visionpeft.core import delta as deltas
from visionpeft.core.base_model import Base
from visionpeft.errors import ConfigError, DeltaError, MismatchError, ModelError, TrainingError, VisionpeftError
from visionpeft.registry import FAMILIES
from visionpeft.report.model import read_report
from visionpeft.training import checkpoint, run_folder

ODD = [None, True, -4, 0, 8.5, 10**9, 10**30, 1e30, float("nan"), float("inf"), "8", "", "\ud800", [], {}, [[]], {"a": [1]}]
EDITED = [f for f in sorted((FOLDER / "deltas").glob("vit-*")) if deltas.inspect(f)["plan"]["edits"]]
few = settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every node below one."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(content: Any, draw: Callable[[Any], Any]) -> Any:
    """Return a copy with one node replaced by something odd, dropped, or with something added beside it."""
    made = copy.deepcopy(content)
    *path, last = draw(st.sampled_from(list(places(content))))
    owner = made
    for key in path:
        owner = owner[key]
    how, odd = draw(st.sampled_from(["replace", "replace", "drop", "add"])), draw(st.sampled_from(ODD))
    if how == "drop" and not isinstance(owner, tuple):
        del owner[last]
    elif how == "add" and isinstance(owner, dict):
        owner["odd"] = odd
    elif not isinstance(owner, tuple):
        owner[last] = odd
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    """The base of the golden deltas, which loading gives without looking at its arguments."""
    named = make_base("vit", tmp_path_factory.mktemp("vit"))
    loaded = FAMILIES["timm"]().load(named["model"], **named["model_args"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES["timm"], "load", lambda self, source, **options: loaded)
        yield loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(file: Path, header: Any, tensors: dict[str, Tensor], **metadata: str) -> Path:
    """Write a delta whose checksum is right, whatever it says."""
    if isinstance(header, dict):
        header = {**header, "checksum": deltas._checksum(header, tensors)}
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(save(tensors, {deltas.KEY: text, **metadata}))
    return file


def lora() -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = FOLDER / "deltas" / "vit-lora.safetensors"
    return deltas.inspect(file), load_file(file)


@given(st.data())
@few
def test_a_header(base: Base, folder: Path, data: st.DataObject) -> None:
    header, tensors = lora()
    file = written(folder / "a.safetensors", changed(header, data.draw), tensors)
    for read in (
        deltas.inspect,
        visionpeft.inspect,
        lambda f: visionpeft.verify(f, "timm/x"),
        lambda f: visionpeft.load(f, model="timm/x"),
    ):
        try:
            read(file)
        except VisionpeftError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


@given(st.data())
@few
def test_a_part(base: Base, folder: Path, data: st.DataObject) -> None:
    """Settings alone, of every method that adds parts."""
    name = data.draw(
        st.sampled_from([f for f in sorted((FOLDER / "deltas").glob("vit-*")) if deltas.inspect(f)["plan"]["edits"]])
    )
    header, tensors = deltas.inspect(name), load_file(name)
    edit = header["plan"]["edits"][0]
    edit["settings"] = changed(edit["settings"], data.draw)
    file = written(folder / "p.safetensors", header, tensors)
    try:
        visionpeft.verify(file, "timm/x")
    except VisionpeftError as error:
        assert isinstance(error, DeltaError)


@given(st.data())
@few
def test_bytes(folder: Path, data: st.DataObject) -> None:
    whole = (FOLDER / "deltas" / "vit-norm.safetensors").read_bytes()
    at, count = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 3))
    (folder / "b.safetensors").write_bytes(whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + count :])
    try:
        deltas.read(folder / "b.safetensors")
    except DeltaError:
        return
    assert (folder / "b.safetensors").read_bytes() == whole


@given(st.data())
@few
def test_a_run(folder: Path, data: st.DataObject) -> None:
    run = folder / "run"
    shutil.copytree(FOLDER / "runs" / "resnet", run, dirs_exist_ok=True)
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    if data.draw(st.booleans()):
        torch.save(changed(content, data.draw), run / "checkpoint.pt")
    else:
        (run / "train.json").write_text(json.dumps(changed(json.loads((run / "train.json").read_text()), data.draw)))
    try:
        with run_folder.resumed(run, folder, None):
            pass
    except VisionpeftError as error:
        assert isinstance(error, TrainingError)


@given(st.data())
@few
def test_an_adapter(base: Base, folder: Path, data: st.DataObject) -> None:
    adapter = folder / "adapter"
    shutil.copytree(FOLDER / "peft" / "vit", adapter, dirs_exist_ok=True)
    config = changed(json.loads((adapter / "adapter_config.json").read_text()), data.draw)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    try:
        hfpeft.adopt(hfpeft.read(adapter), FAMILIES["timm"](), base, {})
    except VisionpeftError as error:
        assert isinstance(error, DeltaError)


@given(st.data())
@few
def test_results(folder: Path, data: st.DataObject) -> None:
    cells = folder / "results" / "cells"
    shutil.rmtree(cells, ignore_errors=True)
    shutil.copytree(FOLDER / "results", cells.parent, dirs_exist_ok=True)
    file = sorted(cells.glob("*.json"))[0]
    content = json.loads(file.read_text())
    content = changed({k: v for k, v in content.items() if k != "pictures"}, data.draw)
    file.unlink()
    (cells / f"{hash_of(content.get('cell', {}))}.json").write_text(json.dumps(content))
    try:
        read_report([cells.parent])
    except VisionpeftError:
        pass


# ------------------------------------------------------------------------------------------------ what chance does not find
def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (nested(60_000), "nested more than 100 deep"),
        ('{"format": 1e999}', "its format is inf, but must be a whole number"),
        ('{"format": 1, "format": 1}', "names 'format' twice"),
        ('{"format": 1, "a": ' + nested(500) + "}", "nested more than 100 deep"),
        ("\x00", "is no JSON"),
        ("[]", "must be a mapping"),
    ],
)
def test_a_header_that_is_none(text: str, says: str, folder: Path) -> None:
    with pytest.raises(DeltaError, match=says):
        deltas.inspect(written(folder / "h.safetensors", text, {}))


def test_what_no_checksum_covers_is_refused(folder: Path) -> None:
    header, tensors = lora()
    with pytest.raises(DeltaError, match="has metadata beside visionpeft's .'author'"):
        deltas.read(written(folder / "m.safetensors", header, tensors, author="somebody"))
    raw = (FOLDER / "deltas" / "vit-lora.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    twice = b'{"__metadata__":{"visionpeft":"{}","visionpeft"' + raw[8 : 8 + length].partition(b'"visionpeft"')[2]
    (folder / "m.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + raw[8 + length :])
    with pytest.raises(DeltaError, match="twice|damaged"):
        deltas.read(folder / "m.safetensors")


@pytest.mark.parametrize("part", ["header", "plan", "edit", "settings"])
def test_a_field_of_a_newer_one(part: str, base: Base, folder: Path) -> None:
    header, tensors = lora()
    edit = header["plan"]["edits"][0]
    {"header": header, "plan": header["plan"], "edit": edit, "settings": edit["settings"]}[part]["renamed"] = 1
    with pytest.raises(DeltaError, match="'renamed', which was written by a newer visionpeft; upgrade"):
        visionpeft.verify(written(folder / "n.safetensors", header, tensors), "timm/x")


def test_the_plan_is_held_against_the_tensors(base: Base, folder: Path) -> None:
    header, tensors = lora()
    own = {"blocks.0.mlp.fc1.weight": torch.randn(64, 16), "blocks.1.mlp.fc1.weight": torch.randn(64, 16)}

    def refused(says: str, more: dict[str, Tensor] | None = None, kind: type = MismatchError, **plan: Any) -> None:
        made = {**tensors, **(more or {})}
        sizes = {**header["bytes"], "statistics": 0, "head": 0}
        sizes["body"] = sum(t.numel() * t.element_size() for t in made.values())
        changed = {**header, "bytes": sizes, "plan": {**header["plan"], **plan}}
        file = written(folder / "t.safetensors", changed, made)
        for read in (visionpeft.verify, visionpeft.load):
            with pytest.raises(kind, match=says):
                read(file, model="timm/x")

    refused("2 outside its plan .first: blocks.*.mlp.fc1.weight", own)
    refused("2 outside its plan", own, heads=["blocks"])
    refused("by its table 3,330 parameters train, by its plan 5,378", own, train=[*header["plan"]["train"], *own])
    refused("plan's still names blocks.9, which is not there", still=["blocks.9"])
    refused("plan's train names blocks.9, which is not there", train=["blocks.9"])
    key, value = next((k, v) for k, v in tensors.items() if "lora_B" in k)
    refused("values in .* that are no finite numbers", {key: value * float("nan")}, DeltaError)
    for dtype in (torch.int8, torch.bool, torch.float64, torch.complex64):
        refused("a delta's tensors are float16", {key: value.to(dtype)}, DeltaError)
    refused("is of torch.int64, the model's of", {key: value.long()}, DeltaError)


def test_a_tensor_with_one_value_that_is_none_keeps_the_others() -> None:
    half = deltas._half(torch.tensor([float("nan"), 1e6]))
    assert half.dtype == torch.float32 and deltas._half(torch.tensor([float("nan"), 1.0])).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "value", "eps", "fits"),
    [
        ("running_var", 6e4, 1e-3, True),
        ("running_var", 1e6, 1e-3, False),  # would be infinite
        ("weight", 7e4, 1e-3, False),
        ("weight", 1e-9, 1e-3, True),  # 0, as in every checkpoint of half precision
        ("running_var", 1e-9, 1e-3, True),  # 0, which beside eps is nothing
        ("running_var", 1e-9, 1e-12, False),
    ],
)
def test_what_half_precision_would_lose_is_not_written_in_it(name: str, value: float, eps: float, fits: bool) -> None:
    norm = nn.BatchNorm2d(2, eps=eps)
    norm.state_dict()[name][0] = value
    assert deltas.fits_half(nn.Sequential(norm)) == fits


def test_a_checkpoint_of_code_is_refused_without_torchs_advice(tmp_path: Path) -> None:
    torch.save({"done": print}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="neither a tensor nor a plain value") as error:
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert "weights_only" not in str(error.value)


def test_odd_base_checkpoints(tmp_path: Path) -> None:
    family = FAMILIES["yolo"]()
    named = make_base("yolo", tmp_path)["model"]
    names = family.load(named).names

    def load(change: Callable[[Any, dict[str, Any]], object]) -> Base:
        content = torch.load(named, weights_only=False)
        change(content["model"], content)
        torch.save(content, tmp_path / "odd.pt")
        return family.load(str(tmp_path / "odd.pt"))

    assert load(lambda model, _: setattr(model, "names", list(names.values()))).names == names
    odd: dict[str, Callable[[Any, dict[str, Any]], object]] = {
        "train_args": lambda _, content: content.update(train_args="x"),
        "train_args is": lambda _, content: content.update(train_args=[1]),
        "names is None": lambda model, _: setattr(model, "names", None),
        "names are not those": lambda model, _: setattr(model, "names", {1: "a", 2: "b", 3: "c"}),
        "yaml is None": lambda model, _: setattr(model, "yaml", None),
        "yaml is ": lambda model, _: setattr(model, "yaml", []),
        "no layers as backbone": lambda model, _: model.yaml.update(backbone=[]),
        "stride is": lambda model, _: setattr(model, "stride", "x"),
        "its stride is": lambda model, _: setattr(model, "stride", torch.tensor([float("nan")])),
        "that are no numbers .NaN.": lambda model, _: model.model[0].conv.weight.data.fill_(float("nan")),
    }
    for says, change in odd.items():
        with pytest.raises(ModelError, match=says) as error:
            load(change)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "says"),
    [(("after", "top1"), "run.after.top1 is '0.5'"), (("parameters", "body"), "run.parameters.body is '0.5'")],
)
def test_numbers_of_a_result_are_numbers(place: tuple[str, str], says: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "results", tmp_path / "results")
    file = next((tmp_path / "results" / "cells").glob("*.json"))
    content = json.loads(file.read_text())
    content["run"][place[0]][place[1]] = "0.5"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"run.{'.'.join(place)} is '0.5', but must be a number"):
        read_report([tmp_path / "results"])
