"""Ultralytics YOLO: a mixin over Ultralytics' own trainers, so their augmentation, losses, validation, callbacks and
multi-GPU launch stay in force. Tasks: detect (YOLOv8, YOLO11, YOLO26)."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import torch
import ultralytics
from torch import nn
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.utils import IMG_FORMATS, check_det_dataset, img2label_paths
from ultralytics.engine.exporter import Exporter
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionTrainer, DetectionValidator
from ultralytics.nn.modules.block import Attention as AreaAttention
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils.torch_utils import ModelEMA, intersect_dicts, select_device, unwrap_model

from .. import checkpoint, files
from ..attach import attach, attached, merge, mergeable, settle, train_mode
from ..errors import ConfigError, DataError, ModelError, TrainingError, nearest
from ..measure import Meter
from ..plan import HEAD, Anatomy, Attention, Block, Plan, Stage
from ..registry import FAMILIES
from ..twins import plain
from .base import Base, Data, Family, Job, keep_best, observe, read_layers, read_params, read_statistics

log = logging.getLogger(__name__)

# what train() decides itself, and what would undo it
_OURS = {"model", "data", "epochs", "imgsz", "batch", "lr0", "optimizer", "device", "workers", "seed", "amp", "resume"}
_OURS |= {"freeze", "project", "name", "exist_ok", "save_dir", "task", "mode", "pretrained", "cfg", "distill_model"}
_OURS |= {"save", "save_period"}
_OPTIMIZERS = ("AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "MuSGD")
_REFUSED = {
    "RTDETRDetectionModel": "RT-DETR",
    "WorldModel": "YOLO-World",
    "YOLOEModel": "YOLOE",
    "YOLOESegModel": "YOLOE",
    "SemanticSegmentationModel": "semantic segmentation",
    "DepthModel": "depth",
}
_OTHERS = {"rtdetr": "RT-DETR", "-world": "YOLO-World", "yoloe": "YOLOE", "-sem": "semantic segmentation", "-depth": "depth"}
_METRICS = {"metrics/mAP50(B)": "mAP50", "metrics/mAP50-95(B)": "mAP50-95"}
_METRICS |= {"metrics/precision(B)": "precision", "metrics/recall(B)": "recall"}


@FAMILIES.register("yolo")
class Yolo(Family):
    """Models of Ultralytics: "yolo11n.pt", a path to a checkpoint, or a YAML (random weights: no base, no delta)."""

    suffix: ClassVar[str] = ".pt"
    score: ClassVar[str] = "mAP50-95"
    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 50,
        "imgsz": 640,
        "batch": 16,
        "lr0": 2e-3,
        "optimizer": "AdamW",
        "workers": 8,
        "head": "keep",
    }

    def claims(self, source: str) -> bool:
        path = Path(source)
        if source.startswith("timm/") or path.suffix not in (".pt", ".yaml", ".yml", ""):
            return False
        return path.suffix != "" or path.stem.lower().startswith(("yolo", "rtdetr"))

    def known(self) -> Iterable[str]:
        return [f"yolo{v}{s}.pt" for v in ("v8", "11", "26") for s in "nsmlx"]

    def arguments(self) -> Iterable[str]:
        return sorted(set(DEFAULT_CFG_DICT) - _OURS)

    def check(self, settings: Mapping[str, Any]) -> None:
        name = settings["optimizer"]
        if name.lower() not in map(str.lower, _OPTIMIZERS):
            raise ConfigError(f"optimizer='{name}' is not known; give {', '.join(_OPTIMIZERS)}.{nearest(name, _OPTIMIZERS)}")
        try:
            get_cfg(overrides={k: v for k, v in settings.items() if k in DEFAULT_CFG_DICT})
            select_device(settings["device"], verbose=False)
        except (ValueError, TypeError, SyntaxError) as error:
            raise ConfigError(_brief(error)) from error

    def load(self, source: str, **options: Any) -> Base:
        if options:
            raise ConfigError(f"YOLO models take no further options, but {', '.join(options)} was given")
        stem = Path(source).stem.lower()
        if other := next((kind for mark, kind in _OTHERS.items() if mark in stem), None):
            raise ModelError(f"{source} is a {other} model, which is not supported; give a YOLOv8, YOLO11 or YOLO26 detector")
        pretrained = not source.endswith((".yaml", ".yml"))
        try:
            if pretrained:
                model, _ = load_checkpoint(source if source.endswith(".pt") else f"{source}.pt")
            else:
                model = DetectionModel(source, verbose=False)
        except (FileNotFoundError, ConnectionError, OSError) as error:
            raise ModelError(
                f"the model {source} is not here and could not be downloaded; give the path of a .pt file ({_brief(error)})"
            ) from error
        except (RuntimeError, TypeError, EOFError, KeyError, AttributeError, ModuleNotFoundError, ValueError) as error:
            raise ModelError(f"{source} is not a checkpoint that Ultralytics can read ({_brief(error)})") from error
        _refuse_unsupported(model, source)
        model = model.float().cpu()
        imgsz = getattr(model, "args", {}).get("imgsz") or 640
        facts = {"imgsz": imgsz, "mean": [0.0] * 3, "std": [1.0] * 3, "channels": int(model.yaml.get("channels", 3))}
        return Base(source, model, "detect", dict(model.names), facts, pretrained)

    # ---------------------------------------------------------------------------------------------------------- the data
    def read_data(self, source: str, base: Base | None = None, split: str = "val") -> Data:
        if not str(source).endswith((".yaml", ".yml")):
            raise DataError(f"data={source} is no data YAML; give a .yaml with train, val and names (Ultralytics' format)")
        try:
            data = check_det_dataset(str(source), autodownload=os.environ.get("YOLO_OFFLINE") is None)
        except Exception as error:  # Ultralytics raises plain SyntaxError, TypeError, FileNotFoundError, AssertionError, ...
            raise DataError(f"the data {source} cannot be used: {_brief(error)}") from error
        digest = hashlib.sha256()
        for part in ("train", split):
            images = _images(data.get(part), part, source)
            boxes = 0
            for image, label in zip(images, img2label_paths(images), strict=True):
                rows = _rows(Path(label))
                boxes += len(rows)
                _check_classes(rows, data["nc"], label)
                digest.update(f"{Path(image).name}|{os.path.getsize(image)}|{rows}\n".encode())
            if not boxes:
                raise DataError(
                    f"the {len(images)} {part} images of {source} have no labels; put one .txt per image into a folder "
                    "'labels' beside 'images'"
                )
        return Data(str(source), dict(data["names"]), digest.hexdigest(), {"channels": data["channels"]})

    # --------------------------------------------------------------------------------------------------------- the model
    def fit(self, base: Base, names: Mapping[int, str], head: str) -> nn.Module:
        return _fit(base.model, names, base.facts["channels"], head)

    def anatomy(self, model: Any, name: str) -> Anatomy:
        *body, head = model.model
        last = len(body)

        def stage_of(parameter: str) -> int | None:
            if ".dfl." in parameter:
                return None
            index = int(parameter.split(".")[1])
            return HEAD if index == last else index

        first = next(model.parameters())
        size = int(model.stride.max()) * 2
        x = torch.zeros(1, model.yaml.get("channels", 3), size, size, device=first.device, dtype=first.dtype)
        shapes = observe(model, x, [f"model.{i}" for i in range(last)])
        stages, blocks = [], []
        for i, module in enumerate(body):
            kind = plain(type(module)).__name__
            shape = shapes.get(f"model.{i}", ())
            channels = shape[1] if len(shape) == 4 and any(True for _ in module.parameters()) else 0
            stages.append(Stage(i, f"model.{i}", kind, channels, "NCHW" if channels else "", i in head.f))
            if channels and not isinstance(module, Conv):
                blocks.append(Block(f"model.{i}", "conv", channels, "NCHW", i))
        attentions = {
            n: m for n, m in model.named_modules() if isinstance(m, AreaAttention) and not n.startswith(f"model.{last}.")
        }
        return Anatomy(
            family=self.name,
            model=name,
            stages=tuple(stages),
            head=plain(type(head)).__name__,
            heads=(f"model.{last}",),
            params=read_params(model, stage_of),
            layers=read_layers(
                model, stage_of, attentions, {f"{n}.qkv.conv": _slices(m) for n, m in attentions.items()}
            ),
            blocks=tuple(blocks),
            attentions=tuple(
                Attention(n, "map", m.num_heads, m.key_dim, m.head_dim, int(n.split(".")[1])) for n, m in attentions.items()
            ),
            statistics=read_statistics(model, stage_of),
        )

    # ------------------------------------------------------------------------------------------------------------ the run
    def train(self, job: Job) -> None:
        trainer = type("TunedDetectionTrainer", (Tuned, DetectionTrainer), {"job": job})(overrides=_overrides(job))
        try:
            trainer.train()
        finally:
            trainer.close()

    def evaluate(self, model: nn.Module | Path, data: Data, **options: Any) -> dict[str, float]:
        source = str(model) if isinstance(model, Path) else None
        args = {"data": data.source, "mode": "val", "task": "detect", "plots": False, "verbose": False, **options}
        with tempfile.TemporaryDirectory() as folder:  # Ultralytics wants a place for plots and labels
            validator = DetectionValidator(args={**args, "model": source}, save_dir=Path(folder))
            with _readable(data.source):
                stats = validator(model=None if source else _for_inference(model))
        return {name: round(float(stats[key]), 5) for key, name in _METRICS.items()}

    def predict(self, model: nn.Module, source: Any, **options: Any) -> Any:
        predictor = DetectionPredictor(overrides={"mode": "predict", "task": "detect", "save": False, **options})
        predictor.setup_model(model=_for_inference(model), verbose=False)
        return predictor(source)

    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        model = _for_inference(model)
        model.pt_path = str(out.with_suffix(".pt"))  # Ultralytics names the result after this
        model.args = {**DEFAULT_CFG_DICT, "task": "detect"}
        options = {"batch": 1, **options, "mode": "export", "format": format}
        made = Path(str(Exporter(overrides=options)(model=model)))
        if made != out:
            made.replace(out)
        return out

    def save_merged(self, model: Any, header: Mapping[str, Any], out: Path) -> Path:
        model = copy.deepcopy(model).cpu()
        model.criterion = None
        args = {k: v for k, v in header["train_args"].items() if k in DEFAULT_CFG_DICT}
        model.args = {**DEFAULT_CFG_DICT, **args, "task": "detect", "mode": "train"}
        for parameter in model.half().parameters():
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


class Tuned:
    """Mixin over an Ultralytics trainer: attaches the plan, keeps it in force, and writes deltas instead of pickles."""

    job: Job

    @property
    def _plan(self) -> Plan:
        return self.job.plan

    def check_resume(self: Any, overrides: Any) -> None:
        self.resume = False  # Ultralytics resumes from pickles that lack the live weights; `resume_training` does it

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model = _fit(weights or self.job.base.model, self.data["names"], self.data["channels"], self.job.head)
        attach(model, self._plan)
        for parameter in model.parameters():  # Ultralytics warns of each that does not require a gradient; see below
            parameter.requires_grad_(True)
        return model

    def build_optimizer(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model = unwrap_model(model)
        settle(model, self._plan)  # Ultralytics has just let everything train
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        heads = tuple(f"{h}." for h in self._plan.heads)
        head = {id(p) for n, p in model.named_parameters() if n.startswith(heads)}
        groups = []
        for group in optimizer.param_groups:
            for scale, inside in ((1.0, True), (self.job.lr_scale, False)):
                params = [p for p in group["params"] if p.requires_grad and (id(p) in head) == inside]
                if params:
                    groups.append({**group, "params": params, "lr": group["lr"] * scale})
        optimizer.param_groups = groups
        return optimizer

    def _build_train_pipeline(self: Any) -> None:
        super()._build_train_pipeline()  # type: ignore[misc]
        # Ultralytics counts batches across epochs, so a resumed run would step elsewhere: `optimizer_step` counts instead
        self._accumulate, self.accumulate = self.accumulate, 1
        self._batch = 0

    def get_dataloader(self: Any, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        with _readable(self.job.data.source):
            loader = super().get_dataloader(dataset_path, batch_size, rank, mode)  # type: ignore[misc]
        if mode == "train":
            loader.__class__ = ReplayableLoader
        given = {Path(f).name for f in _images(dataset_path, mode, self.job.data.source)}
        if lost := sorted(given - {Path(f).name for f in loader.dataset.im_files}):
            log.warning(f"{len(lost)} of {len(given)} {mode} images cannot be used and are left out: {', '.join(lost[:5])}")
        return loader

    def resume_training(self: Any, ckpt: Any) -> None:
        model = unwrap_model(self.model)
        self.ema = TrainedEMA(model)
        self._meter = Meter(model, self.device)
        self._history: list[dict[str, float]] = []
        if not self.job.resume:
            return
        saved = checkpoint.load(self.job.checkpoint)
        checkpoint.restore(model, saved["model"])
        checkpoint.restore(self.ema.ema, saved["ema"])
        self.ema.updates = saved["updates"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.best_fitness, self.start_epoch = saved["best_fitness"], saved["epoch"] + 1
        self.stopper.__dict__.update(saved["stopper"])
        self._history = saved["history"]
        self._meter.saved_bytes = saved["measured"]["saved_bytes"]
        if self.start_epoch >= self.epochs:
            raise TrainingError(f"{self.job.folder} has trained all of its {self.epochs} epochs; nothing is left to resume")
        if getattr(model.model[-1], "one2one_cv2", None) is not None:
            model.criterion = model.init_criterion()
            model.criterion.updates = self.start_epoch - 1
            model.criterion.update()
        dataset = self.train_loader.dataset
        for index in saved["buffer"]:  # the images that mosaic chooses from, in their order
            dataset.load_image(index)
        self._saved_states = saved["random"], saved["sampler"]
        self.add_callback("on_train_start", _restore_random_states)

    def _model_train(self: Any) -> None:
        super()._model_train()  # type: ignore[misc]
        train_mode(unwrap_model(self.model), self._plan)
        self._batch = 0

    def preprocess_batch(self: Any, batch: dict) -> dict:
        self._meter.start()
        return super().preprocess_batch(batch)  # type: ignore[misc]

    def optimizer_step(self: Any) -> None:
        self._meter.stop()
        self._batch += 1
        if self._batch % self._accumulate == 0 or self._batch == len(self.train_loader):
            super().optimizer_step()  # type: ignore[misc]

    def _handle_nan_recovery(self: Any, epoch: int) -> bool:
        if all(torch.isfinite(torch.as_tensor(v)).all() for v in self.tloss.values()):
            return False
        raise TrainingError(
            f"the loss is no longer a number in epoch {epoch + 1}: lower lr0 (it is {self.args.lr0}), and look at the "
            f"labels with extreme boxes; the last good epoch can be resumed from {self.job.folder}"
        )

    def save_model(self: Any) -> bool:
        model = unwrap_model(self.model)
        live = checkpoint.live(model)
        names = {k: self.metrics.get(key) for key, k in _METRICS.items()}
        losses = {f"train/{k}": float(v) for k, v in self.tloss.items()}
        self._history.append({"epoch": self.epoch + 1, **losses, **names})
        if self.fitness == self.best_fitness:
            keep_best(FAMILIES["yolo"](), self.job, self.ema.ema, names, self.epoch + 1)
        checkpoint.save(
            self.job.checkpoint,
            {
                "epoch": self.epoch,
                "model": live,
                "ema": {k: v for k, v in self.ema.ema.state_dict().items() if k in live},
                "updates": self.ema.updates,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best_fitness": None if self.best_fitness is None else float(self.best_fitness),
                "stopper": {"best_fitness": float(self.stopper.best_fitness), "best_epoch": self.stopper.best_epoch},
                "history": self._history,
                "measured": self._meter.report(),
                "random": checkpoint.random_states(),
                "sampler": self.train_loader.position(),
                "buffer": list(self.train_loader.dataset.buffer),
            },
        )
        return True

    def final_eval(self: Any) -> None:
        """Nothing: train() evaluates the merged file, as its user would."""

    def close(self: Any) -> None:
        """Stop measuring, wherever the run ended."""
        if meter := getattr(self, "_meter", None):
            meter.close()


class TrainedEMA(ModelEMA):
    """Ultralytics' moving average, over what trains and over statistics that move; the rest is the base's, bit for bit."""

    def update(self, model: nn.Module) -> None:
        if self._pairs is None:
            model = unwrap_model(model)
            own, live = self.ema.state_dict(), checkpoint.live(model, copy=False)
            keys = [k for k in live if live[k].is_floating_point()]
            self._pairs = [own[k] for k in keys], [live[k] for k in keys]
        super().update(model)


class ReplayableLoader(InfiniteDataLoader):
    """Ultralytics' loader, which can say where it is and go there again. Exact with workers=0.

    Its iterator outlives epochs and draws from the generator when it starts, and lazily, so the generator's state alone
    does not tell what comes next; the state before the iterator started and the count of batches since do.
    """

    drawn = 0  # batches since the iterator started
    replay = 0  # batches to pass over, without loading them, when the next iterator starts

    def _get_iterator(self) -> Any:
        self.origin = self.generator.get_state()
        iterator = super()._get_iterator()
        for _ in range(self.replay):
            iterator._next_index()
        self.drawn, self.replay = self.replay, 0
        return iterator

    def __iter__(self) -> Iterator:
        for batch in super().__iter__():
            self.drawn += 1
            yield batch

    def position(self) -> dict[str, Any]:
        """Where it is, for `go_to`."""
        return {"origin": self.origin, "drawn": self.drawn, "generator": self.generator.get_state()}

    def go_to(self, position: Mapping[str, Any], anew: bool) -> None:
        """Go there; with `anew`, to a new iterator that starts there."""
        self.reset()
        self.generator.set_state(position["generator" if anew else "origin"])
        self.replay = 0 if anew else position["drawn"]


def _restore_random_states(trainer: Any) -> None:
    states, position = trainer._saved_states
    checkpoint.set_random_states(states)
    closing = max(trainer.epochs - trainer.args.close_mosaic, 0)
    # where mosaic closes, the uninterrupted run's loader starts anew too
    trainer.train_loader.go_to(position, anew=bool(trainer.args.close_mosaic) and trainer.start_epoch == closing)


# ------------------------------------------------------------------------------------------------------------- the pieces
def _fit(source: Any, names: Mapping[int, str], channels: int, head: str) -> nn.Module:
    """Return a new model of `source`'s design for `names`, filled from `source`.

    "keep" is Ultralytics' own `load`: the class towers keep their width and weights, only the last layer is new, and rows
    of classes with the same name are kept. "rebuild" makes the towers anew, as narrow as the class count asks for.
    """
    model = DetectionModel({**copy.deepcopy(source.yaml), "nc": len(names)}, ch=channels, verbose=False)
    model.names = dict(names)
    if head == "keep":
        model.load(source, verbose=False)
    else:
        own = intersect_dicts(source.float().state_dict(), model.state_dict())
        model.load_state_dict(own, strict=False)
    return model


def _overrides(job: Job) -> dict[str, Any]:
    """Return Ultralytics' arguments for a run. What suits fine-tuning differs from its defaults for training anew."""
    batch = job.batch
    return {
        "warmup_epochs": min(3.0, job.epochs / 10),
        "warmup_bias_lr": 0.0,  # biases start at no other rate than the rest
        "nbs": batch if batch >= 1 else 64,  # a step per batch: small sets get real optimizer steps
        **job.extra,
        "task": "detect",
        "mode": "train",
        "model": job.base.source,
        "data": job.data.source,
        "epochs": job.epochs,
        "imgsz": job.imgsz,
        "batch": batch,
        "lr0": job.lr0,
        "optimizer": job.optimizer,
        "device": job.device,
        "workers": job.workers,
        "seed": job.seed,
        "amp": job.amp if job.amp is not None else _amp(job.device),
        "save_dir": str(job.folder),
        "exist_ok": True,
        "resume": job.resume,
    }


def _amp(device: str) -> bool | str:
    """Return "bf16" where the GPU has it: it needs no loss scaling, and no weights to be fetched for a check."""
    if str(device) == "cpu" or not torch.cuda.is_available():
        return False
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else True


def _for_inference(model: Any) -> Any:
    """Return a copy that Ultralytics may fuse: merged where it can be."""
    model = copy.deepcopy(model).eval()
    if attached(model) is not None and mergeable(model):
        merge(model)
    if not hasattr(model, "args") or not isinstance(model.args, dict):
        model.args = dict(DEFAULT_CFG_DICT)
    model.task = "detect"
    return model


def _refuse_unsupported(model: nn.Module, source: str) -> None:
    kind = type(model).__name__
    if kind in _REFUSED:
        raise ModelError(f"{source} is a {_REFUSED[kind]} model, which is not supported; give a YOLOv8, YOLO11 or YOLO26 detector")
    if kind != "DetectionModel":
        raise ModelError(f"{source} is a {kind}; so far visionpeft adapts YOLO detectors (and timm classifiers)")


def _slices(attention: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the rows of q, k and v in Ultralytics' fused projection, where each head has its own three."""
    step = attention.key_dim * 2 + attention.head_dim
    spans = {"q": (0, attention.key_dim), "k": (attention.key_dim, 2 * attention.key_dim), "v": (2 * attention.key_dim, step)}
    return {n: tuple((h * step + a, h * step + b) for h in range(attention.num_heads)) for n, (a, b) in spans.items()}


def _images(places: Any, part: str, source: str) -> list[str]:
    """Return the image files of one part of a data set, as Ultralytics finds them."""
    found: list[str] = []
    for place in map(Path, places if isinstance(places, list) else [places] if places else []):
        if place.is_dir():
            found += [str(f) for f in place.rglob("*") if f.suffix[1:].lower() in IMG_FORMATS]
        elif place.is_file():
            lines = place.read_text().split()
            found += [str(place.parent / x[2:]) if x.startswith("./") else x for x in lines]
    if not found:
        raise DataError(f"the data {source} has no {part} images (looked in {places}); give a folder that holds images")
    return sorted(found)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Say in a sentence what Ultralytics raises when it finds no image of a set readable."""
    try:
        yield
    except RuntimeError as error:
        if "No valid images found" not in str(error):
            raise
        raise DataError(f"the data {source} cannot be used: {_brief(error)}") from error


def _rows(label: Path) -> list[str]:
    return [line for line in label.read_text(encoding="utf-8-sig").splitlines() if line.strip()] if label.is_file() else []


def _check_classes(rows: list[str], count: int, label: str) -> None:
    for row in rows:
        first = row.split()[0]
        try:
            index = float(first)
        except ValueError:
            raise DataError(f"{label} has the row '{row[:40]}'; a row is: class x y w h, all numbers") from None
        if not 0 <= index < count or index != int(index):
            raise DataError(f"{label} has class {first}, but the data YAML names {count} classes (0 to {count - 1})")


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).replace("❌", "").split())
    return text if len(text) < 200 else f"{text[:200]}…"
