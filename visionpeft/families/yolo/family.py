"""Ultralytics YOLO: a mixin over Ultralytics' own trainers, so their augmentation, losses, validation, callbacks and
multi-GPU launch stay in force. Tasks of YOLOv8, YOLO11 and YOLO26: detect, segment, pose, obb, classify."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import torch
import ultralytics
import yaml
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.utils import get_split_fraction, img2label_paths
from ultralytics.engine.exporter import Exporter
from ultralytics.nn.modules.block import Attention as AreaAttention
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import guess_model_task, torch_safe_load, yaml_model_load
from ultralytics.utils import DATASETS_DIR, ROOT
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.downloads import attempt_download_asset
from ultralytics.utils.patches import imread
from ultralytics.utils.torch_utils import select_device

from ... import files
from ...config import SettledConfig
from ...core.anatomy import HEAD, Anatomy, Attention, Block, Stage
from ...core.attach import attached, merge, mergeable
from ...core.base_model import LARGEST_IMAGE, Base, Data
from ...core.class_twins import plain
from ...core.delta import fits_half
from ...data.layout import SUFFIXES, composed, read_names, read_values
from ...data.pictures import inspect_image, refuse_unfit
from ...errors import ConfigError, DataError, ModelError, VisionpeftError, nearest
from ...files import read_yaml
from ...pickles import objection
from ...registry import FAMILIES
from ...sources import find
from ...training.distributed import check_shares
from ...training.feature_cache import ViewSchedule
from ...training.job import Job
from ...training.plots import Picture, spread
from ..base import DryRun, EvalResult, Family, LeadingStages, Step
from ..classification import FOLDERS, draw, few, held_back, read_folders, split_folders
from ..introspect import observe, read_layers, read_params, read_statistics, read_stride
from . import dry_run as dry_run
from .batches import batches
from .output import aside, quiet
from .pictures import labelled, predicted
from .sources import (
    check_caches,
    check_described,
    check_download,
    check_named,
    check_parts,
    check_size,
    checkpoint,
    known,
    read_set,
)
from .tasks import TASKS, Outputs, Task, build, check_content, fit, outputs_of, pose_length, rows_of, task_of
from .trainer import PeftTrainerMixin, ReplayableLoader, brief, check_hooks, images, readable, usable, warn_of_lost

log = logging.getLogger(__name__)

# what train() decides itself, and what would undo it
_OURS = {"model", "data", "epochs", "imgsz", "batch", "lr0", "optimizer", "device", "workers", "seed", "amp", "resume"}
_OURS |= {"freeze", "project", "name", "exist_ok"}
_NO_VIEW = {"lrf", "momentum", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr", "cos_lr", "nbs"}
_NO_VIEW |= {"box", "cls", "cls_pw", "dfl", "pose", "kobj", "rle", "angle", "dropout", "patience", "val", "plots", "verbose"}
_NO_VIEW |= {"iou", "conf", "max_det", "deterministic", "profile", "half", "save_json"}  # what no augmentation reads
_OPTIMIZERS = ("AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "MuSGD")
_REFUSED = {
    "RTDETRDetectionModel": "RT-DETR",
    "WorldModel": "YOLO-World",
    "YOLOEModel": "YOLOE",
    "YOLOESegModel": "YOLOE",
    "SemanticSegmentationModel": "semantic segmentation",
    "DepthModel": "depth",
}
_UNREADABLE = (RuntimeError, TypeError, EOFError, LookupError, AttributeError, ImportError, ValueError, yaml.YAMLError)
_INSTEAD = "give a YOLOv8, YOLO11 or YOLO26 model that detects, segments, classifies, or finds poses or oriented boxes"
_OTHERS = {"rtdetr": "RT-DETR", "-world": "YOLO-World", "yoloe": "YOLOE", "-sem": "semantic segmentation", "-depth": "depth"}


@FAMILIES.register("yolo")
class Yolo(Family):
    """Models of Ultralytics: "yolo11n.pt", a path to a checkpoint, or a YAML (random weights: no base, no delta)."""

    suffix: ClassVar[str] = ".pt"
    outputs: ClassVar[type] = Outputs
    data_yamls: ClassVar[Path | None] = ROOT / "cfg" / "datasets"
    data_root: ClassVar[Path | None] = DATASETS_DIR
    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 50,
        "imgsz": None,  # the task's own, see defaults_for
        "batch": 16,
        "lr0": 1e-3,
        "optimizer": "AdamW",
        "workers": 8,
        "head": "keep",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "task": "the task is the model's: yolo11n-seg.pt segments",
        "mode": "train() trains; val, predict and export are verbs of their own",
        "pretrained": "the weights are those of model=...; for random ones give a design, model='yolo11n.yaml'",
        "cfg": "a file of options is a recipe: --config FILE on the command line",
        "distill_model": "training learns from labels alone",
        "save": "a run always saves its delta, and the merged checkpoint beside it",
        "save_dir": "a run's folder is project/name",
        "save_period": "a run can be resumed from each of its epochs, and keeps the best one's delta",
        "single_cls": "let the data YAML name one class, and every label row begin with 0",
        "quantize": "export the adapted model, and quantise that",
    }
    evaluated: ClassVar[frozenset[str]] = frozenset(
        ("classes", "conf", "iou", "max_det", "agnostic_nms", "overlap_mask", "mask_ratio")
    )

    def supports(self, source: str) -> bool:
        path = Path(source)
        if source.startswith("timm/") or path.suffix not in (".pt", ".yaml", ".yml", ""):
            return False
        return path.suffix != "" or path.stem.lower().startswith(("yolo", "rtdetr"))

    def model_names(self) -> Iterable[str]:
        return [f"yolo{v}{s}.pt" for v in ("v8", "11", "26") for s in "nsmlx"]

    def train_options(self) -> Iterable[str]:
        return sorted(set(DEFAULT_CFG_DICT) - _OURS - set(self.refused))

    def defaults_for(self, base: Base) -> dict[str, Any]:
        return {**self.defaults, "imgsz": TASKS[base.task].imgsz}

    def primary_metric(self, task: str) -> str:
        return TASKS[task].score

    def check(self, config: SettledConfig) -> None:
        name = config.optimizer
        if name.lower() not in map(str.lower, _OPTIMIZERS):
            raise ConfigError(f"optimizer='{name}' is not known; give {', '.join(_OPTIMIZERS)}.{nearest(name, _OPTIMIZERS)}")
        if (amp := config.amp) not in (None, True, False, "bf16", "fp32"):
            raise ConfigError(f"amp={amp!r} is not known; it is True (fp16), 'bf16' or False")
        check_shares(config.device, config.batch)
        settings = {**_shared(config), **config.options}
        with usable(settings):
            get_cfg(overrides={k: v for k, v in settings.items() if v is not None})
            select_device(config.device, verbose=False)

    def load(self, source: str, **options: Any) -> Base:
        if strange := ", ".join(options.keys() - {"channels"}):
            raise ConfigError(f"YOLO models take no further options but channels, but {strange} was given")
        stem = Path(source).stem.lower()
        named = (kind for mark, kind in _OTHERS.items() if mark in stem and stem.startswith(("yolo", "rtdetr")))
        if not Path(source).is_file() and (other := next(named, None)):
            raise ModelError(f"{source} is a {other} model, which is not supported; {_INSTEAD}")
        pretrained = not source.endswith((".yaml", ".yml"))
        try:
            if pretrained:
                # Ultralytics' allow-list instead of unpickling: a delta may name a base that its user never looked at
                content = _content(checkpoint(source))
                model = _network(content, source)
                model.args = content.get("train_args") or {}
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)  # random weights, but always the same
                    model = _from_yaml(source)
        except VisionpeftError:
            raise
        except (FileNotFoundError, ConnectionError, OSError) as error:
            raise ModelError(
                f"the model {source} is not here and could not be downloaded; give the path of a .pt file ({brief(error)})"
            ) from error
        except _UNREADABLE as error:
            raise ModelError(f"{source} is not a checkpoint that Ultralytics can read ({brief(error)})") from error
        task = _supported(model, source)
        check_content(model, source)
        model.args = dict(getattr(model, "args", {}))
        if pretrained:
            check_described(model)
        model = model.float().eval()
        imgsz = model.args.get("imgsz")
        imgsz = imgsz if isinstance(imgsz, int) and 0 < imgsz <= LARGEST_IMAGE else task.imgsz
        facts = {"imgsz": imgsz, "mean": [0.0] * 3, "std": [1.0] * 3, "channels": int(model.yaml.get("channels", 3))}
        base = Base(source, model, task.name, dict(model.names), facts, pretrained)
        return _reading(base, options["channels"], "model_args") if options else base

    def check_named(
        self, source: str | None, named: Mapping[str, Any], own: Mapping[str, Any], scratch: bool = False
    ) -> dict[str, Any]:
        if named not in ({}, {"channels": 1}, {"channels": 3}):
            raise ModelError(
                f"the arguments {str(dict(named))[:60]}, but of a YOLO model only its channels can be said, 1 or 3"
            )
        if source is not None:
            check_named(source, scratch)
        return {}

    def load_architecture(self, source: str, **options: Any) -> Base:
        design = Path(source).with_suffix(".yaml").name
        return self.load(source if Path(find(source)).is_file() or not known(design) else design, **options)

    # ---------------------------------------------------------------------------------------------------------- the data
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        task = TASKS[base.task if base else "detect"]
        if task.name == "classify":
            # with train, too: without it, Ultralytics would split the rest anew
            return _own_folders(read_folders(source, split, SUFFIXES), split)
        if not str(source).endswith((".yaml", ".yml")):
            raise DataError(f"data={source} is no data YAML; give a .yaml with train, val and names (Ultralytics' format)")
        if Path(source).is_file():
            read_names(Path(source))  # a clear word on what is wrong with them
        data = read_set(str(source), "" if train else split, allow_download)
        source = str(source if Path(source).is_file() else data["yaml_file"])  # a name or an address until now
        digest, outputs = hashlib.sha256(), outputs_of(task, data, source)
        facts: dict[str, Any] = {"channels": data["channels"], "pose": pose_length(task, data, source)}
        owners: dict[str, set[str]] = {}
        for part in ("train", split) if train else (split,):
            found = images(data.get(part), part, source, said=True)
            if data["channels"] in (1, 3):  # else Ultralytics reads all bands, and all pages as bands
                refuse_unfit(found)
            boxes = 0
            for image, label in zip(found, img2label_paths(list(found)), strict=True):
                if not os.path.isfile(image):
                    named = f"{image[:200]!r}"  # with the blanks around it
                    raise DataError(f"{source} lists the {part} image {named}, which is not there; correct the list")
                rows = rows_of(Path(label), facts["pose"])
                owners.setdefault(label, set()).update([image] if rows else [])
                boxes += len(rows)
                _check_rows(rows, data["nc"], label, task, outputs)
                digest.update(f"{Path(image).name}|{os.path.getsize(image)}|{rows}\n".encode())
            if not boxes:
                raise DataError(
                    f"the {len(found)} {part} images of {source} have no labels; put one .txt per image into a folder "
                    "'labels' beside 'images'"
                )
            facts["train" if train and part == "train" else "val"] = found
        check_caches(Path(label).parent for label in owners)
        if shared := [label for label, own in owners.items() if len(own) > 1]:
            log.warning(
                f"more than one image of {source} has the labels {few(shared)}, so all but one train on another's boxes; "
                "rename the images"
            )
        if len(set(data["names"].values())) < data["nc"]:
            log.warning(f"{source} has classes of the same name, which scores cannot tell apart: {brief(data['names'])}")
        return Data(str(source), task.name, dict(data["names"]), digest.hexdigest(), facts, outputs)

    # --------------------------------------------------------------------------------------------------------- the model
    def suited(self, base: Base, data: Data) -> tuple[Base, dict[str, Any]]:
        channels = data.facts.get("channels", 3)
        if channels == base.facts["channels"]:
            return base, {}
        return _reading(base, channels, data.source), {"channels": channels}

    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        return fit(base.model, names, base.facts["channels"], head, outputs)

    def anatomy(self, model: Any, name: str) -> Anatomy:
        *body, head = model.model
        last = len(body)

        def stage_of(parameter: str) -> int | None:
            if ".dfl." in parameter:
                return None
            index = int(parameter.split(".")[1])
            return HEAD if index == last else index

        first = next(model.parameters())
        size = max(int(model.stride.max()) * 2, 64)
        to_head = head.f if isinstance(head.f, list) else [last + head.f]
        x = torch.zeros(1, model.yaml.get("channels", 3), size, size, device=first.device, dtype=first.dtype)
        attentions = {
            n: m for n, m in model.named_modules() if isinstance(m, AreaAttention) and not n.startswith(f"model.{last}.")
        }
        seen = observe(model, x, [*(f"model.{i}" for i in range(last)), *attentions])
        usual = _supported(model, name).imgsz / size  # images of the task's usual size are that much larger than x
        stages, blocks = [], []
        for i, module in enumerate(body):
            kind = plain(type(module)).__name__
            given, shape = seen.get(f"model.{i}", (None, ()))
            channels = shape[1] if len(shape) == 4 and any(True for _ in module.parameters()) else 0
            stages.append(Stage(i, f"model.{i}", kind, channels, "NCHW" if channels else "", i in to_head))
            if channels and not isinstance(module, Conv):
                inputs, stride = (given[1], read_stride(given[2:], shape[2:])) if given else (0, 0)
                blocks.append(Block(f"model.{i}", "conv", channels, "NCHW", i, cls=kind, inputs=inputs, stride=stride))
        return Anatomy(
            family=self.name,
            model=name,
            stages=tuple(stages),
            head=plain(type(head)).__name__,
            heads=(f"model.{last}",),
            params=read_params(model, stage_of),
            layers=read_layers(model, stage_of, attentions, {f"{n}.qkv.conv": _slices(m) for n, m in attentions.items()}),
            blocks=tuple(blocks),
            attentions=tuple(
                Attention(
                    n,
                    "map",
                    m.num_heads,
                    m.key_dim,
                    m.head_dim,
                    int(n.split(".")[1]),
                    keys=round(math.prod(seen[n].out[2:]) * usual**2),
                )
                for n, m in attentions.items()
            ),
            statistics=read_statistics(model, stage_of),
        )

    def leading_stages(self, base: Base, stages: int, imgsz: int) -> LeadingStages:
        model: Any = base.model
        read: set[int] = set()
        for module in model.model[stages:]:
            sources = [module.f] if isinstance(module.f, int) else module.f
            read |= {s if s >= 0 else module.i + s for s in sources}
        side = check_imgsz(imgsz, stride := max(int(model.stride.max()), 32), floor=stride, max_dim=1)  # as when it trains
        names = [f"model.{i}" for i in range(stages)]
        return LeadingStages(names, [names[i] for i in sorted(read) if i < stages], (base.facts["channels"], side, side))

    def view_schedule(self, views: int, config: SettledConfig, task: str) -> ViewSchedule:
        given = {k: v for k, v in config.options.items() if v is not None}
        use = {**DEFAULT_CFG_DICT, **given, "epochs": config.epochs}
        clashes = {"compile": "the frozen stages run apart from the rest"}
        if views:
            clashes |= {"multi_scale": "stored views are of one size", "rect": "stored views are of one size"}
            clashes |= {"time": "how many epochs read the stored views must be known"}
        if clash := next((name for name in clashes if use[name]), None):
            raise ConfigError(
                f"{clash}={use[clash]} does not go with cache or frozen_dtype ({clashes[clash]}); leave one out"
            )
        closing, share = max(use["epochs"] - use["close_mosaic"], 0), get_split_fraction(use["fraction"], "train")
        mixes = any(use[name] for name in ("mosaic", "mixup", "cutmix", "copy_paste"))
        if not (mixes and use["close_mosaic"]) or task == "classify":
            return ViewSchedule(min(views, use["epochs"]), share=share)
        return ViewSchedule(min(views, closing), min(views, use["epochs"] - closing), closing, share)

    def augmentation_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if k not in _NO_VIEW}

    def max_objects(self, data: Data, settings: Mapping[str, Any]) -> tuple[int, float]:
        return dry_run.objects(data, settings)

    def max_size(self, imgsz: int, settings: Mapping[str, Any]) -> int:
        return math.ceil(imgsz * (1 + (settings.get("multi_scale") or 0.0)))

    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
        return dry_run.rehearse(model, base, step)

    # ------------------------------------------------------------------------------------------------------------ the run
    def losses(self, model: Any, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        model.args = get_cfg()
        model.criterion = model.init_criterion()
        device, stride = next(model.parameters()).device, int(max(model.stride.max(), 32))
        with readable(data.source), quiet():
            for made in batches(data, imgsz, batch, count, stride):
                yield model.loss({k: v.to(device) for k, v in made.items()})[0].sum()

    def train(self, job: Job) -> None:
        task = TASKS[job.base.task]
        # to a class that calls itself a trainer, Ultralytics adds every tracker that is installed; ours are asked for
        name = f"Peft{task.trainer.__name__.removesuffix('Trainer')}"
        cls = type(name, (PeftTrainerMixin, task.trainer), {"job": job})
        check_hooks(cls, task.validator, ReplayableLoader)
        trainer = cls(overrides=_overrides(job))
        try:
            trainer.train()
        finally:
            trainer.close()

    def check_classes(self, names: Mapping[int, str], data: Data) -> None:
        if dict(names) != dict(data.names):
            raise DataError(
                f"{data.source} has the classes {brief(list(data.names.values()))}, but the model knows "
                f"{brief(list(names.values()))}; give data with the same classes in the same order"
            )

    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        self.check_classes(model.names, data)  # type: ignore[arg-type]
        task = TASKS[data.task]
        channels, own = data.facts.get("channels", 3), getattr(model, "yaml", {}).get("channels", 3)
        if channels != own:
            raise DataError(f"{data.source} has images of channels={channels}, but the model reads {own}; give other data")
        shapes = [list(x or ()) for x in (data.outputs.get("kpt_shape"), getattr(model, "kpt_shape", None))]
        if shapes[0] != shapes[1]:
            raise DataError(f"{data.source} has keypoints of kpt_shape={shapes[0]}, but the model's are {shapes[1]}")
        check_download(data.source, options.get("split", "val"))
        args: dict[str, Any] = {"data": data.source, "mode": "val", "task": task.name, "plots": False, "verbose": False}
        if options.get("batch", 1) < 1:  # for training, Ultralytics finds one
            options["batch"] = self.defaults["batch"]
        args = {**args, "rect": True, **options}  # as `YOLO.val` does: padded less than a square, and scored otherwise
        with tempfile.TemporaryDirectory() as folder:  # Ultralytics wants a place for plots and labels
            with readable(data.source), usable(args), quiet():
                check_hooks(task.validator)
                stats = (validator := task.validator(args=args, save_dir=Path(folder)))(model=_for_inference(model))
        share = get_split_fraction(args.get("fraction", 1.0), args.get("split", "val"))
        warn_of_lost(data, "val", validator.dataloader.dataset, share)
        return EvalResult(
            {name: round(float(stats[key]), 5) for key, name in task.metrics.items()}, task.evidence(validator)
        )

    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        if data.task == "classify":
            return split_folders(data, folder, share)
        back = held_back({Path(f).name for f in data.facts["train"]}, share)
        for part, held in (("train", False), ("val", True)):
            listed = [f for f in data.facts["train"] if (Path(f).name in back) == held]
            (folder / f"{part}.txt").write_text("".join(f"{Path(f).absolute()}\n" for f in listed))
        said = read_values(Path(data.source))
        kept = {k: v for k, v in said.items() if k not in ("path", "train", "val", "test", "download")}
        lists = {part: str((folder / f"{part}.txt").resolve()) for part in ("train", "val")}
        (folder / "data.yaml").write_text(yaml.safe_dump({**kept, **lists}, sort_keys=False), encoding="utf-8")
        return str(folder / "data.yaml")

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

        if data.task == "classify":
            return draw(data, count, guess if model is not None else None)
        some = [f for f in spread(data.facts["val"], count) if imread(f) is not None]  # Ultralytics leaves out the others
        if model is None:
            rows = [rows_of(Path(label), data.facts["pose"]) for label in img2label_paths(list(some))]
            return [labelled(f, r, data.task, data.names, data.outputs) for f, r in zip(some, rows, strict=True)]
        with _predictor(model, options) as predictor:  # one at a time, or they would be padded to one size
            return [predicted(predictor(file)[0]) for file in some]

    def export(self, model: Any, format: str, out: Path, **options: Any) -> Path:
        model = _for_inference(model)
        model.args = {**DEFAULT_CFG_DICT, "task": model.task}
        args = {"batch": 1, **options, "mode": "export", "format": format}
        check_download(str(args.get("data")), args.get("split", "val"))

        def write(temporary: Path) -> None:
            with tempfile.TemporaryDirectory() as folder, usable(args), quiet():
                model.pt_path = str(Path(folder) / "model.pt")  # Ultralytics writes beside this, under its name
                shutil.copyfile(str(Exporter(overrides=args)(model=model)), temporary)

        return files.replace(out, write)

    def loading_snippet(self, base: Base, header: Mapping[str, Any]) -> str:
        cls, design = TASKS[base.task].model.__name__, {"nc": len(header["names"])}
        design |= {k: v for k, v in header.get("outputs", {}).items() if k == "kpt_shape"}
        lines = ["from ultralytics import YOLO", f"from ultralytics.nn.tasks import {cls}"]
        fill = "model.load(base, verbose=False)"
        if header["head"] == "rebuild" or base.task == "classify":
            lines.append("from ultralytics.utils.torch_utils import intersect_dicts")
            fill = "model.load_state_dict(intersect_dicts(base.state_dict(), model.state_dict()), strict=False)"
        channels = f", ch={base.facts['channels']}" if base.facts["channels"] != 3 else ""
        lines.append(f"base = YOLO({base.source!r}).model.float()")
        if "channels" in header["base"]["model_args"]:
            lines += ["from torch.nn import Parameter", "first = base.model[0].conv"]
            lines.append("first.weight = Parameter(first.weight.sum(1, keepdim=True))  # of grey images")
        lines += [
            f"model = {cls}({{**base.yaml, {str(design)[1:-1]}}}{channels}, verbose=False).eval()",
            f"{fill}  # the head's values come with the adapter",
        ]
        return "\n".join(lines)

    def open_merged(self, path: Path) -> nn.Module:
        return _content(str(path))["model"].float().eval()

    def save_merged(self, model: Any, header: Mapping[str, Any], out: Path) -> Path:
        model = copy.deepcopy(model).cpu()
        model.criterion = None
        task = _task(model).name
        args = {k: v for k, v in header["train_args"].items() if k in DEFAULT_CFG_DICT}
        model.args = {**DEFAULT_CFG_DICT, **args, "task": task, "mode": "train"}
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


# ------------------------------------------------------------------------------------------------------------- the pieces
def _overrides(job: Job) -> dict[str, Any]:
    """Return Ultralytics' arguments for a run. What suits fine-tuning differs from its defaults for training anew."""
    batch = job.config.batch
    return {
        "warmup_epochs": min(3.0, job.config.epochs / 10),
        "warmup_bias_lr": 0.0,  # biases start at no other rate than the rest
        "plots": False,  # train() draws its own
        "nbs": batch if batch >= 1 else 64,  # a step per batch: small sets get real optimizer steps
        **job.config.options,
        "task": job.base.task,
        "mode": "train",
        "model": find(job.base.source),
        "data": job.data.source,
        **_shared(job.config),
        "amp": job.config.amp if job.config.amp is not None else _amp(job.config.device),
        "save_dir": str(job.folder),
        "exist_ok": True,
        "resume": job.resume,
    }


def _shared(config: SettledConfig) -> dict[str, Any]:
    """Return the options of `train` that are Ultralytics' arguments, too."""
    names = ("epochs", "imgsz", "batch", "lr0", "optimizer", "device", "workers", "seed", "amp")
    return {name: getattr(config, name) for name in names}


def _amp(device: str) -> bool | str:
    """Return "bf16" where the GPU has it: it needs no loss scaling, and no weights to be fetched for a check."""
    if str(device) == "cpu" or not torch.cuda.is_available():
        return False
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else True


@contextmanager
def _predictor(model: nn.Module, options: Mapping[str, Any]) -> Iterator[Any]:
    """Make Ultralytics' predictor of a model, which predicts as long as this is entered."""
    task = _task(model)
    # as `YOLO.predict` has it: an image by itself is padded to a rectangle
    args = {"mode": "predict", "task": task.name, "save": False, "batch": 1, "rect": True, **options}
    with usable(args), quiet():
        predictor = task.predictor(overrides=args)
        predictor.setup_model(model=_for_inference(model), verbose=False)
        yield predictor


def _for_inference(model: Any) -> Any:
    """Return a copy that Ultralytics may fuse: merged where it can be."""
    model = copy.deepcopy(model).eval()
    if attached(model) is not None and mergeable(model):
        merge(model)
    if not hasattr(model, "args") or not isinstance(model.args, dict):
        model.args = dict(DEFAULT_CFG_DICT)
    model.task = _task(model).name
    return model


def _reading(base: Base, channels: Any, source: str) -> Base:
    """Return a base that reads images of so many channels: grey ones by the sum of its filters, as Ultralytics has it.

    Raises:
        DataError: It cannot be made to.
    """
    own = base.facts["channels"]
    if channels == own:
        return base
    if channels != 1 or own != 3 or isinstance(channels, bool):
        raise DataError(
            f"{source} has images of channels={channels}, but {base.source} reads {own}; a model of 3 is made to read 1 "
            "(grey), and no other; give another model, or correct 'channels' in the data YAML"
        )
    model: Any = copy.deepcopy(base.model)
    first = model.model[0].conv
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = model.yaml["channels"] = 1
    return replace(base, model=model, facts={**base.facts, "channels": 1})


def _own_folders(data: Data, split: str) -> Data:
    """Return a classification set whose folders Ultralytics, which walks them by itself, takes for what they are here.

    Raises:
        DataError: It would find other classes, or other images.
    """
    check_caches(Path(data.source, part) for part in ("train", *FOLDERS["val"], "test"))
    for part in ("train", split):
        for folder in filter(Path.is_dir, (Path(data.source) / name for name in FOLDERS.get(part, (part,)))):
            for hidden in sorted(folder.rglob(".*")):
                if hidden.is_dir() and hidden.parent == folder:
                    raise DataError(f"Ultralytics would take the hidden folder {hidden} for a class; remove it")
                for file in hidden.rglob("*") if hidden.is_dir() else [hidden]:
                    if file.suffix[1:].lower() in SUFFIXES and not inspect_image(file).fault:
                        raise DataError(f"Ultralytics would train on {file}, though {hidden.name} is hidden; remove that")
            spelled = {composed(name): name for name in data.names.values()}
            for place in folder.iterdir():
                if place.is_dir() and spelled.get(composed(place.name), place.name) != place.name:
                    raise DataError(
                        f"{place} has the name of a class in train, but not its accents, which one of them writes apart "
                        "from their letters (decomposed Unicode); to Ultralytics, these are two classes: rename one"
                    )
    return data


def _content(file: str) -> dict[str, Any]:
    """Return what a checkpoint holds, through Ultralytics' allow-list instead of unpickling.

    Raises:
        ModelError: It would run something.
    """
    if not Path(file).is_file():  # fetched now, so that it can be looked through
        with aside():
            file = attempt_download_asset(file)
    if why := objection(file, networks=True):
        raise ModelError(f"{file} is not a checkpoint that Ultralytics can read ({why})")
    with aside():
        return torch_safe_load(file, safe_only=True)[0]


def _from_yaml(source: str) -> nn.Module:
    """Return a network with random weights."""
    if Path(source).is_file():
        read_yaml(Path(source).read_text(encoding="utf-8", errors="ignore"))  # that nothing in it takes for ever
    design = yaml_model_load(source)
    if (name := guess_model_task(design)) not in TASKS:
        raise ModelError(f"{source} describes a {name} model, which is not supported; {_INSTEAD}")
    check_size(design)
    return build(TASKS[name], design, None, design.get("channels", 3))


def _network(content: Any, source: str) -> Any:
    """Return the network in a checkpoint's content.

    Raises:
        ModelError: There is none, or one from which training cannot go on.
    """
    model = content.get("ema") or content.get("model") or content
    if isinstance(model, Mapping):
        raise ModelError(
            f"{source} holds weights only (a state_dict), without the network that they belong to; load them into it, and "
            f"save that: model = YOLO('yolo11n.yaml'), model.model.load_state_dict(...), model.save('base.pt')"
        )
    if type(model) is nn.Sequential:  # what Ultralytics makes of it
        raise ModelError(
            f"{source} holds a whole model (torch.save of it), not a checkpoint of Ultralytics; save it with "
            "YOLO(...).save('base.pt'), and give that"
        )
    if task_of(model) and model.is_fused():
        raise ModelError(
            f"{source} was saved fused, as after predict() or fuse(): its normalisations are folded into the convolutions "
            "and lost for training; give the checkpoint as training left it (best.pt, last.pt, or the one you downloaded)"
        )
    check_parts(model)
    return model


def _supported(model: nn.Module, source: str) -> Task:
    """Return the task of a model that was loaded, or refuse it."""
    if task := task_of(model):
        return task
    kind = type(model).__name__
    raise ModelError(f"{source} is a {_REFUSED.get(kind, kind)} model, which is not supported; {_INSTEAD}")


def _task(model: nn.Module) -> Task:
    task = task_of(model)
    assert task is not None, "models of no task are refused when they are loaded"
    return task


def _slices(attention: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the rows of q, k and v in Ultralytics' fused projection, where each head has its own three."""
    step = attention.key_dim * 2 + attention.head_dim
    spans = {
        "q": (0, attention.key_dim),
        "k": (attention.key_dim, 2 * attention.key_dim),
        "v": (2 * attention.key_dim, step),
    }
    return {n: tuple((h * step + a, h * step + b) for h in range(attention.num_heads)) for n, (a, b) in spans.items()}


def _check_rows(rows: list[str], count: int, label: str, task: Task, outputs: Mapping[str, Any]) -> None:
    for row in rows:
        first, *_ = parts = row.split()
        try:
            index, *_ = numbers = [float(p) for p in parts]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
        except ValueError:
            raise DataError(f"{label} has the row '{row[:40]}'; a row is: {task.row}, all numbers") from None
        if wrong := task.check_row(parts, outputs):
            raise DataError(f"{label} has a row of {wrong}")
        if not 0 <= index < count or index != int(index):
            raise DataError(f"{label} has class {first}, but the data YAML names {count} classes (0 to {count - 1})")
