"""The four points, one at a time: every layer type, every order, and writes that would be lost."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from visionpeft.attach import attach, detach, merge
from visionpeft.errors import ConfigError, ModelError
from visionpeft.methods.dora import DoraConfig
from visionpeft.methods.lora import LoraConfig
from visionpeft.plan import Edit, Plan

LAYERS = {
    "linear": (nn.Linear(12, 8), (2, 12)),
    "linear on tokens": (nn.Linear(12, 8, bias=False), (2, 5, 12)),
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "conv": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "strided": (nn.Conv2d(6, 8, 3, stride=2, bias=False), (2, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (2, 6, 9, 9)),
    "reflect": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 9)),
    "same": (timm.layers.Conv2dSame(6, 8, 3, stride=2), (2, 6, 9, 9)),
    "transposed": (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 5, 5)),
    "grouped transposed": (nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2), (2, 6, 5, 5)),
    "standardised": (timm.layers.StdConv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "scaled standardised": (timm.layers.ScaledStdConv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
}


def bare(layer: nn.Module, *edits: Edit) -> Plan:
    return Plan("none", "bare", "lora", {}, 0, "frozen", (), (), {}, edits, (), ())


def edit(layer: nn.Module, config: LoraConfig, **more) -> Edit:
    groups = layer.groups if isinstance(layer, nn.ConvTranspose2d) else 1
    extra = {"output": int(isinstance(layer, nn.ConvTranspose2d)), "groups": groups} if config.name == "dora" else {}
    settings = {"shape": list(layer.weight.shape), "r": config.r, "scaling": config.lora_alpha / config.r, **extra, **more}
    return Edit("", "weight", config.name, settings)


def randomise(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.peft_weight.parameters():  # type: ignore[union-attr]
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("config", [LoraConfig(r=2), DoraConfig(r=2)], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_type(kind: str, config: LoraConfig) -> None:
    """The output is that of a plain layer with the new weight; merged and unmerged agree; detached is the base."""
    layer, shape = copy.deepcopy(LAYERS[kind][0]).double(), LAYERS[kind][1]
    x = torch.randn(shape, dtype=torch.double)
    state = copy.deepcopy(layer.state_dict())
    plain = copy.deepcopy(layer)
    before = layer(x)
    attach(layer, bare(layer, edit(layer, config)))
    assert torch.allclose(layer(x), before)
    randomise(layer)
    part = layer.peft_weight[config.name]
    plain.weight.data = part(plain.weight).detach()
    y = layer(x)
    assert torch.allclose(y, plain(x)) and not torch.allclose(y, before)
    assert layer.state_dict().keys() > state.keys()
    if config.name == "lora":
        update = (part.lora_B @ part.lora_A).view_as(plain.weight) * (config.lora_alpha / config.r)
        assert torch.allclose(plain.weight, state["weight"] + update)
    merged = merge(copy.deepcopy(layer))
    assert type(merged) is type(plain) and torch.allclose(merged(x), y) and merged.state_dict().keys() == state.keys()
    detach(layer, state)
    assert type(layer) is type(plain) and torch.equal(layer(x), before)


def test_dora_trains_one_length_per_output() -> None:
    layer = nn.ConvTranspose2d(6, 8, 2, groups=2)
    attach(layer, bare(layer, edit(layer, DoraConfig(r=2))))
    lengths = torch.stack([layer._parameters["weight"][(o // 4) * 3 : (o // 4) * 3 + 3, o % 4].norm() for o in range(8)])
    assert torch.allclose(layer.peft_weight["dora"].magnitude, lengths)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equals_hf_peft(kind: str, dora: bool) -> None:
    """Same factors: outputs and gradients as Hugging Face peft's LoRA and DoRA."""
    layer, shape = copy.deepcopy(LAYERS[kind][0]).double(), LAYERS[kind][1]
    x = torch.randn(shape, dtype=torch.double)
    theirs = get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), PeftConfig(r=2, lora_alpha=8, target_modules=["0"], use_dora=dora)
    )
    theirs = theirs.double()
    config = DoraConfig(r=2) if dora else LoraConfig(r=2)
    attach(layer, bare(layer, edit(layer, config)))
    ours = layer.peft_weight[config.name]
    a, b = (next(p for n, p in theirs.named_parameters() if f"lora_{f}" in n) for f in "AB")
    torch.nn.init.normal_(b)
    ours.lora_A.data = a.detach().flatten(1).clone()
    ours.lora_B.data = b.detach().flatten(1).clone()
    assert torch.allclose(layer(x), theirs(x))
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for mine, other in ((ours.lora_A, a), (ours.lora_B, b)):
        assert torch.allclose(mine.grad, other.grad.flatten(1), rtol=1e-6)


def test_rows_of_a_fused_projection() -> None:
    """Choosing q and v leaves the rows of k untouched, and gives q and v factors of their own."""
    layer = nn.Linear(8, 12)
    attach(layer, bare(layer, edit(layer, LoraConfig(r=2), rows=[[[0, 4]], [[8, 10], [10, 12]]])))
    randomise(layer)
    change = (layer.weight - layer._parameters["weight"]).detach()
    assert not change[4:8].any() and change[:4].any() and change[8:].any()
    part = layer.peft_weight["lora"]
    assert torch.allclose(change[8:], 4 * part.lora_B[4:] @ part.lora_A[2:], atol=1e-6)


def test_dropout_acts_on_the_input_of_the_update_only() -> None:
    """W x + s B A dropout(x), Hu et al.'s own formula, re-derived."""
    layer, x = nn.Conv2d(6, 8, 3, padding=1), torch.randn(2, 6, 9, 9)
    attach(layer, bare(layer, edit(layer, LoraConfig(r=2), dropout=0.5)))
    randomise(layer)
    part, weight, bias = layer.peft_weight["lora"], layer._parameters["weight"], layer._parameters["bias"]
    torch.manual_seed(0)
    y = layer.train()(x)
    torch.manual_seed(0)
    expected = F.conv2d(x, weight, bias, padding=1) + F.conv2d(F.dropout(x, 0.5), part.update(), padding=1)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(layer.eval()(x), F.conv2d(x, weight + part.update(), bias, padding=1), atol=1e-5)
    assert torch.allclose(merge(layer)(x), F.conv2d(x, weight + part.update(), bias, padding=1), atol=1e-5)


def test_attention_that_reads_the_weight_itself() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    layer = attention.out_proj
    attach(attention, bare(layer, Edit("out_proj", "weight", "lora", {"shape": [8, 8], "r": 2, "scaling": 1.0})))
    randomise(layer)
    after = attention(x, x, x)[0]
    assert not torch.allclose(before, after)
    assert torch.allclose(merge(attention)(x, x, x)[0], after, atol=1e-6)


@pytest.mark.parametrize(
    "write",
    [lambda w: w.mul_(2), lambda w: nn.init.zeros_(w), lambda w: w.data.zero_(), lambda w: w.detach().add_(1)]
    + [lambda w: w.view(-1).mul_(2), lambda w: w[0].zero_(), lambda w: w.__setitem__(0, 0)],
    ids=["mul_", "init", "data", "detach", "view", "row", "setitem"],
)
def test_writes_in_place_are_refused(write) -> None:
    layer = nn.Linear(8, 8)
    attach(layer, bare(layer, edit(layer, LoraConfig(r=2))))
    with pytest.raises(ConfigError, match="would be lost"):
        write(layer.weight)


def test_assigning_the_weight_folds_the_delta() -> None:
    """What Ultralytics' fuse() does."""
    layer, x = nn.Conv2d(6, 8, 3), torch.randn(1, 6, 9, 9)
    attach(layer, bare(layer, edit(layer, LoraConfig(r=2))))
    randomise(layer)
    y = layer(x)
    layer.weight = nn.Parameter(layer.weight * 2)
    assert type(layer) is nn.Conv2d and type(layer.weight) is nn.Parameter
    assert torch.allclose(layer(x) - layer.bias.view(-1, 1, 1), 2 * (y - layer.bias.view(-1, 1, 1)), atol=1e-4)


def test_two_methods_on_one_layer_apply_in_order() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    attach(layer, bare(layer, edit(layer, LoraConfig(r=2)), edit(layer, DoraConfig(r=2))))
    randomise(layer)
    weight = layer.peft_weight["dora"](layer.peft_weight["lora"](layer._parameters["weight"]))
    assert torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "bad", "error", "says"),
    [
        (
            nn.Embedding(4, 4),
            Edit("", "weight", "lora", {"shape": [4, 4], "r": 1, "scaling": 1}),
            ConfigError,
            "fits Linear",
        ),
        (nn.Linear(4, 4), Edit("deep", "weight", "lora", {"shape": [4, 4], "r": 1, "scaling": 1}), ModelError, "not have"),
        (nn.Linear(4, 4), Edit("", "nowhere", "lora", {}), ConfigError, "no point 'nowhere'"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(layer: nn.Module, bad: Edit, error: type, says: str) -> None:
    good = Edit("", "output", "adapter", {"channels": 4, "bottleneck": 2, "scaling": 1.0, "parallel": False, "conv": False})
    before, kind = dict(layer.__dict__["_modules"]), type(layer)
    with pytest.raises(error, match=says):
        attach(layer, bare(layer, good, bad))
    assert layer._modules == before and type(layer) is kind and not layer._forward_hooks


def test_the_same_edit_twice_is_refused() -> None:
    layer = nn.Linear(8, 8)
    one = edit(layer, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="edited twice"):
        attach(layer, bare(layer, one, one))
    assert type(layer) is nn.Linear
