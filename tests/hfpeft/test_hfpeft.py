"""Folders for HF peft: what it computes with ours, what we compute with its, and what is refused."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from conftest import NETS, flat, make_squares
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import visionpeft
from visionpeft import cli, hfpeft
from visionpeft.core import delta as deltas
from visionpeft.core.attach import attach, is_added, merge, train_mode
from visionpeft.core.base_model import Base
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.errors import ConfigError, DeltaError, MismatchError
from visionpeft.registry import FAMILIES

TIMM = ("vit_tiny", "swin", "resnet18", "convnext_atto", "mobilenetv2")
HEADS = {"vit_tiny": "head", "swin": "head.fc", "resnet18": "fc", "convnext_atto": "head.fc", "mobilenetv2": "classifier"}
NORMS = {"vit_tiny": "norm", "swin": "norm", "resnet18": "layer4.1.bn2", "convnext_atto": "head.norm", "mobilenetv2": "bn2"}
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lambda **k: peft.LoraConfig(
        r=2, lora_alpha=6, rank_pattern={".*(proj|conv2|fc1|conv_pw)": 3}, use_rslora=True, **k
    ),
    "dora": lambda **k: peft.LoraConfig(r=2, use_dora=True, alpha_pattern={"^.*(fc2|conv1|conv_pwl)": 5}, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=".*(fc2|conv2|conv_pwl)", **k),
    "loha": lambda **k: peft.LoHaConfig(r=2, rank_pattern={"fc1|conv1|conv_pw": 3}, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=4, **k),
}

USE = {"input": {"imgsz": 64}, "train_args": {"imgsz": 64}}


# ------------------------------------------------------------------------------------------------------------- the pieces
def base_of(name: str, model: nn.Module) -> Base:
    family = NETS[name][0]
    names = dict(getattr(model, "names", None) or {i: f"class {i}" for i in range(5)})
    return Base("random", model, "classify" if family == "timm" else "detect", names, {"imgsz": 64, "channels": 3})


def family_of(name: str) -> Any:
    return FAMILIES[NETS[name][0]]()


def learn(model: nn.Module, x: Tensor, count: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for _ in range(count):
        optimizer.zero_grad()
        sum((t.square().mean() + t.mean() for t in flat(model(x)) if t.requires_grad), torch.zeros(())).backward()
        optimizer.step()


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([t.flatten() for t in flat(model.eval()(x))])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


def header_of(base: Base, names: dict[int, str], head: str) -> dict[str, Any]:
    said = {"model": base.source, "sha256": deltas.fingerprint(base.state), "model_args": {}}
    classes = {str(i): name for i, name in names.items()}
    return {"base": said, "names": classes, "head": head, "outputs": {}, **USE}


@pytest.fixture
def adapted(net, images) -> Callable[..., tuple[nn.Module, deltas.Delta, Base]]:
    """Returns a net with a trained delta on it for three classes, the delta, and its base."""

    def make(name: str, method: str, dtype: str = "fp32", **options: Any) -> tuple[nn.Module, deltas.Delta, Base]:
        base, names, family = base_of(name, net(name)), {0: "a", 1: "b", 2: "c"}, family_of(name)
        model = family.with_head(base, names, "rebuild")
        plan = make_plan(make_method(method, options), family.anatomy(model, name), bn="train")
        train_mode(attach(model, plan), plan)
        learn(model, images)
        delta = deltas.collect(model, base.state, header_of(base, names, "rebuild"), dtype)
        return rebuilt(delta, base, name), delta, base

    return make


def rebuilt(delta: deltas.Delta, base: Base, name: str) -> nn.Module:
    """The base with a delta on it, as `load` makes it."""
    names = {int(i): n for i, n in delta.header["names"].items()}
    model = family_of(name).with_head(base, names, delta.header["head"])
    return deltas.apply(attach(model, delta.plan, start=False), delta, base.state).eval()


def theirs(base: Base, name: str, folder: Path, classes: int = 3) -> Any:
    """What peft makes of a folder, on the base with a new head of other random values."""
    model = family_of(name).with_head(base, {i: str(i) for i in range(classes)}, "rebuild")
    return peft.PeftModel.from_pretrained(model, str(folder))


def trained_by_peft(name: str, base: Base, config: Callable[..., peft.PeftConfig], folder: Path, x: Tensor) -> nn.Module:
    """A net that peft has adapted and saved, as peft opens it again."""
    start = family_of(name).with_head(base, {i: str(i) for i in range(3)}, "rebuild")
    layers = [n for n, m in start.named_modules() if type(m) in (nn.Linear, nn.Conv2d) and getattr(m, "groups", 1) == 1]
    layers = [n for n in layers if n != HEADS[name]]
    regex = "|".join(map(re.escape, layers))
    model = peft.get_peft_model(
        copy.deepcopy(start), config(target_modules=regex, modules_to_save=[HEADS[name], NORMS[name]])
    )
    learn(model.train(), x)
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(start, str(folder))


# ---------------------------------------------------------------------------------------------------------- there and back
CASES = [
    ("lora", {"lora_alpha": 3.0}),
    ("lora", {"use_rslora": True, "rank_pattern": {".*proj|.*conv2|.*fc1": 3}, "alpha_pattern": {".*fc2|.*conv1": 5.0}}),
    ("dora", {"small_layers": 0.0}),
    ("ia3", {}),
    ("loha", {"rank_pattern": {".*proj|.*conv2|.*fc1": 3}}),
    ("lokr", {"alpha": 3.0}),
    ("lokr", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
]


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_peft_computes_what_we_do_and_we_read_it_again(
    method: str, options: dict, name: str, adapted, images, tmp_path
) -> None:
    model, delta, base = adapted(name, method, **options)
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    y = predict(model, images)
    opened = theirs(base, name, folder)
    assert close(predict(opened, images), y)
    with opened.disable_adapter():
        assert not close(predict(opened, images), y)

    again = hfpeft.adopt(hfpeft.read(folder), family_of(name), base, delta.header)
    assert close(predict(rebuilt(again, base, name), images), y)
    edited, found = ({e.module for e in d.plan.edits} for d in (delta, again))
    assert all(model.get_submodule(m).groups > 1 or clashes(m, method, name) for m in edited - found)
    assert found - edited <= ({"conv1"} if name == "resnet18" else set())  # to peft, also all that end like it
    for key, value in delta.tensors.items():
        if not key.startswith(tuple(f"{m}." for m in edited ^ found)):
            assert torch.equal(again.tensors[key], value), key


def clashes(module: str, method: str, name: str) -> bool:
    """Whether peft cannot tell a layer from the stem, which trained itself, and has no adapter that is such a change."""
    return name == "resnet18" and method == "lokr" and module.endswith("conv1")


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("method", CONFIGS)
def test_we_compute_what_peft_has_saved(method: str, name: str, net, images, tmp_path) -> None:
    base = base_of(name, net(name))
    opened = trained_by_peft(name, base, CONFIGS[method], tmp_path / "adapter", images)
    delta = hfpeft.adopt(hfpeft.read(tmp_path / "adapter"), family_of(name), base, header_of(base, {}, ""))
    model = rebuilt(delta, base, name)
    y = predict(opened, images)
    assert close(predict(model, images), y) and delta.plan.method == method and len(delta.header["names"]) == 3
    deltas.write(tmp_path / "delta", delta)
    assert deltas.read(tmp_path / "delta").plan == delta.plan
    back = hfpeft.write(model, delta, base, "", tmp_path / "back")
    assert close(predict(theirs(base, name, back), images), y)
    ours, own = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("back", "adapter"))
    assert all(torch.equal(value, ours[key]) for key, value in own.items() if "num_batches" not in key)
    assert close(predict(merge(model), images), y)


@pytest.mark.parametrize(
    "name", ["yolo11n", "yolov8n", "yolo26n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"]
)
def test_detectors_go_through_peft_with_their_heads(name: str, adapted, images, tmp_path) -> None:
    model, delta, base = adapted(name, "lora")
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    y = predict(model, images)
    assert close(predict(theirs(base, name, folder), images), y)
    again = hfpeft.adopt(hfpeft.read(folder), family_of(name), base, delta.header)
    assert close(predict(rebuilt(again, base, name), images), y)


def test_a_detector_of_peft(net, images, tmp_path) -> None:
    base = base_of("yolo11n", net("yolo11n"))
    config = peft.LoraConfig(r=2, target_modules=r"model\.[2-8]\..*conv", modules_to_save=["model.23"])
    for names in (base.names, {0: "0", 1: "1"}):
        start = family_of("yolo11n").with_head(base, names, "keep")
        model = peft.get_peft_model(copy.deepcopy(start), config)
        learn(model.eval(), images)
        model.save_pretrained(str(folder := tmp_path / str(len(names))))
        delta = hfpeft.adopt(hfpeft.read(folder), family_of("yolo11n"), base, header_of(base, {}, ""))
        assert delta.header["names"] == {str(i): name for i, name in names.items()}
        y = predict(peft.PeftModel.from_pretrained(start, str(folder)), images)
        assert close(predict(rebuilt(delta, base, "yolo11n"), images), y)


# ------------------------------------------------------------------------------------------------------ layers of all kinds
@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"lora_fa": True}, {"qkv": "qv"}], ids=str
)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_peft_writes_otherwise_is_a_lora_of_another_rank(method: str, options: dict, adapted, images, tmp_path) -> None:
    model, delta, base = adapted("vit_tiny", method, use_rslora=True, **options)
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    config, y = json.loads((folder / "adapter_config.json").read_text()), predict(model, images)
    assert config["r"] == {"pissa": 8, "olora": 8}.get(options.get("init_lora_weights"), 4)
    assert config["init_lora_weights"] is True and bool(config["rank_pattern"]) == ("qkv" in options)
    assert close(predict(theirs(base, "vit_tiny", folder), images), y)
    again = hfpeft.adopt(hfpeft.read(folder), family_of("vit_tiny"), base, delta.header)
    assert close(predict(rebuilt(again, base, "vit_tiny"), images), y)


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_a_stem_that_shares_its_name_is_an_adapter_of_full_rank(method: str, adapted, images, tmp_path) -> None:
    model, delta, base = adapted("resnet18", method)
    assert "conv1.weight" in delta.tensors and "conv1" not in {e.module for e in delta.plan.edits}
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^conv1": 64} and "conv1" not in config["modules_to_save"]
    assert "layer4.1.conv1" in re.split(r"\|", config["target_modules"].replace("\\", ""))
    opened = theirs(base, "resnet18", folder)
    assert close(predict(opened, images), predict(model, images))


class Odd(nn.Module):
    """A classifier of layers on which an adapter of peft would compute something else, or nothing."""

    num_classes, pretrained_cfg = 2, {"classifier": "head", "input_size": (3, 16, 16)}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = timm.layers.Conv2dSame(8, 8, 3, stride=2)
        self.standardised = timm.layers.StdConv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.read = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.more = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ModuleDict({n: nn.Conv2d(8, 8, 1) for n in ("conv", "grouped")}))

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": "^conv", "blocks": "."}

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated(self.grouped(self.conv(x)))
        x = self.up(self.standardised(self.same(self.reflected(x)))).relu()
        x = self.more[1]["grouped"](self.more[1]["conv"](self.more[0](x))).mean((2, 3))
        return self.head(nn.functional.linear(x, self.read.weight, self.read.bias))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha", "lokr"])
def test_layers_that_peft_gets_wrong_are_saved_whole(method: str, tmp_path) -> None:
    """Two of these peft does not take at all; on the others an adapter of it would compute something else in silence."""
    model: Any = Odd().eval()
    base = Base("odd", copy.deepcopy(model), "classify", {0: "a", 1: "b"}, {"imgsz": 16})
    options = {"r": 1, "small_layers": 0.0} if method != "ia3" else {}
    family, x = FAMILIES["timm"](), torch.rand(2, 3, 16, 16)
    anatomy = family.anatomy(model, "odd")
    plan = make_plan(make_method(method, options), anatomy, freeze=["more.1.conv"])
    learn(train_mode(attach(model, plan), plan), x)
    delta = deltas.collect(model, base.state, header_of(base, base.names, "keep"), "fp32")
    parts = hfpeft.writing.divide(model.eval(), delta, base)
    wrong = {"same", "standardised", "reflected", "up", "read"}
    if "ora" in method:
        wrong |= {"grouped", "dilated", "more.1.grouped"}  # the last for its name: whoever saves "grouped" saves it, too
    assert {*parts.merged} == wrong & {e.module for e in plan.edits} and len(parts.merged) > 3
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)  # in a list, "conv" would be "more.1.conv", too
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder))
    assert close(predict(opened, x), predict(model, x))
    with opened.disable_adapter():  # what peft loads stands apart from the base
        assert torch.equal(predict(opened, x), predict(base.model, x))


def test_outputs_without_weights_are_no_dora_of_peft(net, images, tmp_path) -> None:
    """Dequantised weights have rows of zeros, whose length peft's DoRA divides by."""
    base = base_of("vit_tiny", net("vit_tiny"))
    with torch.no_grad():
        base.model.get_submodule("blocks.1.mlp.fc1").weight[0] = 0
    family = family_of("vit_tiny")
    model = family.with_head(base, base.names, "keep")
    plan = make_plan(make_method("dora"), family.anatomy(model, "vit_tiny"))
    learn(train_mode(attach(model, plan), plan), images)
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.peft_weight.dora.lora_B")[0] = 0
    delta = deltas.collect(model, base.state, header_of(base, base.names, "keep"), "fp32")
    folder = hfpeft.write(model.eval(), delta, base, "", tmp_path / "adapter")
    assert "blocks.1.mlp.fc1" in json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert close(predict(theirs(base, "vit_tiny", folder, 5), images), predict(model, images))


def test_half_precision_stays_half(adapted, tmp_path) -> None:
    model, delta, base = adapted("vit_tiny", "lora", "fp16")
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    again = hfpeft.adopt(hfpeft.read(folder), family_of("vit_tiny"), base, delta.header)
    assert {k: t.dtype for k, t in again.tensors.items()} == {k: t.dtype for k, t in delta.tensors.items()}
    assert all(torch.equal(t, delta.tensors[k]) for k, t in again.tensors.items())


def test_an_adapter_on_the_head_becomes_the_head(net, images, tmp_path) -> None:
    base = base_of("vit_tiny", net("vit_tiny"))
    model = peft.get_peft_model(
        copy.deepcopy(base.model), peft.LoraConfig(r=2, target_modules=["head", "blocks.1.attn.qkv"])
    )
    learn(model, images)
    model.save_pretrained(str(tmp_path / "adapter"))
    delta = hfpeft.adopt(hfpeft.read(tmp_path / "adapter"), family_of("vit_tiny"), base, header_of(base, {}, ""))
    assert [e.module for e in delta.plan.edits] == ["blocks.1.attn.qkv"] and "head.weight" in delta.tensors
    assert delta.header["names"] == {str(i): n for i, n in base.names.items()} and not any(
        is_added(k) and k.startswith("head") for k in delta.tensors
    )
    assert close(predict(rebuilt(delta, base, "vit_tiny"), images), predict(model, images))


# ----------------------------------------------------------------------------------------------------- what cannot be read
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A small transformer and an adapter that peft has saved of it."""
    torch.manual_seed(0)
    base = base_of("vit_tiny", NETS["vit_tiny"][1]())
    start = family_of("vit_tiny").with_head(base, {0: "a", 1: "b", 2: "c"}, "rebuild")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    peft.get_peft_model(start, config).save_pretrained(str(folder))
    return base, folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def drop(part: str) -> Callable[[Path], None]:
    return lambda f: alter(f, lambda tensors: {k: v for k, v in tensors.items() if part not in k})


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda f: alter(f, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def subfolders(folder: Path) -> None:
    for name in ("first", "second"):
        (folder / name).mkdir()
        shutil.copy(folder / "adapter_config.json", folder / name)
    (folder / "adapter_config.json").unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json; give a folder"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors; give"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a pickle, which is never"),
    "several adapters": (subfolders, r"holds several adapters \(first, second\); give the folder of one"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{'a': 1}"), "adapter_config.json is no JSON"),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), "says no peft_type"),
    "another type": (lambda f: edit(f, r="two"), "has r='two', which is not what peft writes"),
    "no number": (
        lambda f: edit(f, rank_pattern={"qkv": "two"}),
        "has 'two' as r of blocks.0.attn.qkv, which is no whole number",
    ),
    "half a rank": (lambda f: edit(f, rank_pattern={"qkv": 1.5}), "has 1.5 as r of .*, which is no whole number"),
    "half a factor": (lambda f: edit(f, decompose_factor=1.5), "has decompose_factor=1.5, which is not what peft writes"),
    "no rank for any memory": (lambda f: edit(f, r=2**40), "but this layer takes 1099511627776×192"),
    "no matrix": (
        lambda f: alter(f, lambda tensors: {k: v.sum() if "1.attn.qkv.lora_A" in k else v for k, v in tensors.items()}),
        "a tensor of blocks.1.attn.qkv in the folder is no matrix; get the folder again",
    ),
    "no names": (lambda f: edit(f, target_modules=["qkv", 1]), "has target_modules=.*, which is not what peft writes"),
    "damaged": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678901"), "safetensors is damaged"),
    "no prefix": (rename("base_model.model.", ""), "has a tensor 'blocks.*peft's begin with base_model.model."),
    "an unknown method": (
        lambda f: edit(f, peft_type="OFT"),
        "peft_type=OFT has no like here; there are IA3, LOHA, LOKR, LORA",
    ),
    "bias": (lambda f: edit(f, bias="all"), "made with bias='all', which has no like here"),
    "replicated layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "made with layer_replication="),
    "megatron": (lambda f: edit(f, megatron_config={"a": 1}), "made with megatron_config="),
    "a later option": (lambda f: edit(f, use_wonder=True), "made with use_wonder=True, which has no like here"),
    "another start": (
        lambda f: edit(f, init_lora_weights="pissa"),
        "pissa' changed the base.*path_initial_model_for_weight",
    ),
    "no expression": (lambda f: edit(f, rank_pattern={"(": 2}), r"has .* which is no regular expression"),
    "a tensor less": (drop("blocks.1.attn.qkv.lora_A"), "has tensors of blocks.1.attn.qkv, but no lora_A.weight"),
    "a layer less": (drop("blocks.1.attn.qkv."), "target_modules means blocks.1.attn.qkv, but the folder has no tensors"),
    "half a head": (drop("head.bias"), "does not fit: the folder holds head.weight of 3×192, but random has 5 classes"),
    "no head": (drop("head."), "modules_to_save means head.weight, but the folder has no such tensor"),
    "a strange tensor": (rename("1.attn.qkv.lora_B", "1.attn.qkv.lora_C"), "but no lora_B.weight; get the folder again"),
    "an adapter's name": (rename("lora_A.w", "lora_A.default.w"), "but no lora_A.weight; get the folder again"),
    "another rank": (lambda f: edit(f, r=4), "qkv.lora_A.weight is 2×192 in the folder, but this layer takes 4×192 at r=4"),
    "magnitudes": (lambda f: edit(f, use_dora=True), "has tensors of blocks.0.attn.qkv, but no lora_magnitude_vector"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_in_one_sentence(what: str, saved, tmp_path) -> None:
    base, source = saved
    shutil.copytree(source, folder := tmp_path / "adapter")
    change, says = BAD[what]
    change(folder)
    with pytest.raises(DeltaError, match=says) as error:
        hfpeft.adopt(hfpeft.read(folder), family_of("vit_tiny"), base, header_of(base, {}, ""))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_another_base_is_refused_with_the_layer_or_by_its_hash(saved, adapted, net, tmp_path) -> None:
    _, folder = saved
    family, adapter = family_of("swin"), hfpeft.read(folder)
    with pytest.raises(MismatchError, match="the adapter does not fit|belongs to another base"):
        hfpeft.adopt(adapter, family, base_of("swin", net("swin")), {})
    wider: Any = timm.create_model("vit_small_patch16_224", num_classes=5, img_size=64, depth=3)
    with pytest.raises(MismatchError, match="does not fit: the folder holds head.weight of 3×192"):
        hfpeft.adopt(adapter, family, base_of("vit_tiny", wider), {})
    body = {k: v for k, v in adapter.tensors.items() if "head" not in k}
    headless = hfpeft.Adapter({**adapter.config, "modules_to_save": None}, body, {})
    with pytest.raises(MismatchError, match="another base than random: blocks.0.attn.qkv.lora_A.weight is 2×192"):
        hfpeft.adopt(headless, family, base_of("vit_tiny", wider), {})
    shallow: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=2)
    with pytest.raises(MismatchError, match="another base than random: it has no layer for the folder's blocks.2"):
        hfpeft.adopt(adapter, family, base_of("vit_tiny", shallow), {})

    model, delta, base = adapted("vit_tiny", "lora")
    ours = hfpeft.write(model, delta, base, "", tmp_path / "ours")
    with torch.no_grad():
        base.model.head.bias += 1e-3
    with pytest.raises(MismatchError, match="wrong base: this delta was trained on random"):
        hfpeft.adopt(hfpeft.read(ours), family, base, delta.header)


def test_peft_on_a_grouped_convolution_is_refused(net, images, tmp_path) -> None:
    base = base_of("mobilenetv2", net("mobilenetv2"))
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(copy.deepcopy(base.model), peft.LoraConfig(r=16, target_modules=["blocks.0.0.conv_dw"]))
        model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(DeltaError, match="LORA of blocks.0.0.conv_dw is no change of its weight"):
        hfpeft.adopt(hfpeft.read(tmp_path / "adapter"), family_of("mobilenetv2"), base, {})


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("adapter", {}, "HF peft has nothing that computes what 'adapter' does; it has dora, ia3, loha, lokr, lora"),
        ("lora+adapter", {}, "nothing that computes what 'adapter' does"),
        ("bitfit", {}, "nothing that computes what 'bitfit' does"),
        ("lora+ia3", {}, "holds one method, but this delta has lora and ia3; use merge"),
        ("lora+bitfit", {}, "has an update of its weight, and a weight or bias of its own that was trained"),
    ],
)
def test_a_delta_that_peft_has_nothing_for_is_refused(method: str, options: dict, says: str, adapted, tmp_path) -> None:
    model, delta, base = adapted("vit_tiny", method, **options)
    with pytest.raises(ConfigError, match=re.escape(says)):
        hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_modules_that_peft_cannot_save_are_refused(adapted, tmp_path) -> None:
    model, delta, base = adapted("vit_tiny", "lora")
    for name, says in (
        ("cls_token", "includes a parameter of the model itself"),
        ("blocks.0.x", "save blocks.0 as a whole"),
    ):
        changed = deltas.Delta(delta.plan, {**delta.tensors, name: torch.zeros(1)}, delta.header)
        with pytest.raises(ConfigError, match=says):
            hfpeft.write(model, changed, base, "", tmp_path / "adapter")
    model, delta, base = adapted("mobilenetv2", "lora", target_modules=".*conv_dw", small_layers=0.0)
    with pytest.raises(ConfigError, match="peft computes something else on all [0-9]+ layers that lora edits here"):
        hfpeft.write(model, delta, base, "", tmp_path / "adapter")


# --------------------------------------------------------------------------------------------------------------- the verbs
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), folder / "base.safetensors")
    data = make_squares(folder / "squares")
    small: dict[str, Any] = {"epochs": 1, "imgsz": 32, "batch": 4, "workers": 0, "device": "cpu", "quiet": True}
    named: dict[str, Any] = {
        "model": "timm/test_resnet",
        "model_args": {"checkpoint_path": str(folder / "base.safetensors")},
    }
    return visionpeft.train(data, **named, method="lora", project=folder / "runs", **small)


def code(folder: Path) -> str:
    """The lines of a folder's README."""
    [lines] = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return lines


def test_names_stay_text_in_the_readme(run: visionpeft.Run, tmp_path) -> None:
    evil = "x\n```python\nimport os\n```\n<script>\x1b\u202e"
    loaded = visionpeft.load(run.delta)
    base = dataclasses.replace(loaded.base, source=evil)
    header = {**loaded.delta.header, "names": {"0": evil, "1": "b"}}
    header["base"] = {**header["base"], "model": evil, "model_args": {"a=1); import os; (b": evil}}
    opening = loaded.family.loading_snippet(base, header)
    delta = dataclasses.replace(loaded.delta, header=header)
    folder = hfpeft.write(loaded.model, delta, loaded.base, opening, tmp_path / "evil")
    card = (folder / "README.md").read_text()
    assert [line for line in card.splitlines() if line.lstrip().startswith("```")] == ["```python", "```"]
    assert "\nimport os" not in card and "<script>" not in card.replace(repr(evil), "").replace("\\<", "")
    assert not {"\x1b", "\u202e"} & set(card)
    calls = [node for node in ast.walk(ast.parse(code(folder))) if isinstance(node, ast.Call)]
    assert ["timm.create_model", "model.reset_classifier", "PeftModel.from_pretrained"] == [
        ast.unparse(c.func) for c in calls
    ]


def test_the_verbs(run: visionpeft.Run, tmp_path, monkeypatch, capsys) -> None:
    assert run.delta is not None
    out = tmp_path / "adapter"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", str(run.delta), "--format", "peft", "--out", str(out)])
    assert capsys.readouterr().out.split() == [str(out)]
    assert {f.name for f in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    monkeypatch.chdir(out)
    used: dict[str, Any] = {}
    exec(code(out), used)  # as its reader would
    x, adapted = torch.rand(2, 3, 32, 32), visionpeft.load(run.delta)
    y = predict(adapted.model, x)
    assert close(predict(used["model"], x), y)

    with pytest.raises(SystemExit, match="0"):
        cli.main(["import", str(out)])
    [written] = capsys.readouterr().out.split()
    assert written == f"{out}.safetensors"
    visionpeft.verify(written)
    again = visionpeft.load(written)
    assert close(predict(again.model, x), y) and again.delta.header["names"] == adapted.delta.header["names"]
    assert again.delta.tensors.keys() == adapted.delta.tensors.keys()
    assert all(torch.equal(t, adapted.delta.tensors[k]) for k, t in again.delta.tensors.items())
    assert deltas.fingerprint(visionpeft.detach(again).state_dict()) == again.delta.header["base"]["sha256"]
    assert visionpeft.merge(again, tmp_path / "merged.safetensors").is_file()
    data = run.arguments["data"]
    assert visionpeft.val(written, data, device="cpu", workers=0) == visionpeft.val(run.delta, data, device="cpu", workers=0)


def test_an_import_is_not_written_over_the_delta_of_the_export(run: visionpeft.Run, tmp_path) -> None:
    assert run.delta is not None
    delta = Path(shutil.copy(run.delta, tmp_path / "my.v1.safetensors"))
    folder = visionpeft.export(delta, "peft")
    assert folder == tmp_path / "my.v1.peft" and visionpeft.import_peft(folder) == tmp_path / "my.v1.peft.safetensors"
    assert delta.read_bytes() == run.delta.read_bytes()


def test_the_verbs_refuse(run: visionpeft.Run, tmp_path, capsys) -> None:
    assert run.delta is not None
    out = tmp_path / "adapter"
    visionpeft.export(run.delta, "peft", out)
    kept = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(ConfigError, match="adapter exists; give another folder, or exist_ok=True to replace it"):
        visionpeft.export(run.delta, "peft", out)
    (out / "adapter_config.json").write_text("")
    assert visionpeft.export(run.delta, "peft", out, exist_ok=True) == out
    assert {f.name: f.read_bytes() for f in out.iterdir()} == kept and len(list(tmp_path.iterdir())) == 1
    (out / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"adapter holds something else \(mine.txt\), which would be lost"):
        visionpeft.export(run.delta, "peft", out, exist_ok=True)
    with pytest.raises(ConfigError, match="'dynamic' is no option of format='peft'"):
        visionpeft.export(run.delta, "peft", tmp_path / "b", dynamic=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; give another folder$"):
        visionpeft.export(run.delta, "peft", tmp_path / "file", exist_ok=True)

    ours = shutil.copytree(out, tmp_path / "ours")
    torch.manual_seed(1)  # not the weights of the base again
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), other := tmp_path / "other.safetensors")
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(tensors, out / "adapter_model.safetensors")  # as peft does, without what we say of it
    for arguments, code_, says in (
        (["import", str(out)], 2, "give it with model="),
        (["import", str(tmp_path / "none"), "--model", "timm/test_resnet"], 2, "there is no folder"),
        (["import", str(out), "--model", "timm/test_vit", "--model-args", "{pretrained: false}"], 2, "has random weights"),
        (["import", str(ours), "--model-args", f"{{checkpoint_path: {other}}}"], 1, "wrong base: this delta"),
        (["export", str(run.delta), "--format", "pef"], 2, "Did you mean 'peft'?"),
    ):
        with pytest.raises(SystemExit, match=str(code_)):
            cli.main(arguments)
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_folder_of_peft_takes_its_classes_from_data(run: visionpeft.Run, tmp_path) -> None:
    assert run.delta is not None
    out = visionpeft.export(run.delta, "peft", tmp_path / "adapter")
    save_file(load_file(out / "adapter_model.safetensors"), out / "adapter_model.safetensors")
    given: dict[str, Any] = {"model": run.arguments["model"], "model_args": run.arguments["model_args"]}
    plain = visionpeft.import_peft(out, tmp_path / "plain", **given)
    named = visionpeft.import_peft(out, tmp_path / "named", data=run.arguments["data"], **given)
    assert visionpeft.inspect(plain)["names"] == {"0": "0", "1": "1"}
    assert visionpeft.inspect(named)["names"] == {"0": "blue", "1": "red"}
    x, y = torch.rand(2, 3, 32, 32), None
    for delta in (run.delta, plain, named):
        z = predict(visionpeft.load(delta).model, x)
        assert y is None or close(z, y)
        y = z
    before = visionpeft.val(run.delta, run.arguments["data"], imgsz=32, device="cpu", workers=0)
    assert visionpeft.val(named, run.arguments["data"], imgsz=32, device="cpu", workers=0) == before


@pytest.mark.parametrize("head", ["keep", "rebuild"])
@pytest.mark.parametrize("classes", [2, 80])
def test_the_lines_that_open_a_detector(head: str, classes: int, checkpoint: Path) -> None:
    family = FAMILIES["yolo"]()
    names = {i: str(i) for i in range(classes)}
    for options in ({}, {"channels": 1}):
        same_as_built(family, family.load(str(checkpoint), **options), names, head, options)


@pytest.mark.parametrize("options", [{}, {"img_size": 64}, {"img_size": 64, "num_classes": 7}], ids=str)
def test_the_lines_that_open_a_classifier(options: dict, tmp_path) -> None:
    family, path = FAMILIES["timm"](), tmp_path / "base.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    base = family.load("timm/test_vit", checkpoint_path=str(path), **options)
    for names in (base.names, {0: "a", 1: "b"}):
        same_as_built(family, base, names, "rebuild", {"checkpoint_path": str(path), **options})


def same_as_built(family: Any, base: Base, names: dict[int, str], head: str, model_args: dict | None = None) -> None:
    header = header_of(base, names, head)
    header["base"]["model_args"] = model_args or {}
    used: dict[str, Any] = {}
    exec(family.loading_snippet(base, header), used)
    fitted = family.with_head(base, names, head)
    heads = tuple(f"{h}." for h in family.anatomy(base.model, base.source).heads)
    ours, its = fitted.state_dict(), used["model"].state_dict()
    assert {k: v.shape for k, v in its.items()} == {k: v.shape for k, v in ours.items()}
    assert all(torch.equal(v, ours[k]) for k, v in its.items() if not k.startswith(heads))


def test_peft_saves_again_what_it_has_read(adapted, images, tmp_path) -> None:
    model, delta, base = adapted("resnet18", "norm+lora")
    opened = theirs(base, "resnet18", hfpeft.write(model, delta, base, "", tmp_path / "ours"))
    opened.save_pretrained(str(tmp_path / "again"))
    again = hfpeft.adopt(hfpeft.read(tmp_path / "again"), family_of("resnet18"), base, delta.header)
    assert close(predict(rebuilt(again, base, "resnet18"), images), predict(model, images))
