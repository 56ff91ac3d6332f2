"""Plans are values: what trains, where edits go, and what stays still, for every way of saying so."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import NETS, seen

from visionpeft.core.anatomy import HEAD, Anatomy, Layer, Param, Stage
from visionpeft.core.attach import attach, train_mode
from visionpeft.core.method import Edit, Method, fields_of, make_method, parameters
from visionpeft.core.plan import Plan, make_plan
from visionpeft.errors import ConfigError
from visionpeft.families.base import Family
from visionpeft.methods.lokr import LokrConfig, divide
from visionpeft.methods.lora import LoraConfig
from visionpeft.registry import FAMILIES, METHODS


def test_fields_of_a_method_without_source_have_no_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prompt", ModuleType("prompt"))
    names: dict[str, Any] = {"__name__": "prompt", "Method": Method, "dataclass": dataclass}
    exec("@dataclass(frozen=True)\nclass Mine(Method):\n    strength: float = 1.0  # how much\n", names)
    assert fields_of(names["Mine"]) == [("strength", "float", 1.0, "")]


@pytest.fixture
def anatomy(net):
    def read(name: str) -> Anatomy:
        family: Family = FAMILIES[NETS[name][0]]()
        return family.anatomy(net(name), name)

    return read


def frozen_stages(plan: Plan) -> list[int]:
    return [i for i, row in enumerate(plan.rows[:-1]) if row.params and not row.trained and not row.added]


@pytest.mark.parametrize(
    ("freeze", "stages"),
    [(0, []), (3, [0, 1, 2]), ([1, 4], [1, 4]), (["model.2"], [2]), (["2", 5], [2, 5]), ("model.7", [7])],
)
def test_ways_to_freeze(freeze, stages, anatomy) -> None:
    assert frozen_stages(make_plan(make_method("full"), anatomy("yolo11n"), freeze)) == stages


@pytest.mark.parametrize("freeze", [["0.bn"], ["model.0.bn"]])
def test_a_frozen_name_keeps_its_statistics_still(freeze, net, images) -> None:
    """Where Ultralytics freezes the scale and shift of "0.bn" but lets its statistics drift."""
    model = net("yolo11n")
    plan = make_plan(make_method("full"), FAMILIES["yolo"]().anatomy(model, "x"), freeze)
    assert plan.still == ("model.0.bn",) and not {"model.0.bn.weight", "model.0.bn.bias"} & set(plan.train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_mode(attach(model, plan), plan)(images)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith("model.0.bn") for k in moved)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_outside_the_head_follow_bn(method: str, anatomy) -> None:
    body = {s.name for s in anatomy("yolo11n").statistics if s.stage >= 0}
    if method == "prompt":
        return  # fits no convolutional net
    tuning, known = make_method(method), seen(anatomy("yolo11n"))
    trained = body - set(tuning.moving(known))  # by some methods only in part of the body
    for bn, still in (("frozen", body), ("train", trained), (None, body if tuning.bn == "frozen" else trained)):
        assert set(make_plan(tuning, known, bn=bn).still) == still


def test_no_method_means_full_where_freeze_is_given() -> None:
    assert make_method(None).name == "lora" and make_method(None, freeze=10).name == "full"
    assert make_method(None, freeze=["model.0"]).name == "full" and make_method("lora", freeze=10).name == "lora"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prompt"])
def test_a_plan_survives_json(method: str, anatomy) -> None:
    plan = make_plan(make_method(method), seen(anatomy("yolo11n")), [0, "model.3"])
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and str(again) == str(plan) and len([e.build() for e in again.edits]) == len(plan.edits)


def test_the_table_adds_up(anatomy) -> None:
    plan = make_plan(LoraConfig(), anatomy("yolo11n"))
    assert plan.total == sum(p.numel for p in anatomy("yolo11n").params) == plan.body + plan.rows[-1].params
    text = str(plan)
    assert (
        f"{plan.trained_body:,}" in text
        and f"{plan.trained_head:,}" in text
        and all(len(x) <= 125 for x in text.splitlines())
    )


# ------------------------------------------------------------------------------------------------------ what LoRA targets
def edited(config: LoraConfig, anatomy: Anatomy) -> dict[str, dict]:
    return {e.module: dict(e.settings) for e in make_plan(config, anatomy).edits}


def test_groups_of_targets(anatomy) -> None:
    vit, cnn = anatomy("vit_tiny"), anatomy("yolo11n")
    assert {n.rpartition(".")[2] for n in edited(LoraConfig(target_modules="attention", small_layers=0.0), vit)} == {
        "qkv",
        "proj",
    }
    assert set(edited(LoraConfig(target_modules="conv", small_layers=0.0), vit)) == {"patch_embed.proj"}
    assert all(".attn." in n for n in edited(LoraConfig(target_modules="attention", small_layers=0.0), cnn))
    assert len(edited(LoraConfig(r=2, small_layers=0.0), cnn)) > 60 and not any(
        n.startswith("model.23") for n in edited(LoraConfig(), cnn)
    )


def test_names_endings_and_patterns(anatomy) -> None:
    vit = anatomy("vit_tiny")
    assert set(edited(LoraConfig(target_modules=("fc1",)), vit)) == {f"blocks.{i}.mlp.fc1" for i in range(3)}
    assert set(edited(LoraConfig(target_modules=("blocks.1.attn.qkv",)), vit)) == {"blocks.1.attn.qkv"}
    assert set(edited(LoraConfig(target_modules=r"blocks\.[01]\.attn\.proj", small_layers=0.0), vit)) == {
        "blocks.0.attn.proj",
        "blocks.1.attn.proj",
    }


def test_ranks_and_scalings_by_pattern(anatomy) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8.0, rank_pattern={r".*\.qkv": 2}, alpha_pattern={r"blocks\.0.*": 1.0}, small_layers=0.0
    )
    made = edited(config, anatomy("vit_tiny"))
    assert made["blocks.1.attn.qkv"]["r"] == 2 and made["blocks.1.attn.qkv"]["scaling"] == 4.0
    assert made["blocks.0.mlp.fc1"]["r"] == 4 and made["blocks.0.mlp.fc1"]["scaling"] == 0.25
    stabilised = edited(LoraConfig(r=4, lora_alpha=8.0, use_rslora=True, small_layers=0.0), anatomy("vit_tiny"))
    assert stabilised["blocks.0.mlp.fc1"]["scaling"] == 8.0 / math.sqrt(4)


@pytest.mark.parametrize("name", ["vit_tiny", "swin", "yolo11n"])
def test_chosen_projections_change_alone(name: str, net, images) -> None:
    """q and v of a fused projection: the rows of k stay the base's, in timm's order and in Ultralytics' per-head order."""
    model = net(name)
    read = FAMILIES[NETS[name][0]]().anatomy(model, name)
    plan = make_plan(LoraConfig(r=2, target_modules="attention", qkv="qv", oversize="skip", small_layers=0.0), read)
    layers = {x.name: x for x in read.layers if x.slices}
    assert layers
    attach(model, plan)
    for name_ in layers.keys() & {e.module for e in plan.edits}:
        layer = model.get_submodule(name_)
        torch.nn.init.normal_(layer.peft_weight["lora"].lora_B)
        changed = (layer.weight - layer._parameters["weight"]).flatten(1).abs().sum(1) > 0
        for projection, spans in layers[name_].slices.items():
            rows = torch.cat([changed[a:b] for a, b in spans])
            assert rows.all() if projection in "qv" else not rows.any()
        assert sum(b - a for spans in layers[name_].slices.values() for a, b in spans) == len(changed)


def test_a_layer_no_larger_than_its_update_trains_itself(anatomy) -> None:
    depthwise = [x for x in anatomy("mobilenetv1").layers if x.groups > 1]
    plan = make_plan(LoraConfig(r=16), anatomy("mobilenetv1"))
    assert all(f"{x.name}.weight" in plan.train for x in depthwise) and not {x.name for x in depthwise} & {
        e.module for e in plan.edits
    }
    assert (
        plan.rate(f"{depthwise[0].name}.weight") == 1.0
        and plan.rate(f"{plan.edits[0].prefix}.lora_A") == LoraConfig.lr_scale
    )
    skipped = make_plan(LoraConfig(r=16, oversize="skip", small_layers=0.0), anatomy("mobilenetv1"))
    assert not {f"{x.name}.weight" for x in depthwise} & set(skipped.train)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "resnet18"])
def test_the_smallest_layers_train_themselves(name: str, anatomy) -> None:
    read = anatomy(name)
    plan = make_plan(LoraConfig(), read)
    sizes = {f"{x.name}.weight": math.prod(x.shape) for x in read.layers}
    small = {n: s for n, s in sizes.items() if n in plan.train}
    assert 0 < sum(small.values()) <= 0.055 * plan.body and max(small.values()) < min(sizes[n] for n in sizes.keys() - small)
    assert plan.trained_body <= 0.1 * plan.body
    norms = {p.name for p in read.body if p.role.startswith("norm")}
    assert norms <= set(plan.train)
    bare = make_plan(LoraConfig(r=2, small_layers=0.0, train_norms=False), read)
    assert all(p.startswith(bare.heads) for p in bare.train) and len(bare.edits) == len(sizes)


# ---------------------------------------------------------------------------------------------- what LoKr and SSF target
def test_a_kronecker_product_divides_both_sides(anatomy) -> None:
    """yolo11n's 1x1 convolution of 256 to 256 channels: 16 by 16 each; by 4: 4 and 64, where rank 8 is fewer numbers."""
    layer = next(x for x in anatomy("yolo11n").layers if x.shape == (256, 256, 1, 1))
    config = LokrConfig()
    assert config.part(layer)["sizes"] == [[16, 16], [16, 16]] and config.part(layer)["low"] == [False, False]
    assert config.cost(layer) == 2 * 16 * 16
    config = LokrConfig(r=4, decompose_factor=4, decompose_both=True)
    assert config.part(layer)["sizes"] == [[4, 4], [64, 64]] and config.part(layer)["low"] == [False, True]
    assert config.cost(layer) == 16 + 4 * 128 == parameters(Edit("", "weight", "lokr", config.part(layer)))
    assert [divide(n) for n in (1, 7, 12, 48)] == [(1, 1), (1, 7), (3, 4), (6, 8)]
    assert [divide(n, 5) for n in (10, 12, 4)] == [(5, 2), (3, 4), (2, 2)]


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("name", ["yolo11n", "mobilenetv1", "vit_tiny"])
def test_the_cost_of_an_update_is_its_parameters(method: str, name: str, anatomy) -> None:
    config, read = make_method(method, {"small_layers": 0.0}), anatomy(name)
    layers = {x.name: x for x in read.layers}
    edits = config.edits(read)
    assert edits and all(config.cost(layers[e.module]) == parameters(e) < math.prod(layers[e.module].shape) for e in edits)


@pytest.mark.parametrize("settings", [{"lora_alpha": 0.0}, {"alpha_pattern": {"model.3.*": "8"}}], ids=str)
def test_an_alpha_that_cannot_scale(settings: dict, anatomy) -> None:
    with pytest.raises(ConfigError, match=r"lora: alpha=.* \(of model.*\) cannot scale an update; give a number above 0"):
        make_method("lora", settings).edits(anatomy("yolo11n"))


def test_ssf_edits_norms_in_their_own_stage(anatomy) -> None:
    plan = make_plan(make_method("ssf"), anatomy("yolo11n"), 10)
    norms = {p.name.rpartition(".")[0] for p in anatomy("yolo11n").body if p.role == "norm.weight" and p.stage >= 10}
    assert {e.module for e in plan.edits} == norms and plan.num_frozen_stages == 10
    assert plan.trained_body == sum(p.numel for p in anatomy("yolo11n").body if p.role.startswith("norm") and p.stage >= 10)


def test_ssf_leaves_a_layer_without_bias_to_the_norm_behind(anatomy) -> None:
    def edited(name: str, wanted: object) -> set[str]:
        return {e.module for e in make_method("ssf", {"target_modules": wanted}).edits(anatomy(name))}

    assert edited("yolo11n", ("model.0.conv",)) == {"model.0.bn"}
    assert edited("resnet18", ("layer1.0.conv1", "downsample.0")) == {
        "layer1.0.bn1",
        *(f"layer{i}.0.downsample.1" for i in (2, 3, 4)),
    }
    assert edited("vit_tiny", ("fc1",)) == {f"blocks.{i}.mlp.fc1" for i in range(3)}
    assert not {n for n in edited("swin", "all") if n.endswith("reduction")}  # what comes next is another block's
    with pytest.raises(ConfigError, match=r"layers.1.downsample.reduction has neither a bias.*leave it out"):
        edited("swin", ("reduction",))


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='svd' is not known; it is one of kaiming, pissa, olora"):
        make_method("lora", {"init_lora_weights": "svd"})
    for factor in (0, -2):
        with pytest.raises(ConfigError, match=f"decompose_factor={factor} divides nothing; give a number from 1, or -1"):
            make_method("lokr", {"decompose_factor": factor})
    for rank in (0, 1.5, "4"):
        with pytest.raises(ConfigError, match=f"rank_pattern gives 'x' rank {rank!r}; it must be a number from 1"):
            make_method("loha", {"rank_pattern": {"x": rank}})
    with pytest.raises(ConfigError, match="normalised weight"):
        make_method("dora", {"lora_dropout": 0.1})
    with pytest.raises(ConfigError, match="letters q, k and v"):
        make_method("lora", {"qkv": "x"})
    with pytest.raises(ConfigError, match="oversize='maybe' is not known; it is train or skip"):
        make_method("lora", {"oversize": "maybe"})


@pytest.mark.parametrize(("method", "most"), [("lora", 15), ("dora", 15), ("loha", 7), ("lokr", 32)])
def test_a_rank_above_what_a_layer_allows(method: str, most: int) -> None:
    layer = Layer("stem", "conv", (32, 32, 1, 1), 1, 0)
    params = (Param("stem.weight", 1024, "weight", 0), Param("head.weight", 10, "weight", HEAD))
    one = Anatomy("none", "one", (Stage(0, "stem", ""),), "head", ("head",), params, (layer,), (), (), ())
    assert make_method(method, {"r": most, "small_layers": 0.0}).edits(one)
    with pytest.raises(ConfigError, match=f"r={most + 1} .* r may be up to {most} here"):
        make_method(method, {"r": most + 1, "small_layers": 0.0}).edits(one)
    pattern = {"rank_pattern": {"st.*": most + 1}, "r": 1, "small_layers": 0.0}
    beside = Layer("block", "linear", (64, 64), 1, 0)
    two = replace(one, layers=(layer, beside), params=(*params, Param("block.weight", 4096, "weight", 0)))
    says = f"'st.*' rank {most + 1}, which is above what stem allows; it may be up to {most} there"
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_method(method, pattern).edits(two)
    assert len(make_method(method, {**pattern, "rank_pattern": {"st.*": most}}).edits(two)) == 2
