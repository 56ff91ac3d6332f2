"""Methods that choose what trains, and when: last, surgical, gradual, and LoRA's budget; the evidence that some look at."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETS, ctrl_c, make_boxes, make_squares, seen
from torch import nn

import visionpeft
from visionpeft import planning
from visionpeft.core import delta as deltas
from visionpeft.core.anatomy import HEAD, Anatomy
from visionpeft.core.method import make_method
from visionpeft.core.plan import make_plan, plan_table
from visionpeft.errors import ConfigError, Interrupted, OutOfMemory, TrainingError
from visionpeft.families.gradient_stats import collect_gradient_stats
from visionpeft.families.yolo.tasks import TASKS
from visionpeft.families.yolo.trainer import PeftTrainerMixin
from visionpeft.registry import FAMILIES
from visionpeft.training.job import Job


def anatomy_of(net: Any, name: str) -> Anatomy:
    return FAMILIES[NETS[name][0]]().anatomy(net(name), name)


# ----------------------------------------------------------------------------------------------------------- which stages
@pytest.mark.parametrize(("name", "stages"), [("yolo11n", {19, 20, 22}), ("resnet18", {2, 3, 4})])
def test_last_is_the_stages_before_the_head(name: str, stages: set[int], net) -> None:
    anatomy = anatomy_of(net, name)
    plan = make_plan(make_method("last", {"stages": 3}), anatomy)
    assert {p.stage for p in anatomy.params if p.name in plan.train} == {*stages, HEAD}
    assert {s.stage for s in anatomy.statistics if s.name not in plan.still} <= {*stages, HEAD}
    everything = make_plan(make_method("full"), anatomy, freeze=min(stages))
    assert (plan.train, plan.still) == (
        everything.train,
        everything.still,
    ) and plan.num_frozen_stages == everything.num_frozen_stages


def test_surgical_takes_the_stages_with_the_longest_gradients(net) -> None:
    anatomy = seen(anatomy_of(net, "yolo11n"), s2=5.0, s16=3.0)
    plan = make_plan(make_method("surgical"), anatomy)
    assert {p.stage for p in anatomy.params if p.name in plan.train} == {2, 16, HEAD}
    assert {s.stage for s in anatomy.statistics if s.name not in plan.still} == {2, 16, HEAD}
    plan = make_plan(make_method("surgical", {"stages": 1}), anatomy, freeze=3)
    assert {p.stage for p in anatomy.params if p.name in plan.train} == {16, HEAD}
    few = seen(anatomy, s0=5.0, s8=4.5)  # a mean does not depend on how many weights there are: 3 and 30
    plan = make_plan(make_method("surgical", {"stages": 1}), few)
    assert {p.stage for p in anatomy.params if p.name in plan.train} == {0, HEAD}


@pytest.mark.parametrize("method", ["last", "surgical"])
def test_more_stages_than_there_are(method: str, net) -> None:
    anatomy = seen(anatomy_of(net, "resnet18"))
    with pytest.raises(ConfigError, match="stages=4 is more than the 3 stages that could train here"):
        make_plan(make_method(method, {"stages": 4}), anatomy, freeze=2)
    with pytest.raises(ConfigError, match="stages=0 is out of range"):
        make_method(method, {"stages": 0})


# ----------------------------------------------------------------------------------------------------------------- budget
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["yolo11n", "vit_tiny", "mobilenetv2"])
def test_budget_is_kept_and_goes_to_what_is_sensitive(method: str, name: str, net) -> None:
    anatomy = anatomy_of(net, name)
    for share in (0.06, 0.1):
        plan = make_plan(make_method(method, {"budget": f"{share:.0%}"}), seen(anatomy))
        assert 0.9 * share < plan.trained_body / plan.body <= share
    alike = make_plan(make_method(method, {"budget": 0.1}), seen(anatomy))
    favoured = make_plan(make_method(method, {"budget": 0.1}), seen(anatomy, s2=30.0))
    assert favoured.rows[2].added > 1.5 * alike.rows[2].added
    assert len({e.settings["r"] for e in favoured.edits}) > 1
    assert len({e.settings["scaling"] for e in favoured.edits}) == 1
    assert "rank" in str(favoured) and favoured.rows[2].ranks in str(favoured)
    ranked = make_plan(make_method(method, {"budget": 0.1, "use_rslora": True}), seen(anatomy))
    assert {round(e.settings["scaling"], 6) for e in ranked.edits} == {8.0 / 2}  # lora_alpha / sqrt(r)
    fixed = make_plan(make_method(method, {"budget": 0.1, "lora_fa": True}), seen(anatomy))
    assert 0.09 < fixed.trained_body / fixed.body <= 0.1  # A does not train, so B may have more rows


def test_budget_that_cannot_be() -> None:
    for given in ("lots", "0%", "120%", -0.1, 1.0):
        with pytest.raises(ConfigError, match="is not understood; give a share of the body, e.g. '2%'"):
            make_method("lora", {"budget": given})
    with pytest.raises(ConfigError, match="budget gives every layer its rank, and so does rank_pattern; leave one out"):
        make_method("lora", {"budget": "2%", "rank_pattern": {".*": 8}})


def test_budget_too_small_for_a_rank(net) -> None:
    with pytest.raises(ConfigError, match="leaves no rank for any layer beside the normalisations"):
        make_plan(make_method("lora", {"budget": "0.1%"}), seen(anatomy_of(net, "yolo11n")))


# --------------------------------------------------------------------------------------------------------------- evidence
def test_evidence_is_of_the_mean_gradient(squares: Path, tmp_path: Path) -> None:
    family: Any = FAMILIES["timm"]()
    base = family.load_architecture("timm/test_vit", img_size=32)
    data = family.read_data(str(squares), base)
    model = family.with_head(base, data.names, "rebuild")
    anatomy = family.anatomy(model, "test_vit")
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    made = collect_gradient_stats(family, model, data, anatomy, imgsz=32, batch=4)
    assert made.images == 16 and [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    own = copy.deepcopy(model).train()
    sum(family.losses(own, data, imgsz=32, batch=16, count=1)).backward()
    assert made.gradient.keys() == {p.name for p in anatomy.params}
    for name, p in own.named_parameters():
        assert made.gradient[name] == pytest.approx(float(p.grad.norm()), rel=1e-3, abs=1e-7)
        assert made.product[name] == pytest.approx(float((p * p.grad).detach().abs().sum()), rel=1e-3, abs=1e-7)


def test_evidence_where_memory_is_short_or_images_are_few(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = FAMILIES["timm"]()
    base = family.load_architecture("timm/test_vit", img_size=32)
    data = family.read_data(str(squares), base)
    model = family.with_head(base, data.names, "rebuild")
    look = partial(collect_gradient_stats, family, model, data, family.anatomy(model, "test_vit"), imgsz=32)
    whole, odd = look(batch=16), look(batch=5)
    assert whole.images == odd.images == look(batch=-1).images == 16
    real, room = family.losses, 4

    def losses(model: nn.Module, data: Any, *, batch: int, **more: Any) -> Any:
        for i, loss in enumerate(real(model, data, batch=batch, **more)):
            if batch > room and i:  # not the first, so gradients are there
                raise torch.OutOfMemoryError("CUDA out of memory.")
            yield loss

    monkeypatch.setattr(family, "losses", losses)
    narrow = look(batch=8)
    assert narrow.images == 16 and narrow.gradient == pytest.approx(whole.gradient, rel=1e-3, abs=1e-7)
    room = 0
    with pytest.raises(OutOfMemory, match="the GPU's memory is full"):
        look(batch=8)


@pytest.mark.parametrize("name", ["timm", "yolo"])
def test_statistics_stay_still_while_it_looks(
    name: str, squares: Path, boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = FAMILIES[name]()
    base = family.load_architecture({"timm": "timm/test_resnet", "yolo": "yolo11n.yaml"}[name])
    data = family.read_data(str({"timm": squares, "yolo": boxes}[name]), base)
    model = family.with_head(base, data.names, "rebuild")
    anatomy, state, real = family.anatomy(model, ""), copy.deepcopy(model.state_dict()), family.losses

    def losses(own: Any, *args: Any, **more: Any) -> Any:
        for loss in real(own, *args, **more):
            yield loss
            assert own.training and not any(own.get_submodule(s.name).training for s in anatomy.statistics)
            assert all(torch.equal(v, state[k]) for k, v in own.state_dict().items())

    monkeypatch.setattr(family, "losses", losses)
    assert (
        collect_gradient_stats(family, model, data, anatomy, imgsz=32, batch=1).images == 8
    )  # a size that the classifier is not made for


@pytest.mark.parametrize("version", ["v8", "26"])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_evidence_of_every_task(version: str, task: str, net, tmp_path: Path) -> None:
    family: Any = FAMILIES["yolo"]()
    suffix = {"detect": "", "segment": "-seg", "classify": "-cls"}.get(task, f"-{task}")
    base = family.load_architecture(f"yolo{version}n{suffix}.yaml")
    source = make_squares(tmp_path) if task == "classify" else make_boxes(tmp_path, task)
    data = family.read_data(str(source), base)
    model = family.with_head(base, data.names, "keep", **data.outputs)
    anatomy = family.anatomy(model, "net")
    made = collect_gradient_stats(family, model, data, anatomy, imgsz=64, batch=4)
    assert made.images == (16 if task == "classify" else 8)
    assert all(made.gradient.get(p.name, 0) > 0 for p in anatomy.body if p.role == "weight")
    assert len(make_plan(make_method("surgical"), dataclasses.replace(anatomy, gradient_stats=made)).train) > 2


def test_a_loss_that_is_no_number(squares: Path) -> None:
    family: Any = FAMILIES["timm"]()
    base = family.load_architecture("timm/test_resnet")
    data = family.read_data(str(squares), base)
    model = family.with_head(base, data.names, "rebuild")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="is no number before training"):
        collect_gradient_stats(family, model, data, family.anatomy(model, ""), imgsz=32, batch=4)


@pytest.mark.slow
def test_plan_and_forecast_look_at_data(boxes: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'surgical' looks at training images before it plans; give data"):
        planning.plan(checkpoint, method="surgical")
    with pytest.raises(ConfigError, match="'lora' looks at training images"):
        planning.forecast(checkpoint, method="lora", budget="2%", imgsz=64)
    budget = {"data": boxes, "method": "lora", "budget": "8%", "imgsz": 64, "batch": 2}
    made = planning.plan(checkpoint, **budget)
    assert made.edits == planning.forecast(checkpoint, **budget).plan.edits
    run = visionpeft.train(**budget, model=checkpoint, epochs=1, device="cpu", workers=0, quiet=True, project=tmp_path)
    assert run.plan == made and planning.plan(checkpoint, **budget, seed=1).edits != made.edits
    with pytest.raises(ConfigError, match="imgsz is no part of a plan of 'lora'"):
        planning.plan(checkpoint, data=boxes, method="lora", imgsz=64)
    made = planning.forecast(checkpoint, data=boxes, method="surgical", imgsz=64, batch=2, device="cpu")
    full = planning.forecast(checkpoint, data=boxes, method="full", imgsz=64, batch=2, device="cpu")
    assert 0 < made.total < full.total


def test_a_run_keeps_what_it_chose_when_it_is_resumed(loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, arguments, owner, epoch = loops["yolo"]
    arguments = {**arguments, "method": "surgical", "project": tmp_path}
    whole = visionpeft.train(data, name="whole", **arguments)
    with ctrl_c(owner, epoch, after=1), pytest.raises(Interrupted):
        visionpeft.train(data, name="parts", **arguments)
    monkeypatch.setattr("visionpeft.families.gradient_stats.collect_gradient_stats", None)  # is not called again
    rest = visionpeft.train(resume=tmp_path / "parts")
    assert rest.plan == whole.plan and rest.delta.read_bytes() == whole.delta.read_bytes()
    moved = {k.rpartition(".")[0] for k in deltas.read(rest.delta).tensors if not k.startswith("model.23")}
    assert len({k.split(".")[1] for k in moved}) == 2


# ---------------------------------------------------------------------------------------------------------------- gradual
def test_gradual_opens_group_after_group(net) -> None:
    anatomy = anatomy_of(net, "resnet18")
    plan = make_plan(make_method("gradual", {"groups": 5, "unfrozen": 0.5, "decay": 2.0}), anatomy)
    shares = {stage: 0.1 * (5 - stage) for stage in range(5)}
    for p in anatomy.body:
        assert plan.opens[p.name] == pytest.approx(shares[p.stage])
        assert plan.rate(p.name) == pytest.approx(2.0 ** (p.stage - 4))
    assert all(plan.opens[s.name] == pytest.approx(shares[s.stage]) for s in anatomy.statistics)
    assert not any(p.name in plan.opens for p in anatomy.params if p.stage == HEAD)
    assert plan.still_frozen(0.25) == {n for n, share in plan.opens.items() if share > 0.25}
    assert "50%" in str(plan) and [r.opens for r in plan.rows] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    most = make_plan(make_method("gradual", {"groups": 1000}), anatomy)
    assert most.opens == pytest.approx({**plan.opens}) and most.rates.keys() == plan.rates.keys()
    frozen = make_plan(make_method("gradual"), anatomy, freeze=3)
    assert frozen.fully_unfrozen_at == 0.5  # of two stages, too
    assert set(frozen.opens) <= {*frozen.train, *(s.name for s in anatomy.statistics)}
    assert not any(p.name in frozen.opens for p in anatomy.params if 0 <= p.stage < 3)


def test_patience_of_ultralytics_counts_once_all_trains(loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, arguments, *_ = loops["yolo"]

    def validate(trainer: Any) -> tuple[dict, float]:
        trainer.best_fitness = 0.5
        return {key: 0.0 for key in trainer.metrics}, 0.5

    monkeypatch.setattr(PeftTrainerMixin, "validate", validate)
    settings = {**arguments, "method": "gradual", "groups": 2, "epochs": 6, "patience": 1, "project": tmp_path}
    assert len(visionpeft.train(data, **settings).history) == 4


def test_what_another_method_trains_from_the_start_does_not_wait(net) -> None:
    anatomy = anatomy_of(net, "yolo11n")
    plan = make_plan(make_method("gradual+bitfit"), anatomy)
    assert set(plan.opens) & set(plan.train) == {p.name for p in anatomy.body if not p.role.endswith("bias")}
    last = make_plan(make_method("last"), anatomy)
    both = make_plan(make_method("gradual+last"), anatomy)
    assert plan.rows[0].opens == plan.fully_unfrozen_at == 0.5 and "from" in plan_table(plan, 60)
    assert not set(both.opens) & {*last.train, *(s.name for s in anatomy.statistics if s.name not in last.still)}


def test_gradual_where_parts_are_frozen_by_name(net) -> None:
    anatomy = anatomy_of(net, "yolo11n")
    alone = ["model.0.conv", "model.0.bn.weight", "model.0.bn.bias"]  # of this stage, statistics move and nothing trains
    plan = make_plan(make_method("gradual"), anatomy, freeze=alone)
    assert plan.opens["model.0.bn"] == plan.fully_unfrozen_at == 0.5
    with pytest.raises(ConfigError, match="leaves nothing to train at first"):
        make_plan(make_method("gradual"), anatomy, freeze="model.23")


def test_gradual_is_done_in_its_epochs(loops, tmp_path: Path) -> None:
    data, arguments, *_ = loops["timm"]
    settings = {**arguments, "method": "gradual", "project": tmp_path, "groups": 2, "unfrozen": 0.7}
    with pytest.raises(ConfigError, match="only after 70% of the epochs, so epochs=3 never come to that; give at least 4"):
        visionpeft.train(data, **{**settings, "epochs": 3})
    assert not list(tmp_path.iterdir())
    run = visionpeft.train(data, **{**settings, "epochs": 6, "unfrozen": 0.5, "lr0": 1e-9, "patience": 1})
    assert len(run.history) == 4  # nothing is better than the first; patience counts from the third, the last that waits


@pytest.mark.parametrize("family", ["yolo", "timm"])
def test_what_waits_does_not_move(family: str, loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, arguments, owner, epoch = loops[family]
    states: list[dict] = []
    real = Job.begin_epoch

    def spy(job: Job, model: nn.Module, number: int, meter: Any) -> None:
        real(job, model, number, meter)
        still = {n for n, m in model.named_modules() if "running_mean" in m._buffers and not m.training}
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        states.append({"values": copy.deepcopy(model.state_dict()), "still": still, "wanted": wanted, "plan": job.plan})

    monkeypatch.setattr(Job, "begin_epoch", spy)
    settings = {**arguments, "epochs": 4, "method": "gradual", "groups": 2, "unfrozen": 0.5, "warmup_epochs": 0.0}
    settings |= {"optimizer": "SGD", "lr0": 0.02}  # whose every step moves what has a gradient
    run = visionpeft.train(data, project=tmp_path, name="gradual", **settings)
    plan, first = states[0]["plan"], states[0]["values"]
    assert [len(s["wanted"]) for s in states] == sorted(len(s["wanted"]) for s in states)
    assert {*states[0]["wanted"]} == {n for n in plan.train if n not in plan.opens}
    assert {*states[2]["wanted"]} == {*plan.train}
    for number, state in enumerate(states):
        closed = plan.still_frozen(number / 4)
        assert state["wanted"] == {*plan.train} - closed and state["still"] >= closed - {*plan.train}
        waited = plan.still_frozen((number - 1) / 4) if number else {*plan.opens}
        for key, value in state["values"].items():
            owner_name = key.rpartition(".")[0]
            if key in waited or (owner_name in waited and key.endswith(("running_mean", "running_var"))):
                assert torch.equal(value, first[key]), (number, key)
    moved = [k for k in plan.opens if k in first and not torch.equal(states[3]["values"][k], first[k])]
    assert len(moved) > 0.9 * sum(k in first for k in plan.opens)
    full = visionpeft.train(data, project=tmp_path, name="full", **{**arguments, "epochs": 1, "method": "full"})
    assert run.measured["saved_bytes"] == pytest.approx(full.measured["saved_bytes"], rel=0.02)  # of its last phase

    monkeypatch.setattr(Job, "begin_epoch", real)
    with ctrl_c(owner, epoch, after=2), pytest.raises(Interrupted):
        visionpeft.train(data, project=tmp_path, name="parts", **settings)
    rest = visionpeft.train(resume=tmp_path / "parts")
    assert rest.delta.read_bytes() == run.delta.read_bytes() and rest.history == run.history


def test_gradual_in_one_process_only(loops, tmp_path: Path) -> None:
    data, arguments, *_ = loops["timm"]
    with pytest.raises(ConfigError, match="opens stages one after the other"):
        visionpeft.train(data, project=tmp_path, **{**arguments, "method": "gradual", "device": "cpu,cpu"})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"))
