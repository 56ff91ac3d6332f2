"""A family made of the abstract methods alone trains, evaluates and predicts; a sentence says what it cannot do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import visionpeft
from visionpeft import cli
from visionpeft.errors import ConfigError
from visionpeft.families.base import Family
from visionpeft.registry import FAMILIES

USE: dict[str, Any] = {"model": "tiny", "device": "cpu", "quiet": True}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[type[Family]]:
    """The family, in a package of its own, among the others while this file's tests run."""
    len(FAMILIES)  # looks through visionpeft's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES, "_classes", dict(FAMILIES._classes))
        patch.syspath_prepend(str(Path(__file__).parent))
        from tinylib import Tiny

        yield Tiny
    del sys.modules["tinylib"]


def test_a_family_has_few_duties(tiny: type[Family]) -> None:
    assert len(Family.__abstractmethods__) <= 14
    own = {name for name, value in vars(tiny).items() if callable(value) and not name.startswith("_")}
    assert own == Family.__abstractmethods__


def test_it_trains_evaluates_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tiny" in visionpeft.list_families()
    run = visionpeft.train("shades", method="lora", r=2, project=tmp_path, **USE)
    assert run.after["accuracy"] == 1.0 > run.before["accuracy"] and len(run.history) == 8
    assert visionpeft.val(run.delta, "shades") == run.after
    assert [p["class"] for name in ("dark 3", "light 3") for p in visionpeft.predict(run.delta, name)] == [0, 1]
    assert visionpeft.merge(run.delta, tmp_path / "merged.safetensors").is_file()
    visionpeft.verify(run.delta)
    plan = visionpeft.plan("tiny", data="shades", method="lora", r=2)
    assert plan == run.plan
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", str(run.delta), "light 3"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out) == {"file": "light 3", "class": 1}


@pytest.mark.parametrize(
    "asked",
    [
        lambda folder: visionpeft.forecast("tiny"),
        lambda folder: visionpeft.train("shades", freeze=1, cache=1, project=folder, **USE),
        lambda folder: visionpeft.train("shades", method="surgical", project=folder, **USE),
    ],
)
def test_it_is_refused_what_it_cannot_do(asked: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models of the tiny family"):
        asked(tmp_path)
    assert not list(tmp_path.iterdir())
