"""The family of timm: image classifiers by any of its architectures' names, on folders of images, trained by trainer.py."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from ...config import SettledConfig
from ...core.anatomy import Anatomy
from ...core.base_model import Base, Data
from ...data.layout import composed
from ...errors import DataError
from ...registry import FAMILIES
from ...training.job import Job
from ...training.plots import Picture, spread
from ..base import Arguments, EvalResult, Family
from ..capabilities import SupportsGradients, SupportsHoldout
from ..classification import (
    Images,
    draw,
    image_sources,
    loader,
    open_image,
    read_folders,
    score,
    shorten_list,
    split_folders,
)
from ..predictions import Answers
from . import arguments, loading, trainer
from .anatomy import read_anatomy
from .arguments import EvalOptions, Hyperparameters, PredictOptions, read_options, select_device
from .data import transform
from .dry_run import DryRuns
from .export import Export
from .frozen_stages import FrozenStages
from .sources import check_named


@FAMILIES.register("timm")
class Timm(FrozenStages, DryRuns, Export, SupportsGradients, SupportsHoldout, Family):
    """Classifiers of timm: "timm/NAME", or NAME alone; a local file with model_args={"checkpoint_path": ...}."""

    suffix: ClassVar[str] = ".safetensors"
    defaults: ClassVar[Arguments] = {
        "epochs": 30,
        "imgsz": None,  # the model's own, see defaults_for
        "batch": 32,
        "lr0": 1e-3,
        "optimizer": "adamw",
        "workers": 4,
        "head": "rebuild",
    }
    body_lr_scale: ClassVar[float] = 0.6  # a new classifier may learn faster than the pretrained body should change
    bn: ClassVar[str | None] = "frozen"  # a batch's statistics of small late maps are noise (benchmarks/defaults.md)

    # ------------------------------------------------------------------------------------------------------------ arguments
    def train_options(self) -> Iterable[str]:
        return list(Hyperparameters.__dataclass_fields__)

    def defaults_for(self, base: Base) -> dict[str, Any]:
        return {**self.defaults, "imgsz": base.facts["imgsz"]}

    def check(self, config: SettledConfig) -> None:
        arguments.check(config)

    def primary_metric(self, task: str) -> str:
        return trainer.METRIC

    # --------------------------------------------------------------------------------------------------------------- models
    def supports(self, source: str) -> bool:
        return source.startswith("timm/") or timm.is_model(source)

    def model_names(self) -> Iterable[str]:
        return [f"timm/{name}" for name in timm.list_models()]

    def load(self, source: str, **options: Any) -> Base:
        return loading.load(source, options)

    def load_architecture(self, source: str, **options: Any) -> Base:
        if options.get("checkpoint_path") is not None and Path(options["checkpoint_path"]).is_file():
            return self.load(source, **options)
        return self.load(source, **{**options, "checkpoint_path": None, "pretrained": False})

    def check_named(self, source: str | None, named: Arguments, own: Arguments, scratch: bool = False) -> Arguments:
        return check_named(source and source.removeprefix("timm/"), named, own, scratch)

    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        return loading.with_head(base, names, head)

    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        return read_anatomy(model, self.name, name)

    # ----------------------------------------------------------------------------------------------------------------- data
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        return read_folders(source, split, train=train)

    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        return split_folders(data, folder, share)

    def losses(self, model: nn.Module, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        images = Images(spread(data.train, batch * count), transform(model, imgsz))
        device = next(model.parameters()).device
        for inputs, labels in loader(images, batch):
            yield nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))

    # -------------------------------------------------------------------------------------------------------- training, use
    def train(self, job: Job) -> None:
        trainer.run(job)

    def check_classes(self, names: Mapping[int, str], data: Data) -> None:
        known = set(map(composed, names.values()))
        if strange := [name for name in data.names.values() if composed(name) not in known]:
            raise DataError(
                f"{data.source} has the class '{strange[0]}', which this model does not know; "
                f"it knows {shorten_list(names.values())}"
            )

    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        use = read_options(EvalOptions, options)
        moved: Any = copy.deepcopy(model).to(select_device(use.device))
        names = getattr(moved, "names", data.names)
        self.check_classes(names, data)
        index = {composed(name): i for i, name in names.items()}
        items = [(file, index[composed(data.names[i])]) for file, i in data.val]
        images = Images(items, transform(moved, use.imgsz))
        guesses: list[int] = []
        metrics = score(moved, loader(images, use.batch, use.workers), len(index), guesses=guesses)
        return EvalResult(metrics, Answers.gather([f for f, _ in items], [i for _, i in items], guesses))

    @torch.no_grad()
    def predict(self, model: nn.Module, source: Any, **options: Any) -> list[dict[str, Any]]:
        """Return {"file", "class", "score", "top5"} of each image; `source`: a path, a folder, a PIL image, or a list."""
        use = read_options(PredictOptions, options)
        merged: Any = loading.merged_copy(model).to(select_device(use.device))
        prepare = transform(merged, use.imgsz)
        images = list(image_sources(source))
        results = []
        for start in range(0, len(images), use.batch):
            chunk = images[start : start + use.batch]
            batch = torch.stack([prepare(open_image(image)) for image in chunk])
            shares, classes = merged(batch.to(next(merged.parameters()).device)).softmax(1).topk(min(5, len(merged.names)))
            for image, share, guess in zip(chunk, shares.tolist(), classes.tolist(), strict=True):
                top = [(merged.names[i], round(p, 5)) for i, p in zip(guess, share, strict=True)]
                file = None if isinstance(image, Image.Image) else str(image)
                results.append({"file": file, "class": top[0][0], "score": top[0][1], "top5": top})
        return results

    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        def guess(images: list[Image.Image]) -> list[tuple[str, float]]:
            return [(r["class"], r["score"]) for r in self.predict(model, images, **options)]  # type: ignore[arg-type]

        return draw(data, count, guess if model is not None else None)

    def open_merged(self, path: Path) -> nn.Module:
        return loading.open_merged(path)

    def save_merged(self, model: Any, header: Arguments, out: Path) -> Path:
        return loading.save_merged(model, header, out)
