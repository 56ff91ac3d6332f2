"""Modules that are added to blocks, against their papers' formulas written out plainly; where they go; what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import timm
import torch
from conftest import NETS, flat
from test_lean import assert_same, leaned, results, tensor
from torch import Tensor, nn
from torch.nn import functional as F

from visionpeft.core.anatomy import Anatomy
from visionpeft.core.attach import attach, train_mode
from visionpeft.core.method import Combined, make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.errors import ConfigError, ModelError
from visionpeft.families.timm.anatomy import input_size
from visionpeft.families.timm.family import Timm
from visionpeft.methods._blocks import Layout
from visionpeft.methods.conv_adapter import ConvAdapter
from visionpeft.methods.lora import LoraConfig
from visionpeft.registry import FAMILIES


def anatomy(model: nn.Module, name: str) -> Anatomy:
    return FAMILIES[NETS[name][0]]().anatomy(model, name)


def planned(model: nn.Module, name: str, method: str, **settings: Any) -> Plan:
    return make_plan(make_method(method, settings), anatomy(model, name))


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if "peft_" in n)


def filled(model: nn.Module) -> nn.Module:
    """Give every added parameter a value of its own, none of them zero or one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in parts(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


@pytest.fixture
def pair(net) -> Callable[..., tuple[Any, Any]]:
    """Returns a net with a method on it, its parts filled, and the same without; both in double precision."""

    def make(name: str, method: str, **settings: Any) -> tuple[Any, Any]:
        model = net(name)
        plan = planned(model, name, method, **settings)
        return filled(attach(model, plan)).double().eval(), net(name).double().eval()

    return make


def agree(ours: Tensor, wanted: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Check that two results are the same, and the gradients of `parameters` through both; every one of these counts."""
    assert torch.allclose(ours, wanted, rtol=1e-10, atol=1e-10)
    weights = tensor(*wanted.shape)
    grads = [torch.autograd.grad((y * weights).sum(), list(parameters.values())) for y in (ours, wanted)]
    for name, one, other in zip(parameters, *grads, strict=True):
        assert other.abs().max() > 0 and torch.allclose(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max())), name


def vit(model: Any, x: Tensor, block: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
    """Run a vision transformer, its blocks by a function of their index, themselves and their tokens."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, own in enumerate(model.blocks):
        x = block(i, own, x)
    return model.forward_head(model.norm(x))


# -------------------------------------------------------------------------------------------------------------- adapters
def mix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "adaptformer"])
def test_adapters_in_a_transformer(placement: str, pair, images) -> None:
    model, plain = pair("vit_tiny", "adapter", placement=placement, scaling=0.7)

    def bottleneck(module: Any, x: Tensor, act: Callable) -> Tensor:
        part = module.peft_output["adapter"]
        return 0.7 * mix(act(mix(x, part.down.weight, part.down.bias)), part.up.weight, part.up.bias)

    def block(i: int, own: Any, x: Tensor) -> Tensor:
        edited = model.blocks[i]
        h = own.attn(own.norm1(x))
        if placement == "houlsby":  # Houlsby et al. 2019, figure 2: after both sublayers, each with a skip of its own
            h = h + bottleneck(edited.attn, h, F.gelu)
        x = x + h
        h = own.mlp(own.norm2(x))
        if placement == "adaptformer":  # Chen et al. 2022, equations 3 and 4: beside the MLP, of the same normalised input
            return x + h + bottleneck(edited.mlp, own.norm2(x), F.relu)
        return x + h + bottleneck(edited.mlp, h, F.gelu)

    agree(model(images.double()), vit(plain, images.double(), block), dict(parts(model)))


@pytest.mark.parametrize("deep", [False, True])
def test_prompts(deep: bool, pair, images) -> None:
    """Jia et al. 2022, equations 4 to 8: [class, prompts, image], which attention does not tell from our order."""
    model, plain = pair("vit_tiny", "prompt", num_virtual_tokens=3, deep=deep)

    def block(i: int, own: Any, x: Tensor) -> Tensor:
        if i == 0 or deep:
            prompt = model.blocks[i].peft_input["prompt"].prompt.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], prompt, x[:, 1 if i == 0 else 4 :]], 1)
        x = own(x)
        return torch.cat([x[:, :1], x[:, 4:]], 1) if i == len(plain.blocks) - 1 else x

    agree(model(images.double()), vit(plain, images.double(), block), dict(parts(model)))


# ---------------------------------------------------------------------------------------------------------- conv adapters
BLOCKS = {  # net, block, what it reads
    "C3k2": ("yolo11n", "model.4", (2, 64, 6, 10)),
    "C2f of several maps": ("yolov8n", "model.12", (2, 384, 6, 10)),
    "SPPF": ("yolov8n", "model.9", (2, 256, 4, 6)),
    "C2PSA": ("yolo11n", "model.10", (2, 256, 4, 6)),
    "resnet, stride 2": ("resnet18", "layer2.0", (2, 64, 7, 10)),
    "inverted residual": ("mobilenetv2", "blocks.2.0", (2, 8, 8, 8)),
    "convnext": ("convnext_atto", "stages.2.blocks.1", (2, 160, 6, 4)),
    "swin": ("swin", "layers.1.blocks.1", (2, 8, 8, 48)),
    "vit": ("vit_tiny", "blocks.1", (2, 17, 192)),
}
LAYOUTS: dict[str, tuple[Callable, Callable]] = {  # to a map and back; tokens less the first
    "swin": (lambda x: x.permute(0, 3, 1, 2), lambda y: y.permute(0, 2, 3, 1)),
    "vit": (lambda x: x[:, 1:].permute(0, 2, 1).reshape(len(x), -1, 4, 4), lambda y: y.flatten(2).permute(0, 2, 1)),
}


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Convolve group by group."""
    size = weight.shape[1]
    groups = [
        F.conv2d(x[:, i * size : (i + 1) * size], weight[i : i + 1], bias[i : i + 1], stride, weight.shape[-1] // 2)
        for i in range(len(weight))
    ]
    return torch.cat(groups, 1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weight.flatten(1), x) + bias[:, None, None]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_conv_adapter(kind: str, placement: str, pair) -> None:
    """Chen et al. 2022, equation 2: h + alpha * (W_up pointwise f(W_down depthwise x)), x what the block reads or h."""
    name, path, shape = BLOCKS[kind]
    model, plain = pair(name, "conv_adapter", placement=placement, kernel_size=5, reduction_factor=8)
    block, x = model.get_submodule(path), tensor(*shape).requires_grad_()
    part, h = block.peft_output["conv_adapter"], plain.get_submodule(path)(x)
    to_map, back = LAYOUTS.get(kind, (lambda x: x, lambda y: y))
    source = to_map(x if placement == "parallel" else h)
    stride = math.ceil(source.shape[2] / to_map(h).shape[2])
    assert part.down.out_channels == max(source.shape[1] // 8, 4)
    narrow = F.relu(depthwise(source, part.down.weight, part.down.bias, stride))
    delta = back(part.alpha[:, None, None] * pointwise(narrow, part.up.weight, part.up.bias))
    wanted = torch.cat([h[:, :1], h[:, 1:] + delta], 1) if kind == "vit" else h + delta
    agree(block(x), wanted, {"x": x, **dict(part.named_parameters())})


def test_as_many_groups_as_divide_the_channels(net) -> None:
    plan = planned(net("convnext_atto"), "convnext_atto", "conv_adapter", reduction_factor=3)
    assert [e.settings["bottleneck"] for e in plan.edits] == [10, 20, 40, 40, 80]  # of 40, 80, 160, 160, 320 channels
    for edit in plan.edits:
        edit.build()


def test_where_a_block_reads_no_one_map(net) -> None:
    """Parallel stands behind it, as sequential does."""
    read = anatomy(net("resnet18"), "resnet18")
    blocks = tuple(dataclasses.replace(b, inputs=0) if b.name == "layer2.0" else b for b in read.blocks)
    plan = make_plan(make_method("conv_adapter"), dataclasses.replace(read, blocks=blocks))
    assert [e.module for e in plan.edits if not e.settings["parallel"]] == ["layer2.0"]
    assert {e.settings["inputs"] for e in plan.edits if e.module == "layer2.0"} == {128}


def test_sizes_that_a_block_rounds_down() -> None:
    part = ConvAdapter(8, 4, 8, 3, 2, True, "NCHW").double()
    nn.init.normal_(part.up.weight)
    given, output = tensor(1, 8, 7, 9), tensor(1, 8, 3, 4)
    whole = part(tensor(1, 8, 4, 5) * 0, given)
    assert torch.allclose(part(output, given), output + whole[..., :3, :4])


# ------------------------------------------------------------------------------------------------------------------ Mona
def mona(part: Any, x: Tensor, to_map: Callable, back: Callable) -> Tensor:
    """Yin et al. 2023, equations 4 to 7, of features whose channels come last."""
    x = part.s1 * F.layer_norm(x, x.shape[-1:], part.norm.weight, part.norm.bias, part.norm.eps) + part.s2 * x
    h = mix(x, part.down.weight, part.down.bias)
    m = to_map(h)
    m = m + sum(depthwise(m, conv.weight, conv.bias) for conv in part.convs) / 3
    m = back(m + pointwise(m, part.projector.weight, part.projector.bias))
    h = F.gelu(torch.cat([h[:, :1], m], 1) if h.dim() == 3 else m)
    return mix(h, part.up.weight, part.up.bias)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_mona(kind: str, pair) -> None:
    name, path, shape = BLOCKS[kind]
    model, plain = pair(name, "mona")
    block, own, x = model.get_submodule(path), plain.get_submodule(path), tensor(*shape).requires_grad_()
    ways = LAYOUTS.get(kind, LAYOUTS["swin"])
    if kind not in LAYOUTS:
        part, h = block.peft_output["mona"], own(x)
        wanted = h + mona(part, last(h), *ways).permute(0, 3, 1, 2)
    else:  # figure 3: after attention and after the MLP
        part = block.peft_forward["mona"]
        h = x + (own._attn if kind == "swin" else own.attn)(own.norm1(x))
        h = h + mona(part.attn, h, *ways)
        h = h + own.mlp(own.norm2(h))
        wanted = h + mona(part.mlp, h, *ways)
    agree(block(x), wanted, {"x": x, **dict(part.named_parameters())})


def test_mona_drops_while_training_only(pair, images) -> None:
    model, plain = pair("vit_tiny", "mona", mona_dropout=0.5)
    x, modes = images.double(), {m.training for m in attach(plain, model.peft.plan).modules()}
    assert modes == {False}  # what is attached to a net in eval mode is in eval mode, too
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    for part in model.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.0
    assert torch.equal(model(x), model(x))


# ------------------------------------------------------------------------------------------------------- where they stand
@pytest.mark.parametrize("method", ["adapter", "conv_adapter", "mona"])
@pytest.mark.parametrize(
    ("name", "blocks", "chosen"),
    [
        ("yolov8n", "C2f", [f"model.{i}" for i in (2, 4, 6, 8, 12, 15, 18, 21)]),
        ("yolo11n", "C3k2|C2PSA", [f"model.{i}" for i in (2, 4, 6, 8, 10, 13, 16, 19, 22)]),
        ("yolo26n", "SPPF", ["model.9"]),
        ("resnet18", "layer[34].*", ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]),
        ("convnext_atto", r"stages\.2\..*", ["stages.2.blocks.0", "stages.2.blocks.1"]),
        ("swin", r"layers\.0.*", ["layers.0.blocks.0"]),
        ("vit_tiny", r"blocks\.[02]", ["blocks.0", "blocks.2"]),
    ],
)
def test_chosen_blocks(method: str, name: str, blocks: str, chosen: list[str], net, images) -> None:
    model = net(name)
    before = flat(model(images))
    plan = planned(model, name, method, blocks=blocks)
    places = {e.module.removesuffix(".mlp") for e in plan.edits}
    assert places == set(chosen) and len(plan.edits) == len(chosen)
    attach(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(flat(model(images)), before, strict=True))  # nothing changes at the start
    filled(model)
    assert not torch.allclose(flat(model(images))[0], before[0])


def test_what_blocks_say_of_themselves(net) -> None:
    def fact(name: str, of: str) -> dict[str, Any]:
        return {b.name: getattr(b, of) for b in anatomy(net(name), name).blocks}

    assert fact("resnet18", "stride")["layer3.0"] == 2 and fact("resnet18", "inputs")["layer3.0"] == 128
    assert set(fact("vit_tiny", "grid").values()) == {(4, 4)} and set(fact("vit_tiny", "leading").values()) == {1}
    assert fact("swin", "norm")["layers.1.blocks.0"] == "layers.1.blocks.0.norm2"
    assert not any(fact("convnext_atto", "norm").values()) and set(fact("convnext_atto", "cls").values()) == {
        "ConvNeXtBlock"
    }


@pytest.mark.parametrize(
    ("name", "options", "norms", "grid", "leading"),
    [
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1}, True, (2, 4), 1),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "block_fn": "post"}, False, (4, 4), 1),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}, True, (4, 4), 2),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1}, True, (4, 4), 1),
        ("mixer_s32_224", {}, True, (7, 7), 0),
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, True, (56, 56), 0),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4)},
            False,
            (0, 0),
            0,
        ),
        ("cait_xxs24_224", {"img_size": 64, "depth": 1}, True, (4, 4), 0),  # its class token joins after the blocks
    ],
)
def test_mona_finds_the_sum_in_the_middle(name: str, options: dict, norms: bool, grid: tuple, leading: int) -> None:
    """In blocks that normalise before each sublayer, not behind: there it stands at the output alone."""
    if options.get("block_fn"):
        options = {**options, "block_fn": timm.models.vision_transformer.ResPostBlock}
    model = timm.create_model(name, num_classes=5, **options)
    read = Timm().anatomy(model, name)
    first = read.blocks[0]
    assert (bool(first.norm), first.grid, first.leading) == (norms, grid, leading)
    plan = make_plan(make_method("mona"), read)
    assert plan.edits[0].point == ("forward" if norms else "output")
    assert filled(attach(model, plan))(torch.rand(2, *input_size(model))).shape == (2, 5)


# ------------------------------------------------------------------------------------------------------ shapes and layouts
METHODS = [("conv_adapter", {"placement": "parallel"}), ("conv_adapter", {"placement": "sequential"}), ("mona", {})]


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("name", ["yolo11n", "resnet18", "convnext_atto", "swin", "vit_tiny"])
def test_lean_keeps_results(method: str, settings: dict, name: str, pair) -> None:
    model, _ = pair(name, method, **settings)
    plan = model.peft.plan
    train_mode(model, plan)
    x = tensor(2, 3, 64, 64)
    wanted = results(model, x)
    assert sum("peft_" in n for n in wanted) == len(dict(parts(model)))
    for level in ("auto", "memory"):
        assert_same(results(leaned(model, level), x), wanted)


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize(("name", "size"), [("yolo11n", (64, 96)), ("yolov8n", (96, 32)), ("resnet18", (75, 50))])
def test_images_that_are_not_square(method: str, settings: dict, name: str, size: tuple, net) -> None:
    model, x = net(name), torch.rand(2, 3, *size)
    before = [t.shape for t in flat(model(x))]
    filled(attach(model, planned(model, name, method, **settings)))
    assert [t.shape for t in flat(model(x))] == before


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("name", ["yolo11n", "resnet18", "swin", "vit_tiny"])
def test_autocast_and_channels_last(method: str, settings: dict, name: str, net, images) -> None:
    plain = net(name).eval()
    model = filled(attach(net(name), planned(plain, name, method, **settings))).eval()
    wanted = flat(model(images))
    turned = model.to(memory_format=torch.channels_last)
    x = images.contiguous(memory_format=torch.channels_last)
    for one, other in zip(flat(turned(x)), wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * max(1.0, float(other.detach().abs().max())))
    plain(images)  # Ultralytics keeps the anchors of the first
    with torch.autocast("cpu", torch.bfloat16):
        halves, own = flat(turned(x)), flat(plain(images))
    assert [t.dtype for t in halves] == [t.dtype for t in own]
    sum(t.float().mean() for t in halves).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in parts(turned))


@pytest.mark.parametrize("method", ["conv_adapter", "mona"])
def test_other_sizes_of_a_sequence(method: str) -> None:
    options = {"num_classes": 5, "img_size": 64, "depth": 2, "dynamic_img_size": True}
    model: Any = timm.create_model("vit_tiny_patch16_224", **options).double().eval()
    plan = make_plan(make_method(method), Timm().anatomy(model, "vit"))
    filled(attach(model, plan)).double()
    block, x = model.blocks[0], tensor(1, 1 + 6 * 6, 192)
    turned = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (6, 6)).flip(2).flatten(1, 2)], 1)
    assert not torch.allclose(block(x), block(turned))  # neighbours count
    assert model(tensor(1, 3, 96, 96)).shape == (1, 5)
    with pytest.raises(ModelError, match="32 tokens are no map of the shape 4 x 4"):
        model(tensor(1, 3, 64, 128))


def test_layouts_lead_there_and_back() -> None:
    for layout, x in (
        (Layout("NCHW"), tensor(2, 3, 4, 5)),
        (Layout("NHWC"), tensor(2, 4, 5, 3)),
        (Layout("NLC", 2, (4, 5)), tensor(2, 22, 3)),
        (Layout("NLC", 0, (4, 5)), tensor(2, 80, 3)),  # twice as high and wide
    ):
        assert layout.to_map(x).shape[1] == 3 and torch.equal(layout.over(lambda m: m * 1, x), x)


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        ("conv_adapter", {"kernel_size": 4}, "kernel_size=4 is even.*give 3, 5 or 7"),
        ("conv_adapter", {"kernel_size": 0}, "kernel_size=0 is out of range; it must be between 1 and 31"),
        ("conv_adapter", {"placement": "beside"}, "placement='beside' is not known; it is parallel or sequential"),
        ("conv_adapter", {"reduction_factor": 0}, "reduction_factor=0 is out of range"),
        ("mona", {"reduction_factor": 0}, "reduction_factor=0 is out of range"),
        ("mona", {"mona_dropout": 1.0}, "mona_dropout=1.0 is out of range; it must be between 0.0 and 0.99"),
        ("mona", {"blocks": "C3k3"}, "blocks='C3k3' matches none of its 10 blocks.*classes, C2PSA, C3k2, SPPF\\. With"),
        ("adapter", {"blocks": "(("}, "'\\(\\(' is not a regular expression"),
        ("prefix", {"num_virtual_tokens": 900}, "=900 is more than twice the 400 keys that an attention.*give at most 800"),
        ("lora+lora", {}, "method 'lora\\+lora' names a method twice; name each once"),
        ("prompt+mona", {}, "'prompt' adds tokens to the sequence that 'mona' takes for a map; use one of the two"),
    ],
)
def test_settings_that_cannot_be(method: str, settings: dict, sentence: str, net) -> None:
    with pytest.raises(ConfigError, match=sentence) as said:
        planned(net("yolo11n"), "yolo11n", method, **settings)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("method", "count", "most"), [("prompt", 35, 34), ("prefix", 35, 34), ("prompt", 1000, 34), ("prefix", 1000, 34)]
)
def test_more_prompts_than_tokens(method: str, count: int, most: int, net) -> None:
    model = net("vit_tiny")
    with pytest.raises(
        ConfigError, match=f"num_virtual_tokens={count} is more than twice the 17 .* own; give at most {most}$"
    ):
        planned(model, "vit_tiny", method, num_virtual_tokens=count)
    assert planned(model, "vit_tiny", method, num_virtual_tokens=most).edits


@pytest.mark.parametrize("method", ["adapter", "conv_adapter", "mona"])
@pytest.mark.parametrize(("channels", "said"), [(1, "1 channel,"), (3, "3 channels,")])
def test_blocks_too_narrow_for_an_adapter(method: str, channels: int, said: str) -> None:
    model = timm.create_model("resnet18", num_classes=5, channels=(channels, 8, 8, 8))
    read = Timm().anatomy(model, "resnet18")
    with pytest.raises(ConfigError, match=f"{method}: layer1.0 has {said} but the bottleneck of an adapter has at least 4"):
        make_plan(make_method(method), read)
    assert make_plan(make_method(method, {"blocks": "layer[34].*"}), read).edits


def test_configurations_combined_with_themselves() -> None:
    with pytest.raises(ConfigError, match="'lora\\+lora' names a method twice"):
        Combined((LoraConfig(), LoraConfig(r=8)))
    nested = Combined((Combined((LoraConfig(), make_method("norm"))), make_method("mona")))
    assert [m.name for m in nested.parts] == ["lora", "norm", "mona"] == list(nested.settings())
    with pytest.raises(ConfigError, match="twice"):
        Combined((nested, LoraConfig()))
    with pytest.raises(ConfigError, match="names none"):
        Combined(())
