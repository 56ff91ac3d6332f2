"""The options of `train`, which are declared once: what travels, and what every door makes of them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import make_squares

import visionpeft
from visionpeft import TrainConfig, api
from visionpeft.config import OPTIONS, RENAMED, by_new_names, types
from visionpeft.errors import ConfigError
from visionpeft.registry import METHODS

ROOT = Path(visionpeft.__file__).parent


def test_train_takes_the_fields_of_its_configuration() -> None:
    given = {k: p for k, p in inspect.signature(visionpeft.train).parameters.items()}
    assert [*given] == [f.name for f in fields(TrainConfig)] == [*OPTIONS, "options"]
    assert {k: p.default for k, p in given.items() if k != "options"} == {
        f.name: f.default for f in fields(TrainConfig) if f.name != "options"
    }
    assert set(types()) == set(given)


@pytest.mark.parametrize("verb", [visionpeft.plan, visionpeft.forecast, visionpeft.suggest], ids=lambda f: f.__name__)
def test_the_verbs_before_a_run_take_options_of_train(verb) -> None:
    own = {"plan": {"options"}, "forecast": {"options", "objects"}, "suggest": {"options", "objects"}}[verb.__name__]
    assert inspect.signature(verb).parameters.keys() - own <= OPTIONS.keys()


def test_what_a_run_is_leaves_and_returns() -> None:
    config = TrainConfig.from_call({"model": "m.pt", "data": "d", "method": "lora", "freeze": [0, 1], "options": {"nbs": 4}})
    config = config.settled(
        {"epochs": 3, "imgsz": 64, "batch": 2, "lr0": 0.1, "optimizer": "SGD", "workers": 0, "head": "keep"}
    )
    kept = json.loads(json.dumps({**config.arguments(), "model_args": {}}))
    assert not {"project", "name", "exist_ok", "quiet", "resume", "allow_download"} & kept.keys()
    again = TrainConfig.from_file(kept)
    assert again.arguments() == kept and again.changed() and TrainConfig().changed() == []
    old = {next((o for o, n in RENAMED.items() if n == k), k): v for k, v in kept.items()}
    assert old != kept and TrainConfig.from_file(old) == again


def test_all_public_names_are_there() -> None:
    assert {"LoraConfig", "Plan", "Delta", "Forecast", "Run", "TrainConfig", "lean", "suggest", "train"} <= {
        *visionpeft.__all__
    }
    assert all(getattr(visionpeft, cls.__name__) is cls for cls in METHODS.values()), "every method's configuration"
    for name in visionpeft.__all__:
        assert getattr(visionpeft, name) is not None
    assert visionpeft.plan is visionpeft.planning.plan and {*visionpeft.__all__} <= {*dir(visionpeft)}
    with pytest.raises(AttributeError, match="no attribute"):
        visionpeft.trane  # noqa: B018


def test_help_needs_no_torch() -> None:
    code = "import sys; from visionpeft.cli import app; app(['train', '--help'], result_action='return_value'); "
    code += "print(sorted({'torch', 'numpy', 'cv2', 'ultralytics', 'timm'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--frozen-dtype" in run.stdout and run.stdout.endswith("[]\n")


def test_plans_are_found_where_they_were(tmp_path: Path) -> None:
    """Methods of users import from `visionpeft.plan`, whose name is a verb's, too."""
    code = "import visionpeft.forgetting; from visionpeft.plan import Anatomy, Edit, Plan, Unfit, make_plan\n"
    code += "assert callable(visionpeft.forgetting), 'the verb, though its module was imported first'\n"
    code += "print(visionpeft.plan('timm/test_resnet', model_args={'pretrained': False}, method='head').method)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "head\n"


def test_old_options_warn(tmp_path: Path) -> None:
    data = make_squares(tmp_path)
    model = {"model": "timm/test_resnet", "model_args": {"pretrained": False}, "imgsz": 32, "epochs": 1}
    with pytest.warns(FutureWarning, match="prefix_dtype= is now called frozen_dtype="):
        run = visionpeft.train(data, **model, freeze=2, prefix_dtype="fp32", project=tmp_path, device="cpu", workers=0)
    assert run.arguments["frozen_dtype"] == "fp32" and "prefix_dtype" not in run.arguments


def test_an_option_by_two_names() -> None:
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="two names of one option; give frozen_dtype alone"):
        visionpeft.train("data", model="m.pt", frozen_dtype="fp16", prefix_dtype="bf16")
    with pytest.warns(FutureWarning) as warned:
        visionpeft.forecast("timm/test_resnet", imgsz=64, batch=2, method="full", freeze=2, prefix_dtype="bf16")
    assert [w.filename for w in warned] == [__file__]
    with pytest.warns(FutureWarning, match="--prefix_dtype is now called"):
        assert {**by_new_names({"prefix-dtype": "bf16"}), "frozen_dtype": "fp16"} == {"frozen_dtype": "fp16"}


def test_options_that_a_verb_does_not_have() -> None:
    with pytest.raises(ConfigError, match="'lr0' is no setting of train"):
        visionpeft.plan("timm/test_resnet", model_args={"pretrained": False}, method="head", lr0=0.1)
    with pytest.raises(ConfigError, match="memory='?0'? is not"):
        visionpeft.suggest(0, model="timm/test_resnet")


def test_a_budget_is_the_machines_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train(memory=)` is for the device that it will train on; `suggest` for a GPU, whether there is one or not."""

    def search(config: TrainConfig, **_: object) -> None:
        raise ConfigError(f"for {config.device}")

    monkeypatch.setattr(api, "search_memory", search)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="for cpu"):
        visionpeft.train("data", model="timm/test_resnet", memory="1GB", quiet=True)


def test_modules_are_attributes() -> None:
    code = "import visionpeft as v; print(v.measure.SavedBytes.__name__, v.errors.__name__, v.scenes.find)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("SavedBytes visionpeft.errors <function find")
