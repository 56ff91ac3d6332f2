"""What is counted as saved for backward and as living, down to the byte."""

from __future__ import annotations

import gc
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETS, ctrl_c, flat
from torch import Tensor, nn

import visionpeft
from visionpeft import lean, measure
from visionpeft.core import attach
from visionpeft.core import delta as deltas
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.errors import Interrupted
from visionpeft.families.introspect import stage_modules
from visionpeft.measure import WATCHED, Meter, PeakBytes, SavedBytes, SavedSplit, storage_bytes
from visionpeft.registry import FAMILIES

KB = 1024  # bytes of a tensor of 256 single-precision numbers


class Square(torch.autograd.Function):
    """x², whose input is kept in one of two places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, declared: bool) -> Tensor:
        if declared:
            ctx.save_for_backward(x)
        else:
            ctx.kept = x
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0] if ctx.saved_tensors else ctx.kept
        return 2 * x * gradient, None


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_function_keeps_is_seen(declared: bool) -> None:
    """Saved properly, both see it; kept on the context, the peak still does."""
    weight = nn.Parameter(torch.ones(256))
    with PeakBytes() as peak, SavedBytes(nn.ParameterList([weight])) as saved:
        y = Square.apply(weight * 1.0, declared)
        live = peak.live
    assert saved.bytes == (KB if declared else 0)
    assert live == 2 * KB, "the kept input and the output"
    y.sum().backward()
    assert torch.equal(weight.grad, torch.full((256,), 2.0))


def test_what_is_kept_ends_with_the_loss() -> None:
    """Also where backward is never called, as when a step runs out of memory."""
    x = torch.randn(256, requires_grad=True)
    with PeakBytes() as peak, SavedBytes(nn.ParameterList([x])) as saved:
        loss = x.exp().sigmoid().sum()  # both keep their results
        assert saved.bytes == 2 * KB <= peak.live
        del loss
        gc.collect()
        assert peak.live == 0


def test_saved_bytes_leave_out_parameters_buffers_and_what_is_given() -> None:
    layer, x = nn.BatchNorm1d(16).eval(), torch.randn(16, 16)
    with SavedBytes(layer) as saved:
        layer(x).sum()
    with SavedBytes(layer, x) as less:
        layer(x).sum()
    assert saved.bytes == KB and less.bytes == 0


def test_each_storage_lives_once_from_its_making_to_its_end() -> None:
    old = torch.zeros(256)
    with PeakBytes() as peak:
        old.add_(1), old.view(16, 16)  # older than the mode
        assert peak.live == 0
        x = torch.zeros(256)
        views = [x.view(16, 16), *x.chunk(4), x.detach()]
        x.mul_(2)
        assert peak.live == KB
        y = torch.cat((x, x))
        del x
        assert peak.live == 3 * KB, "a view keeps the storage"
        del views
        assert peak.live == 2 * KB
        y.resize_(1024)
        assert peak.live == 4 * KB
        del y
    assert peak.live == 0 and peak.bytes == 4 * KB


def test_peak_of_a_step() -> None:
    """Three layers without parameters: what is saved, then gradients of the same size, one at a time."""
    x = torch.randn(256, requires_grad=True)
    with PeakBytes() as peak:
        y = x.sigmoid().sigmoid().sigmoid()
        assert peak.live == 3 * KB
        y.backward(torch.ones(256))
    assert 4 * KB <= peak.bytes <= 6 * KB
    del y
    assert peak.live == KB, "the gradient of x"


def test_gradients_made_by_backward_count() -> None:
    layer = nn.Linear(64, 64, bias=False)
    with PeakBytes() as peak:
        layer(torch.ones(1, 64)).sum().backward()
    assert peak.live == layer.weight.grad.nbytes == 16 * KB <= peak.bytes


def test_what_is_compiled_runs_as_it_is_while_it_is_watched() -> None:
    double = torch.compile(lambda x: x * 2, fullgraph=True, backend="eager")  # as in timm's kron
    x = torch.ones(256)
    with PeakBytes() as peak:
        y = double(x)
        assert peak.live == y.nbytes
    assert torch.equal(double(x), y)


# ----------------------------------------------------------------------------------------------- by stage and by operation
class Small(nn.Module):
    """Two stages and a head; every map has 256 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).sigmoid()))


def test_every_byte_has_a_stage_and_a_cause() -> None:
    model, x = Small(), torch.randn(16, 16)
    with SavedSplit(model, {"stem": "stem", "body": "body", "head": "head"}) as saved:
        loss = Square.apply(model(x), True).exp().sum()
    # the batch; what sigmoid returned, which the next linear layer keeps too; what SiLU read and what it returned
    assert saved.by_stage == {"stem": 2 * KB, "body": KB, "head": KB, "loss": 2 * KB}
    assert saved.by_cause == {"linear": 2 * KB, "sigmoid": KB, "silu": KB, "other": KB, "exp": KB}
    assert saved.bytes == 6 * KB
    loss.backward()


CASES = [
    ("yolo11n", "full", 10), ("yolo11n", "adapter", 0), ("yolo26n", "prefix", 0), ("yolov8n", "side", 0),
    ("yolov8n", "lora", 5), ("resnet18", "lora+norm", 0), ("resnet18", "full", 2), ("vit_tiny", "prompt", 0),
    ("vit_tiny", "dora", 1),
    ("convnext_atto", "bitfit", 0), ("swin", "ia3", 0), ("mobilenetv2", "head", 0),
]  # fmt: skip


@pytest.mark.parametrize("level", ["off", "auto", "memory"])
@pytest.mark.parametrize(("name", "method", "freeze"), CASES)
def test_splits_sum_up_and_change_nothing(name: str, method: str, freeze: int, level: str, net, images) -> None:
    family, model = FAMILIES[NETS[name][0]](), net(name)
    anatomy = family.anatomy(model, name)
    plan = make_plan(make_method(method, {}), anatomy, freeze)
    attach.train_mode(attach.attach(model, plan), plan)
    if level != "off":
        lean.apply(model, level)
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    def step(watch: Any) -> dict[str, Tensor]:
        model.load_state_dict(buffers, strict=False)
        model.zero_grad()
        with watch, torch.random.fork_rng(devices=[]):
            loss = sum(t.square().mean() for t in flat(model(images)))
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, split, peak = SavedBytes(model), SavedSplit(model, stage_modules(anatomy)), PeakBytes()
    expected, found = step(plain), step(split)
    with peak:
        again = step(SavedSplit(model, stage_modules(anatomy)))
    assert all(torch.equal(found[n], g) and torch.equal(again[n], g) for n, g in expected.items())
    assert sum(split.by_stage.values()) == sum(split.by_cause.values()) == split.bytes == plain.bytes > 0
    labels = ["stem" if s.kind == "stem" else s.name for s in anatomy.stages]
    assert list(split.by_stage) == [*labels, "head", "loss"]
    assert not any(split.by_stage[label] for label in labels[:freeze]), "frozen stages keep nothing"
    assert "other" not in split.by_cause and all(c[0].islower() for c in split.by_cause), "functions of torch, not lean's"


# ---------------------------------------------------------------------------------------------------------------- the meter
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the clock; returns what moves it on by some seconds."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_seconds_by_part(clock) -> None:
    model = Small()
    meter = Meter(model, torch.device("cpu"))

    def step(data: float, forward: float, backward: float, optimizer: float) -> None:
        clock(data)
        meter.start("forward")
        loss = model(torch.ones(1, 16)).sum()
        clock(forward)
        meter.start("backward")
        loss.backward()
        clock(backward)
        if optimizer:
            meter.start("optimizer")
            clock(optimizer)
        meter.start("data")

    with pytest.warns(FutureWarning, match="Meter.begin is now called start"):
        meter.begin("data")
    step(100, 10, 20, 30)
    assert meter.report()["first_step_seconds"] == 60 and meter.report()["step_seconds"] is None
    step(1, 2, 4, 8)
    meter.start("forward")
    clock(1000)  # a step that runs out of memory
    meter.close()
    clock(1000)  # and a validation
    meter.start("data")
    step(3, 4, 6, 0)  # one whose gradients are kept for the next
    step(2, 3, 5, 9)
    report = meter.report()
    assert report["first_step_seconds"] == 60 and report["step_seconds"] == 8
    assert report["seconds_by_part"] == {"data": 2, "forward": 3, "backward": 5, "optimizer": 8.5}


def test_a_step_that_fails_is_watched_again() -> None:
    model = Small()
    meter = Meter(model, torch.device("cpu"), stages={"stem": "stem", "head": "head"})
    meter.start("data")
    meter.start("forward")
    loss = model(torch.ones(99, 16)).sum()
    meter.start("backward")
    meter.start("forward")  # a smaller batch
    assert meter.report()["saved_bytes"] is None
    loss = model(torch.ones(16, 16)).sum()
    meter.start("backward")
    loss.backward()
    meter.start("data")
    report = meter.report()
    assert report["saved_bytes"] == 4 * KB == sum(report["saved_by_stage"].values())
    assert report["live_bytes"] > 4 * KB and report["state_bytes"]["gradients"] == storage_bytes(list(model.parameters()))
    meter.start("forward")
    model(torch.ones(99, 16))
    meter.close()
    assert meter.report()["saved_bytes"] == 4 * KB, "only the first is watched"


def test_what_an_older_checkpoint_reported_is_restored() -> None:
    meter = Meter(Small(), torch.device("cpu"))
    old = {"saved_bytes": 7, "peak_bytes": 7, "peak_measure": "bytes saved for backward", "step_seconds": 0.5}
    meter.restore(old)
    meter.start("data")
    meter.start("forward")
    meter.start("data")
    report = meter.report()
    assert {k: report[k] for k in old} == old
    assert report["saved_by_stage"] is report["live_bytes"] is report["cuda"] is None
    assert report["state_bytes"]["weights"] == 3 * (KB + 64)


def test_a_compiled_model_is_only_summed_up() -> None:
    model = Small()
    meter = Meter(model, torch.device("cpu"), stages={"stem": "stem"}, compiled=True)
    meter.start("forward")
    model(torch.ones(16, 16)).sum().backward()
    meter.start("data")
    report = meter.report()
    assert report["saved_bytes"] == 4 * KB and report["saved_by_stage"] is report["live_bytes"] is None


def test_storages_are_held_once() -> None:
    x, y = torch.zeros(256), torch.zeros(256)
    assert storage_bytes([x, x.view(16, 16), {"more": [x[:4]]}], y) == 2 * KB
    assert storage_bytes([x, y], None, 3, beside=[x]) == KB


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_times_and_peaks() -> None:
    device = torch.device("cuda")
    model = Small().to(device)
    meter = Meter(model, device, stages={"stem": "stem", "head": "head"})
    for _ in range(3):
        for part, run in (("data", lambda: None), ("forward", lambda: model(torch.ones(16, 16, device=device)).sum())):
            meter.start(part)
            loss = run()
        meter.start("backward")
        loss.backward()
    meter.start("data")
    report = meter.report()
    assert report["saved_bytes"] == 4 * KB and report["cuda"]["reserved"] >= report["cuda"]["allocated"] > 4 * KB
    assert all(report["seconds_by_part"][part] > 0 for part in ("data", "forward", "backward"))


# ------------------------------------------------------------------------------------------------------------ in both loops
@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_a_run_measures_itself(family: str, loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key, the same for both; whole or resumed; and the weights are those of a run that nobody watched."""
    data, args, owner, method = loops[family]
    args = {**args, "method": "lora", "r": 2, "project": tmp_path}
    run = visionpeft.train(data, name="whole", **args)
    said = json.loads((run.folder / "run.json").read_text())["measured"]
    assert sum(said["saved_by_stage"].values()) == sum(said["saved_by_cause"].values()) == said["saved_bytes"] > 0
    assert said["live_bytes"] > said["saved_bytes"] and said["cuda"] is None
    state, trained = said["state_bytes"], run.plan.trained_body + run.plan.trained_head
    assert state["gradients"] == 4 * trained and 2 <= state["optimizer"] / state["gradients"] < 2.01
    added = sum(row.added for row in run.plan.rows)
    assert state["weights"] >= 4 * (run.plan.total + added) and state["buffers"] > 0 and state["average"] > 0
    parts = said["seconds_by_part"]
    assert all(parts[part] > 0 for part in measure.PARTS)
    assert 0 < said["step_seconds"] < said["first_step_seconds"] < run.seconds
    assert "conv2d" in str(run) and "backward" in str(run)

    with ctrl_c(owner, method, after=1), pytest.raises(Interrupted):
        visionpeft.train(data, name="parts", **args)
    rest = visionpeft.train(resume=tmp_path / "parts", quiet=True)
    kept = (*WATCHED, "state_bytes", "peak_bytes")
    assert {k: rest.measured[k] for k in kept} == {k: run.measured[k] for k in kept}

    monkeypatch.setattr(Meter, "_start_step", lambda self: None)
    blind = visionpeft.train(data, name="blind", **args)
    assert blind.measured["saved_bytes"] is None
    a, b = (deltas.read(r.delta).tensors for r in (run, blind))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Returns a function that runs a benchmark, at sizes at which its numbers mean nothing, and returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_what_measuring_costs(script) -> None:
    said = script("measure.py", "--rounds", 1, "--pixels", 64)
    assert [line.split(":")[0].split() for line in said.splitlines()] == [["lean", x] for x in ("off", *lean.LEVELS)]


def test_the_table_of_lean(script, tmp_path: Path, capsys) -> None:
    table = tmp_path / "table.md"
    said = script("lean.py", "--quick", "--only", "yolo11n.*(LoRA|freeze)", "--markdown", table)
    for text, first in ((said, ["peft", "`auto`", "`memory`", "Ultralytics' step", "`auto`", "`memory`"]),
                        (table.read_text(), ["peft", "Ultralytics' step"])):  # fmt: skip
        lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert [line[1] for line in lines[2:]] == first
        assert all(len(line) == len(lines[0]) for line in lines)
    assert "saved ≤ 0.32" in said
    with pytest.raises(SystemExit):
        script("lean.py", "--quick", "--only", "nothing")
    assert "names no row" in capsys.readouterr().err
