"""Equality with references: Hugging Face peft where it has the method, else the paper's formula derived again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import timm.layers
import torch
from conftest import NETS
from torch import Tensor, nn

from visionpeft.core.anatomy import HEAD, Anatomy, Layer, Param, Stage
from visionpeft.core.attach import attach, merge
from visionpeft.core.method import Edit, make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.methods._updates import UpdateConfig
from visionpeft.methods.dora import DoraConfig
from visionpeft.methods.loha import LohaConfig
from visionpeft.methods.lokr import LokrConfig
from visionpeft.methods.lora import LoraConfig
from visionpeft.registry import FAMILIES

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear on tokens": (lambda: nn.Linear(12, 20, bias=False), (2, 5, 12)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 5, 5)),
}
PAIRS: dict[str, tuple[UpdateConfig, peft.PeftConfig]] = {
    "lora": (LoraConfig(r=2), peft.LoraConfig(r=2, lora_alpha=8)),
    "rslora": (LoraConfig(r=2, use_rslora=True), peft.LoraConfig(r=2, lora_alpha=8, use_rslora=True)),
    "dora": (DoraConfig(r=2), peft.LoraConfig(r=2, lora_alpha=8, use_dora=True)),
    "loha": (LohaConfig(r=2, alpha=8.0), peft.LoHaConfig(r=2, alpha=8)),
    "lokr": (LokrConfig(r=1), peft.LoKrConfig(r=1, alpha=8)),
    "lokr, whole": (LokrConfig(r=8), peft.LoKrConfig(r=8, alpha=8)),
    "lokr, both": (LokrConfig(r=1, decompose_both=True), peft.LoKrConfig(r=1, alpha=8, decompose_both=True)),
    "lokr by 4": (LokrConfig(r=1, decompose_factor=4), peft.LoKrConfig(r=1, alpha=8, decompose_factor=4)),
}


def tuned(layer: nn.Module, edit: Edit) -> nn.Module:
    return attach(layer, Plan("none", "bare", edit.method, {}, 0, "frozen", (), (), {}, (edit,), (), ()))


def update(layer: Any, config: UpdateConfig) -> nn.Module:
    """Return a copy of the layer with a method attached."""
    facts = Layer("layer", "linear" if isinstance(layer, nn.Linear) else "conv", tuple(layer.weight.shape), 1, 0)
    return tuned(copy.deepcopy(layer), Edit("", "weight", config.name, config.part(facts)))


def theirs(layer: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Return a copy of the layer as Hugging Face peft adapts it."""
    config = copy.deepcopy(config)
    config.target_modules = {"0"}
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)  # type: ignore[return-value, arg-type]


def parameters_of(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """Return peft's trained parameters under our names."""
    renamed = {"lora_magnitude_vector": "magnitude"}
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own = next(part for part in name.split(".") if part.startswith(("lora_", "hada_", "lokr_", "ia3_")))
            found[renamed.get(own, own)] = parameter
    return found


def assert_equal(ours: nn.Module, theirs: nn.Module, x: Tensor, randomise: bool = True) -> None:
    """Give both the same parameters; outputs and gradients, of the parameters and of the input, are then the same."""
    own = dict(next(iter(ours.peft_weight.values())).named_parameters())  # type: ignore[union-attr, operator]
    other = parameters_of(theirs)
    assert own.keys() == other.keys()
    for name, parameter in own.items():
        if randomise:
            nn.init.normal_(other[name], mean=1.0 if name in ("magnitude", "ia3_l") else 0.0, std=0.5)
        parameter.data = other[name].detach().reshape(parameter.shape).clone()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [module(given) for module, given in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)
    for name, parameter in own.items():
        assert parameter.grad is not None and parameter.grad.any()
        torch.testing.assert_close(parameter.grad, other[name].grad.view_as(parameter), rtol=1e-8, atol=1e-8)  # type: ignore[union-attr]
    torch.testing.assert_close(merge(copy.deepcopy(ours))(x), outputs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", LAYERS)
def test_updates_equal_hf_peft(kind: str, name: str) -> None:
    make, shape = LAYERS[kind]
    layer, (config, their_config) = make().double(), PAIRS[name]
    assert_equal(update(layer, config), theirs(layer, their_config).double(), torch.randn(shape, dtype=torch.double))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", LAYERS)
def test_updates_are_laid_out_and_drawn_as_in_hf_peft(kind: str, name: str) -> None:
    """The same names and sizes, and what starts at zero there does so here."""
    layer, (config, their_config) = LAYERS[kind][0](), PAIRS[name]
    own = dict(next(iter(update(layer, config).peft_weight.values())).named_parameters())  # type: ignore[union-attr, operator]
    other = parameters_of(theirs(layer, their_config))
    assert {n: p.numel() for n, p in own.items()} == {n: p.numel() for n, p in other.items()}
    assert {n for n, p in own.items() if p.any()} == {n for n, p in other.items() if p.any()}


@pytest.mark.parametrize("kind", LAYERS)
def test_ia3_equals_hf_peft(kind: str) -> None:
    """peft's factors on the output: of a layer that it is not told to be feed-forward."""
    make, shape = LAYERS[kind]
    layer = make().double()
    ours = tuned(copy.deepcopy(layer), Edit("", "weight", "ia3", {"outputs": len(layer.weight)}))  # type: ignore[arg-type]
    other = theirs(layer, peft.IA3Config(feedforward_modules=set())).double()
    assert_equal(ours, other, torch.randn(shape, dtype=torch.double))


# ------------------------------------------------------------------------------------- factors that start from the weight
@pytest.mark.parametrize("config", [LoraConfig(r=3), LoraConfig(r=3, use_rslora=True), DoraConfig(r=3)], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_as_in_hf_peft(init: str, config: LoraConfig) -> None:
    """The base weight is peft's residual plus product, the factors' product is peft's, and the same steps lead to the same
    place. peft knows these starts for linear layers alone, and computes them in single precision."""
    layer, x = nn.Linear(12, 8), torch.randn(5, 12)
    settings = {"use_rslora": config.use_rslora, "use_dora": isinstance(config, DoraConfig)}
    other = theirs(layer, peft.LoraConfig(r=3, lora_alpha=8, init_lora_weights=init, **settings))
    ours = update(layer, type(config)(r=3, use_rslora=config.use_rslora, init_lora_weights=init))
    part: Any = ours.peft_weight[config.name]  # type: ignore[index]
    factors = parameters_of(other)
    product = factors["lora_B"] @ factors["lora_A"]
    assert torch.allclose(part.start_B @ part.start_A, product, atol=1e-5)
    residual = next(m for m in other.modules() if type(m) is nn.Linear and m.out_features == 8).weight
    assert torch.allclose(residual + part.scaling * product, layer.weight, atol=1e-5)
    assert torch.equal(ours.weight if config.name == "lora" else layer.weight, layer.weight)  # to the bit
    for module in (ours, other):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours(x), other(x), atol=1e-5) and not torch.allclose(ours(x), layer(x), atol=1e-2)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (6, 1, 3, 3), (20, 12)], ids=str)
def test_starts_of_any_weight(shape: tuple[int, ...]) -> None:
    """Of the matrix that a weight is seen as: PiSSA's product is the best approximation, OLoRA's the first part of Q R."""
    weight = torch.randn(shape, dtype=torch.double)
    matrix = weight.flatten(1)
    for init in ("pissa", "olora"):
        config = LoraConfig(r=2, init_lora_weights=init)
        layer: Any = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(6, shape[0], 3, groups=6 // shape[1])
        layer.weight = nn.Parameter(weight)
        layer = update(layer.double(), config)
        part = layer.peft_weight["lora"]
        product = part.start_B @ part.start_A
        if init == "pissa":
            u, s, v = torch.linalg.svd(matrix)
            assert torch.allclose(part.scaling * product, u[:, :2] @ s[:2].diag() @ v[:2])
            squares = part.start_B.t() @ part.start_B, part.start_A @ part.start_A.t()
            assert torch.allclose(*squares, atol=1e-6)  # the singular values are shared evenly
        else:
            q, upper = torch.linalg.qr(matrix)
            assert torch.allclose(product, q[:, :2] @ upper[:2])
        assert (part.start_B.gather(0, part.start_B.abs().argmax(0, keepdim=True)) > 0).all()
        for parameter in part.parameters():
            nn.init.normal_(parameter)
        up, down = part.start_B + part.lora_B, part.start_A + part.lora_A
        assert torch.allclose(layer.weight, weight + part.scaling * (up @ down - product).view(shape))
        base, first, second, scaling = part.factors(weight)
        assert torch.allclose(base + scaling * (first @ second).view(shape), layer.weight)


def test_starts_of_chosen_projections() -> None:
    """q and v of a fused projection start each from its own rows, k's stay the base's."""
    layer = nn.Linear(8, 12).double()
    settings = {"shape": [12, 8], "r": 2, "scaling": 2.0, "rows": [[[0, 4]], [[8, 10], [10, 12]]], "init": "pissa"}
    ours: Any = tuned(copy.deepcopy(layer), Edit("", "weight", "lora", settings))
    part = ours.peft_weight["lora"]
    assert torch.equal(ours.weight, layer.weight)
    for rows, ups, downs in ((slice(0, 4), slice(0, 4), slice(0, 2)), (slice(8, 12), slice(4, 8), slice(2, 4))):
        u, s, v = torch.linalg.svd(layer.weight[rows], full_matrices=False)
        assert torch.allclose(2.0 * part.start_B[ups] @ part.start_A[downs], u[:, :2] @ s[:2].diag() @ v[:2])
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    change = ours.weight - layer.weight
    assert not change[4:8].any() and change[:4].any() and change[8:].any()


# --------------------------------------------------------------------------------------------------------------------- SSF
def scaled(module: nn.Module, edits: tuple[Edit, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Let y -> gamma y + beta follow each edited module, as the paper writes it; returns those by module."""
    made = {}
    for edit in edits:
        gamma = torch.randn(edit.settings["outputs"], dtype=torch.double) * 0.3 + 1
        beta = torch.randn(edit.settings["outputs"], dtype=torch.double) * 0.3
        layer = module.get_submodule(edit.module)
        channels_second = isinstance(layer, nn.Conv2d | nn.BatchNorm2d | timm.layers.LayerNorm2d)
        layer = getattr(layer, "drop", layer)  # timm's BatchNorm goes on with this, and with an activation

        def follow(gamma: Tensor, beta: Tensor, shape: tuple, module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return gamma.view(shape) * y + beta.view(shape)

        made[edit.module] = gamma.requires_grad_(), beta.requires_grad_()
        layer.register_forward_hook(partial(follow, gamma, beta, (-1, 1, 1) if channels_second else (-1,)))
    return made


def assert_ssf(plain: nn.Module, plan: Plan, x: Tensor) -> None:
    """Outputs and gradients, of what SSF learns and of the input, are the formula's."""
    ours: Any = attach(copy.deepcopy(plain), plan)
    made = scaled(plain, plan.edits)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for name, (gamma, beta) in made.items():
        part = ours.get_submodule(name).peft_weight["ssf"]
        part.scale.data, part.shift.data = gamma.detach() - 1, beta.detach().clone()
    outputs = [module(given) for module, given in zip((ours, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-8, atol=1e-8)
    for name, (gamma, beta) in made.items():
        part = ours.get_submodule(name).peft_weight["ssf"]
        torch.testing.assert_close(part.scale.grad, gamma.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(part.shift.grad, beta.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merge(ours)(x), outputs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny", "convnext_atto", "swin", "mobilenetv2"])
def test_ssf_on_nets(name: str, net) -> None:
    plain = net(name).double().eval()
    plan = make_plan(make_method("ssf"), FAMILIES[NETS[name][0]]().anatomy(plain, name))
    names = {e.module for e in plan.edits}
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not path.startswith(plan.heads):
            assert (path in names) == (module.bias is not None)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d) and not path.startswith(plan.heads):
            assert path in names
    assert_ssf(plain, plan, torch.rand(2, 3, 64, 64, dtype=torch.double))


def small_net() -> tuple[nn.Module, Anatomy]:
    """A convolution without bias, its BatchNorm, and a linear layer; facts and net."""
    layers = (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    net = nn.Sequential(*layers).double().eval()
    for values in (net[1].running_mean, net[1].weight.data, net[1].bias.data):  # type: ignore[union-attr]
        nn.init.normal_(values)  # type: ignore[arg-type]
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    roles = {"0.weight": "weight", "1.weight": "norm.weight", "1.bias": "norm.bias", "4.weight": "weight", "4.bias": "bias"}
    params = tuple(Param(n, p.numel(), roles[n], 0) for n, p in net.named_parameters())
    convs = (Layer("0", "conv", (6, 3, 3, 3), 1, 0), Layer("4", "linear", (4, 54), 1, 0))
    head = (Param("head", 1, "weight", HEAD),)
    return net, Anatomy("none", "small", (Stage(0, "", "all"),), "", (), (*params, *head), convs, (), (), ())


def test_ssf_of_a_convolution_is_left_to_the_norm_behind() -> None:
    """gamma2 BN(gamma1 conv(x) + beta1) + beta2, for any gamma and beta, is what the BatchNorm's own two can be."""
    plain, anatomy = small_net()
    edits = tuple(make_method("ssf").edits(anatomy))
    assert [e.module for e in edits] == ["1", "4"]
    assert [e.module for e in make_method("ssf", {"target_modules": "conv"}).edits(anatomy)] == ["1"]
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    plan = Plan("none", "small", "ssf", {}, 0, "frozen", (), (), {}, edits, (), ())
    assert_ssf(copy.deepcopy(plain), plan, x)

    ours: Any = attach(copy.deepcopy(plain), plan)
    norm: Any = plain[1]  # type: ignore[index]
    extra = Edit("0", "weight", "ssf", {"outputs": 6, "kind": "conv"})
    made = scaled(plain, (extra, *edits))
    (g1, b1), (g2, b2), (g, b) = (made[n] for n in "014")
    with torch.no_grad():
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        ours[1].peft_weight["ssf"].scale.copy_(g1 * g2 - 1)
        through = slope * ((g1 - 1) * norm.running_mean + b1) + norm.bias
        ours[1].peft_weight["ssf"].shift.copy_(g2 * through + b2 - g1 * g2 * norm.bias)
        ours[4].peft_weight["ssf"].scale.copy_(g - 1)
        ours[4].peft_weight["ssf"].shift.copy_(b)
        torch.testing.assert_close(ours(x), plain(x))
