"""Writes the files beside it. They are what an earlier visionpeft wrote, so run this for a new kind of file only, never to
let a changed reader pass:  python tests/golden/make.py [NAME ...]  with names of the functions below."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = Path(tempfile.gettempdir()) / "golden"  # what paths in the files begin with
os.environ["VISIONPEFT_CACHE"] = str(ROOT / "cache")
sys.path.insert(0, str(HERE.parent))

import yaml  # noqa: E402
from conftest import ctrl_c  # noqa: E402
from golden_nets import FAMILY, SIZES, make_base, make_data, nets_of, outputs  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_golden import RUN, place  # noqa: E402

import visionpeft  # noqa: E402
from visionpeft.benchmark import run as sweep  # noqa: E402
from visionpeft.core import delta as deltas  # noqa: E402
from visionpeft.families.timm.trainer import Trainer  # noqa: E402
from visionpeft.families.yolo.trainer import PeftTrainerMixin  # noqa: E402


def given(net: str, **more: Any) -> dict[str, Any]:
    own = {"epochs": 2, "batch": 4, "imgsz": SIZES[net], "device": "cpu", "workers": 0, "quiet": True, "exist_ok": True}
    folder = ROOT / net
    folder.mkdir(parents=True, exist_ok=True)
    return {"data": make_data(net, folder), **make_base(net, folder), **own, "project": ROOT / "runs", **more}


def delta_files() -> None:
    """One delta for each method and family, and what the adapted models say of two images."""
    said = {}
    for family in dict.fromkeys(FAMILY.values()):
        (ROOT / family).mkdir(parents=True, exist_ok=True)
        (HERE / "deltas").mkdir(exist_ok=True)
        for method, net in nets_of(family, ROOT / family).items():
            run = visionpeft.train(**given(net, method=method, epochs=3, lr0=0.02, name=f"{net}-{method}"))
            name = f"{net}-{method}"
            shutil.copy(run.delta, HERE / "deltas" / f"{name}.safetensors")
            said[name] = outputs(net, visionpeft.load(run.delta).model)
            print(name, flush=True)
    save_file(said, HERE / "outputs.safetensors")


def run_folders() -> None:
    """Runs of two epochs that were stopped after the first, and where the whole ones came to."""
    for net, owner, name in (("yolo", PeftTrainerMixin, "_model_train"), ("resnet", Trainer, "_epoch")):
        whole = visionpeft.train(**given(net, **RUN, name=f"{net}-whole"))
        try:
            with ctrl_c(owner, name, 1):
                visionpeft.train(**given(net, **RUN, name=f"{net}-run"))
        except visionpeft.errors.Interrupted:
            folder = HERE / "runs" / net
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("train.json", "checkpoint.pt", "delta.safetensors"):
                shutil.copy(ROOT / "runs" / f"{net}-run" / file, folder)
        shutil.copy(whole.delta, folder / "whole.safetensors")
        (folder / "whole.json").write_text(
            json.dumps({"place": place(), "fingerprint": deltas.fingerprint(deltas.read(whole.delta).tensors)}, indent=1)
        )


def views() -> None:
    """What the frozen stages of a classifier made of its images."""
    shutil.rmtree(ROOT / "cache", ignore_errors=True)
    run = visionpeft.train(**given("resnet", method="full", freeze=2, cache=1, name="views"))
    (file,) = (ROOT / "cache").rglob("*.views")
    shutil.copy(file, HERE / "resnet.views")
    print(run.measured["prefix"])


def peft_folders() -> None:
    """Adapters for HF peft."""
    for net in ("yolo", "vit"):
        base = given(net)
        named = {k: base[k] for k in ("model", "model_args") if k in base}
        file = HERE / "deltas" / f"{net}-lora.safetensors"
        visionpeft.export(file, "peft", HERE / "peft" / net, exist_ok=True, **named)


def benchmark_folder() -> None:
    """Results of a sweep of two methods."""
    given("resnet")
    config = {k: v for k, v in given("resnet").items() if k not in ("quiet", "exist_ok", "project")}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    (ROOT / "sweep.yaml").write_text(yaml.safe_dump({**config, "name": "golden", "method": ["full", "lora"]}))
    out = ROOT / "results"
    shutil.rmtree(out, ignore_errors=True)
    sweep(str(ROOT / "sweep.yaml"), out)
    shutil.rmtree(HERE / "results", ignore_errors=True)
    for file in (out / "benchmark.json", *(out / "cells").glob("*.json")):
        target = HERE / "results" / file.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        said = json.loads(file.read_text())
        if "pictures" in said:  # one of each will do
            said["pictures"] = {k: v[:1] for k, v in said["pictures"].items()}
        target.write_text(json.dumps(said))


if __name__ == "__main__":
    makers = (delta_files, run_folders, views, peft_folders, benchmark_folder)
    for maker in makers:
        if maker.__name__ in (sys.argv[1:] or [m.__name__ for m in makers]):
            maker()
    for file in sorted(f for f in HERE.rglob("*") if f.is_file()):
        print(file.relative_to(HERE), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()[:12])
