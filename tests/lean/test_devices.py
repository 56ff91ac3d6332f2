"""No step mixes devices: without a GPU, it runs there on tensors without content, under CUDA's autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import NETS
from test_lean import BLOCKS, loss_of, randomised, tuned
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from visionpeft import lean
from visionpeft.core.attach import attach, set_requires_grad, train_mode
from visionpeft.core.base_model import Base
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.families.capabilities import Step
from visionpeft.families.yolo.tasks import task_of
from visionpeft.memory.fake_tensors import FakeTensorOracle
from visionpeft.registry import FAMILIES

GPU = torch.device("cuda", 0)


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Let tensors have no content, and CUDA's autocast be on."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            yield fake
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def sent(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Return a copy without content on the GPU. (``to`` cannot turn fake tensors.)"""
    with FakeCopyMode(fake):
        model = copy.deepcopy(model)
    known: dict[int, Tensor] = {}

    def turned(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            moved = tensor.detach().to(GPU)
            known[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        return known[id(tensor)]

    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):  # Ultralytics' heads move their strides, too
            values.update({k: turned(v) for k, v in values.items() if isinstance(v, Tensor)})
    return model


def backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, whose engine needs the GPU: call the graph's nodes, each after its readers."""
    root = loss.grad_fn
    readers: dict[Any, int] = {root: 0}
    ahead = [root]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is not None:
                if node not in readers:
                    ahead.append(node)
                readers[node] = readers.get(node, 0) + 1
    given: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            gradients = _call(node, given.pop(node, {}))
            for (behind, place), gradient in zip(node.next_functions, gradients, strict=True):
                if behind is None:
                    continue
                if gradient is not None:
                    wanted = behind._input_metadata[place]
                    assert gradient.device == wanted.device, f"{node.name()} returns a gradient on {gradient.device}"
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                    sums = given.setdefault(behind, {})
                    sums[place] = sums[place] + gradient if place in sums else gradient
                readers[behind] -= 1
                if not readers[behind]:
                    ready.append(behind)


def _call(node: Any, given: dict[int, Tensor]) -> tuple:
    if hasattr(node, "variable"):  # a leaf
        if given:
            node.variable.grad = given[0]
        return ()
    if not given:
        return (None,) * len(node.next_functions)
    gradients = [given.get(i) for i in range(len(node._input_metadata))]
    if hasattr(node, "saved_tensors"):  # a Function's, which autograd gives zeros for none
        kinds = enumerate(node._input_metadata)
        gradients = [
            torch.zeros(k.shape, dtype=k.dtype, device=GPU) if gradients[i] is None else gradients[i] for i, k in kinds
        ]
        found = node.apply(*gradients)
        found = found if isinstance(found, tuple) else (found,)
        wanted = (g for g, needed in zip(found, node.needs_input_grad, strict=True) if needed)
        return tuple(None if behind is None else next(wanted) for behind, _ in node.next_functions)
    found = node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def test_the_engine_is_autograd_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for autograd's engine here gives its gradients."""
    monkeypatch.setitem(globals(), "GPU", torch.device("cpu"))
    model, x = lean.apply(tuned(randomised(BLOCKS["c2f"][0]()), "lora")), torch.rand(BLOCKS["c2f"][1], dtype=torch.float64)
    loss_of(model(x)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    backward(loss_of(model(x)))
    assert wanted and all(torch.allclose(model.get_parameter(n).grad, g, rtol=1e-12) for n, g in wanted.items())


KINDS = ["depthwise", "conv-bn-relu", "max pool", "c2psa", "pyramid", "layer norm", "swin", "convnext", "efficientnet"]


@pytest.mark.parametrize("kind", [k if k in KINDS else pytest.param(k, marks=pytest.mark.slow) for k in BLOCKS])
def test_blocks(kind: str) -> None:
    make, shape = BLOCKS[kind]
    for way, level in (("lora", "memory"), ("norm", "memory"), ("full", "auto")):
        plain = tuned(randomised(make()), way).float()
        with fake_gpu() as fake:
            model = lean.apply(sent(plain, fake), level)
            x = torch.empty(shape, device=GPU, requires_grad=True)
            backward(loss_of(model(x)))
            assert x.grad.device == GPU


CASES = [
    ("yolo11n", "lora"), pytest.param("yolo26n", "full", marks=pytest.mark.slow), ("vit_tiny", "dora"),
    ("vit_tiny", "prompt"), ("swin", "mona"), ("resnet18", "lora+norm"), ("convnext_atto", "side"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), CASES)
def test_steps(name: str, method: str, net) -> None:
    """A whole training step: the library's own loss, backward, an optimizer."""
    base, family = net(name), FAMILIES[NETS[name][0]]()
    plan = make_plan(make_method(method), family.anatomy(base, name))
    task = task_of(base)
    of = Base(name, base, task.name if task else "classify", dict(enumerate("abcde")), {"channels": 3, "imgsz": 64})
    model = set_requires_grad(attach(copy.deepcopy(base), plan), plan)
    answers = FakeTensorOracle(2)
    with fake_gpu() as fake, answers:
        answers.yes = True
        model = lean.apply(train_mode(sent(model, fake), plan))
        rehearsal = family.dry_run(model, of, Step(2, 64, "AdamW", True, 3, 0.02))
        answers.true, answers.number = rehearsal.true, rehearsal.number
        given = rehearsal.batch()
        given = {k: v.to(GPU) for k, v in given.items()} if isinstance(given, dict) else tuple(v.to(GPU) for v in given)
        backward(rehearsal.loss(given))
        rehearsal.optimizer.step()
