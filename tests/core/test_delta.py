"""What a delta holds, byte for byte, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from visionpeft.core import delta as deltas
from visionpeft.core.attach import attach, detach
from visionpeft.core.method import Edit
from visionpeft.core.plan import Plan
from visionpeft.errors import MismatchError, ModelError

BASE = {"model": "tiny", "sha256": "", "model_args": {}}
USE = {"input": {"imgsz": 8}, "train_args": {"imgsz": 8, "batch": 1}}
HEADER = {"base": BASE, "names": {"0": "café"}, "head": "keep", **USE}


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture
def adapted(base: nn.Module) -> nn.Module:
    edit = Edit("0", "weight", "lora", {"shape": [8, 3, 3, 3], "r": 2, "scaling": 1.0})
    train = ("1.weight", "3.weight", "3.bias")
    model = attach(copy.deepcopy(base), Plan("none", "tiny", "lora", {}, 0, "train", ("3",), train, {}, (edit,), (), ()))
    with torch.no_grad():
        model[3].bias += 1 / 3
        model[1].running_mean += 1 / 3
    return model


def test_only_what_differs_is_stored(base: nn.Module, adapted: nn.Module) -> None:
    delta = deltas.collect(adapted, base.state_dict(), HEADER)
    assert delta.tensors.keys() == {
        "0.peft_weight.lora.lora_A",
        "0.peft_weight.lora.lora_B",
        "1.running_mean",
        "3.bias",
    }
    assert delta.tensors["3.bias"].dtype == torch.float16 and delta.tensors["1.running_mean"].dtype == torch.float32
    assert delta.bytes == {"body": 2 * (2 * 27 + 8 * 2), "head": 2 * 4, "statistics": 4 * 8}
    whole = deltas.collect(adapted, base.state_dict(), HEADER, "fp32")
    assert torch.equal(whole.tensors["3.bias"], adapted[3].bias)


def test_values_that_half_precision_cannot_hold_stay_whole(base: nn.Module, adapted: nn.Module) -> None:
    with torch.no_grad():
        adapted[3].bias[0] = 1e6
    assert deltas.collect(adapted, base.state_dict(), HEADER).tensors["3.bias"].dtype == torch.float32


def test_a_change_too_small_for_half_precision_is_dropped_for_good(base: nn.Module, adapted: nn.Module, tmp_path) -> None:
    state = {k: v.half().to(v.dtype) if v.is_floating_point() else v for k, v in base.state_dict().items()}
    adapted.load_state_dict({**adapted.state_dict(), **state})
    with torch.no_grad():
        adapted[3].weight += 1e-9
    assert "3.weight" not in deltas.collect(adapted, state, HEADER).tensors


def test_the_same_delta_has_the_same_bytes(base: nn.Module, adapted: nn.Module, tmp_path) -> None:
    delta = deltas.collect(adapted, base.state_dict(), HEADER)
    shuffled = deltas.Delta(delta.plan, dict(reversed(delta.tensors.items())), dict(reversed(delta.header.items())))
    a, b = deltas.write(tmp_path / "a", delta), deltas.write(tmp_path / "b", shuffled)
    assert a.read_bytes() == b.read_bytes()
    read = deltas.read(a)
    assert read.plan == delta.plan and read.header["names"] == HEADER["names"]
    assert all(torch.equal(read.tensors[k], delta.tensors[k]) for k in delta.tensors)


def test_fingerprint_is_of_names_types_shapes_and_values() -> None:
    one = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": torch.arange(4.0).half()}  # order and half precision do not count
    others = [{"a": torch.arange(4.0).view(2, 2), "b": one["b"]}, {"c": one["a"], "b": one["b"]}, {"a": one["a"]}]
    others += [{"a": one["a"] + 1e-6, "b": one["b"]}, {"a": one["a"], "b": torch.tensor(3, dtype=torch.int32)}]
    assert deltas.fingerprint(one) == deltas.fingerprint(same)
    assert deltas.fingerprint(one) not in {deltas.fingerprint(o) for o in others}


def test_a_delta_that_does_not_fit_changes_nothing(base: nn.Module, adapted: nn.Module) -> None:
    delta = deltas.collect(adapted, base.state_dict(), HEADER)
    target = attach(copy.deepcopy(base), delta.plan, start=False)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    strange = deltas.Delta(delta.plan, {**delta.tensors, "9.weight": torch.zeros(1)}, delta.header)
    lacking = deltas.Delta(delta.plan, {k: v for k, v in delta.tensors.items() if "lora_A" not in k}, delta.header)
    for wrong, says in (
        (strange, "1 unexpected .first: 9.weight"),
        (lacking, "1 missing .first: 0.peft_weight.lora.lora_A"),
    ):
        with pytest.raises(MismatchError, match=says):
            deltas.apply(target, wrong, base.state_dict())
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_detaching_needs_the_right_base(base: nn.Module, adapted: nn.Module) -> None:
    state = {k: v for k, v in base.state_dict().items() if k != "3.weight"}
    with pytest.raises(ModelError, match="3.weight is missing"):
        detach(adapted, state)
    assert adapted.peft.plan.method == "lora"


def test_nothing_to_save_without_a_plan(base: nn.Module) -> None:
    with pytest.raises(ModelError, match="nothing is attached"):
        deltas.collect(base, base.state_dict(), HEADER)
