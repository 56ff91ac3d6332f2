"""Memory known before a run: beside torch.profiler's record of the real step; what fits into a budget; no trace is left."""

from __future__ import annotations

import gc
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ctrl_c, make_boxes, make_squares

import visionpeft as vp
from visionpeft import planning
from visionpeft.cli import main
from visionpeft.core import delta as deltas
from visionpeft.core.method import make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.errors import ConfigError, Interrupted
from visionpeft.families.capabilities import Step
from visionpeft.families.yolo.family import Yolo
from visionpeft.memory.forecast import Case, Forecast, Trace, parse_memory, trace
from visionpeft.memory.search import _largest
from visionpeft.settings import find_family

YOLO = {"model": "yolo11n.yaml", "imgsz": 64, "batch": 2, "objects": 2, "device": "cpu"}
VIT = {"model": "timm/test_vit", "batch": 2, "device": "cpu", "method": "full"}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script that prints the README's errors."""
    path = Path(__file__).parents[2] / "benchmarks" / "forecast.py"
    spec = importlib.util.spec_from_file_location("bench_forecast", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(net: str, method: str, lean: str = "off", imgsz: int = 96, objects: int = 5, **more: Any) -> Case:
    family = find_family(net)
    base = family.load_architecture(net)
    fitted = family.with_head(base, base.names, "keep")
    plan = make_plan(make_method(method), family.anatomy(fitted, net), more.pop("freeze", 0))
    step = Step(1, imgsz, more.pop("optimizer", "AdamW"), False, objects, 0.02, **more)
    return Case(family, base, fitted, plan, step, lean, gpu=False)


def compare(bench: ModuleType, of: Case, batch: int = 4, validation: bool = False) -> float:
    """Return the error of a forecast relative to the profiler's record of the real step."""
    torch.manual_seed(0)
    said = trace(of).at(batch)
    expected = said.weights + said.average + (said.validation if validation else said.optimizer + said.step)
    return expected / bench.measured(of, replace(of.step, batch=batch), validation) - 1


@pytest.mark.parametrize(
    ("net", "method", "lean", "more"),
    [
        ("yolo11n.yaml", "full", "off", {}),
        ("yolo11n.yaml", "lora", "memory", {}),
        ("yolo11n.yaml", "head", "auto", {"freeze": 10}),
        ("yolo11n.yaml", "full", "memory", {"optimizer": "MuSGD"}),
        ("yolo26n.yaml", "dora", "memory", {}),
        ("yolo26n-pose.yaml", "bitfit", "off", {"imgsz": 320}),
        ("yolo11n-seg.yaml", "adapter", "memory", {}),
        ("yolo11n-obb.yaml", "side", "off", {}),
        ("yolov8n.yaml", "conv_adapter", "auto", {}),
        ("yolo11n.yaml", "mona", "memory", {}),
        ("timm/test_vit", "mona", "off", {"imgsz": 160}),
        ("yolo11n-cls.yaml", "ia3", "auto", {}),
        ("timm/test_vit", "prefix", "off", {"imgsz": 160}),
        ("timm/test_vit", "lora+bitfit", "memory", {"imgsz": 160, "optimizer": "lion"}),
        ("timm/test_resnet", "full", "memory", {"imgsz": 160, "optimizer": "adagrad"}),
    ],
)
def test_peak_is_the_profilers(bench: ModuleType, net: str, method: str, lean: str, more: dict[str, Any]) -> None:
    assert abs(compare(bench, case(net, method, lean, **more))) <= bench.TOP


@pytest.mark.parametrize("objects", [1, 100, 400])
def test_loss_of_many_objects(bench: ModuleType, objects: int) -> None:
    assert abs(compare(bench, case("yolo11n.yaml", "head", imgsz=160, objects=objects), 2)) <= bench.TOP


def test_validation(bench: ModuleType) -> None:
    assert abs(compare(bench, case("yolo11n.yaml", "head", "memory"), validation=True)) <= bench.TOP


def test_any_batch_from_one_run(bench: ModuleType) -> None:
    of = case("yolo11n.yaml", "lora", "auto")
    made = trace(of)
    for batch in (1, 3, 8):
        said = made.at(batch)
        real = bench.measured(of, replace(of.step, batch=batch), False)
        assert abs((said.weights + said.average + said.optimizer + said.step) / real - 1) <= bench.TOP


@pytest.mark.slow
def test_stages_apart() -> None:
    common = {**YOLO, "imgsz": 160, "method": "full", "freeze": 10}
    with_all, apart, cached = (planning.forecast(**common, **k) for k in ({}, {"frozen_dtype": "bf16"}, {"cache": 2}))
    assert with_all.weights < apart.weights < cached.weights  # a copy of the stages, bf16 and fp32
    assert cached.step < with_all.step  # there are no images, and no stages that read them
    assert cached.weights - with_all.weights == pytest.approx(2 * (apart.weights - with_all.weights), rel=0.1)
    with pytest.raises(ConfigError, match="needs frozen stages"):
        planning.forecast(**{**common, "freeze": 0}, cache=2)


def test_what_else_a_run_takes() -> None:
    plain, waits, shared, muon, wide, wider = (
        planning.forecast(**{**YOLO, "method": "full", **more})
        for more in (
            {},
            {"nbs": 64},
            {"device": "cpu,cpu", "batch": 4},
            {"optimizer": "MuSGD"},
            {"multi_scale": 0.5},
            {"imgsz": 96},
        )
    )
    gradients = 4 * (plain.plan.trained_body + plain.plan.trained_head)
    assert waits.step - plain.step == gradients  # wait for the next steps
    assert shared.step - plain.step == gradients and shared.batch == 4  # are exchanged
    assert muon.optimizer == pytest.approx(2 * gradients, rel=0.02)  # two averages
    assert muon.step > plain.step  # updates of all weights at once
    assert wide.step == wider.step and wide.imgsz == 64
    assert wide.validation == plain.validation < wider.validation


def test_gpu() -> None:
    on, off = (
        planning.forecast(**{**YOLO, "method": "lora", "imgsz": 160, "device": 0, "amp": amp}) for amp in (None, False)
    )
    assert on.gpu and on.allowance > 600e6 and on.total == on.tensors + on.allowance
    assert on.saved < 0.8 * off.saved  # half precision
    assert "assumed" in str(on) and on.to_dict()["total"] == on.total


def test_objects_of_data(tmp_path: Path) -> None:
    base, data = Yolo().load("scenes/driving.pt"), Yolo().read_data(str(make_boxes(tmp_path)))  # two in every image
    seen = {
        name: Yolo().max_objects(base, data, {"epochs": 3, **settings})[0]
        for name, settings in {
            "alone": {"mosaic": 0.0},
            "mosaic": {},
            "mixup": {"mixup": 0.1},
            "both": {"mosaic": 0, "mixup": 0.1},
        }.items()
    }
    assert seen == {"alone": 2, "mosaic": 8, "mixup": 16, "both": 4}
    assert 0.03 < Yolo().max_objects(base, data, {"epochs": 3})[1] < 0.15


def test_no_trace(tmp_path: Path, loops: dict) -> None:
    data, common, *_ = loops["yolo"]
    common = {**common, "epochs": 1}
    before = vp.train(data, **common, project=tmp_path / "before")
    state, enabled = torch.get_rng_state(), gc.isenabled()
    planning.forecast("yolo11n.yaml", data=data, imgsz=64, device=0, method="lora", lean="memory")
    planning.forecast(**VIT)
    assert torch.equal(torch.get_rng_state(), state) and gc.isenabled() == enabled
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cpu") and type(torch.zeros(1)) is torch.Tensor
    after = vp.train(data, **common, project=tmp_path / "after")
    one, two = (deltas.read(run.delta).tensors for run in (before, after))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    of = case("yolo11n.yaml", "lora", "memory")
    values = {k: v.clone() for k, v in of.fitted.state_dict().items()}
    trace(of)
    assert {k: type(v) for k, v in of.fitted.named_parameters()} == {
        k: torch.nn.Parameter for k in dict(of.fitted.named_parameters())
    }
    assert all(torch.equal(v, values[k]) for k, v in of.fitted.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    ("given", "amount"),
    [("6GB", 6e9), ("6 gib", 6 * 2**30), (6, 6e9), ("8000MB", 8e9), ("512M", 512e6), (0.5, 5e8), ("2G", 2e9)],
)
def test_parse_memory(given: Any, amount: float) -> None:
    assert parse_memory(given) == amount


@pytest.mark.parametrize("given", ["", "GB", "six", "-6GB", 0, "nan", "inf", "6TB", None, True, "6gg"])
def test_parse_memory_refuses(given: Any) -> None:
    with pytest.raises(ConfigError, match="is not understood; give e.g. 6GB"):
        parse_memory(given)


def test_fit() -> None:
    found = planning.suggest("1GB", model="yolo11n.yaml", imgsz=320, objects=5)
    first, *others = found.choices
    assert first is found.best and first.forecast.total <= found.budget == 1e9
    assert "nearest to full fine-tuning" in first.reason and all(c.reason for c in others)

    def wish(c: planning.budget.Choice) -> tuple[float, ...]:
        return min(c.forecast.batch, 4), c.worth, c.forecast.batch, -c.cost, -c.forecast.total

    wishes = [wish(c) for c in found.choices]
    assert wishes == sorted(wishes, reverse=True) and len(set(wishes)) == len(wishes) > 2
    for one in wishes:  # none is worse than another in everything
        assert not any(o != one and all(a >= b for a, b in zip(o, one, strict=True)) for o in wishes)
    again = planning.forecast("yolo11n.yaml", objects=5, **first.settings)
    assert again.total == first.forecast.total  # what is printed takes what is said
    assert json.loads(json.dumps(found.to_dict()))["choices"][0]["method"] == first.settings["method"]


@pytest.mark.parametrize(
    ("devices", "budget", "fixed", "batch"),
    [(1, 260, False, 16), (1, 259, False, 14), (1, 129, False, 2), (1, 119, False, 1), (1, 109, False, None),
     (1, 259, True, None), (2, 175, False, 12), (2, 115, False, 2)],
)  # fmt: skip
def test_the_largest_batch_that_fits(devices: int, budget: int, fixed: bool, batch: int | None) -> None:
    plan = Plan("none", "net", "full", {}, 0, "frozen", (), (), {}, (), (), ())
    one = Forecast(plan, "off", 1, 64, False, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0)
    made = Trace(one, [(100, 10)], (0, 0), [(0, 0)], 0.0, 0.0, 0, devices)
    found = _largest(made, budget, 16, fixed)
    assert (found and found.batch) == batch


@pytest.mark.slow
def test_fit_keeps_what_is_given() -> None:
    found = planning.suggest("2GB", model="yolo11n.yaml", imgsz=64, batch=6, method="lora", freeze=[0, 1], lean="auto", r=3)
    alone = planning.suggest("2GB", model="yolo11n.yaml", imgsz=64, batch=6, lean="auto", r=3)
    assert {c.settings["method"] for c in alone.choices} == {"lora"}  # whose field it is
    assert {(c.settings["method"], c.settings["batch"], c.settings["imgsz"]) for c in found.choices} == {("lora", 6, 64)}
    assert found.best.forecast.plan.settings["r"] == 3
    assert "--freeze 0,1 --lean auto --batch 6" in str(found)


def test_nothing_fits() -> None:
    vit = {"model": "timm/vit_tiny_patch16_224", "model_args": {"img_size": 64, "depth": 1}}  # it reads no other size
    with pytest.raises(ConfigError, match=r"nothing fits into 10.0 MB: the least that .* takes is ([\d.]+) MB") as said:
        planning.suggest("10MB", **vit)
    assert "method='head'" in str(said.value) and "batch=1 and imgsz=64" in str(said.value)
    least = planning.forecast(**vit, method="head", lean="memory", batch=1)
    assert f"takes is {least.total / 1e6:.1f} MB" in str(said.value)


@pytest.mark.slow
def test_train_in_a_budget(tmp_path: Path, loops: dict, capsys: pytest.CaptureFixture) -> None:
    data, common, *where = loops["yolo"]
    given = {**common, "batch": 2, "quiet": False, "memory": "150MB", "lean": "memory"}
    with ctrl_c(*where, after=1), pytest.raises(Interrupted):
        vp.train(data, **given, project=tmp_path, name="one")
    printed = capsys.readouterr().out
    with pytest.raises(ConfigError, match="memory was given; leave it out"):
        vp.train(resume=tmp_path / "one", memory="1GB")
    resumed = vp.train(resume=tmp_path / "one", quiet=True)
    assert len(resumed.history) == 2
    said = json.loads((tmp_path / "one" / "run.json").read_text())["arguments"]
    assert (
        said["lean"] == "memory" and said["batch"] == 2 and said["imgsz"] == 64 and said["method"] == "full"
    )  # but the last, all were given
    line = next(x for x in printed.splitlines() if x.startswith("The first:"))
    assert f"--method {said['method']} --freeze {said['freeze']} --lean {said['lean']} --batch 2 --imgsz 64" in line
    with pytest.raises(ConfigError, match="does not go with cache or frozen_dtype"):
        vp.train(data, **{**given, "cache": 2}, project=tmp_path)


def test_train_a_classifier_in_a_budget(tmp_path: Path, loops: dict) -> None:
    data, common, *_ = loops["timm"]
    run = vp.train(data, **{**common, "epochs": 1, "memory": "1GB", "method": "bitfit"}, project=tmp_path)
    assert run.plan.method == "bitfit"


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({**YOLO, "batch": -1}, "batch=-1 is found on the GPU"),
        ({**YOLO, "batch": True}, "batch=True is not usable"),
        ({**YOLO, "objects": 0}, "objects=0 is not usable"),
        ({**YOLO, "device": "foo"}, "device='foo' is not known"),
        ({**YOLO, "device": "0,1", "batch": 3}, "batch=3 cannot be shared by 2 devices"),
        ({**YOLO, "optimizer": "auto"}, "optimizer='auto' ignores lr0"),
        ({**YOLO, "optimizer": 3}, "optimizer=3 is not usable"),
        ({**YOLO, "cache": -1}, "cache=-1 is not usable"),
        ({**YOLO, "cache": "foo"}, "cache='foo' is not known"),
        ({**YOLO, "lean": "foo"}, "lean='foo' is not known"),
        ({**YOLO, "lr0": -1}, "lr0=-1 is not usable"),
        ({**YOLO, "model_args": 3}, "model_args=3 is not usable"),
        ({**VIT, "imgsz": 100}, "cannot read images of imgsz=100"),
        ({**VIT, "optimizer": "adahessian"}, "needs second derivatives"),
        ({**VIT, "optimizer": "bnbadam"}, "optimizer='bnbadam' cannot be used here"),
    ],
)
def test_bad_input(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        planning.forecast(**given)


def test_what_memory_does_not_depend_on() -> None:
    extra = {"lr0": 0.1, "workers": 0, "seed": 3, "lr_scale": 2.0, "optimizer": "NAdam"}
    assert isinstance(planning.forecast(**YOLO, method="head", **extra), Forecast)


def test_command_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return int(end.value.code or 0), *capsys.readouterr()

    options = ("--model", "timm/test_resnet", "--imgsz", "64", "--batch", "2")
    code, out, _ = call("forecast", *options, "--device", "cpu", "--method", "head", "--json")
    assert code == 0 and json.loads(out)["memory"]["batch"] == 2
    code, out, _ = call("suggest", *options, "--memory", "1GB", "--data", str(make_squares(tmp_path)))
    assert code == 0 and "The first: visionpeft train" in out
    for words in (
        ("--memory", "1TB"),
        ("--memory", "1MB"),
        ("--memory", "1GB", "--model-args", "3"),
        ("--memory", "1GB", "--freeze", "99"),
    ):
        code, _, err = call("suggest", *options, *words)
        assert code == 2 and err.startswith("visionpeft: ") and err.count("\n") == 1


def test_old_names(capsys: pytest.CaptureFixture) -> None:
    options = ("--model", "timm/test_resnet", "--imgsz", "64", "--batch", "2", "--method", "head", "--json")
    said = {}
    for words in (("fit", "--gpu", "1GB"), ("suggest", "--memory", "1GB"), ("plan", "--memory"), ("forecast",)):
        with pytest.raises(SystemExit) as end:
            main([*words, *options])
        out, err = capsys.readouterr()
        assert not end.value.code and ("is now called" in err) == (words[0] in ("fit", "plan"))
        said[words[0]] = json.loads(out)
    assert said["fit"] == said["suggest"] and said["plan"] == said["forecast"]
    with pytest.warns(FutureWarning, match="fit is now called suggest"):
        vp.fit("1GB", model="timm/test_resnet", imgsz=64, batch=2, method="head")
    with pytest.warns(FutureWarning, match="prefix_dtype= is now called frozen_dtype="):
        vp.forecast("timm/test_resnet", imgsz=64, batch=2, method="full", freeze=2, prefix_dtype="bf16")
