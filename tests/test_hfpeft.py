"""Folders for HF peft: what it computes with ours, what we compute with its, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from visionpeft import delta as deltas
from visionpeft import hfpeft
from visionpeft.attach import attach, train_mode
from visionpeft.families.base import Base
from visionpeft.families.timm import Timm
from visionpeft.methods.base import make_method
from visionpeft.plan import make_plan

TIMM = ("vit_tiny", "swin", "resnet18", "convnext_atto", "mobilenetv2")
NAMES = {i: f"class {i}" for i in range(5)}


def base_of(model: nn.Module) -> Base:
    return Base("random", model, "classify", NAMES, {"imgsz": 64})


def header_of(base: Base, names: dict[int, str]) -> dict[str, Any]:
    said = {"model": base.source, "sha256": deltas.fingerprint(base.state), "model_args": {}}
    classes = {str(i): name for i, name in names.items()}
    return {"base": said, "names": classes, "head": "rebuild", "outputs": {}, "input": {}, "train_args": {}}


def learn(model: nn.Module, x: Tensor, count: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().add(model(x).mean()).backward()
        optimizer.step()


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.fixture
def adapted(net, images) -> Callable[..., tuple[nn.Module, deltas.Delta, Base]]:
    """Returns a net with a trained delta on it, the delta, and its base, for another number of classes."""

    def make(name: str, method: str, dtype: str = "fp32", **options: Any) -> tuple[nn.Module, deltas.Delta, Base]:
        base, names = base_of(net(name)), {0: "a", 1: "b", 2: "c"}
        model = Timm().fit(base, names, "rebuild")
        plan = make_plan(make_method(method, options), Timm().anatomy(model, name), bn="train")
        train_mode(attach(model, plan), plan)
        learn(model, images)
        delta = deltas.collect(model, base.state, header_of(base, names), dtype)
        fitted = attach(Timm().fit(base, names, "rebuild"), plan, start=False)
        return deltas.apply(fitted, delta, base.state).eval(), delta, base

    return make


def theirs(base: Base, classes: int, folder: Path) -> nn.Module:
    """What peft makes of a folder, on the base with a new head of other random values."""
    model: Any = copy.deepcopy(base.model)
    model.reset_classifier(classes)
    return peft.PeftModel.from_pretrained(model, str(folder))


CASES = [
    ("lora", {"lora_alpha": 3.0}),
    ("lora", {"use_rslora": True, "rank_pattern": {".*proj|.*conv2|.*fc1": 3}, "alpha_pattern": {".*fc2|.*conv1": 5.0}}),
    ("dora", {"small_layers": 0.0}),
    ("ia3", {}),
    ("loha", {"rank_pattern": {".*proj|.*conv2|.*fc1": 3}}),
    ("lokr", {"alpha": 3.0}),
    ("lokr", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_peft_computes_the_same_with_our_folder_and_we_with_it_again(
    method: str, options: dict, name: str, adapted, images, tmp_path
) -> None:
    model, delta, base = adapted(name, method, **options)
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    y = predict(model, images)
    assert close(predict(theirs(base, 3, folder), images), y)
    again = hfpeft.adopt(hfpeft.read(folder), Timm(), base, delta.header)
    fitted = attach(Timm().fit(base, {0: "a", 1: "b", 2: "c"}, "rebuild"), again.plan, start=False)
    assert close(predict(deltas.apply(fitted, again, base.state), images), y)
