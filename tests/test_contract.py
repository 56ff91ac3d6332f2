"""The contract every method keeps on every kind of net."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import NETS, flat
from torch import nn

from visionpeft.core import class_swap
from visionpeft.core import delta as deltas
from visionpeft.core.anatomy import HEAD, GradientStats
from visionpeft.core.attach import attach, attached, detach, is_added, merge, mergeable, train_mode
from visionpeft.core.method import make_method
from visionpeft.core.plan import Plan, applicable_methods, make_plan
from visionpeft.errors import ConfigError
from visionpeft.registry import FAMILIES, METHODS

UNFIT = {  # what a net lacks the parts for: no tokens, no attention
    "prompt": set(NETS) - {"vit_tiny"},
    "prefix": {n for n in NETS if n.startswith(("yolov8", "resnet", "convnext", "mobilenet"))},
}
USE = {"input": {"imgsz": 64}, "train_args": {"imgsz": 64}}
HEADER = {"base": {"model": "random", "sha256": "", "model_args": {}}, "names": {}, "head": "keep", **USE}


def predict(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return flat(model(x))


def close(a: list, b: list, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(s, t, atol=tolerance * max(1.0, float(t.abs().max()))) for s, t in zip(a, b, strict=True))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def step(model: nn.Module, plan: Plan, x: torch.Tensor, count: int = 2) -> None:
    train_mode(model, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for _ in range(count):
        loss = sum((t.square().mean() + t.mean() for t in flat(model(x)) if t.requires_grad), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evidence(model: nn.Module, x: torch.Tensor) -> GradientStats:
    """Return what a method that looks at data would see of a loss that every parameter has a part in."""
    model = copy.deepcopy(model).requires_grad_(True)
    sum((t.square().mean() for t in flat(model(x)) if t.requires_grad), torch.zeros(())).backward()
    pairs = {n: (p.detach(), p.grad) for n, p in model.named_parameters() if p.grad is not None}
    lengths = [{n: float(pair[i].norm()) for n, pair in pairs.items()} for i in (0, 1)]
    return GradientStats(len(x), *lengths, {n: float((w * g).abs().sum()) for n, (w, g) in pairs.items()})


USUAL = {"yolov8n-seg", "yolo11n-pose", "yolo26n-obb", "yolo11n-cls"}  # the other versions of these tasks are slow tests
CASES = [  # of YOLO's further tasks, whose bodies are those of its detectors, only with the first stages frozen
    pytest.param(method, name, freeze, marks=[pytest.mark.slow] if "-" in name and name not in USUAL else [])
    for method in (*METHODS, "lora+bitfit")
    for name in NETS
    for freeze in ((2,) if name.startswith("yolo") and "-" in name else (0, 2))
]


@pytest.mark.parametrize(("method", "name", "freeze"), CASES)
def test_contract(method: str, name: str, freeze: int, net, images, tmp_path) -> None:
    base = net(name)
    anatomy = FAMILIES[NETS[name][0]]().anatomy(base, name)
    tuning = make_method(method)
    if name in UNFIT.get(method, ()):
        with pytest.raises(ConfigError, match="does not fit.*these fit: adapter, bitfit"):
            make_plan(tuning, anatomy, freeze)
        assert method not in applicable_methods(anatomy)
        return
    if tuning.needs_gradients:
        with pytest.raises(ConfigError, match="give data"):
            make_plan(tuning, anatomy, freeze)
        anatomy = replace(anatomy, gradient_stats=evidence(base, images))
    plan = make_plan(tuning, anatomy, freeze)
    assert Plan.from_dict(plan.to_dict()) == plan and str(plan)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    wanted = {n: p.requires_grad for n, p in base.named_parameters()}
    before = predict(base, images)

    model = attach(base, plan)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    assert {k: v for k, v in start.items() if not is_added(k)}.keys() == state.keys()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == plan.trained_body + plan.trained_head
    after = predict(model, images)
    assert tuning.identity_at_init == close(after, before)
    with pytest.raises(ConfigError, match="attached already"):
        attach(model, plan)

    step(model, plan, images)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    allowed = set(plan.train) | {k for k in start if is_added(k)}
    moving = [s.name for s in anatomy.statistics if s.name not in plan.still]
    allowed |= {f"{m}.{leaf}" for m in moving for leaf in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved <= allowed
    frozen = {p.name for p in anatomy.params if 0 <= p.stage < freeze}
    assert not moved & frozen and not any(s.name in moving for s in anatomy.statistics if 0 <= s.stage < freeze)
    assert any(is_added(k) or k in plan.train for k in moved if not k.startswith(plan.heads)) or method == "head"

    y = predict(model, images)
    assert not close(y, after)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        assert same(twin.state_dict(), model.state_dict()) and close(predict(twin, images), y, 0)

    first, second = (tmp_path / f"{i}.safetensors" for i in (1, 2))
    deltas.write(first, deltas.collect(model, state, HEADER))
    deltas.check(deltas.read(first), again := net(name), state)
    attach(again, deltas.read(first).plan, start=False)
    deltas.apply(again, deltas.read(first), state)
    deltas.write(second, deltas.collect(again, state, HEADER))
    assert first.read_bytes() == second.read_bytes()
    assert close(predict(again, images), y, 2e-2)  # half precision

    whole = copy.deepcopy(model)
    if tuning.merges:
        merge(whole)
        assert close(predict(whole, images), y) and whole.state_dict().keys() == state.keys()
        assert not any(class_swap.mixins(type(m)) for m in whole.modules()) and attached(whole) is None
    else:
        assert not mergeable(whole)
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge(whole)
        assert close(predict(whole, images), y, 0)

    detach(model, state)
    assert same(model.state_dict(), state) and close(predict(model, images), before, 0)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert not any(class_swap.mixins(type(m)) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_every_net_has_a_head_and_stages(net) -> None:
    for name, (family, _) in NETS.items():
        model = net(name)
        anatomy = FAMILIES[family]().anatomy(model, name)
        trainable = {n for n, _ in model.named_parameters() if ".dfl." not in n}
        assert {p.name for p in anatomy.params} == trainable
        assert any(p.stage == HEAD for p in anatomy.params) and len(anatomy.stages) > 2
