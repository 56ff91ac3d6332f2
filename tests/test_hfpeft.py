"""Folders for HF peft: what it computes with ours, what we compute with its, and what is refused."""

from __future__ import annotations

import copy
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
from visionpeft import delta as deltas
from visionpeft.attach import attach, detach, is_added, merge, train_mode
from visionpeft.errors import ConfigError, DeltaError, MismatchError
from visionpeft.families.base import Base
from visionpeft.methods.base import make_method
from visionpeft.plan import Edit, Plan, make_plan
from visionpeft.registry import FAMILIES, METHODS

pytestmark = pytest.mark.filterwarnings("error")
TIMM = ("vit_tiny", "swin", "resnet18", "convnext_atto", "mobilenetv2")
HEADS = {"vit_tiny": "head", "swin": "head.fc", "resnet18": "fc", "convnext_atto": "head.fc", "mobilenetv2": "classifier"}
NORMS = {"vit_tiny": "norm", "swin": "norm", "resnet18": "layer4.1.bn2", "convnext_atto": "head.norm", "mobilenetv2": "bn2"}
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lambda **k: peft.LoraConfig(
        r=2, lora_alpha=6, rank_pattern={".*(proj|conv2|fc1|conv_pw)": 3}, use_rslora=True, **k
    ),
    "dora": lambda **k: peft.LoraConfig(r=2, use_dora=True, alpha_pattern={"^.*(fc2|conv1|conv_pwl)": 5}, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=[], **k),
    "loha": lambda **k: peft.LoHaConfig(r=2, rank_pattern={"fc1|conv1|conv_pw": 3}, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=4, **k),
}


# ------------------------------------------------------------------------------------------------------------- the pieces
def base_of(name: str, model: nn.Module) -> Base:
    family = NETS[name][0]
    names = dict(getattr(model, "names", None) or {i: f"class {i}" for i in range(5)})
    return Base("random", model, "classify" if family == "timm" else "detect", names, {"imgsz": 64})


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
    return {"base": said, "names": classes, "head": head, "outputs": {}, "input": {}, "train_args": {}}


@pytest.fixture
def adapted(net, images) -> Callable[..., tuple[nn.Module, deltas.Delta, Base]]:
    """Returns a net with a trained delta on it for three classes, the delta, and its base."""

    def make(name: str, method: str, dtype: str = "fp32", **options: Any) -> tuple[nn.Module, deltas.Delta, Base]:
        base, names, family = base_of(name, net(name)), {0: "a", 1: "b", 2: "c"}, family_of(name)
        base.facts["channels"] = 3
        model = family.fit(base, names, "rebuild")
        plan = make_plan(make_method(method, options), family.anatomy(model, name), bn="train")
        train_mode(attach(model, plan), plan)
        learn(model, images)
        return (
            (rebuilt(delta := deltas.collect(model, base.state, header_of(base, names, "rebuild"), dtype), base, name)),
            delta,
            base,
        )

    return make


def rebuilt(delta: deltas.Delta, base: Base, name: str) -> nn.Module:
    """The base with a delta on it, as `load` makes it."""
    names = {int(i): n for i, n in delta.header["names"].items()}
    model = family_of(name).fit(base, names, delta.header["head"])
    return deltas.apply(attach(model, delta.plan, start=False), delta, base.state).eval()


def theirs(base: Base, name: str, folder: Path, classes: int = 3) -> Any:
    """What peft makes of a folder, on the base with a new head of other random values."""
    model = family_of(name).fit(base, {i: str(i) for i in range(classes)}, "rebuild")
    return peft.PeftModel.from_pretrained(model, str(folder))


def trained_by_peft(name: str, base: Base, config: Callable[..., peft.PeftConfig], folder: Path, x: Tensor) -> nn.Module:
    """A net that peft has adapted and saved, as peft opens it again."""
    start = family_of(name).fit(base, {i: str(i) for i in range(3)}, "rebuild")
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
    merged = {e.module for e in delta.plan.edits} - {e.module for e in again.plan.edits}
    assert merged == {m for m in merged if model.get_submodule(m).groups > 1}  # what peft would get wrong
    for key, value in delta.tensors.items():
        if not key.startswith(tuple(f"{m}." for m in merged)):
            assert torch.equal(again.tensors[key], value), key


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


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n", "yolo26n"])
def test_detectors_go_through_peft_with_their_heads(name: str, adapted, images, tmp_path) -> None:
    model, delta, base = adapted(name, "lora")
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    y = predict(model, images)
    assert close(predict(theirs(base, name, folder), images), y)
    again = hfpeft.adopt(hfpeft.read(folder), family_of(name), base, delta.header)
    assert close(predict(rebuilt(again, base, name), images), y)


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
    wrong = {"same", "standardised", "reflected", "up", "read"} | ({"grouped", "dilated"} if "ora" in method else set())
    assert {*parts.merged} == wrong & {e.module for e in plan.edits} and len(parts.merged) > 3
    folder = hfpeft.write(model, delta, base, "", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)  # in a list, "conv" would be "more.1.conv", too
    assert ("base_model.model.grouped" in config["modules_to_save"]) == ("ora" in method)  # and "grouped" one of "more"
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder))
    assert close(predict(opened, x), predict(model, x))
