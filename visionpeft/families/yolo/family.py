"""The family of Ultralytics YOLO: a mixin over Ultralytics' own trainers, so their augmentation, losses, validation,
callbacks and multi-GPU launch stay in force. Tasks of YOLOv8, YOLO11 and YOLO26: detect, segment, pose, obb, classify."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import torch
import ultralytics
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.utils import get_split_fraction
from ultralytics.utils import DATASETS_DIR, ROOT
from ultralytics.utils.patches import imread

from ... import files
from ...config import SettledConfig
from ...core.anatomy import Anatomy
from ...core.base_model import Base, Data
from ...core.delta import fits_half
from ...errors import ConfigError, DataError, ModelError
from ...registry import FAMILIES
from ...sources import find
from ...training.job import Job
from ...training.plots import Picture, spread
from ..base import Arguments, EvalResult, Family
from ..capabilities import SupportsGradients, SupportsHoldout
from ..classification import draw
from . import arguments, loading
from .anatomy import read_anatomy
from .arguments import usable
from .data import LabelledImages, batches, read_data, readable, split_off, warn_of_lost
from .dry_run import DryRuns
from .export import Export
from .frozen_stages import FrozenStages
from .loader import ReplayableLoader
from .loading import for_inference, settled_task
from .output import quiet
from .pictures import labelled, predicted
from .sources import check_download, check_named, known
from .tasks import TASKS, Outputs, with_head
from .trainer import PeftTrainerMixin, check_hooks


@FAMILIES.register("yolo")
class Yolo(FrozenStages, DryRuns, Export, SupportsGradients, SupportsHoldout, Family):
    """Models of Ultralytics: "yolo11n.pt", a path to a checkpoint, or a YAML (random weights: no base, no delta)."""

    suffix: ClassVar[str] = ".pt"
    outputs: ClassVar[type] = Outputs
    data_yamls: ClassVar[Path | None] = ROOT / "cfg" / "datasets"
    data_root: ClassVar[Path | None] = DATASETS_DIR
    defaults: ClassVar[Arguments] = {
        "epochs": 50,
        "imgsz": None,  # the task's own, see defaults_for
        "batch": 16,
        "lr0": 1e-3,
        "optimizer": "AdamW",
        "workers": 8,
        "head": "keep",
    }
    refused: ClassVar[Mapping[str, str]] = arguments.REFUSED
    evaluated: ClassVar[frozenset[str]] = frozenset(
        ("classes", "conf", "iou", "max_det", "agnostic_nms", "overlap_mask", "mask_ratio")
    )

    # ------------------------------------------------------------------------------------------------------------ arguments
    def train_options(self) -> Iterable[str]:
        return arguments.PASSED

    def defaults_for(self, base: Base) -> dict[str, Any]:
        return {**self.defaults, "imgsz": TASKS[base.task].imgsz}

    def check(self, config: SettledConfig) -> None:
        arguments.check(config)

    def primary_metric(self, task: str) -> str:
        return TASKS[task].score

    # --------------------------------------------------------------------------------------------------------------- models
    def supports(self, source: str) -> bool:
        path = Path(source)
        if source.startswith("timm/") or path.suffix not in (".pt", ".yaml", ".yml", ""):
            return False
        return path.suffix != "" or path.stem.lower().startswith(("yolo", "rtdetr"))

    def model_names(self) -> Iterable[str]:
        return [f"yolo{v}{s}.pt" for v in ("v8", "11", "26") for s in "nsmlx"]

    def load(self, source: str, **options: Any) -> Base:
        if strange := ", ".join(options.keys() - {"channels"}):
            raise ConfigError(f"YOLO models take no further options but channels, but {strange} was given")
        base = loading.load(source)
        return loading.with_channels(base, options["channels"], "model_args") if options else base

    def load_architecture(self, source: str, **options: Any) -> Base:
        design = Path(source).with_suffix(".yaml").name
        return self.load(source if Path(find(source)).is_file() or not known(design) else design, **options)

    def check_named(self, source: str | None, named: Arguments, own: Arguments, scratch: bool = False) -> Arguments:
        if named not in ({}, {"channels": 1}, {"channels": 3}):
            raise ModelError(
                f"the arguments {str(dict(named))[:60]}, but of a YOLO model only its channels can be said, 1 or 3"
            )
        if source is not None:
            check_named(source, scratch)
        return {}

    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        return with_head(base.model, names, base.facts["channels"], head, outputs)

    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        return read_anatomy(model, self.name, name, loading.supported(model, name))

    # ----------------------------------------------------------------------------------------------------------------- data
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        return read_data(source, TASKS[base.task if base else "detect"], split, train, allow_download)

    def suited(self, base: Base, data: Data) -> tuple[Base, Arguments]:
        if data.channels == base.facts["channels"]:
            return base, {}
        return loading.with_channels(base, data.channels, data.source), {"channels": data.channels}

    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        return split_off(data, folder, share)

    def losses(self, model: Any, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        model.args = get_cfg()
        model.criterion = model.init_criterion()
        device, stride = next(model.parameters()).device, int(max(model.stride.max(), 32))
        with readable(data.source), quiet():
            for labelled_images in batches(data, imgsz, batch, count, stride):
                yield model.loss({k: v.to(device) for k, v in labelled_images.items()})[0].sum()

    # -------------------------------------------------------------------------------------------------------- training, use
    def train(self, job: Job) -> None:
        task = TASKS[job.base.task]
        # to a class that calls itself a trainer, Ultralytics adds every tracker that is installed; ours are asked for
        name = f"Peft{task.trainer.__name__.removesuffix('Trainer')}"
        cls = type(name, (PeftTrainerMixin, task.trainer), {"job": job})
        check_hooks(cls, task.validator, ReplayableLoader)
        trainer = cls(overrides=arguments.of_run(job))
        try:
            trainer.train()
        finally:
            trainer.close()

    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        self.check_classes(model.names, data)  # type: ignore[arg-type]
        task, reads = TASKS[data.task], getattr(model, "yaml", {}).get("channels", 3)
        if data.channels != reads:
            raise DataError(
                f"{data.source} has images of channels={data.channels}, but the model reads {reads}; give other data"
            )
        shapes = [list(x or ()) for x in (data.outputs.get("kpt_shape"), getattr(model, "kpt_shape", None))]
        if shapes[0] != shapes[1]:
            raise DataError(f"{data.source} has keypoints of kpt_shape={shapes[0]}, but the model's are {shapes[1]}")
        check_download(data.source, options.get("split", "val"))
        if isinstance(batch := options.get("batch"), int | float) and batch < 1:  # for training, Ultralytics finds one
            options["batch"] = self.defaults["batch"]
        args: dict[str, Any] = {"data": data.source, "mode": "val", "task": task.name, "plots": False, "verbose": False}
        args = {**args, "rect": True, **options}  # as `YOLO.val` does: padded less than a square, and scored otherwise
        with tempfile.TemporaryDirectory() as folder:  # Ultralytics wants a place for plots and labels
            with readable(data.source), usable(args), quiet():
                check_hooks(task.validator)
                stats = (validator := task.validator(args=args, save_dir=Path(folder)))(model=for_inference(model))
        share = get_split_fraction(args.get("fraction", 1.0), args.get("split", "val"))
        warn_of_lost(data, "val", validator.dataloader.dataset, share)
        metrics = {name: round(float(stats[key]), 5) for key, name in task.metrics.items()}
        return EvalResult(metrics, task.predictions(validator))

    def predict(self, model: nn.Module, source: Any, **options: Any) -> Any:
        with _predictor(model, options) as predictor:
            return predictor(source)

    def to_json(self, prediction: Any) -> dict[str, Any]:
        """Return boxes (with masks, keypoints, corners), or a class and the next best."""
        if prediction.probs is None:
            return {"file": prediction.path, "boxes": prediction.summary()}
        best = zip(prediction.probs.top5, prediction.probs.top5conf, strict=True)
        top = [(prediction.names[i], round(float(p), 5)) for i, p in best]
        return {"file": prediction.path, "class": top[0][0], "score": top[0][1], "top5": top}

    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        def guess(images: list[Any]) -> list[tuple[str, float]]:
            results = self.predict(model, images, **options)  # type: ignore[arg-type]
            return [(r.names[r.probs.top1], float(r.probs.top1conf)) for r in results]

        if not isinstance(data, LabelledImages):
            return draw(data, count, guess if model is not None else None)
        some = [f for f in spread(data.val, count) if imread(f) is not None]  # Ultralytics leaves out the others
        if model is None:
            return [labelled(f, r, data) for f, r in zip(some, data.rows(some), strict=True)]
        with _predictor(model, options) as predictor:  # one at a time, or they would be padded to one size
            return [predicted(predictor(file)[0]) for file in some]

    def open_merged(self, path: Path) -> nn.Module:
        return loading.read_checkpoint(str(path))["model"].float().eval()

    def save_merged(self, model: Any, header: Arguments, out: Path) -> Path:
        model = copy.deepcopy(model).cpu()
        model.criterion = None
        args = {k: v for k, v in header["train_args"].items() if k in DEFAULT_CFG_DICT}
        model.args = {**DEFAULT_CFG_DICT, **args, "task": settled_task(model).name, "mode": "train"}
        # Ultralytics trains in channels_last on a GPU, and says that released versions cannot fuse such weights
        model = model.to(dtype=torch.float16 if fits_half(model) else torch.float32)
        for parameter in model.to(memory_format=torch.contiguous_format).parameters():
            parameter.requires_grad_(False)
        content = {
            "date": datetime.now(timezone.utc).isoformat(),
            "version": ultralytics.__version__,
            "license": "AGPL-3.0 License (https://ultralytics.com/license)",
            "docs": "https://docs.ultralytics.com",
            "epoch": -1,
            "model": model,
            "train_args": model.args,
            "train_metrics": header.get("metrics", {}).get("after", {}),
            **dict.fromkeys(("best_fitness", "ema", "updates", "optimizer", "scaler")),
        }
        return files.replace(out, lambda temporary: torch.save(content, temporary))


@contextmanager
def _predictor(model: nn.Module, options: Arguments) -> Iterator[Any]:
    """Make Ultralytics' predictor of a model, which predicts as long as this is entered."""
    task = settled_task(model)
    # as `YOLO.predict` has it: an image by itself is padded to a rectangle
    args = {"mode": "predict", "task": task.name, "save": False, "batch": 1, "rect": True, **options}
    with usable(args), quiet():
        predictor = task.predictor(overrides=args)
        predictor.setup_model(model=for_inference(model), verbose=False)
        yield predictor
