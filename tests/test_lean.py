"""`lean`: the gradients of plain autograd, block by block and net by net, with far less kept; whatever else it meets stays right.

Gradients are compared in double precision with those of the same module without lean.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import C2PSA, PSA, SPPF, Bottleneck, C2f, C3k2, Concat, Conv, Detect, DWConv
from ultralytics.nn.modules.block import Attention
from ultralytics.utils.torch_utils import ModelEMA

from visionpeft import lean, twins
from visionpeft.attach import attach, detach, merge, train_mode
from visionpeft.errors import ConfigError
from visionpeft.measure import PeakBytes, SavedBytes
from visionpeft.methods.base import make_method
from visionpeft.methods.lora import LoraConfig, LowRank
from visionpeft.plan import Edit, Plan, make_plan
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

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


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
    "batch norm in one dimension": (lambda: nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU()), (6, 32)),
    "batch norm without affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), nn.SiLU(), nn.Conv2d(8, 8, 1)), MAP,
    ),
    "max pool": (lambda: nn.Sequential(Conv(4, 8, 3), nn.MaxPool2d(3, 2, 1), Conv(8, 8, 1)), MAP),
    "max pool, odd": (lambda: nn.Sequential(Conv(4, 8, 3), nn.MaxPool2d((2, 3), (3, 2), (1, 0), (2, 1), ceil_mode=True)), MAP),
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
        part.lora_B.data.copy_(torch.randn(part.lora_B.shape, generator=generator) * 0.2)
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


def results(module: nn.Module, *inputs: Tensor, step: Callable = lambda m, *x: loss_of(m(*x)).backward()) -> dict[str, Tensor]:
    """Return what one step leaves: gradients of inputs and parameters, and the buffers."""
    given = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    given = [x.requires_grad_(x.is_floating_point()) for x in given]
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of what a module drops by chance
    step(module, *given)
    found = {f"input {i}": x.grad for i, x in enumerate(given)}
    found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return {**{k: v for k, v in found.items() if v is not None}, **{n: b.clone() for n, b in module.named_buffers()}}


def assert_same(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative errors stay below the tolerance; of what is zero but for rounding, errors relative to the largest."""
    assert ours.keys() == plain.keys()
    scale = max((float(t.double().norm()) for k, t in plain.items() if k.startswith(("input", "grad"))), default=0.0)
    assert scale > 0 or not any(k.startswith(("input", "grad")) and t.numel() for k, t in plain.items())
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
    """Return one of the nets with a method attached, training."""
    torch.manual_seed(0)
    family, make, _ = SMALL[name]
    model = make()
    if method == "lora":
        settings = {"r": 2, "small_layers": 0, **settings}
    plan = make_plan(make_method(method, settings), FAMILIES[family]().anatomy(model, name), freeze, bn)
    model = filled(attach(randomised(model).float(), plan))
    return train_mode(model, plan)


CASES = [(m, None, 0) for m in ("bitfit", "norm")]
CASES += [("lora", "frozen", 0), ("lora", "train", 0), ("full", "frozen", 0), ("full", "train", 2)]


@pytest.mark.parametrize(("method", "bn", "freeze"), CASES)
@pytest.mark.parametrize("name", SMALL)
def test_nets(name: str, method: str, bn: str | None, freeze: int) -> None:
    plain = net(name, method, bn, freeze).double()
    x = torch.rand(2, 3, SMALL[name][2], SMALL[name][2], dtype=torch.float64)
    ours = {level: leaned(plain, level) for level in LEVELS}
    wanted = results(plain, x)
    for twin in ours.values():
        assert_same(results(twin, x), wanted)


@pytest.mark.parametrize("method", ["adapter", "dora", "ia3", "prefix", "prompt", "side"])
@pytest.mark.parametrize("name", ["yolo11n", "vit_tiny"])
def test_other_methods(name: str, method: str) -> None:
    if name == "yolo11n" and method == "prompt":
        pytest.skip("prompts are for tokens")
    plain = net(name, method).double()
    assert_same(results(leaned(plain), images()), results(plain, images()))


def images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ whole steps
def losses(model: Any, steps: int) -> list[float]:
    """Train with Ultralytics' loss, or the cross-entropy, and return the losses."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 3, 64, 64, generator=generator)
    batch = {
        "img": x,
        "batch_idx": torch.tensor([0.0, 0, 1, 1]),
        "cls": torch.tensor([[0.0], [1], [2], [3]]),
        "bboxes": torch.rand(4, 4, generator=generator) * 0.3 + 0.3,
    }
    model.args = get_cfg()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    found = []
    for _ in range(steps):
        loss = model(batch)[0].sum() if hasattr(model, "stride") else F.cross_entropy(model(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "method"), [("yolo11n", "lora"), ("yolo11n", "full"), ("resnet18", "lora"), ("vit_tiny", "lora")])
def test_twenty_steps(name: str, method: str) -> None:
    plain = net(name, method)
    ours = {level: losses(leaned(plain, level), 20) for level in LEVELS}
    wanted = losses(plain, 20)
    assert len({round(x, 3) for x in wanted}) > 15, "it learns"
    for found in ours.values():
        assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "method", "bn", "most"),
    [("yolo11n", "lora", "frozen", 0.5), ("yolo11n", "full", "train", 0.5), ("resnet50", "bitfit", None, 0.05), ("vit_small", "lora", None, 0.5)],
)
def test_less_is_kept(name: str, method: str, bn: str | None, most: float) -> None:
    """Ceilings of what is saved, and nothing is kept beside that."""
    plain = net(name, method, bn)
    saved, x = {}, torch.rand(2, 3, 64 if SMALL[name][2] == 64 else 32, 64 if SMALL[name][2] == 64 else 32)
    for level, model in {"off": plain, **{level: leaned(plain, level) for level in LEVELS}}.items():
        model(x)  # what is decided once
        with PeakBytes() as peak, SavedBytes(model, x) as kept:
            out = model(x)
        saved[level] = kept.bytes
        outputs = sum(t.untyped_storage().nbytes() for t in flat(out))
        if level != "off":
            assert peak.live <= 1.02 * kept.bytes + outputs
        del out
    assert saved["memory"] <= most * saved["off"]
    assert saved["memory"] <= saved["auto"] <= saved["off"]


@pytest.mark.parametrize("name", SMALL)
def test_report(name: str) -> None:
    size = SMALL[name][2]
    model = leaned(net(name, "lora"))
    report = lean.report(model, torch.rand(2, 3, size, size))
    assert 0.95 <= report.share <= 1
    assert str(report).count("\n") >= 2 and sum(report.taken.values()) > 0
    with pytest.raises(ConfigError, match="not lean"):
        lean.report(lean.remove(model))
