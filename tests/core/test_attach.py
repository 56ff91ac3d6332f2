"""The four points, one at a time: every layer type, every order, and writes that would be lost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics.nn.modules import Conv
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from visionpeft.core.anatomy import Layer
from visionpeft.core.attach import attach, detach, merge
from visionpeft.core.method import Edit
from visionpeft.core.plan import Plan
from visionpeft.errors import ConfigError, ModelError
from visionpeft.methods._updates import UpdateConfig
from visionpeft.methods.dora import DoraConfig
from visionpeft.methods.loha import LohaConfig
from visionpeft.methods.lokr import LokrConfig
from visionpeft.methods.lora import LoraConfig

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


def edit(layer: Any, config: UpdateConfig, module: str = "", **more: Any) -> Edit:
    """Return what a method would plan for a bare layer."""
    kind = {nn.Linear: "linear", nn.ConvTranspose2d: "conv_transpose"}.get(type(layer), "conv")
    facts = Layer("layer", kind, tuple(layer.weight.shape), getattr(layer, "groups", 1), 0)
    return Edit(module, "weight", config.name, {**config.part(facts), **more})


def randomise(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.peft_weight.parameters():  # type: ignore[union-attr]
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


METHODS = {
    "lora": LoraConfig(r=2),
    "dora": DoraConfig(r=2),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "olora, A fixed": LoraConfig(r=2, init_lora_weights="olora", lora_fa=True),
    "dora from olora": DoraConfig(r=2, init_lora_weights="olora"),
    "loha": LohaConfig(r=2),
    "lokr": LokrConfig(r=1),
    "lokr whole": LokrConfig(r=8),
    "lokr both": LokrConfig(r=1, decompose_both=True, decompose_factor=3),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_type(kind: str, config: UpdateConfig) -> None:
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
    if config == METHODS["lora"]:
        update = (part.lora_B @ part.lora_A).view_as(plain.weight) * 4
        assert torch.allclose(plain.weight, state["weight"] + update)
    merged = merge(copy.deepcopy(layer))
    assert type(merged) is type(plain) and torch.allclose(merged(x), y) and merged.state_dict().keys() == state.keys()
    detach(layer, state)
    assert type(layer) is type(plain) and torch.equal(layer(x), before)


NORMS = {
    "batch": (nn.BatchNorm2d(6), (2, 6, 5, 5)),
    "batch of vectors": (nn.BatchNorm1d(6), (4, 6)),
    "instances": (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (2, 6, 5, 5)),
    "group": (nn.GroupNorm(2, 6), (2, 6, 5, 5)),
    "layer": (nn.LayerNorm(6), (2, 5, 6)),
    "layer of a map": (nn.LayerNorm((6, 5)), (2, 6, 5)),
    "timm's batch": (timm.layers.BatchNormAct2d(6), (2, 6, 5, 5)),
    "timm's group": (timm.layers.GroupNormAct(6, 2), (2, 6, 5, 5)),
    "timm's layer": (timm.layers.LayerNorm2d(6), (2, 6, 5, 5)),
    "timm's layer with act": (timm.layers.LayerNormAct2d(6), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_every_normalisation(kind: str, train: bool) -> None:
    """SSF scales and shifts what a normalisation puts out, before its activation; merged, copied, detached as a layer."""
    norm: Any = copy.deepcopy(NORMS[kind][0]).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(NORMS[kind][1], dtype=torch.double)
    norm(x)  # statistics that are not all the same
    norm.train(train)
    plain, state = copy.deepcopy(norm), copy.deepcopy(norm.state_dict())
    before = copy.deepcopy(norm)(x)
    attach(norm, bare(norm, Edit("", "weight", "ssf", {"outputs": norm.weight.numel(), "kind": "norm"})))
    assert torch.equal(copy.deepcopy(norm)(x), before)
    randomise(norm)
    gamma, beta = (getattr(norm.peft_weight["ssf"], n).detach().view(norm.weight.shape) for n in ("scale", "shift"))
    bare_norm = copy.deepcopy(plain)
    with torch.no_grad():
        bare_norm.weight.mul_(1 + gamma)
        bare_norm.bias.mul_(1 + gamma).add_(beta)
    y = copy.deepcopy(norm)(x)
    assert torch.allclose(y, bare_norm(x)) and not torch.allclose(y, before)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), y)
    merged = merge(copy.deepcopy(norm))
    assert type(merged) is type(plain) and merged.state_dict().keys() == state.keys()
    norm.load_state_dict(state, strict=False)
    merged.load_state_dict({k: v for k, v in state.items() if k not in ("weight", "bias")}, strict=False)
    assert torch.allclose(merged(x), y)
    detach(norm, state)
    assert type(norm) is type(plain) and torch.equal(norm(x), before)


def test_a_fused_normalisation_takes_its_scale_and_shift_along(images) -> None:
    """Ultralytics' fuse() folds a BatchNorm, with what SSF made of it, into its convolution."""
    block: Any = Conv(3, 6, 3).eval()
    nn.init.normal_(block.bn.running_mean)
    edits = [Edit("bn", "weight", "ssf", {"outputs": 6, "kind": "norm"}), edit(block.conv, LoraConfig(r=2), module="conv")]
    attach(block, bare(block, *edits))
    for parameter in (*block.bn.peft_weight.parameters(), *block.conv.peft_weight.parameters()):
        nn.init.normal_(parameter)
    fused = fuse_conv_and_bn(copy.deepcopy(block.conv), copy.deepcopy(block.bn))
    assert torch.allclose(fused(images), block.bn(block.conv(images)), atol=1e-5)


def test_a_normalisation_without_a_scale_is_refused() -> None:
    norm = nn.BatchNorm2d(6, affine=False)
    with pytest.raises(ConfigError, match="is a BatchNorm2d; a weight delta fits .* with a scale"):
        attach(norm, bare(norm, Edit("", "weight", "ssf", {"outputs": 6, "kind": "norm"})))


def test_dora_trains_one_length_per_output() -> None:
    layer = nn.ConvTranspose2d(6, 8, 2, groups=2)
    attach(layer, bare(layer, edit(layer, DoraConfig(r=2))))
    lengths = torch.stack([layer._parameters["weight"][(o // 4) * 3 : (o // 4) * 3 + 3, o % 4].norm() for o in range(8)])
    assert torch.allclose(layer.peft_weight["dora"].magnitude, lengths)


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
