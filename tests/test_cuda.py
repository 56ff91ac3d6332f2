"""What only a GPU can show: gradients, precisions, methods and whole runs there.

``python -m pytest -m cuda tests``; with VISIONPEFT_TEST_DEVICE=cpu the same code runs on the CPU, to prove that it is right.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETS, ctrl_c, flat
from test_contract import HEADER, UNFIT, close, evidence, predict, same
from test_lean import (
    BLOCKS,
    LEVELS,
    SMALL,
    WAYS,
    assert_same,
    distance,
    has_statistics,
    images,
    leaned,
    loss_of,
    randomised,
    results,
    simple_step,
    still,
    tensor,
    tuned,
)  # fmt: skip
from test_lean import net as small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import visionpeft
from visionpeft import lean
from visionpeft.core import delta as deltas
from visionpeft.core.attach import attach, detach, merge, train_mode
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.errors import Interrupted
from visionpeft.registry import FAMILIES, METHODS

DEVICE = torch.device(os.environ.get("VISIONPEFT_TEST_DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a GPU")]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _whole_single_precision() -> Iterator[None]:
    """Single precision is not to be TensorFloat-32 here."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    were = [b.allow_tf32 for b in backends]
    for b in backends:
        b.allow_tf32 = False
    yield
    for b, was in zip(backends, were, strict=True):
        b.allow_tf32 = was


def step_in(precision: torch.dtype) -> Callable:
    """Return a step under autocast, in single precision without."""
    if precision is torch.float32:
        return simple_step

    def step(module: nn.Module, *inputs: Tensor) -> None:
        with torch.autocast(DEVICE.type, precision):
            loss = loss_of(module(*inputs))
        loss.backward()

    return step


def assert_as_near(plain: nn.Module, x: Tensor, precision: torch.dtype) -> None:
    """Lean gradients are no further from those in double precision than PyTorch's own, but for rounding."""
    exact, step = results(copy.deepcopy(plain).double(), x.double()), step_in(precision)
    size = sum(float(v.square().sum()) for k, v in exact.items() if k.startswith("grad")) ** 0.5
    theirs = results(plain, x.float(), step=step)
    for level in LEVELS:
        ours = results(leaned(plain, level), x.float(), step=step)
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
        errors = distance(ours, exact), distance(theirs, exact)
        assert errors[0] <= 1.5 * errors[1] + torch.finfo(precision).eps * size, (level, errors, size)


# -------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str) -> None:
    make, shape = BLOCKS[kind]
    x = tensor(*shape).to(DEVICE)
    for way in WAYS:
        plain = tuned(randomised(make()), way).to(DEVICE)
        for module in (plain, still(copy.deepcopy(plain))) if has_statistics(plain) else (plain,):
            wanted = results(module, x)
            for level in LEVELS:
                assert_same(results(leaned(module, level), x), wanted, 1e-9)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_precisions(kind: str, precision: torch.dtype) -> None:
    make, shape = BLOCKS[kind]
    for way in ("lora", "norm", "full"):
        plain = still(tuned(randomised(make()), way)).float().to(DEVICE)
        if any(p.requires_grad for p in plain.parameters()):
            assert_as_near(plain, tensor(*shape).to(DEVICE), precision)


@pytest.mark.parametrize("kind", ["conv-bn-silu", "conv-bn-relu", "depthwise", "max pool", "c2f", "mobilenet", "pyramid"])
def test_channels_last(kind: str) -> None:
    make, shape = BLOCKS[kind]
    for way in ("lora", "norm", "full"):
        plain = tuned(randomised(make()), way).to(DEVICE, memory_format=torch.channels_last)
        x = tensor(*shape).to(DEVICE, memory_format=torch.channels_last)
        assert_same(results(leaned(plain), x), results(plain, x), 1e-9)
        assert_as_near(still(plain).float(), x, torch.bfloat16)


@pytest.mark.parametrize(("method", "bn"), [("lora", "frozen"), ("lora", "train"), ("bitfit", None), ("full", "train")])
@pytest.mark.parametrize("name", SMALL)
def test_nets(name: str, method: str, bn: str | None) -> None:
    plain, x = small(name, method, bn).to(DEVICE), images(SMALL[name][2]).to(DEVICE)
    assert_as_near(still(copy.deepcopy(plain)), x, torch.bfloat16)
    plain = plain.double()
    wanted = results(plain, x)
    for level in LEVELS:
        assert_same(results(leaned(plain, level), x), wanted, 1e-8)


def test_compiled() -> None:
    plain, x = tuned(randomised(BLOCKS["c2f"][0]()), "lora").to(DEVICE), tensor(*BLOCKS["c2f"][1]).to(DEVICE)
    compiled = torch.compile(leaned(plain), backend="inductor" if GPU else "aot_eager")
    found = results(compiled, x)  # type: ignore[arg-type]
    assert_same({k.replace("_orig_mod.", ""): v for k, v in found.items()}, results(plain, x), 1e-9)


def test_one_process_of_several(tmp_path: Path) -> None:
    plain, x = small("yolo11n", "lora").double().to(DEVICE), images().to(DEVICE)
    where = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl" if GPU else "gloo", init_method=where, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(leaned(plain), device_ids=[DEVICE.index or 0] if GPU else None)
        found = results(model, x)
    finally:
        torch.distributed.destroy_process_group()
    assert_same({k.replace("module.", "", 1): v for k, v in found.items()}, results(plain, x), 1e-8)


# ---------------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("name", ["yolo11n", "vit_tiny", "resnet18"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, name: str, net: Callable, tmp_path: Path) -> None:
    """Attached, trained, averaged, written, read, merged and taken off, all there."""
    if name in UNFIT.get(method, ()):
        pytest.skip(f"{method} does not fit {name}")
    tuning, x = make_method(method), images().float().to(DEVICE)
    base = net(name).to(DEVICE)
    anatomy = FAMILIES[NETS[name][0]]().anatomy(base, name)
    if tuning.needs_gradients:
        anatomy = replace(anatomy, gradient_stats=evidence(base, x))
    plan = make_plan(tuning, anatomy)
    state = {k: v.cpu().clone() for k, v in base.state_dict().items()}
    model = attach(base, plan)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {DEVICE.type}
    average = copy.deepcopy(model)

    lean.apply(train_mode(model, plan))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=GPU)
    for _ in range(2):
        with torch.autocast(DEVICE.type, torch.float16 if GPU else torch.bfloat16):
            loss = sum((t.float().square().mean() for t in flat(model(x)) if t.requires_grad), torch.zeros(()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    lean.remove(model)
    with torch.no_grad():
        for own, live in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(live)
    y = predict(model, x)
    assert close(predict(average, x), y, 0)

    file = deltas.write(tmp_path / "delta.safetensors", deltas.collect(model, state, HEADER, "fp32"))
    again = attach(net(name).to(DEVICE), plan, start=False)
    assert close(predict(deltas.apply(again, deltas.read(file), state), x), y, 1e-4)
    if tuning.merges:
        assert close(predict(merge(again), x), y, 1e-3)
    detach(model, state)
    assert same({k: v.cpu() for k, v in model.state_dict().items()}, state)


# ------------------------------------------------------------------------------------------------------------------- runs
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("yolo", {"method": "lora", "r": 2, "lean": "memory"}),
    ("yolo", {"method": "full", "freeze": 10, "frozen_dtype": "bf16"}),
    ("yolo", {"method": "full", "freeze": 10, "cache": 1}),
    ("yolo", {"method": "surgical"}),
    ("timm", {"method": "lora", "r": 2, "lean": "memory"}),
    ("timm", {"method": "gradual"}),
    ("timm", {"method": "full", "freeze": 2, "cache": 1}),
    ("timm", {"method": "full", "amp": True if GPU else "bf16"}),
]


@pytest.mark.parametrize(("family", "settings"), RUNS, ids=[f"{f} {' '.join(map(str, s.values()))}" for f, s in RUNS])
def test_runs(family: str, settings: dict, loops: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, interrupted and resumed; measured on the way."""
    monkeypatch.setenv("VISIONPEFT_CACHE", str(tmp_path / "cache"))
    data, args, owner, method = loops[family]
    args = {**args, **settings, "device": "0" if GPU else "cpu", "project": tmp_path}
    whole = visionpeft.train(data, name="whole", **args)
    with ctrl_c(owner, method, after=1), pytest.raises(Interrupted):
        visionpeft.train(data, name="parts", **args)
    parts = visionpeft.train(resume=tmp_path / "parts", quiet=True)
    for run in (whole, parts):
        measured = json.loads((run.folder / "run.json").read_text())["measured"]
        assert measured["saved_bytes"] > 0 and measured["step_seconds"] > 0
        assert (measured["cuda"] is not None) == GPU
        if GPU:
            assert measured["cuda"]["reserved"] >= measured["cuda"]["allocated"] > measured["saved_bytes"]
        assert len((run.folder / "metrics.csv").read_text().splitlines()) == 3
    tensors = [deltas.read(run.delta).tensors for run in (whole, parts)]
    assert tensors[0].keys() == tensors[1].keys()
    vectors = [torch.cat([found[k].double().flatten() for k in tensors[0]]) for found in tensors]
    # sums of a GPU's threads are in no order
    assert (vectors[0] - vectors[1]).norm() <= (0.02 if GPU else 0) * vectors[0].norm()
    scores = visionpeft.val(whole.delta, data=data, device="0" if GPU else "cpu")
    assert scores.keys() >= whole.after.keys()
