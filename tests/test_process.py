"""The process that calls a verb stays as it was, and threads do not get in each other's way."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.utils import LOGGER

import visionpeft
from visionpeft import lean
from visionpeft.core import delta as deltas
from visionpeft.families.yolo.output import quiet, stdout_to_stderr
from visionpeft.process import shared, untouched

State = dict[str, Any]
LORA = {"method": "lora", "r": 2}


def state() -> State:
    """What a process has one of."""
    gc.collect()
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    cudnn = torch.backends.cudnn
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "safe globals": set(map(str, torch.serialization.get_safe_globals())),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "streams": (sys.stdout, sys.stderr, [getattr(h, "stream", None) for h in LOGGER.handlers]),
        "deterministic": (torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "types": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
        "files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0,
        "module": (nn.Module.__call__, nn.Module.__getattr__),
        **{f"logger {x.name}": (x.level, list(x.handlers), x.propagate, x.disabled) for x in loggers},
    }


def changed(before: State) -> list[str]:
    after = state()  # a library may make new loggers
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module", params=["yolo", "timm"])
def trained(request: Any, loops: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict, Any, list[str]]:
    """A run of a loop: its family, data, arguments, result, and what it changed."""
    data, given, *_ = loops[request.param]
    given = {**given, "epochs": 1, **LORA}
    visionpeft.list_families()  # imports libraries, which once have settings of their own
    before = state()
    run = visionpeft.train(data, **given, project=tmp_path_factory.mktemp("runs"))
    return request.param, data, given, run, changed(before)


VERBS: dict[str, Callable[[Any, Path, dict, Path], object]] = {
    "plan": lambda delta, data, args, out: visionpeft.plan(data=data, **_model(args), **LORA),
    "forecast": lambda delta, data, args, out: visionpeft.forecast(imgsz=32, device="cpu", **_model(args), **LORA),
    "suggest": lambda delta, data, args, out: visionpeft.suggest("2GB", imgsz=32, freeze=0, **_model(args), **LORA),
    "load": lambda delta, data, args, out: visionpeft.load(delta),
    "merge": lambda delta, data, args, out: visionpeft.merge(delta, out / "merged.pt"),
    "val": lambda delta, data, args, out: visionpeft.val(delta, data),
    "predict": lambda delta, data, args, out: visionpeft.predict(delta, [image(data)]),
    "torchscript": lambda delta, data, args, out: visionpeft.export(delta, "torchscript", out / "model.torchscript"),
    "peft": lambda delta, data, args, out: visionpeft.import_peft(visionpeft.export(delta, "peft", out / "peft")),
    "forgetting": lambda delta, data, args, out: visionpeft.forgetting(delta, data),
}
SLOW = ("forecast", "suggest", "forgetting", "merge", "peft")  # for YOLO; what is of the family in them is in others, too


def _model(given: dict) -> dict:
    return {k: given[k] for k in ("model", "model_args") if k in given}


def image(data: Path) -> str:
    return str(next((data if data.is_dir() else data.parent / "images").rglob("val/**/*.png")))


def test_train_leaves_the_process_as_it_was(trained: tuple) -> None:
    assert trained[-1] == []


@pytest.mark.parametrize("verb", [pytest.param(v, marks=[pytest.mark.slow] * (v == "suggest")) for v in VERBS])
def test_a_verb_leaves_the_process_as_it_was(verb: str, trained: tuple, tmp_path: Path) -> None:
    family, data, given, run, _ = trained
    if family == "yolo" and verb in SLOW:
        pytest.skip("as for timm")
    before = state()
    try:
        VERBS[verb](run.delta, data, given, tmp_path)
    except visionpeft.VisionpeftError as error:  # the base has other classes
        assert verb == "forgetting", error
    assert changed(before) == []


def test_threads(trained: tuple, tmp_path: Path) -> None:
    """Trains come one after the other, with the results that each has alone; loads and predictions do not wait."""
    family, data, given, run, _ = trained
    before = state()
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        if family == "timm":
            runs = list(pool.map(lambda i: visionpeft.train(data, **given, project=tmp_path), range(2)))
            wanted, *others = (deltas.read(r.delta).tensors for r in (run, *runs))
            assert all(torch.equal(found[k], value) for found in others for k, value in wanted.items())
        done = list(
            pool.map(
                lambda i: visionpeft.predict(visionpeft.load(run.delta), [image(data)]), range(4 if family == "yolo" else 8)
            )
        )
    assert len({_seen(results) for results in done}) == 1
    assert [name for name in changed(before) if name != "torch"] == []  # what other threads drew stays drawn
    assert nn.Linear(1, 1)(torch.zeros(1, 1)).shape == (1, 1)


def _seen(results: Any) -> str:
    return str([r if isinstance(r, dict) else r.boxes.data.tolist() for r in results])


def test_lean_is_applied_in_threads() -> None:
    """What finds folds must not stand between other threads and their modules."""
    stop, errors = threading.Event(), []

    def call() -> None:
        linear = nn.Linear(1, 1)
        while not stop.is_set():
            try:
                linear(torch.zeros(1, 1))
            except Exception as error:
                errors.append(error)

    other = threading.Thread(target=call)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            blocks = [nn.Sequential(*(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) * 20) for _ in range(8)]
            list(pool.map(lean.apply, blocks))
    finally:
        stop.set()
        other.join()
    assert not errors


def test_threads_wait_until_all_methods_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package := tmp_path / "slow_methods").mkdir()
    (package / "__init__.py").write_text(
        "from visionpeft.registry import Registry\nALL = Registry('slow_methods', 'method')\n"
    )
    (package / "one.py").write_text(
        "import time\ntime.sleep(0.2)\nfrom slow_methods import ALL\n@ALL.register('one')\nclass One: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = importlib.import_module("slow_methods").ALL
    with ThreadPoolExecutor(4) as pool:
        assert {cls.__name__ for cls in pool.map(registry.__getitem__, ["one"] * 4)} == {"One"}


def test_all_that_may_change_is_put_back() -> None:
    os.environ["TO_CHANGE"] = "as it was"
    try:
        before = state()
        with untouched():
            os.environ |= {"TO_CHANGE": "otherwise", "NEW": "1"}
            del os.environ["PATH"]
            random.seed(7), np.random.seed(7), torch.manual_seed(7)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True
            torch.set_num_threads(2)
            torch.serialization.add_safe_globals([nn.Linear])
            warnings.simplefilter("ignore")
        assert changed(before) == []
    finally:
        del os.environ["TO_CHANGE"]


def test_what_threads_share_is_left_by_the_last() -> None:
    inside: list[str] = []

    class Kept:
        def __enter__(self) -> None:
            inside.append("in")

        def __exit__(self, *error: object) -> None:
            inside.pop()

    kept = shared(Kept)  # type: ignore[arg-type]
    first, second = kept(), kept()
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert inside == ["in"]
    assert inside == []


def test_voices_in_threads(capsys: pytest.CaptureFixture) -> None:
    """What one thread keeps off stdout is no other's; Ultralytics' logger is as it was, in whatever order they end."""
    level, streams = LOGGER.level, [getattr(h, "stream", None) for h in LOGGER.handlers]
    one, other = quiet(), quiet()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert LOGGER.level >= logging.WARNING
    other.__exit__(None, None, None)
    with stdout_to_stderr():
        print("mine")
        thread = threading.Thread(target=lambda: print("another's"))
        thread.start()
        thread.join()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("another's\n", "mine\n")
    assert (LOGGER.level, [getattr(h, "stream", None) for h in LOGGER.handlers]) == (level, streams)
