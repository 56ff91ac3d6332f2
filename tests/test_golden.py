"""Files that an earlier visionpeft wrote (tests/golden) are read as they were then: the same tensors, the same outputs."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_nets import FAMILY, FOLDER, SIZES, make_base, make_data, outputs
from safetensors.torch import load_file
from torch import Tensor

import visionpeft
from visionpeft import benchmark
from visionpeft.core import attach
from visionpeft.core import delta as deltas
from visionpeft.core.plan import Plan
from visionpeft.registry import FAMILIES, METHODS
from visionpeft.report import model
from visionpeft.training import feature_cache_file as view_file

RUN = {"method": "lora", "freeze": 3, "epochs": 2, "optimizer": "sgd", "lr0": 0.01}
DELTAS = sorted(f.stem for f in (FOLDER / "deltas").glob("*.safetensors"))
Bases = dict[str, dict[str, Any]]


def place() -> dict[str, str]:
    """Return all that the last bits of a training run on the CPU depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "stepping"))}) or [platform.processor()]
    libraries = {n: version(n) for n in ("torch", "torchvision", "ultralytics", "timm", "numpy", "pillow", "opencv-python")}
    return {"cpu": hashlib.sha256("".join(cpu).encode()).hexdigest()[:16], "system": platform.system(), **libraries}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Arguments that name the golden bases, by net."""
    return {net: make_base(net, tmp_path_factory.mktemp(net)) for net in SIZES}


def test_there_is_a_delta_for_every_method_and_family() -> None:
    plans = [deltas.read(FOLDER / "deltas" / f"{name}.safetensors").plan for name in DELTAS]
    assert {(plan.family, plan.method) for plan in plans} == {(f, m) for f in FAMILIES for m in METHODS} - {
        ("yolo", "prompt")
    }


@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_gives_the_same_model(name: str, bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[FAMILY[name.partition("-")[0]]]
    monkeypatch.setattr(family, "load", _loaded(family))
    net, file = name.partition("-")[0], FOLDER / "deltas" / f"{name}.safetensors"
    adapted = visionpeft.load(file, **bases[net])
    own, stored = adapted.model.state_dict(), load_file(file)
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in stored.items())
    rest = {k: v for k, v in own.items() if k not in stored}
    assert all(torch.equal(value, adapted.base.state[key]) for key, value in rest.items())
    expected = load_file(FOLDER / "outputs.safetensors")[name]
    assert _near(outputs(net, adapted.model), expected)
    assert not adapted.mergeable or _near(outputs(net, attach.merge(adapted.model)), expected)


@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    """Byte for byte, so that its plan, too, came back whole."""
    file = FOLDER / "deltas" / f"{name}.safetensors"
    read = deltas.read(file)
    again = deltas.Delta(Plan.from_dict(read.plan.to_dict()), read.tensors, read.header)
    assert again.plan == read.plan and json.loads(json.dumps(again.plan.to_dict())) == read.header["plan"]
    assert deltas.write(tmp_path / "again.safetensors", again).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("net", ["yolo", "resnet"])
def test_a_run_trains_and_resumes_as_it_did(net: str, bases: Bases, tmp_path: Path) -> None:
    """Two epochs in one go, and the second of them from the checkpoint that an earlier visionpeft left after the first."""
    golden = FOLDER / "runs" / net
    data = make_data(net, tmp_path / "data")
    use = {"batch": 4, "imgsz": SIZES[net], "device": "cpu", "workers": 0, "quiet": True, "project": tmp_path}
    whole = visionpeft.train(data, **bases[net], **RUN, **use, name="whole")
    shutil.copytree(golden, tmp_path / "run", ignore=lambda *_: ["whole.json", "whole.safetensors"])
    said = json.loads((golden / "train.json").read_text())
    said |= {"data": str(data), **bases[net]}
    (tmp_path / "run" / "train.json").write_text(json.dumps(said))
    resumed = visionpeft.train(resume=tmp_path / "run", quiet=True)
    assert [e["epoch"] for e in resumed.history] == [1, 2]
    first, expected = deltas.read(golden / "delta.safetensors").tensors, deltas.read(golden / "whole.safetensors").tensors
    facts = json.loads((golden / "whole.json").read_text())
    for run in (whole, resumed):
        tensors = deltas.read(run.delta).tensors
        if facts["place"] == place():
            assert deltas.fingerprint(tensors) == facts["fingerprint"]
        else:  # another processor or library: near what it was, measured by what the second epoch did
            assert tensors.keys() == expected.keys()
            assert _distance(tensors, expected) <= max(0.5 * _distance(first, expected), 1e-4), place()


@cache
def _loaded(family: type) -> Any:
    """Return a family's `load` that loads every base once."""
    load, made = family.load, {}  # type: ignore[attr-defined]

    def once(self: Any, source: str, **options: Any) -> Any:
        if source not in made:
            made[source] = load(self, source, **options)
        return made[source]

    return once


def _near(given: Tensor, expected: Tensor) -> bool:
    return torch.allclose(given, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[k].double() - b[k].double()).square().sum()) for k in b) ** 0.5


def test_stored_views_are_read() -> None:
    header = view_file._header(FOLDER / "resnet.views")
    assert header is not None
    prefix: Any = SimpleNamespace(length=header["length"], stored=torch.bfloat16)
    made = view_file.read(FOLDER / "resnet.views", header["rows"], prefix)
    assert made is not None and made.places.shape == (1, 8) and sorted(made.places[0].tolist()) == list(range(8))
    assert sorted(made.columns["1"][row] for row in range(8)) == [0] * 4 + [1] * 4
    assert deltas.fingerprint({"views": made.vectors}).startswith("eec8e12c2749")


@pytest.mark.parametrize("net", ["yolo", "vit"])
def test_an_adapter_for_peft_is_imported(net: str, bases: Bases, tmp_path: Path) -> None:
    folder = FOLDER / "peft" / net
    made = visionpeft.import_peft(folder, tmp_path / "made.safetensors", **bases[net])
    expected = load_file(FOLDER / "outputs.safetensors")[f"{net}-lora"]
    given = outputs(net, visionpeft.load(made).model)
    assert _near(given, expected)


def test_results_of_a_benchmark_are_read() -> None:
    rows = {row.method: row for row in benchmark.compare(benchmark.read(FOLDER / "results"), "full")}
    cells = {json.loads(f.read_text())["names"]["method"]: f for f in (FOLDER / "results" / "cells").glob("*.json")}
    assert rows.keys() == cells.keys() == {"full", "lora"}
    for method, file in cells.items():
        run = json.loads(file.read_text())["run"]
        assert rows[method].score_mean == run["after"]["top1"] and rows[method].total == 16_434
    assert model.read_report([FOLDER / "results"]).name == "golden"
