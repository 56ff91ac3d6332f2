"""A family of one small network on made-up images: no more than a family must be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionpeft.core.anatomy import HEAD, Anatomy, Stage
from visionpeft.core.attach import attach, set_requires_grad
from visionpeft.core.base_model import Base, Data
from visionpeft.errors import DataError, ModelError
from visionpeft.families.base import EvalResult, Family
from visionpeft.families.introspect import read_layers, read_params, read_statistics
from visionpeft.families.predictions import Answers
from visionpeft.measure import Meter
from visionpeft.process import random_states
from visionpeft.registry import FAMILIES
from visionpeft.training import checkpoint
from visionpeft.training.job import Job, keep_best
from visionpeft.training.plots import Picture

SIDE, STAGES = 8, ("stem", "body")


class Net(nn.Module):
    """Reads images (B, 3, H, W), puts out (B, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


def stage_of(name: str) -> int:
    first = name.split(".")[0]
    return STAGES.index(first) if first in STAGES else HEAD


def images(names: Sequence[str]) -> Tensor:
    """Return what images of these names look like: dark ones and light ones."""
    noise = torch.Generator().manual_seed(len(names))
    return torch.stack([torch.rand(3, SIDE, SIDE, generator=noise) / 2 + name.startswith("light") / 2 for name in names])


@FAMILIES.register("tiny")
class Tiny(Family):
    """One small network, "tiny"."""

    suffix: ClassVar[str] = ".safetensors"
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 8,
        "imgsz": SIDE,
        "batch": 4,
        "lr0": 0.02,
        "optimizer": "adam",
        "workers": 0,
        "head": "rebuild",
    }

    def primary_metric(self, task: str) -> str:
        return "accuracy"

    def supports(self, source: str) -> bool:
        return source == "tiny"

    def model_names(self) -> Iterable[str]:
        return ["tiny"]

    def load(self, source: str, **options: Any) -> Base:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Base(source, Net(3).eval(), "classify", {0: "a", 1: "b", 2: "c"}, {"imgsz": SIDE})

    def check_named(
        self, source: str | None, named: Mapping[str, Any], own: Mapping[str, Any], scratch: bool = False
    ) -> dict[str, Any]:
        if named or source not in (None, "tiny"):
            raise ModelError(f"the model {source} with {named}, which is not here")
        return {}

    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        model: Any = copy.deepcopy(base.model)
        if dict(names) != base.names:
            model.head = nn.Linear(8, len(names))
        return model

    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        return Anatomy(
            family=self.name,
            model=name,
            stages=tuple(Stage(i, n, "Conv2d", 8, "NCHW", i == 1) for i, n in enumerate(STAGES)),
            head="Linear",
            heads=("head",),
            params=read_params(model, stage_of),
            layers=read_layers(model, stage_of),
            blocks=(),
            attentions=(),
            statistics=read_statistics(model, stage_of),
        )

    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        if source != "shades":
            raise DataError(f"there are no images {source}; give shades")
        some = [(f"{shade} {i}", label) for label, shade in enumerate(("dark", "light")) for i in range(8)]
        return Data(source, "classify", {0: "dark", 1: "light"}, "shades of grey", some, some[::2])

    def train(self, job: Job) -> None:
        torch.manual_seed(job.config.seed)
        model = set_requires_grad(attach(self.with_head(job.base, job.data.names, job.config.head), job.plan), job.plan)
        meter = Meter(model, torch.device("cpu"), stages=job.stages)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], job.config.lr0)
        job.trackers.open(0)
        history: list[dict[str, float]] = []
        for epoch in range(job.config.epochs):
            job.begin_epoch(model, epoch / job.config.epochs, meter)
            for chunk in (job.data.train[i :: len(job.data.train) // job.config.batch] for i in range(job.config.batch)):
                files, labels = zip(*chunk, strict=True)
                loss = nn.functional.cross_entropy(model(images(files)), torch.tensor(labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            metrics = self.evaluate(model, job.data).metrics
            history.append({"epoch": epoch + 1, "train/loss": loss.item(), **metrics})
            if metrics["accuracy"] >= max(e["accuracy"] for e in history):
                keep_best(job, model, metrics, epoch + 1)()
            live = checkpoint.live(model)
            content = {
                "epoch": epoch,
                "done": epoch + 1 == job.config.epochs,
                "model": live,
                "ema": live,
                "updates": epoch + 1,
            }
            content |= {"optimizer": optimizer.state_dict(), "history": history, "measured": meter.report()}
            checkpoint.save(job.checkpoint, {**content, "random": random_states(), "origin": job.origin})
        meter.close()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        files, labels = (list(x) for x in zip(*data.val, strict=True))
        guesses = model.eval()(images(files)).argmax(1).tolist()
        hits = sum(a == b for a, b in zip(labels, guesses, strict=True))
        return EvalResult({"accuracy": hits / len(labels)}, Answers.gather(files, labels, guesses))

    @torch.no_grad()
    def predict(self, model: nn.Module, source: Any, **options: Any) -> list[dict[str, Any]]:
        return [{"file": source, "class": model.eval()(images([source])).argmax().item()}]

    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        return [np.zeros((SIDE, SIDE, 3), np.uint8)]

    def save_merged(self, model: nn.Module, header: Mapping[str, Any], out: Path) -> Path:
        save_file(model.state_dict(), out)
        return out

    def open_merged(self, path: Path) -> nn.Module:
        tensors = load_file(path)
        model = Net(len(tensors["head.bias"]))
        model.load_state_dict(tensors)
        return model
