"""Plans are values: what trains, where edits go, and what stays still, for every way of saying so."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import NETS

from visionpeft.attach import attach, train_mode
from visionpeft.errors import ConfigError
from visionpeft.families.base import Family
from visionpeft.methods.base import make_method
from visionpeft.methods.lora import LoraConfig
from visionpeft.plan import Anatomy, Plan, make_plan
from visionpeft.registry import FAMILIES, METHODS


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
    for bn, still in (("frozen", body), ("train", set()), (None, body if METHODS[method].bn == "frozen" else set())):
        assert set(make_plan(make_method(method), anatomy("yolo11n"), bn=bn).still) == still


def test_no_method_means_full_where_freeze_is_given() -> None:
    assert make_method(None).name == "lora" and make_method(None, freeze=10).name == "full"
    assert make_method(None, freeze=["model.0"]).name == "full" and make_method("lora", freeze=10).name == "lora"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prompt"])
def test_a_plan_survives_json(method: str, anatomy) -> None:
    plan = make_plan(make_method(method), anatomy("yolo11n"), [0, "model.3"])
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


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match="normalised weight"):
        make_method("dora", {"lora_dropout": 0.1})
    with pytest.raises(ConfigError, match="letters q, k and v"):
        make_method("lora", {"qkv": "x"})
    with pytest.raises(ConfigError, match="'train' or 'skip'"):
        make_method("lora", {"oversize": "maybe"})
