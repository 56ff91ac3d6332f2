"""`lean`: the gradients of plain autograd, block by block and net by net, with far less kept; all else it meets stays right.

Gradients are compared in double precision with those of the same module without lean.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import NETS, flat
from timm.layers import SqueezeExcite
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck as ResNetBottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import C2PSA, PSA, SPPF, Bottleneck, C2f, C3k2, Concat, Conv, Detect, DWConv
from ultralytics.nn.modules.block import Attention
from ultralytics.utils.torch_utils import ModelEMA

from visionpeft import lean
from visionpeft.core import class_swap
from visionpeft.core.attach import attach, detach, merge, train_mode
from visionpeft.core.method import Edit, make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.errors import ConfigError, ModelError
from visionpeft.measure import PeakBytes, SavedBytes
from visionpeft.methods.loha import Hadamard
from visionpeft.methods.lokr import Kronecker
from visionpeft.methods.lora import LoraConfig, LowRank
from visionpeft.methods.ssf import ScaleShift
from visionpeft.registry import FAMILIES

LEVELS = ("auto", "memory")
WAYS = ("frozen", "bias", "norm", "lora", "full")


# ------------------------------------------------------------------------------------------------------------- the blocks
class Sends(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward: Callable, **layers: nn.Module):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def conv_bn(act: nn.Module, width: int = 8, **conv: Any) -> nn.Module:
    """Two of them, so that the first one's output is the second one's input."""
    first = nn.Conv2d(4, width, **{"kernel_size": 3, "padding": 1, "bias": False, **conv})
    second = nn.Conv2d(width, 8, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(width), act, second, nn.BatchNorm2d(8), copy.deepcopy(act))


def top_down(m: Any, x: Tensor) -> Tensor:
    """A pyramid's head: down, up again, joined with what was before, twice read."""
    a, b = m.first(x), m.down(m.first(x))
    up = m.concat([m.up(b), a])
    y = m.mix(up)
    return m.last(m.concat([m.again(y), b])) + up.mean()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
    "identity": nn.Identity,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "mish": nn.Mish,  # not taken over
}
MAP, WIDE, TOKENS = (2, 4, 8, 8), (2, 32, 6, 6), (2, 16, 32)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"conv-bn-{name}": (lambda make=make: conv_bn(make()), MAP) for name, make in ACTIVATIONS.items()},
    "grouped": (lambda: conv_bn(nn.SiLU(), groups=2), MAP),
    "depthwise": (lambda: conv_bn(nn.SiLU(), groups=4), MAP),
    "dilated": (lambda: conv_bn(nn.ReLU(), dilation=2, padding=2), MAP),
    "strided": (lambda: conv_bn(nn.SiLU(), stride=2), (2, 4, 9, 9)),
    "reflected": (lambda: conv_bn(nn.SiLU(), padding_mode="reflect"), MAP),
    "padded by name": (lambda: conv_bn(nn.SiLU(), padding="same"), MAP),
    "conv with bias": (lambda: conv_bn(nn.SiLU(), bias=True), MAP),
    "pointwise, many channels": (lambda: nn.Sequential(Conv(130, 132, 1), Conv(132, 8, 1)), (2, 130, 4, 4)),
    "bare conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, (1, 3), bias=False)), MAP),
    "linear": (lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8, bias=False)), TOKENS),
    "linear on rows": (lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)), (6, 32)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.LayerNorm(48)), TOKENS),
    "layer norm, plain": (lambda: nn.Sequential(nn.LayerNorm(32, elementwise_affine=False), nn.Linear(32, 8)), TOKENS),
    "layer norm over a map": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm((4, 8, 8)), nn.SiLU()), MAP),
    "layer norm beside a layer": (
        lambda: Sends(
            lambda m, x: m.beside(y := m.first(x) + 100.0) + m.last(m.norm(y)) + m.beside(y.mul(2)) + m.norm(y).mean(),
            first=nn.Linear(32, 32), norm=nn.LayerNorm(32), beside=nn.Linear(32, 130), last=nn.Linear(32, 130),
        ),
        TOKENS,
    ),
    "a layer behind its input's norm": (
        lambda: Sends(
            lambda m, x: m.last(m.norm(y := m.first(x))) + m.beside(y) + m.again(m.beside(y)),
            first=nn.Linear(32, 32), norm=nn.LayerNorm(32), beside=nn.Linear(32, 130), last=nn.Linear(32, 130),
            again=nn.Linear(130, 130),
        ),
        TOKENS,
    ),
    "batch norm in one dimension": (lambda: nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU()), (6, 32)),
    "batch norm without affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), nn.SiLU(), nn.Conv2d(8, 8, 1)), MAP,
    ),
    "max pool": (lambda: nn.Sequential(Conv(4, 8, 3), nn.MaxPool2d(3, 2, 1), Conv(8, 8, 1)), MAP),
    "max pool, odd": (
        lambda: nn.Sequential(Conv(4, 8, 3), nn.MaxPool2d((2, 3), (3, 2), (1, 0), (2, 1), ceil_mode=True)), MAP,
    ),
    "max pool wider than the map": (lambda: nn.Sequential(Conv(4, 8), nn.MaxPool2d(5, 1, 2), Conv(8, 8)), (4, 4, 4, 4)),
    "max pool as wide as the map": (lambda: nn.Sequential(Conv(4, 8), nn.MaxPool2d(5, 1, 2), Conv(8, 8)), (4, 4, 5, 5)),
    "ultralytics conv": (lambda: nn.Sequential(Conv(4, 8, 3, 2), DWConv(8, 8, 3), Conv(8, 8, 1, act=False)), MAP),
    "bottleneck": (lambda: Bottleneck(32, 32), WIDE),
    "c2f": (lambda: C2f(32, 32, 2, shortcut=True), WIDE),
    "c3k2": (lambda: C3k2(32, 32, 1, c3k=True), WIDE),
    "c3k2 as c2f": (lambda: C3k2(32, 32, 1, c3k=False), WIDE),
    "sppf": (lambda: SPPF(32, 32), WIDE),
    "psa": (lambda: PSA(64, 64), (2, 64, 4, 4)),
    "c2psa": (lambda: C2PSA(128, 128), (2, 128, 3, 3)),
    "attention": (lambda: Attention(64, num_heads=2), (2, 64, 4, 4)),
    "detect": (lambda: _detect(), (2, 16, 8, 8)),
    "pyramid": (
        lambda: Sends(
            top_down, first=Conv(32, 16, 3), down=Conv(16, 32, 3, 2), up=nn.Upsample(None, 2, "nearest"), concat=Concat(1),
            mix=C2f(48, 16), again=Conv(16, 16, 3, 2), last=C3k2(48, 16),
        ),
        WIDE,
    ),
    "vit": (lambda: VitBlock(32, 2, qkv_bias=True), TOKENS),
    "vit with layer scale": (lambda: VitBlock(32, 2, qk_norm=True, init_values=0.1), TOKENS),
    "swin": (lambda: SwinTransformerBlock(32, (4, 4), 2, window_size=2, shift_size=1), (2, 4, 4, 32)),
    "convnext": (lambda: ConvNeXtBlock(16, ls_init_value=0.1), (2, 16, 6, 6)),
    "resnet": (
        lambda: nn.Sequential(
            ResNetBottleneck(32, 8, downsample=nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))),
            ResNetBottleneck(32, 8),
        ),
        WIDE,
    ),
    "mobilenet": (lambda: nn.Sequential(InvertedResidual(32, 32, act_layer=nn.ReLU6), InvertedResidual(32, 16)), WIDE),
    "efficientnet": (lambda: InvertedResidual(32, 32, act_layer=nn.SiLU, se_layer=SqueezeExcite), WIDE),
    "torch's own transformer": (lambda: nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), TOKENS),
    "a module used twice": (lambda: Sends(lambda m, x: m.conv(m.conv(x)) + m.conv(x), conv=Conv(4, 4, 3)), MAP),
}  # fmt: skip


def _detect() -> nn.Module:
    head = Detect(nc=3, ch=(16, 16))
    head.stride = torch.tensor([8.0, 16.0])
    return Sends(lambda m, x: m.head([x, F.max_pool2d(x, 2)]), head=head)


def randomised(module: nn.Module) -> nn.Module:
    """Return the module in double precision, training, with statistics and scales that are all different."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
            for p in m.parameters(recurse=False):
                if p.dim() == 1:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.double().train()


def tuned(module: nn.Module, way: str) -> nn.Module:
    """Let the part of a module train that `way` names; for LoRA, with factors that are not zero."""
    norms = {
        f"{n}.{leaf}"
        for n, m in module.named_modules()
        if isinstance(m, nn.LayerNorm | nn.modules.batchnorm._NormBase)
        for leaf in ("weight", "bias")
    }
    names = [n for n, p in module.named_parameters() if p.is_floating_point() and ".dfl." not in n]
    trains = {"frozen": lambda n: False, "lora": lambda n: False, "full": lambda n: True, "norm": norms.__contains__}
    trains["bias"] = lambda n: n.endswith("bias")
    train = tuple(n for n in names if trains[way](n))
    edits = lora(module) if way == "lora" else ()
    return filled(attach(module, Plan("none", "block", way, {}, 0, "frozen", (), train, {}, edits, (), ())))


def lora(module: nn.Module, r: int = 2) -> tuple[Edit, ...]:
    layers = {n: m for n, m in module.named_modules() if type(m) in (nn.Conv2d, nn.Linear) and ".dfl" not in n}
    return tuple(
        Edit(n, "weight", "lora", {"shape": list(m.weight.shape), "r": r, "scaling": 0.5}) for n, m in layers.items()
    )


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for part in (m for m in module.modules() if isinstance(m, LowRank)):
        for factor in (part.lora_A, part.lora_B):
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.2 / factor.shape[1] ** 0.5)
    for part in (m for m in module.modules() if isinstance(m, ScaleShift | Hadamard | Kronecker)):
        for parameter in part.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def still(module: nn.Module) -> nn.Module:
    """Freeze the running statistics."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.eval()
    return module


# --------------------------------------------------------------------------------------------------------- the comparison
def leaned(module: nn.Module, level: str = "memory") -> nn.Module:
    return lean.apply(copy.deepcopy(module), level)


def tensor(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(output: Any) -> Tensor:
    """Return a number that depends on every output, on each in its own way."""
    found = [t for t in flat(output) if t.requires_grad]
    return sum(((t * tensor(*t.shape, seed=i).to(t)).sum() for i, t in enumerate(found)), torch.zeros(()))


def simple_step(module: nn.Module, *inputs: Tensor) -> None:
    loss_of(module(*inputs)).backward()


def results(module: nn.Module, *inputs: Tensor, step: Callable = simple_step) -> dict[str, Tensor]:
    """Return what one step leaves: gradients of inputs and parameters, and the buffers; the module is then as before."""
    before = {n: b.clone() for n, b in module.named_buffers()}
    given = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    given = [x.requires_grad_(x.is_floating_point()) for x in given]
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of what a module drops by chance
    step(module, *given)
    found = {f"input {i}": x.grad for i, x in enumerate(given)}
    found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    found |= {n: b.clone() for n, b in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for n, b in module.named_buffers():
            b.copy_(before[n])
    return {k: v for k, v in found.items() if v is not None}


def assert_same(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative errors stay below the tolerance; of what is zero but for rounding, errors relative to the largest."""
    assert ours.keys() == plain.keys()
    scale = max((float(t.double().norm()) for k, t in plain.items() if k.startswith(("input", "grad"))), default=0.0)
    assert scale > 0 or not plain.get("input 0", torch.ones(1)).numel()
    for name, wanted in plain.items():
        error, size = float((ours[name].double() - wanted.double()).norm()), float(wanted.double().norm())
        bound = tolerance * size if size > 1e-12 * scale else 1e-12 * scale
        assert error <= bound, f"{name}: error {error:.1e} of {size:.1e}"


def has_statistics(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._NormBase) for m in module.modules())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str, way: str) -> None:
    make, shape = BLOCKS[kind]
    plain, x = tuned(randomised(make()), way), tensor(*shape)
    for module in (plain, still(copy.deepcopy(plain))) if has_statistics(plain) else (plain,):
        twins_of = {level: leaned(module, level) for level in LEVELS}
        outputs = copy.deepcopy(module)(x)
        wanted = results(module, x)
        for twin in twins_of.values():
            for a, b in zip(flat(copy.deepcopy(twin)(x)), flat(outputs), strict=True):
                assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
            assert_same(results(twin, x), wanted)


SMALL: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    **{name: ("yolo", NETS[name][1], 64) for name in ("yolo11n", "yolov8n", "yolo26n")},
    "resnet18": ("timm", lambda: timm.create_model("resnet18", num_classes=5), 64),
    "resnet50": ("timm", lambda: timm.create_model("resnet50", num_classes=5, layers=(1, 2, 1, 1)), 64),
    "mobilenetv2": ("timm", lambda: timm.create_model("mobilenetv2_100", num_classes=5), 64),
    "efficientnet": ("timm", lambda: timm.create_model("efficientnet_b0", num_classes=5), 64),
    "vit_tiny": ("timm", NETS["vit_tiny"][1], 64),
    "vit_small": ("timm", lambda: timm.create_model("vit_small_patch16_224", num_classes=5, img_size=32, depth=3), 32),
    "swin": ("timm", NETS["swin"][1], 64),
    "convnext": ("timm", lambda: timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 2, 1)), 64),
}


def net(name: str, method: str, bn: str | None = None, freeze: int = 0, **settings: Any) -> nn.Module:
    """Return one of the nets with a method attached, training, its statistics those of some images."""
    torch.manual_seed(0)
    family, make, _ = SMALL[name]
    model = make()
    if method == "lora":
        settings = {"r": 2, "small_layers": 0, **settings}
    plan = make_plan(make_method(method, settings), FAMILIES[family]().anatomy(model, name), freeze, bn)
    model = filled(attach(randomised(model).float(), plan)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():  # else values grow from layer to layer, and rounding with them
        model(images(SMALL[name][2]).float())
    for m in norms:
        m.momentum = 0.1
        m.running_var *= 2.0  # nor may gradients: they would in a net without training and with statistics of few images
    return train_mode(model, plan)


CASES = [(m, None, 0) for m in ("bitfit", "norm", "ssf")]
CASES += [("ssf", "train", 2), ("lora", "frozen", 0), ("lora", "train", 0), ("full", "frozen", 0), ("full", "train", 2)]


@pytest.mark.parametrize(("method", "bn", "freeze"), CASES)
@pytest.mark.parametrize("name", SMALL)
def test_nets(name: str, method: str, bn: str | None, freeze: int) -> None:
    plain = net(name, method, bn, freeze).double()
    x = torch.rand(2, 3, SMALL[name][2], SMALL[name][2], dtype=torch.float64)
    ours = {level: leaned(plain, level) for level in LEVELS}
    wanted = results(plain, x)
    for twin in ours.values():
        assert_same(results(twin, x), wanted)


OTHERS = ("adapter", "conv_adapter", "dora", "ia3", "loha", "lokr", "mona", "prefix", "side", "ssf")


@pytest.mark.parametrize(("name", "method"), [*itertools.product(("yolo11n", "vit_tiny"), OTHERS), ("vit_tiny", "prompt")])
def test_other_methods(name: str, method: str) -> None:
    plain = net(name, method).double()
    assert_same(results(leaned(plain), images()), results(plain, images()))


@pytest.mark.parametrize("fixed", [False, True], ids=["", "A fixed"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["yolo11n", "resnet50", "vit_tiny"])
def test_lora_that_starts_from_the_weight(name: str, init: str, fixed: bool) -> None:
    plain = net(name, "lora", "frozen", init_lora_weights=init, lora_fa=fixed).double()
    parts = [m for m in plain.modules() if isinstance(m, LowRank)]
    assert parts and all(len(part.products()[0][1]) == (2 if fixed else 4) for part in parts)
    x, ours = images(SMALL[name][2]), {level: leaned(plain, level) for level in LEVELS}
    wanted = results(plain, x)
    for twin in ours.values():
        assert_same(results(twin, x), wanted)


def images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ whole steps
def driving(method: str) -> nn.Module:
    """Return the detector that ships, trained, with a method attached: random weights learn too wildly to compare."""
    model = FAMILIES["yolo"]().load("scenes/driving.pt").model
    plan = make_plan(make_method(method), FAMILIES["yolo"]().anatomy(model, "driving"))
    return train_mode(attach(model, plan), plan)


def losses(model: Any, rate: float, steps: int = 20) -> list[float]:
    """Train and return the losses: Ultralytics' own, or the cross-entropy."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 3, 64, 64, generator=generator)
    batch = {
        "img": x,
        "batch_idx": torch.tensor([0.0, 0, 1, 1]),
        "cls": torch.tensor([[0.0], [1], [2], [1]]),
        "bboxes": torch.rand(4, 4, generator=generator) * 0.3 + 0.3,
    }
    model.args = get_cfg()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    found = []
    for _ in range(steps):
        loss = model(batch)[0].sum() if hasattr(model, "stride") else F.cross_entropy(model(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("name", "method", "rate"),  # at higher rates the detector's assignment of boxes flips between runs without lean, too
    [("driving", "lora", 3e-5), ("driving", "full", 1e-5), ("vit_tiny", "lora", 1e-4), ("vit_tiny", "full", 1e-4)],
)
def test_twenty_steps(name: str, method: str, rate: float) -> None:
    plain = driving(method) if name == "driving" else net(name, method)
    ours = {level: losses(leaned(plain, level), rate) for level in LEVELS}
    wanted = losses(plain, rate)
    assert wanted[-1] < 0.95 * wanted[0]
    for found in ours.values():
        assert found == pytest.approx(wanted, rel=1e-3)


def halves(precision: torch.dtype) -> Callable:
    """Return a step under autocast."""

    def step(model: nn.Module, *inputs: Tensor) -> None:
        with torch.autocast("cpu", precision):
            loss = loss_of(model(*inputs))
        loss.backward()

    return step


def distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    return sum(float((found[k].double() - v).square().sum()) for k, v in exact.items() if k.startswith("grad")) ** 0.5


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize(
    "kind", ["depthwise", "c2f", "c2psa", "pyramid", "vit", "swin", "convnext", "resnet", "efficientnet"]
)
def test_autocast(kind: str, way: str, precision: torch.dtype) -> None:
    """No further from the exact gradient than autocast itself, on average, and in the same types."""
    make, shape = BLOCKS[kind]
    plain = still(tuned(randomised(make()), way)).float()
    twins_of = {level: leaned(plain, level) for level in LEVELS}
    errors: dict[str, float] = dict.fromkeys(("off", *LEVELS), 0.0)
    for seed in range(4):
        x = tensor(*shape, seed=seed).float()
        exact = results(copy.deepcopy(plain).double(), x.double())
        theirs = results(plain, x, step=halves(precision))
        errors["off"] += distance(theirs, exact)
        for level, twin in twins_of.items():
            ours = results(twin, x, step=halves(precision))
            assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
            errors[level] += distance(ours, exact)
    with torch.autocast("cpu", precision):
        assert [t.dtype for t in flat(twins_of["memory"](x))] == [t.dtype for t in flat(plain(x))]
    assert all(0 < errors[level] <= 1.25 * errors["off"] for level in LEVELS)


CEILINGS = [  # of what "auto" and "memory" save at these sizes, as shares of what autograd does: measured, and 5 % of it
    ("yolo11n", "lora", "frozen", 0.335, 0.115),
    ("yolo11n", "full", "train", 0.99, 0.35),
    ("resnet50", "bitfit", "frozen", 0.028, 0.028),
    ("resnet50", "lora", "frozen", 0.165, 0.135),
    ("mobilenetv2", "lora", "frozen", 0.435, 0.225),
    ("vit_small", "lora", "frozen", 0.023, 0.015),
    ("swin", "full", "train", 1.05, 0.53),
    ("vit_tiny", "mona", "frozen", 1.13, 0.75),
    ("swin", "conv_adapter", "frozen", 1.12, 0.735),
    ("convnext", "lora", "frozen", 0.26, 0.146),
]


@pytest.mark.parametrize(("name", "method", "bn", "auto", "memory"), CEILINGS)
def test_less_is_kept(name: str, method: str, bn: str, auto: float, memory: float) -> None:
    """Less is saved, and nothing is kept beside what is saved."""
    plain, x = net(name, method, bn), torch.rand(2, 3, SMALL[name][2], SMALL[name][2])
    saved = {}
    for level, model in {"off": plain, **{level: leaned(plain, level) for level in LEVELS}}.items():
        model(x)  # what is decided once
        with PeakBytes() as peak, SavedBytes(model, x) as kept:
            out = model(x)
        saved[level] = kept.bytes
        if level != "off":
            assert peak.live <= 1.02 * kept.bytes + size_of(out)
        del out
    assert saved["auto"] <= auto * saved["off"]
    assert saved["memory"] <= memory * saved["off"]


def size_of(output: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat(output)}.values())


@pytest.mark.parametrize("name", SMALL)
def test_report(name: str) -> None:
    size = SMALL[name][2]
    model = leaned(net(name, "lora"))
    report = lean.report(model, torch.rand(2, 3, size, size))
    assert 0.95 <= report.share <= 1
    assert str(report).count("\n") >= 2 and sum(report.taken.values()) > 0
    with pytest.raises(ConfigError, match="not lean"):
        lean.report(lean.remove(model))


# ---------------------------------------------------------------------------------------- what else a model goes through
def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_keys_outputs_and_levels() -> None:
    plain = net("yolo11n", "lora").double()
    model = leaned(plain, "auto")
    assert lean.applied(model) == "auto" and lean.applied(plain) is None
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    with torch.no_grad():
        for a, b in zip(flat(model(images())), flat(plain(images())), strict=True):
            assert torch.equal(a, b), "without gradients it is the plain forward, bit for bit"
    for a, b in zip(flat(model.eval()(images())), flat(plain.eval()(images())), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    assert type(lean.remove(model)) is type(plain) and lean.applied(model) is None
    assert lean.remove(model) is model, "without effect"
    assert model.__dict__.keys() == plain.__dict__.keys()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_stay_lean(way: Callable[[nn.Module], nn.Module]) -> None:
    model = leaned(net("resnet18", "lora").double())
    wanted = results(model, images())
    twin = way(model)
    assert lean.applied(twin) == "memory"
    lean.remove(model)
    assert lean.applied(twin) == "memory"
    assert_same(results(twin, images()), wanted)
    assert lean.report(twin, images()).taken


def test_a_moving_average_follows() -> None:
    model = leaned(net("yolo11n", "full"))
    ema = ModelEMA(model)
    before = copy.deepcopy(ema.ema.state_dict())
    loss_of(model(images().float())).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    ema.update(model)
    assert any(not torch.equal(v, before[k]) for k, v in ema.ema.state_dict().items())
    with torch.no_grad():
        assert flat(ema.ema.eval()(images().float()))


def test_what_goes_in_and_comes_out_is_plain() -> None:
    """After backward nothing of a step lives on: not by recipes on what goes in or out, not by the graph, not as garbage."""
    model, x = leaned(net("yolo11n", "lora")), images().float()
    model(x)
    gc.collect()
    gc.disable()
    try:
        with PeakBytes() as peak:
            out = model(x)
            loss = loss_of(out)
            loss.backward()
            model.zero_grad(set_to_none=True)
        assert peak.live <= size_of(out) + 1024
    finally:
        gc.enable()
    for t in (x, *model.parameters(), *model.buffers(), *flat(out)):
        assert not t.__dict__ or set(t.__dict__) <= {"_is_param"}
    buffer = io.BytesIO()
    torch.save((x, out), buffer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_inside(reentrant: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.inner, m.first(x), use_reentrant=reentrant))

    plain = still(tuned(randomised(Sends(forward, first=Conv(4, 8, 3), inner=C2f(8, 8), last=Conv(8, 8, 1))), "full"))
    assert_same(results(leaned(plain), tensor(*MAP)), results(plain, tensor(*MAP)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_around(reentrant: bool) -> None:
    plain = still(tuned(randomised(conv_bn(nn.SiLU())), "full"))

    def step(model: nn.Module, x: Tensor) -> None:
        loss_of(checkpoint(model, x, use_reentrant=reentrant)).backward()

    assert_same(results(leaned(plain), tensor(*MAP), step=step), results(plain, tensor(*MAP), step=step))


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_timm_checkpointing(name: str) -> None:
    plain: Any = net(name, "lora").double()
    wanted = results(plain, images())
    plain.set_grad_checkpointing()
    assert_same(results(leaned(plain), images()), results(plain, images()))
    gradients = {k: v for k, v in wanted.items() if k.startswith(("input", "grad"))}
    assert_same({k: v for k, v in results(leaned(plain), images()).items() if k in gradients}, gradients)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    plain = tuned(randomised(BLOCKS["c2f"][0]()), "full")
    wanted, model = results(plain, tensor(*WIDE)), leaned(plain)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    ours = results(model, tensor(*WIDE), step=lambda m, x: loss_of(compiled(x)).backward())
    assert_same(ours, wanted)


def test_functional_calls_and_transforms() -> None:
    plain = still(tuned(randomised(conv_bn(nn.SiLU())), "full"))
    x, values = tensor(*MAP), {k: v.detach() for k, v in plain.named_parameters()}

    def loss(model: nn.Module, parameters: dict) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    wanted = torch.func.grad(lambda p: torch.func.functional_call(plain, p, (x,)).sum())(values)
    ours = torch.func.grad(lambda p: torch.func.functional_call(leaned(plain), p, (x,)).sum())(values)
    assert all(torch.allclose(ours[k], wanted[k], rtol=1e-10) for k in values)
    replaced = {k: (v * 1.5).requires_grad_() for k, v in values.items()}
    a = torch.autograd.grad(loss(plain, replaced), list(replaced.values()))
    b = torch.autograd.grad(loss(leaned(plain), replaced), list(replaced.values()))
    assert all(torch.allclose(s, t, rtol=1e-9, atol=1e-11) for s, t in zip(b, a, strict=True))


WORKER = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from visionpeft import lean
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1)).double()
x = torch.randn(2, 2, 3, 9, 9, dtype=torch.float64)
def gradients(model):
    model.zero_grad()
    model(x[rank]).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]
wanted = gradients(DDP(net))
ours = gradients(DDP(lean.apply(net)))
assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(ours, wanted))
alone = gradients(net)
assert not torch.allclose(alone[0], ours[0])  # those of both processes
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_traced_and_exported(tmp_path: Path) -> None:
    plain = net("resnet18", "lora").eval()
    model, x = leaned(plain), images().float()
    with torch.no_grad():
        wanted = plain(x)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert torch.allclose(traced(x), wanted, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        torch.onnx.export(model, (x,), str(tmp_path / "net.onnx"), dynamo=False)
    assert (tmp_path / "net.onnx").stat().st_size > 1e5


def test_fused_by_ultralytics() -> None:
    model = leaned(net("yolo11n", "lora").double()).eval()
    with torch.no_grad():
        before = flat(model(images()))
        fused: Any = copy.deepcopy(model).fuse(verbose=False)
        after = flat(fused(images()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(after, before, strict=True))
    x = images().requires_grad_()
    loss_of(fused(x)).backward()  # and its frozen BatchNorms, no longer there, are not looked for
    assert x.grad is not None


ORDERS = [
    order
    for end in ("merge", "detach")
    for order in itertools.permutations(("attach", "apply", end, "remove"))
    if order.index("attach") < order.index(end) and order.index("apply") < order.index("remove")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("kind", ["conv", "linear", "yolo11n", "vit_tiny"])
def test_every_order(kind: str, order: tuple[str, ...]) -> None:
    """Attach, lean, merge or detach, remove: at each point, the gradients are those of plain autograd."""
    bare = {"conv": (nn.Conv2d(4, 8, 3), MAP), "linear": (nn.Linear(32, 8), TOKENS)}
    model = bare[kind][0].double() if kind in bare else randomised(SMALL[kind][1]())
    x = tensor(*bare[kind][1]) if kind in bare else images(32 if kind == "yolo11n" else 64)
    method = FAMILIES[SMALL[kind][0]]() if kind in SMALL else None
    plan = (
        make_plan(LoraConfig(r=2, small_layers=0), method.anatomy(model, kind))
        if method
        else Plan("none", kind, "lora", {}, 0, "frozen", (), (), {}, _bare_edits(model), (), ())
    )
    base, original = copy.deepcopy(model.state_dict()), type(model)
    plain = copy.deepcopy(model)
    for change in order:
        for one in (model, plain):
            if change == "attach":
                filled(attach(one, plan))
            elif change == "merge":
                merge(one)
            elif change == "detach":
                detach(one, base)
        if change == "apply":
            lean.apply(model)
        elif change == "remove":
            lean.remove(model)
        assert_same(results(still(model), x), results(still(plain), x))
    assert type(model) is original and model.state_dict().keys() == base.keys()
    assert not any(class_swap.mixins(type(m)) for m in model.modules())


def _bare_edits(layer: Any) -> tuple[Edit, ...]:
    return (Edit("", "weight", "lora", {"shape": list(layer.weight.shape), "r": 2, "scaling": 0.5}),)


def test_two_backwards_and_accumulation() -> None:
    def twice(m: nn.Module, x: Tensor) -> None:
        loss = loss_of(m(x))
        loss.backward(retain_graph=True)
        loss.backward()
        loss_of(m(x * 2)).backward()

    for name in ("yolo11n", "vit_tiny"):
        plain = net(name, "lora").double()
        for level in LEVELS:
            assert_same(results(leaned(plain, level), images(), step=twice), results(plain, images(), step=twice))


def test_second_derivatives_are_refused() -> None:
    """Better loud than wrong: the backward of lean cannot itself be differentiated."""
    model, x = leaned(tuned(randomised(conv_bn(nn.SiLU())), "full")), tensor(*MAP).requires_grad_()
    with pytest.raises(ModelError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_part_of_the_gradients() -> None:
    plain = still(tuned(randomised(conv_bn(nn.SiLU())), "lora"))
    for name in [n for n, p in plain.named_parameters() if p.requires_grad]:
        found = []
        for model in (plain, leaned(plain)):
            found.append(torch.autograd.grad(loss_of(model(tensor(*MAP))), dict(model.named_parameters())[name])[0])
        assert torch.allclose(found[1], found[0], rtol=1e-10, atol=1e-14)
    only_up = copy.deepcopy(plain)  # LoRA-FA: A is frozen
    for part in (m for m in only_up.modules() if isinstance(m, LowRank)):
        part.lora_A.requires_grad_(False)
    assert_same(results(leaned(only_up), tensor(*MAP)), results(only_up, tensor(*MAP)))


# -------------------------------------------------------------------------------------------------------------- bad input
def test_bad_calls() -> None:
    model = lean.apply(conv_bn(nn.SiLU()), "auto")
    with pytest.raises(ConfigError, match="lean already"):
        lean.apply(model)
    with pytest.raises(ConfigError, match="'fast'.*auto"):
        lean.apply(conv_bn(nn.SiLU()), "fast")
    with pytest.raises(ConfigError, match="not lean"):
        lean.report(conv_bn(nn.SiLU()), torch.zeros(MAP))


@pytest.mark.parametrize("kind", ["conv-bn-silu", "c2f"])
@pytest.mark.parametrize("on", [nn.Conv2d, nn.BatchNorm2d, nn.SiLU])
@pytest.mark.parametrize("where", ["forward", "pre", "backward", "everywhere"])
def test_hooks_see_the_right_values(kind: str, on: type, where: str) -> None:
    make, shape = BLOCKS[kind]
    plain = still(tuned(randomised(make()), "bias"))
    seen: list[dict[str, list[Tensor]]] = []
    for model in (plain, leaned(plain)):
        notes: dict[str, list[Tensor]] = {}
        seen.append(notes)

        def note(name: str, notes: dict = notes) -> Callable:
            return lambda module, *values: notes.setdefault(name, []).extend(
                t.detach().clone() for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)
            )

        handles = []
        for name, m in model.named_modules():
            if isinstance(m, on):
                if where == "forward":
                    handles.append(m.register_forward_hook(note(name)))
                elif where == "pre":
                    handles.append(m.register_forward_pre_hook(note(name)))
                elif where == "backward":
                    handles.append(m.register_full_backward_hook(note(name)))
        if where == "everywhere":
            every = note("all")
            handles.append(
                nn.modules.module.register_module_forward_hook(
                    lambda m, *v, every=every: every(m, *v) if isinstance(m, on) else None
                )
            )
        try:
            results(model, tensor(*shape))
        finally:
            for handle in handles:
                handle.remove()
    assert seen[0].keys() == seen[1].keys() and seen[0]
    for name, values in seen[0].items():
        assert len(values) == len(seen[1][name])
        for a, b in zip(seen[1][name], values, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


class Scales(nn.BatchNorm2d):
    """A BatchNorm of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Doubles(nn.Conv2d):
    """A convolution of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2)


class Remembers(nn.Module):
    """What it keeps is read by someone else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.conv(x)
        return self.bn(self.seen)


def _without_grad_tracking(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = F.silu(m.b(m.a(x))).flatten(1).reshape(x.shape)
    return m.c(torch.cat([y.clone(), x], 1)) + y.mean()


def _each_layer(m: Any, x: Tensor) -> Tensor:
    """Passes the container and reads what is between its layers."""
    total = x.new_zeros(())
    for layer in m.layers:
        x = layer(x)
        total = total + x.cos().mean()
    return x + total


def _pairs_of_lists(m: Any, x: Tensor) -> Tensor:
    for conv, bn in zip(m.convs, m.bns, strict=True):
        x = F.relu(bn(conv(x)))
    return m.last(x)


def _shared_weight() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3))
    module[3].weight = module[0].weight
    return module


def _shared_conv() -> nn.Module:
    block = conv_bn(nn.SiLU())
    return Sends(lambda m, x: m.block(x) + m.alone(x), block=block, alone=nn.Sequential(block[0], nn.Conv2d(8, 8, 1)))


def _shared_block() -> nn.Module:
    block = conv_bn(nn.SiLU(), 4)
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(block[0], block[1]), nn.SiLU(), nn.Sequential(block[0], block[1]))


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "no running statistics": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.SiLU(), nn.Conv2d(8, 8, 1)
    ),
    "a cumulative average": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.SiLU()),
    "another kind of BatchNorm": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), Scales(8), nn.SiLU()),
    "a weight used twice": _shared_weight,
    "a convolution used with and without BatchNorm": _shared_conv,
    "a convolution and its BatchNorm used twice": _shared_block,
    "a BatchNorm used twice": lambda: Sends(
        lambda m, x: m.bn(m.b(F.relu(m.bn(m.a(x))))), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)
    ),
    "the convolution's output read twice": lambda: Sends(
        lambda m, x: m.bn(y := m.a(x)) + y, a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)
    ),
    "BatchNorm only at times": lambda: Sends(
        lambda m, x: m.bn(m.a(x)) if x.shape[1] > 9 else m.a(x), a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8), nn.SiLU()
    ),
    "a parameter as input": lambda: Sends(
        lambda m, x: m.linear(F.gelu(m.tokens[0])).sum() + m.linear(m.tokens[0]).mean() + m.conv(x),
        tokens=nn.ParameterList([torch.ones(3, 8)]), linear=nn.Linear(8, 4), conv=Conv(4, 4, 3),
    ),
    "a frozen stretch without gradients": lambda: Sends(_half_frozen, a=Conv(4, 8, 3), b=Conv(8, 8, 3), c=Conv(8, 8, 1)),
    "cat by axis": lambda: Sends(lambda m, x: m.b(torch.cat((y := m.a(x), y), axis=1)), a=Conv(4, 8, 3), b=Conv(16, 8, 1)),
    "cat into": lambda: Sends(
        lambda m, x: m.b(torch.concat([m.a(x), x], dim=1)), a=Conv(4, 8, 3), b=Conv(12, 8, 1)
    ),
    "sums with factors": lambda: Sends(
        lambda m, x: m.b(torch.add(y := m.a(x), y, alpha=3) + 1 + y * 2), a=Conv(4, 8, 3), b=Conv(8, 8, 1)
    ),
    "sums that broadcast": lambda: Sends(
        lambda m, x: m.b((y := m.a(x)) + y.mean((2, 3), keepdim=True)), a=Conv(4, 8, 3), b=Conv(8, 8, 1)
    ),
    "one-dimensional and transposed": lambda: Sends(
        lambda m, x: m.t(F.silu(m.a(x.flatten(2)))), a=nn.Conv1d(4, 8, 3), t=nn.ConvTranspose1d(8, 4, 2)
    ),
    "unbatched": lambda: Sends(lambda m, x: m.c(F.relu(F.max_pool2d(m.c(x[0]), 2))), c=nn.Conv2d(4, 4, 3, padding=1)),
    "bilinear": lambda: Sends(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")), a=Conv(4, 8, 3), b=Conv(8, 8, 1)
    ),
    "up to a size": lambda: Sends(
        lambda m, x: m.b(F.interpolate(m.a(x), size=(11, 13))), a=Conv(4, 8, 3), b=Conv(8, 8, 1)
    ),
    "infinite gradients where ReLU is zero": lambda: Sends(
        lambda m, x: m.b(F.relu6(m.a(x)).sqrt() + F.relu(m.a(x)).sqrt()), a=Conv(4, 8, act=nn.Identity()), b=Conv(8, 8)
    ),
    "arguments by name": lambda: Sends(
        lambda m, x: m.b(torch.flatten(input=torch.chunk(input=F.silu(m.a(x)), chunks=2, dim=1)[0], start_dim=2)),
        a=Conv(4, 8), b=nn.Linear(64, 5),
    ),
    "a stretch in inference mode": lambda: Sends(
        _without_grad_tracking, a=Conv(4, 8), b=Conv(8, 4), c=Conv(8, 4)
    ),
    "another kind of convolution": lambda: nn.Sequential(Conv(4, 4), Doubles(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU()),
    "what a block remembers": lambda: Sends(
        lambda m, x: m.c(m.block(x)) + m.block.seen.mean(), block=Remembers(), c=nn.Conv2d(4, 4, 1)
    ),
    "lists of layers": lambda: Sends(
        _pairs_of_lists, convs=nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]),
        bns=nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), last=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    ),
    "what is between the layers of a container": lambda: Sends(
        _each_layer, layers=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
    ),
    "strides by hand": lambda: Sends(lambda m, x: m.a(x).as_strided((2, 36), (8 * 36, 8)), a=nn.Conv2d(4, 8, 3)),
    "dropout on tokens laid out as a map": lambda: Sends(
        lambda m, x: F.dropout(m.b(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 0.5), a=Conv(4, 8), b=nn.Linear(8, 4)
    ),
    "dropout": lambda: nn.Sequential(Conv(4, 8, 3), nn.Dropout(0.5), Conv(8, 8, 3), nn.Dropout2d(0.5), Conv(8, 8, 1)),
}  # fmt: skip


def test_lists_of_layers_are_folded() -> None:
    model = leaned(still(tuned(randomised(UNUSUAL["lists of layers"]()), "frozen")))
    assert lean.report(model, tensor(*MAP)).folded == 3


def test_large_gradients_in_half_precision() -> None:
    """A shift's gradient is a sum over images and places, beyond what half precision holds; a BatchNorm's is in single."""
    plain = still(tuned(randomised(nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Identity())), "bias")).float()
    plain[0].requires_grad_(False)
    apart = nn.Sequential(plain[0], nn.ReLU(), plain[1])  # not folded

    def step(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", torch.float16):
            y = model(x)
        y.float().mul(4096).sum().backward()

    x = tensor(2, 4, 8, 8).float()
    for module in (plain, apart):
        wanted = results(module, x, step=step)
        assert all(torch.isfinite(t).all() for t in wanted.values())
        for level in LEVELS:
            assert_same(results(leaned(module, level), x, step=step), wanted, 1e-2)


def test_forward_derivatives_and_meta_tensors() -> None:
    """What is neither recorded nor computed runs as it is."""
    plain, x = still(tuned(randomised(conv_bn(nn.SiLU())), "full")), tensor(*MAP)
    tangents = []
    for model in (plain, leaned(plain)):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert torch.equal(*tangents)
    assert leaned(plain).to("meta")(x.to("meta")).shape == plain(x).shape


def test_folds_hold_while_training_and_not() -> None:
    """A forward may differ between the two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(y := m.a(x)) + (0.0 if m.training else y)

    plain = still(tuned(randomised(Sends(forward, a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))), "bias"))
    model = leaned(plain)
    assert_same(results(model.eval(), tensor(*MAP)), results(plain.eval(), tensor(*MAP)))


def test_a_forward_put_in_place_of_the_class_s() -> None:
    plain = still(tuned(randomised(nn.Sequential(conv_bn(nn.SiLU()), conv_bn(nn.SiLU(), 8)[3])), "bias"))
    model = leaned(plain)
    for m in (plain, model):
        m[0].forward = lambda x, m=m[0]: m[2](m[1](y := m[0](x)) + y)
    assert_same(results(model, tensor(*MAP)), results(plain, tensor(*MAP)))


def test_lora_with_dropout_on_frozen_statistics() -> None:
    """Such a layer reads its weight in two parts, so its BatchNorm is not folded into the first."""
    module = randomised(nn.Sequential(conv_bn(nn.SiLU()), nn.Conv2d(8, 4, 1)))
    edits = tuple(Edit(e.module, e.point, e.method, {**e.settings, "dropout": 0.3}) for e in lora(module))
    plain = still(filled(attach(module, Plan("none", "block", "lora", {}, 0, "frozen", (), (), {}, edits, (), ()))))
    for level in LEVELS:
        assert_same(results(leaned(plain, level), tensor(*MAP)), results(plain, tensor(*MAP)))
    assert lean.report(leaned(plain).eval(), tensor(*MAP)).folded == 2


def test_a_folded_weight_read_elsewhere_is_refused() -> None:
    """What cannot be seen before is refused with a sentence, never wrong."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.block(x) + F.conv2d(x, m.block[0].weight, padding=1).mean()

    model = leaned(still(tuned(randomised(Sends(forward, block=conv_bn(nn.SiLU()))), "bias")))
    with pytest.raises(ModelError, match="BatchNorm"):
        model(tensor(*MAP))


def _half_frozen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.b(m.a(x))
    return m.c(y) + x.mean()


# a delta on a shared or computed weight is another matter
ONE_LAYER = [k for k in UNUSUAL if not ("twice" in k or "weight" in k or "spectral" in k)]


@pytest.mark.parametrize(
    ("kind", "way"), [*itertools.product(UNUSUAL, ("full", "bias", "frozen")), *((k, "lora") for k in ONE_LAYER)]
)
def test_unusual_modules(kind: str, way: str) -> None:
    module = randomised(UNUSUAL[kind]())
    plain = tuned(module, way)
    for one in (plain, still(copy.deepcopy(plain))):
        twins_of = [leaned(one, level) for level in LEVELS]
        wanted = results(one, tensor(*MAP))
        for twin in twins_of:
            assert_same(results(twin, tensor(*MAP)), wanted)


def _changed_part(m: Any, x: Tensor) -> Tensor:
    a = F.silu(m.a(x))
    joined = torch.cat([a, x], 1)
    a.mul_(2.0)
    return m.c(joined) + m.b(a)


def _changed_bare_part(m: Any, x: Tensor) -> Tensor:
    a, extra = F.silu(m.a(x)), torch.sin(x)
    joined = torch.cat([a, extra], 1)
    y = m.c(joined)
    extra.mul_(3.0)
    return y + m.b(a) + extra.mean()


def _changed_piece(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    p, q = y[:, :4], y.narrow(1, 4, 4)
    p.mul_(2.0)
    return m.b(torch.cat([p, q], 1))


def _changed_index(m: Any, x: Tensor) -> Tensor:
    order = torch.arange(8)
    y = F.silu(m.a(x))[:, order]
    order.zero_()
    return m.b(y)


def _changed_before_use(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.silu(y) + F.silu(y * 2)
    z += 1.0
    return m.b(z)


def _changed_through_a_view(m: Any, x: Tensor) -> Tensor:
    z = F.silu(m.a(x)) + 0.0
    z[:, :2] = 1.5
    return m.b(z)


def _activated_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    doubled = y + y
    return m.b(F.relu_(doubled)) + m.b(F.silu(y, inplace=True))


def _skipped_in_place(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    z = m.b(y)
    z += y
    return m.b(F.relu(z, inplace=True))


def _changed_by_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(y.shape[0], -1).add_(1.0)
    return m.b(y)


def _changed_data(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    z = y + y
    z.data.clamp_(max=0.2)
    return m.b(z)


def _assigned_data(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    z = y + y
    z.data = z.detach() * 3
    return m.b(z)


CHANGES = [
    _changed_data,
    _assigned_data,
    _changed_by_a_view,
    _changed_part,
    _changed_bare_part,
    _changed_piece,
    _changed_index,
    _changed_before_use,
    _changed_through_a_view,
]
CHANGES += [_activated_in_place, _skipped_in_place]


@pytest.mark.parametrize("way", ["full", "lora", "frozen"])
@pytest.mark.parametrize("forward", CHANGES)
def test_changes_in_place(forward: Callable, way: str) -> None:
    """What is rebuilt from a tensor that changed since would be wrong: it is right, or refused as autograd refuses it."""
    layers = {"a": nn.Conv2d(4, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(12, 8, 3, padding=1)}
    plain = tuned(randomised(Sends(forward, **layers)), way)
    try:
        wanted = results(plain, tensor(*MAP))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        wanted = None
    for level in LEVELS:
        try:
            ours = results(leaned(plain, level), tensor(*MAP))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error) and wanted is None
        else:
            if wanted is not None:
                assert_same(ours, wanted)


@pytest.mark.parametrize("kind", ["conv-bn-relu", "c3k2", "vit", "max pool", "mobilenet"])
def test_parameters_changed_before_backward(kind: str) -> None:
    """An optimizer steps between forward and backward: the gradients of the forward, or autograd refuses."""
    make, shape = BLOCKS[kind]
    for way in ("bias", "norm", "lora", "full"):
        plain, x = still(tuned(randomised(make()), way)), tensor(*shape)

        def late(m: nn.Module, x: Tensor) -> None:
            loss = loss_of(m(x))
            with torch.no_grad():
                for p in m.parameters():
                    if p.requires_grad:
                        p.mul_(1.5)
            loss.backward()

        wanted = results(copy.deepcopy(plain), x)
        try:
            ours = results(leaned(plain), x, step=late)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert_same(ours, wanted)


@pytest.mark.parametrize("kind", ["conv-bn-silu", "conv-bn-relu", "depthwise", "max pool", "c2f", "mobilenet", "pyramid"])
def test_channels_last(kind: str) -> None:
    make, shape = BLOCKS[kind]
    plain = tuned(randomised(make()), "full").to(memory_format=torch.channels_last)
    x = tensor(*shape).to(memory_format=torch.channels_last)
    assert_same(results(leaned(plain), x), results(plain, x))
    outputs = [flat(m(x))[0].is_contiguous(memory_format=torch.channels_last) for m in (plain, leaned(plain))]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", ["conv-bn-silu", "bare conv", "c2f", "detect", "resnet"])
def test_outputs_lie_in_memory_as_without_lean(kind: str) -> None:
    """A loss may view them in another shape."""
    make, shape = BLOCKS[kind]
    plain = tuned(randomised(make()), "full")
    outputs = [flat(model(tensor(*shape))) for model in (leaned(plain), plain)]
    assert [t.stride() for t in outputs[0]] == [t.stride() for t in outputs[1]]


@pytest.mark.parametrize(
    "kind", ["conv-bn-silu", "conv-bn-relu in place", "max pool", "linear", "layer norm", "c2f", "convnext"]
)
def test_empty_batches(kind: str) -> None:
    make, shape = BLOCKS[kind]
    plain = still(tuned(randomised(make()), "full"))
    x = torch.zeros(0, *shape[1:], dtype=torch.float64)
    assert_same(results(leaned(plain), x), results(plain, x))


def test_odd_inputs() -> None:
    embedding = Sends(lambda m, x: m.linear(m.table(x)), table=nn.Embedding(5, 32), linear=nn.Sequential(VitBlock(32, 2)))
    plain, x = tuned(randomised(embedding), "full"), torch.tensor([[0, 3, 1], [4, 4, 2]])
    assert_same(results(leaned(plain), x), results(plain, x))
    named = Sends(lambda m, batch: m.conv(batch["img"]) * batch["scale"], conv=Conv(4, 8, 3))
    plain = tuned(randomised(named), "full")

    def step(m: nn.Module, x: Tensor) -> None:
        loss_of(m({"img": x, "scale": 2.0})).backward()

    assert_same(results(leaned(plain), tensor(*MAP), step=step), results(plain, tensor(*MAP), step=step))


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise KeyError("one")
        return m.conv(x)

    plain = tuned(randomised(Sends(forward, conv=Conv(4, 8, 3))), "full")
    model = leaned(plain)
    with pytest.raises(KeyError):
        model(tensor(1, *MAP[1:]))
    with SavedBytes(plain) as kept:
        F.relu(tensor(*MAP).requires_grad_())
    assert kept.bytes == 2 * 4 * 8 * 8 * 8, "torch is itself again"
    assert_same(results(model, tensor(*MAP)), results(plain, tensor(*MAP)))


def test_lean_within_lean() -> None:
    plain = still(tuned(randomised(nn.Sequential(C2f(32, 32), Conv(32, 8, 3))), "full"))
    model = leaned(plain)
    lean.apply(model[0])
    assert_same(results(model, tensor(*WIDE)), results(plain, tensor(*WIDE)))
    lean.remove(model)
    assert_same(results(model, tensor(*WIDE)), results(plain, tensor(*WIDE)))


@pytest.mark.parametrize("change", ["other BatchNorm", "no BatchNorm", "other convolution", "training", "learning"])
def test_changed_after_it_was_made_lean(change: str) -> None:
    plain = still(tuned(randomised(nn.Sequential(C2f(32, 32), Conv(32, 8, 3))), "bias"))
    model = leaned(plain)
    results(model, tensor(*WIDE))
    for m in (model, plain):
        conv = m[0].cv1
        torch.manual_seed(0)
        if change == "other BatchNorm":
            conv.bn = randomised(nn.BatchNorm2d(conv.bn.num_features, eps=0.1)).eval()
        elif change == "no BatchNorm":
            conv.bn = nn.Identity()
        elif change == "other convolution":
            conv.conv = nn.Conv2d(32, conv.bn.num_features, 3, padding=1).double()
        elif change == "training":
            conv.bn.train()
        else:
            conv.bn.weight.requires_grad_(True)
    assert_same(results(model, tensor(*WIDE)), results(plain, tensor(*WIDE)))
