"""timm models: what is read of them, real runs on tiny images, resumed as if never stopped, merged into a plain file."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ctrl_c, learned_the_same, make_squares
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import group_parameters

import visionpeft
from visionpeft import cli, lean
from visionpeft.core import delta as deltas
from visionpeft.core.anatomy import HEAD
from visionpeft.core.attach import attach
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan
from visionpeft.errors import ConfigError, DataError, Interrupted, ModelError, TrainingError
from visionpeft.families.timm.family import Timm
from visionpeft.families.timm.loading import KEY, _unwrapped, open_merged
from visionpeft.families.timm.trainer import Average, Images, Trainer
from visionpeft.registry import METHODS

SMALL: dict[str, Any] = {"epochs": 2, "imgsz": 32, "batch": 4, "workers": 0, "device": "cpu"}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}
NETS: dict[str, tuple[dict, str, int, int, int, int]] = {  # arguments, stage 1, stages, blocks, attentions, sequence
    "resnet18": ({}, "layer1", 5, 8, 0, 0),
    "resnet50": ({}, "layer1", 5, 16, 0, 0),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, "blocks.0", 4, 3, 3, 3),
    "deit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, "blocks.0", 4, 3, 3, 3),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 3}, "blocks.0", 4, 3, 3, 3),
    "swin_tiny_patch4_window7_224": (SWIN, "layers.0", 4, 4, 4, 0),
    "convnext_atto": ({}, "stages.0", 6, 12, 0, 0),
    "mobilenetv2_100": ({"pad_type": "same"}, "blocks.0", 8, 17, 0, 0),
    "mobilenetv1_100": ({}, "blocks.0", 6, 13, 0, 0),
    "efficientnet_b0": ({}, "blocks.0", 8, 16, 0, 0),
    "mobilenetv3_small_100": ({}, "blocks.0", 8, 11, 0, 0),
    "regnetx_002": ({}, "s1", 5, 13, 0, 0),
    "resnetv2_50x1_bit": ({}, "stages.0", 6, 16, 0, 0),
    "nf_resnet50": ({}, "stages.0", 5, 16, 0, 0),
    "poolformer_s12": ({}, "stages.0", 6, 12, 0, 0),  # has no groups of timm's
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Returns the arguments of `train` for a random net of seven classes, saved in a file as timm reads it."""
    folder = tmp_path_factory.mktemp("weights")

    def make(name: str, **options: Any) -> dict:
        torch.manual_seed(0)
        size = {k: v for k, v in options.items() if k != "img_size"}
        path = folder / f"{name}-{len(options)}.safetensors"
        save_file(timm.create_model(name, num_classes=7, **size).state_dict(), path)
        return {"model": f"timm/{name}", "model_args": {"checkpoint_path": str(path), **options}}

    return make


@pytest.fixture(scope="module")
def lora(squares: Path, base, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    return visionpeft.train(squares, **base("test_resnet"), method="lora", project=tmp_path_factory.mktemp("lora"), **SMALL)


@pytest.fixture(scope="module")
def prompt(squares: Path, base, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    """A method that cannot merge, on a transformer whose position embeddings are resized to 32 pixels."""
    model = base("test_vit", img_size=32)
    return visionpeft.train(squares, **model, method="prompt", project=tmp_path_factory.mktemp("prompt"), **SMALL)


@pytest.fixture(scope="module")
def adapter(squares: Path, base, tmp_path_factory: pytest.TempPathFactory) -> visionpeft.Run:
    folder = tmp_path_factory.mktemp("adapter")
    return visionpeft.train(squares, **base("test_resnet"), method="adapter", project=folder, **{**SMALL, "epochs": 1})


# --------------------------------------------------------------------------------------------------------- the anatomies
@pytest.mark.parametrize("name", NETS)
def test_anatomy(name: str) -> None:
    options, first, stages, blocks, attentions, sequence = NETS[name]
    model = timm.create_model(name, num_classes=5, **options)
    anatomy = Timm().anatomy(model, name)
    assert {p.name for p in anatomy.params} == {n for n, _ in model.named_parameters()}
    assert {p.name.rpartition(".")[0] for p in anatomy.params if p.stage == HEAD} == set(anatomy.heads)
    assert [s.index for s in anatomy.stages] == list(range(stages)) and anatomy.stages[1].name == first
    assert {p.stage for p in anatomy.body} == set(range(stages))
    assert (len(anatomy.blocks), len(anatomy.attentions)) == (blocks, attentions)
    assert sum(b.sequence for b in anatomy.blocks) == sequence
    assert sum(s.to_head for s in anatomy.stages) == 1
    assert {la.name for la in anatomy.layers if la.slices} == {f"{a.name}.qkv" for a in anatomy.attentions}
    moving = {n for n, m in model.named_modules() if getattr(m, "running_mean", None) is not None}
    assert {s.name for s in anatomy.statistics} == moving


@pytest.mark.parametrize("name", [n for n in NETS if n != "poolformer_s12"])
def test_freeze_cuts_between_the_groups_of_timm(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=5, **NETS[name][0])
    anatomy = Timm().anatomy(model, name)
    groups = group_parameters(model, model.group_matcher(coarse=True))
    for count in range(len(anatomy.stages)):
        plan = make_plan(make_method("full"), anatomy, freeze=count)
        assert set(plan.train) == {n for i, group in groups.items() if i >= count for n in group}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "qk_norm": True, "scale_attn_norm": True}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}),
        ("swin_tiny_patch4_window7_224", SWIN),  # with shifted windows, so with masks
        ("mobilevit_xxs", {}),
    ],
)
def test_a_prefix_of_no_tokens_is_the_attention_itself(name: str, options: dict, images) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    plan = make_plan(make_method("prefix"), Timm().anatomy(model, name))
    edits = tuple(dataclasses.replace(e, settings={**e.settings, "tokens": 0}) for e in plan.edits)
    edited = attach(copy.deepcopy(model), dataclasses.replace(plan, edits=edits))
    with torch.no_grad():
        assert edits and torch.allclose(edited(images), model(images), atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- the runs
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("prefix", "prompt")])
def test_every_method_trains(method: str, squares: Path, base, tmp_path: Path) -> None:
    arguments = {**SMALL, "epochs": 2 if method == "gradual" else 1}
    run = visionpeft.train(squares, **base("test_resnet"), method=method, project=tmp_path, **arguments)
    assert run.delta and (run.merged is not None) == METHODS[method].merges
    assert set(run.before) == set(run.after) == {"top1", "top5", "loss"} and run.after["top5"] == 1.0
    delta = deltas.read(run.delta)
    assert delta.header["names"] == {"0": "blue", "1": "red"} and delta.header["input"]["imgsz"] == 32
    assert {"std", "mean", "interpolation"} <= delta.header["input"].keys()


def test_run(lora: visionpeft.Run) -> None:
    assert len(lora.history) == 2 and {"epoch", "train/loss", "top1", "loss"} <= lora.history[0].keys()
    assert lora.measured["saved_bytes"] > 1e4 and lora.measured["step_seconds"] > 0
    best = deltas.read(lora.delta).header
    assert best["metrics"]["after"] == {k: lora.history[best["epoch"] - 1][k] for k in ("top1", "top5", "loss")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("mobilenetv2_035", {"pad_type": "same", "pretrained_cfg_overlay": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}),
        ("test_vit", {"img_size": 32}),
    ],
)
def test_merged_file_is_timms_own(name: str, options: dict, squares: Path, base, images, tmp_path: Path) -> None:
    run = visionpeft.train(squares, **base(name, **options), method="lora", r=2, project=tmp_path, **SMALL)
    plain = timm.create_model(name, num_classes=2, checkpoint_path=str(run.merged), **options).eval()
    adapted = visionpeft.load(run.delta)
    x = images[:, :, :32, :32]
    with torch.no_grad():
        assert torch.allclose(plain(x), adapted.model(x), atol=1e-4)
    opened: Any = open_merged(run.merged)
    assert opened.names == {0: "blue", 1: "red"} and opened.pretrained_cfg["mean"] == adapted.model.pretrained_cfg["mean"]
    assert visionpeft.val(run.delta, squares, device="cpu") == pytest.approx(run.after, abs=1e-4)
    again = visionpeft.merge(adapted, tmp_path / "again.safetensors")
    assert again.read_bytes() == run.merged.read_bytes()
    base_state = Timm().load(f"timm/{name}", **adapted.delta.header["base"]["model_args"]).state
    detached = visionpeft.detach(adapted).state_dict()
    assert all(torch.equal(detached[k], v) for k, v in base_state.items())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "lora_dropout": 0.1},
        {
            "method": "full",
            "optimizer": "SGD",
            "mixup": 0.4,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
            "nbs": 8,
            "erasing": 0.5,
        },
        {"method": "bitfit", "cos_lr": False, "auto_augment": "rand-m9-mstd0.5", "warmup_epochs": 2, "workers": 2},
    ],
    ids=lambda options: options["method"],
)
@pytest.mark.pictures  # without them a run is not complete
def test_resumed_equals_uninterrupted(options: dict, squares: Path, base, tmp_path: Path) -> None:
    arguments = {**base("test_resnet"), **SMALL, "epochs": 3, **options}
    whole = visionpeft.train(squares, project=tmp_path, name="whole", **arguments)
    with ctrl_c(Trainer, "_epoch", after=1), pytest.raises(Interrupted, match="go on with resume="):
        visionpeft.train(squares, project=tmp_path, name="parts", **arguments)
    rest = visionpeft.train(resume=tmp_path / "parts")

    assert whole.delta.read_bytes() == rest.delta.read_bytes() and whole.merged.read_bytes() == rest.merged.read_bytes()
    one, two = (torch.load(r.folder / "checkpoint.pt", weights_only=True) for r in (whole, rest))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert [k for k in one[part] if not torch.equal(one[part][k], two[part][k])] == []
    assert (
        one["history"] == two["history"] and one["updates"] == two["updates"] and torch.equal(one["sampler"], two["sampler"])
    )
    assert str(one["optimizer"]) == str(two["optimizer"])
    with pytest.raises(TrainingError, match="nothing is left to resume"):
        visionpeft.train(resume=tmp_path / "parts")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_lean_keeps_less_and_learns_the_same(name: str, squares: Path, base, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without it, from Python and on the command line; a resumed run stays at its level."""
    model = base(name, **({"img_size": 32} if name == "test_vit" else {}))
    # steps that are smooth in the gradient: AdamW's first ones are its sign, and near zero that is rounding
    arguments = {**SMALL, "method": "lora", "optimizer": "SGD", "lr0": 0.01, "delta_dtype": "fp32", "project": tmp_path}
    runs = {x: visionpeft.train(squares, **model, **arguments, lean=x, name=x) for x in ("off", "auto", "memory")}
    levels, real = [], lean.apply
    monkeypatch.setattr(lean, "apply", lambda model, level: levels.append(level) or real(model, level))
    flags = [f"--{k}={v}" for k, v in {**arguments, "lean": "memory", "name": "flags"}.items()]
    given = ["--data", squares, "--model", model["model"], "--model_args", json.dumps(model["model_args"])]
    with ctrl_c(Trainer, "_epoch", after=1), pytest.raises(SystemExit) as stopped:
        cli.main(["train", *map(str, given), *flags])
    assert stopped.value.code == 130
    runs["flags"] = visionpeft.train(resume=tmp_path / "flags")
    assert levels == ["memory", "memory"]

    learned_the_same(runs)
    assert runs["flags"].delta.read_bytes() == runs["memory"].delta.read_bytes()


def test_patience_ends_a_run(squares: Path, base, tmp_path: Path) -> None:
    arguments = {**SMALL, "epochs": 9, "lr0": 1e-12, "patience": 2, "ema": 0.0}
    run = visionpeft.train(squares, **base("test_resnet"), method="head", project=tmp_path, **arguments)
    assert len(run.history) == run.history.index(max(run.history, key=lambda h: (h["top1"], -h["loss"]))) + 3


def test_a_last_batch_of_one_image(base, tmp_path: Path) -> None:
    """BatchNorm cannot train on one value for each channel, which is what test_resnet ends in at 32 pixels."""
    data = make_squares(tmp_path / "data", train=4)
    Image.new("RGB", (32, 32), "red").save(data / "train" / "red" / "one_more.png")
    arguments = {**SMALL, "epochs": 1, "batch": 4}
    run = visionpeft.train(data, **base("test_resnet"), method="full", bn="train", project=tmp_path, **arguments)
    assert run.plan.bn == "train" and run.parameters["statistics"] > 0


def test_one_process_can_use_one_precision_after_another(squares: Path, base, tmp_path: Path) -> None:
    for amp in (False, "bf16"):
        run = visionpeft.train(squares, **base("test_vit", img_size=32), method="norm", amp=amp, project=tmp_path, **SMALL)
        assert run.arguments["amp"] == amp


def test_head_learns_at_lr0_and_the_rest_at_lr_scale(squares: Path, base, tmp_path: Path) -> None:
    arguments = {**SMALL, "lr0": 1e-3, "lr_scale": 0.5, "lrf": 0.1}
    run = visionpeft.train(squares, **base("test_vit", img_size=32), method="full", project=tmp_path, **arguments)
    groups = torch.load(run.folder / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    rates = {g["lr_scale"]: g["lr"] for g in groups}
    assert rates == pytest.approx({1.0: 1e-4, 0.5 * Timm.body_lr_scale: 0.5 * Timm.body_lr_scale * 1e-4})
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05} and len(groups) == 4


def test_two_processes_train_what_one_does(squares: Path, base, tmp_path: Path, monkeypatch) -> None:
    """The plan reaches the processes, which share each batch; the delta is the same to rounding."""
    arguments = {**base("test_vit", img_size=32), **SMALL, "method": "lora+bitfit", "r": 2, "delta_dtype": "fp32"}
    arguments |= {"scale": 0.0, "fliplr": 0.0, "color_jitter": 0.0}  # nothing is random
    one, two = (
        visionpeft.train(squares, **{**arguments, "device": device}, optimizer="sgd", project=tmp_path, quiet=True)
        for device in ("cpu", "cpu,cpu")
    )
    assert two.plan == one.plan and two.arguments["device"] == "cpu,cpu"
    a, b = (deltas.read(run.delta).tensors for run in (one, two))
    assert a.keys() == b.keys() and any(".peft_weight.lora." in k for k in a)
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-5), key
    assert two.after == pytest.approx(one.after, abs=1e-4)
    logged = [line.split(",")[0] for line in (two.folder / "metrics.csv").read_text().splitlines()]
    assert logged == ["epoch", "1", "2"], "by the first process alone"


def test_what_goes_wrong_in_a_process_is_one_sentence(squares: Path, base, tmp_path: Path, capfd) -> None:
    arguments = {**SMALL, "optimizer": "sgd", "lr0": 999.0, "warmup_epochs": 0, "epochs": 9, "device": "cpu,cpu"}
    with pytest.raises(TrainingError, match="no longer a number in epoch .* lower lr0"):
        visionpeft.train(squares, **base("test_vit", img_size=32), method="full", project=tmp_path, **arguments)
    assert "Traceback" not in capfd.readouterr().err and not list(tmp_path.rglob("error.json"))
    for device in ("cpu,0", "0,0", "0,"):
        with pytest.raises(ConfigError, match="is not understood; give different GPUs"):
            visionpeft.train(squares, **base("test_vit", img_size=32), project=tmp_path, device=device)
    with pytest.raises(ConfigError, match="batch=3 cannot be shared by 2 devices; give a multiple of 2"):
        visionpeft.train(squares, **base("test_vit", img_size=32), project=tmp_path, device="cpu,cpu", batch=3)


def test_average_leaves_the_base_alone() -> None:
    model: Any = timm.create_model("test_resnet", num_classes=2)
    plan = make_plan(make_method("norm"), Timm().anatomy(model, "test_resnet"), bn="train")
    average: Any = Average(attach(model, plan), 0.9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for value in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()):
        value.data = value.data + 1  # new storage: among several processes, torch gives parameters other ones
    average.update(10**6)
    for key, value in average.model.state_dict().items():
        moved = model.state_dict()[key].sub(before[key]).abs().max() > 0
        step = 1.0 if "num_batches" in key else 0.1 if moved else 0.0
        assert torch.allclose(value.sub(before[key]).float(), torch.tensor(step), atol=1e-5), key


def test_a_loss_that_is_no_number(squares: Path, base, tmp_path: Path) -> None:
    arguments = {**SMALL, "optimizer": "sgd", "lr0": 999.0, "warmup_epochs": 0, "epochs": 9}
    with pytest.raises(TrainingError, match="no longer a number in epoch .* lower lr0"):
        visionpeft.train(squares, **base("test_vit", img_size=32), method="full", project=tmp_path, **arguments)


def test_random_weights_give_no_delta(squares: Path, tmp_path: Path) -> None:
    arguments = {**SMALL, "epochs": 1, "model": "test_resnet", "model_args": {"pretrained": False}}
    run = visionpeft.train(squares, method="full", project=tmp_path, **arguments)
    assert run.delta is None and open_merged(run.merged).names == {0: "blue", 1: "red"}


# --------------------------------------------------------------------------------------------------------- using results
def test_predict(lora: visionpeft.Run, prompt: visionpeft.Run, squares: Path) -> None:
    folder = squares / "val" / "red"
    for run in (lora, prompt):
        results = visionpeft.predict(run.delta, folder, device="cpu")
        assert [Path(r["file"]).name for r in results] == ["0.png", "1.png", "2.png"]
        assert all(r["class"] == r["top5"][0][0] and 0 <= r["score"] <= 1 and len(r["top5"]) == 2 for r in results)
    with Image.open(folder / "0.png") as image:
        one, two = visionpeft.predict(lora.delta, [image, folder / "0.png"], device="cpu")
    assert one["top5"] == two["top5"] and one["file"] is None
    with pytest.raises(DataError, match="there is no image"):
        visionpeft.predict(lora.delta, "nowhere.png")
    with pytest.raises(ConfigError, match="'conf' is no option here"):
        visionpeft.predict(lora.delta, folder, conf=0.5)


def test_onnx_needs_its_extra(lora: visionpeft.Run, lacking) -> None:
    lacking("onnx")
    with pytest.raises(ConfigError, match=r"format='onnx' needs onnx.*pip install 'visionpeft\[export\]'"):
        visionpeft.export(lora.delta)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("which", ["lora", "adapter", "prompt"])
def test_export_gives_the_same_logits(which: str, format: str, request, tmp_path: Path) -> None:
    import onnxruntime

    adapted = visionpeft.load(request.getfixturevalue(which).delta)
    out = visionpeft.export(adapted, format, tmp_path / f"model.{format}")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = adapted.model(x)
    if format == "onnx":
        y = torch.from_numpy(onnxruntime.InferenceSession(out).run(None, {"images": x.numpy()})[0])
    else:
        y = torch.jit.load(out)(x)
    assert torch.allclose(y, expected, atol=1e-4)
    assert [f.name for f in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_checkpoints_of_training_loops_are_opened(key: str, tmp_path: Path) -> None:
    """Lightning's names begin with that of the attribute that holds the net."""
    net = timm.create_model("test_resnet", num_classes=3)
    names = {"state_dict": "net.{}", "model_state_dict": "{}"}[key]
    torch.save({key: {names.format(k): v for k, v in net.state_dict().items()}, "epoch": 3}, tmp_path / "loop.ckpt")
    base = Timm().load("timm/test_resnet", checkpoint_path=str(tmp_path / "loop.ckpt"))
    assert len(base.names) == 3 and "state_dict" not in base.model.pretrained_cfg
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in base.state.items())
    bare = timm.create_model("densenet121", num_classes=0, growth_rate=4, block_config=(1, 1)).state_dict()
    assert {k.partition(".")[0] for k in bare} == {"features"} and _unwrapped(bare, "features.conv0") is bare


def test_classes_of_a_merged_file_keep_their_rows(lora: visionpeft.Run) -> None:
    family = Timm()
    base = family.load("timm/test_resnet", checkpoint_path=lora.merged)
    assert base.names == {0: "blue", 1: "red"}
    kept: Any = family.with_head(base, {0: "green", 1: "blue", 2: "red"}, "keep")
    own: Any = base.model
    assert torch.equal(kept.fc.weight[1:], own.fc.weight) and kept.fc.bias.shape == (3,)
    assert torch.equal(family.with_head(base, base.names, "keep").fc.weight, own.fc.weight)
    assert not torch.equal(family.with_head(base, base.names, "rebuild").fc.weight, own.fc.weight)


def test_other_data_must_have_known_classes(lora: visionpeft.Run, squares: Path, tmp_path: Path) -> None:
    data = make_squares(tmp_path / "data")
    for part in ("train", "val"):
        (data / part / "red").rename(data / part / "green")
    with pytest.raises(DataError, match="has the class 'green', which this model does not know"):
        visionpeft.val(lora.delta, data, device="cpu")


# ------------------------------------------------------------------------------------------------------------- the models
@pytest.mark.parametrize("source", ["timm/resnet18", "resnet18", "resnet18.a1_in1k", "timm/no_such_net"])
def test_names_of_timm(source: str) -> None:
    assert visionpeft.api.find_family(source).name == "timm"


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("timm/resnet81", {}, "timm has no model 'resnet81'. Did you mean"),
        ("timm/resnet18.no_such_tag", {}, "timm cannot make resnet18.no_such_tag"),
        ("timm/resnet18", {}, "weights of resnet18 are not here .* cannot be reached; .*checkpoint_path"),
        ("timm/resnet18", {"checkpoint_path": "nowhere.safetensors"}, "there is no checkpoint nowhere.safetensors"),
        ("timm/resnet18", {"pretrained": False, "pad_typ": "same"}, "timm cannot make resnet18.*pad_typ"),
        ("timm/resnet18", {"pretrained": False, "features_only": True}, "does not classify RGB images"),
        ("timm/resnet18", {"pretrained": False, "in_chans": 1}, "does not classify RGB images"),
    ],
)
def test_models_that_cannot_be_had(source: str, options: dict, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        Timm().load(source, **options)


def test_a_checkpoint_of_another_architecture(base) -> None:
    with pytest.raises(ModelError, match="timm cannot make test_vit.*"):
        Timm().load("timm/test_vit", **base("test_resnet")["model_args"])


def test_weights_of_timm_know_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model
    monkeypatch.setattr("visionpeft.families.timm.loading._from_hub", lambda *_: {})
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: real(name, **options))
    base = Timm().load("timm/test_resnet")
    assert base.pretrained and base.names[0] == "n01440764" and len(base.names) == 1000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer": "adamx"}, "optimizer='adamx' is not one of timm's.*Did you mean"),
        ({"batch": -1}, "batch=-1 is not usable"),
        ({"batch": 5, "mixup": 0.2}, "mixup and cutmix .* batch=5 is odd"),
        ({"fliplr": 2.0}, "fliplr=2.0 is not usable; it must be a number from 0 to 1"),
        ({"auto_augment": "rnd-x"}, "auto_augment='rnd-x' is not one of timm's policies"),
        ({"device": "77"}, "device='77' is not there"),
        ({"device": "0,1"}, "no GPU that torch can use"),
        ({"lean": "nonsense"}, "lean='nonsense' is not known; it is 'off' or 'auto' or 'memory'"),
        ({"imgsz": 48}, "cannot read images of imgsz=48: it was made for 32.*'img_size': 48"),
        ({"mosaic": 1.0}, "'mosaic' is no setting of train or of the timm family"),
    ],
)
def test_options_that_cannot_be_used(options: dict, sentence: str, squares: Path, base, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        model = base("vit_tiny_patch16_224", img_size=32, depth=1)
        visionpeft.train(squares, **model, project=tmp_path, **{**SMALL, **options})
    assert not list(tmp_path.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------------- the data
def remove(*parts: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for part in parts:
            for file in sorted(root.glob(f"{part}/**/*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()

    return change


def spoil(pattern: str, content: bytes = b"no image") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for file in root.glob(pattern):
            file.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: (root / "val").rename(root / "other"), "has no folder val or validation or valid or test"),
        (lambda root: (root / "train").rename(root / "other"), "has no folder train"),
        (remove("val"), "has no images .it has no class folders"),
        (remove("val/red", "val/blue"), "has no images .its class folders hold none"),
        (remove("train/red"), "train/red holds no images"),
        (lambda root: (root / "val" / "red").rename(root / "val" / "green"), "has green in val, but not in train"),
        (lambda root: make_squares(root / "val" / "third"), "has third in val, but not in train"),
        (spoil("val/*/*.png"), "none of the 6 images in .*val can be read"),
        (spoil("**/*.png"), "can be read"),
    ],
)
def test_folders_that_cannot_be_used(change: Callable, sentence: str, tmp_path: Path) -> None:
    change(make_squares(tmp_path / "data"))
    with pytest.raises(DataError, match=sentence):
        Timm().read_data(str(tmp_path / "data"))


def test_a_source_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; give one that holds train/CLASS/"):
        Timm().read_data(str(tmp_path / "data.yaml"))


def test_one_class_only(tmp_path: Path) -> None:
    data = make_squares(tmp_path / "data")
    for part in ("train", "val"):
        remove(f"{part}/red")(data)
        (data / part / "red").rmdir()
    with pytest.raises(DataError, match="one class only"):
        Timm().read_data(str(data))


def test_unreadable_images_are_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_squares(tmp_path / "data")
    whole = Timm().read_data(str(data))
    photo = data / "train" / "red" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(photo)
    photo.write_bytes(photo.read_bytes()[:900])
    (data / "train" / "blue" / ".hidden.png").write_bytes(b"")
    (data / "train" / "blue" / "empty.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "visionpeft"):
        read = Timm().read_data(str(data))
    assert caplog.text.count("2 of 18 images") == 1 and len(caplog.records) == 1
    assert read == whole and len(read.train) == 16


def test_fingerprint_sees_names_and_sizes(tmp_path: Path) -> None:
    data = make_squares(tmp_path / "data")
    seen = {Timm().read_data(str(data)).fingerprint}
    (data / "val").rename(data / "valid")
    seen.add(Timm().read_data(str(data)).fingerprint)
    assert len(seen) == 1
    (data / "train" / "red" / "0.png").rename(data / "train" / "red" / "x.png")
    seen.add(Timm().read_data(str(data)).fingerprint)
    Image.new("RGB", (40, 40)).save(data / "train" / "red" / "x.png")
    seen.add(Timm().read_data(str(data)).fingerprint)
    assert len(seen) == 3


def test_pictures_of_every_format_are_trained_on_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_squares(tmp_path / "data")
    for name in ("a.jp2", "b.PPM", "c d%20*[1].JPG", "e.gif", "f.gif"):
        Image.open(data / "train/red/0.png").save(data / "train/red" / name)
    (data / "train/blue").rename(tmp_path / "blue")
    (data / "train/blue").mkdir()
    (data / "train/blue/site").symlink_to(tmp_path / "blue")
    assert len(Timm().read_data(str(data)).train) == 8 + 11
    assert "2 pictures in" in caplog.text and "red/e.gif" in caplog.text


def test_an_image_that_would_be_read_wrongly_stops_a_run(lora: visionpeft.Run, tmp_path: Path) -> None:
    data = make_squares(tmp_path / "data")
    Image.new("F", (32, 32)).save(file := data / "train/red/9.tif")
    with pytest.raises(DataError, match=r"red/9.tif holds fractions.* \(1 such images in .*train\)"):
        Timm().read_data(str(data))
    with pytest.raises(DataError, match="red/9.tif holds fractions"):
        visionpeft.predict(lora.delta, file)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8)).save(path, **({"transparency": b"\x00\x80"} if mode == "P" else {}))
    image, label = Images([(str(path), 3)], lambda image: image)[0]
    assert image.mode == "RGB" and label == 3


def test_train_json_is_plain(lora: visionpeft.Run) -> None:
    said = json.loads((lora.folder / "train.json").read_text())
    assert said["imgsz"] == 32 and said["model_args"]["checkpoint_path"].endswith(".safetensors")


def test_a_merged_file_of_a_newer_version_is_opened(tmp_path: Path) -> None:
    family = Timm()
    base = family.load("timm/test_resnet", pretrained=False)
    names = {str(i): name for i, name in base.names.items()}
    header = {"base": {"model": base.source, "model_args": {}}, "names": names, "input": {**base.facts, "imgsz": 32}}
    file = family.save_merged(copy.deepcopy(base.model), header, tmp_path / "merged.safetensors")
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()[KEY])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    save_file(tensors, file, {KEY: json.dumps({**facts, "later": 1})})
    again = family.open_merged(file)
    assert all(torch.equal(value, base.state[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("batch", [0, -1, 0.5, "abc"])
def test_a_batch_of_no_images_is_refused(batch: object, tmp_path: Path) -> None:
    family = Timm()
    base = family.load("timm/test_resnet", pretrained=False)
    data = family.read_data(str(make_squares(tmp_path)), base)
    with pytest.raises(ConfigError, match="it must be a whole number of at least 1"):
        family.evaluate(base.model, data, imgsz=32, batch=batch)
