"""YOLO's tasks, a row of a table each: classes of Ultralytics, metrics, labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from ultralytics.models import yolo
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel, PoseModel, SegmentationModel
from ultralytics.utils.torch_utils import intersect_dicts

from ... import schema
from ...core.class_swap import plain
from ...core.delta import MOST_CLASSES
from ...errors import ModelError
from ...schema import Malformed
from ..base import Arguments
from ..predictions import Answers, Detections, ImagePredictions
from .labels import Boxes, OrientedBoxes, Outlines, Poses
from .output import quiet
from .sources import check_design
from .validator import keeping_predictions, with_fast_nms

_KEYPOINTS = 1000  # at most


@dataclass(frozen=True)
class Outputs:
    """The outputs that a head may have beside the classes."""

    kpt_shape: tuple[int, int] = (0, 0)
    kpt_names: Mapping[str, Any] | Sequence[Any] = ()
    kpt_oks_sigmas: Sequence[float] = ()

    def __post_init__(self) -> None:
        count, numbers = self.kpt_shape
        if self.kpt_shape != (0, 0) and not (1 <= count <= _KEYPOINTS and numbers in (2, 3)):
            raise Malformed(f"kpt_shape is {list(self.kpt_shape)}, but it is 1 to {_KEYPOINTS} keypoints of 2 or 3 numbers")
        if self.kpt_oks_sigmas and not (len(self.kpt_oks_sigmas) == count and all(map(is_positive, self.kpt_oks_sigmas))):
            raise Malformed(f"kpt_oks_sigmas are not {count} numbers above 0, one for each keypoint")
        if bad := next((k for k in self.kpt_names if isinstance(self.kpt_names, Mapping) and not k.isdecimal()), None):
            raise Malformed(f"kpt_names are by the number of a class, but one is {bad!r}")


@dataclass(frozen=True)
class Task:
    """One task: Ultralytics' classes, its metrics, its labels, and how its loss is computed."""

    name: str
    model: type[Any]
    trainer: type[Any]
    validator: type[Any]
    predictor: type[Any]
    metrics: Mapping[str, str]  # Ultralytics' names to ours
    score: str  # the metric, in our names, that is shown where there is room for one
    labels: Boxes | None  # in files beside the images; None: an image's class is its folder
    imgsz: int = 640  # by default
    hits: str = "tp"  # the validator's name for the true positives that the score is of
    halved: bool = True  # whether training batches are half of those of validation
    loops: bool = False  # whether the loss goes through the images one by one
    pastes: bool = False  # whether copy_paste repeats objects

    def check_row(self, row: Sequence[str], outputs: Arguments) -> str:
        """Return the fault in the length of a label row, "" where there is none."""
        assert self.labels, "a set with folders of classes has no label files"
        article = "an" if self.name[0] in "aeiou" else "a"
        fits = self.labels.fits(len(row), outputs.get("kpt_shape", (0, 0)))
        return "" if fits else f"{len(row)} numbers; a row of {article} {self.name} set is: {self.labels.row}"

    def predictions(self, validator: Any) -> ImagePredictions:
        """Return the predictions of a validator that has run, for each image."""
        dataset = validator.dataloader.dataset
        if self.labels:
            return Detections.gather(dataset.im_files, validator.kept, self.hits)
        files, guesses = [sample[0] for sample in dataset.samples], torch.cat([best[:, 0] for best in validator.pred])
        return Answers.gather(files, torch.cat(validator.targets).tolist(), guesses.tolist())


def _metrics(*kinds: str) -> dict[str, str]:
    """Return the metrics of boxes (B), masks (M) and keypoints (P); those of boxes go without their letter."""
    names = ("mAP50", "mAP50-95", "precision", "recall")
    return {f"metrics/{n}({k})": n if k == "B" else f"{n}({k})" for k in kinds for n in names}


TASKS = {
    task.name: task
    for task in (
        Task(
            "detect",
            DetectionModel,
            yolo.detect.DetectionTrainer,
            with_fast_nms(yolo.detect.DetectionValidator),
            yolo.detect.DetectionPredictor,
            _metrics("B"),
            "mAP50-95",
            Boxes(),
        ),
        Task(
            "segment",
            SegmentationModel,
            yolo.segment.SegmentationTrainer,
            with_fast_nms(yolo.segment.SegmentationValidator),
            yolo.segment.SegmentationPredictor,
            _metrics("B", "M"),
            "mAP50-95(M)",
            Outlines(),
            hits="tp_m",
            loops=True,
            pastes=True,
        ),
        Task(
            "pose",
            PoseModel,
            yolo.pose.PoseTrainer,
            with_fast_nms(yolo.pose.PoseValidator),
            yolo.pose.PosePredictor,
            _metrics("B", "P"),
            "mAP50-95(P)",
            Poses(),
            hits="tp_p",
        ),
        Task(
            "obb",
            OBBModel,
            yolo.obb.OBBTrainer,
            keeping_predictions(yolo.obb.OBBValidator),
            yolo.obb.OBBPredictor,
            _metrics("B"),
            "mAP50-95",
            OrientedBoxes(),
            halved=False,
        ),
        Task(
            "classify",
            ClassificationModel,
            yolo.classify.ClassificationTrainer,
            keeping_predictions(yolo.classify.ClassificationValidator),
            yolo.classify.ClassificationPredictor,
            {"metrics/accuracy_top1": "top1", "metrics/accuracy_top5": "top5"},
            "top1",
            None,
            imgsz=224,
        ),
    )
}


def task_of(model: nn.Module) -> Task | None:
    """Return the task of one of Ultralytics' networks, with or without a plan on it; None where it has none of these."""
    return next((task for task in TASKS.values() if plain(type(model)) is task.model), None)


# ----------------------------------------------------------------------------------------------------------------- models
def build(task: Task, design: Arguments, names: Mapping[int, str] | None, channels: int, **outputs: Any) -> nn.Module:
    """Return a new network.

    Args:
        task: Its task.
        design: The content of its YAML.
        names: Of the classes; None: as many as the design says.
        channels: Of the images.
        **outputs: What the head must be made for beside the classes: for keypoints ``kpt_shape``.

    Raises:
        ModelError: The design holds more than layers and plain numbers.
    """
    check_design(design)
    adapted: dict[str, Any] = copy.deepcopy(dict(design))
    adapted["nc"] = adapted["nc"] if names is None else len(names)  # in the design, for Ultralytics reports an override
    adapted |= {k: v for k, v in outputs.items() if k == "kpt_shape"}
    with quiet():  # a classifier is summarised whenever one is made
        model = task.model(adapted, ch=channels, nc=adapted["nc"], verbose=False)
    if names is not None:
        model.names = dict(names)
    for name, value in outputs.items():
        setattr(model, name, {int(k): v for k, v in value.items()} if isinstance(value, Mapping) else value)
    return model


def check_content(model: Any, source: str) -> None:
    """Check a loaded network's description of itself; class names in a list get their numbers.

    Raises:
        ModelError: It is not what Ultralytics keeps there.
    """
    try:
        names, args, stride = (getattr(model, name, None) for name in ("names", "args", "stride"))
        names = dict(enumerate(names)) if isinstance(names, list | tuple) else schema.check(dict[int, Any], names, "names")
        if len(names) > MOST_CLASSES or names.keys() != set(range(len(names))):
            raise Malformed("its names are not those of classes numbered from 0 on")
        model.names = {i: str(name) for i, name in names.items()}
        schema.check(
            int | Sequence[int] | None, schema.check(dict[str, Any], args or {}, "train_args").get("imgsz"), "imgsz"
        )
        design = schema.check(dict[str, Any], getattr(model, "yaml", None), "yaml")
        if not all(design.get(part) and isinstance(design[part], list) for part in ("backbone", "head")):
            raise Malformed("its yaml lists no layers as backbone and head")
        schema.check(int, design.get("channels", 3), "yaml.channels")
        if not (isinstance(stride, torch.Tensor) and stride.numel() and bool((stride >= 1).all() and (stride < 1e4).all())):
            raise Malformed(f"its stride is {schema.shown(stride)}")
    except Malformed as error:
        raise ModelError(f"{source} is not a checkpoint that Ultralytics wrote ({error}); give another") from error


def with_head(source: Any, names: Mapping[int, str], channels: int, head: str, outputs: Arguments) -> nn.Module:
    """Return a new model of `source`'s design for `names`, filled from `source`.

    "keep" is Ultralytics' own `load`: the class towers keep their width and weights, only the last layer is new, and rows
    of classes with the same name are kept. "rebuild" makes the towers anew, as narrow as the class count asks for.
    """
    task = task_of(source)
    assert task is not None, "a base has one of the tasks"
    model: Any = build(task, source.yaml, names, channels, **outputs)
    _check_design(tensors := source.float().state_dict(), model)
    fitting = intersect_dicts(tensors, model.state_dict())
    if not task.labels:
        last = f"model.{len(model.model) - 1}.linear."
        model.load_state_dict({k: v for k, v in fitting.items() if not k.startswith(last)}, strict=False)
        if head == "keep":
            _keep_rows(source, model)
    elif head == "keep":
        model.load(source, verbose=False)
    else:
        model.load_state_dict(fitting, strict=False)
    return model


def _check_design(tensors: Mapping[str, torch.Tensor], model: Any) -> None:
    """Refuse a checkpoint whose tensors are not those of its own design: missing ones would train from random values."""
    designed, head = model.state_dict(), f"model.{len(model.model) - 1}."
    odd = [k for k, v in designed.items() if k not in tensors or (tensors[k].shape != v.shape and not k.startswith(head))]
    if odd := odd + [k for k in tensors if k not in designed]:
        raise ModelError(
            f"{len(odd)} tensors of the checkpoint are not as its own design has them (first: {odd[0]}): it was fused, "
            "pruned or changed after it was built; give one as training left it"
        )


@torch.no_grad()
def _keep_rows(source: Any, model: Any) -> None:
    """Copy a classifier's rows of classes with the same name, as Ultralytics' `load` compares them for detectors."""
    old = {str(name).strip().lower(): i for i, name in source.names.items()}
    new, given = model.model[-1].linear, source.model[-1].linear
    for i, name in model.names.items():
        if (row := old.get(str(name).strip().lower())) is not None:
            new.weight[i], new.bias[i] = given.weight[row], given.bias[row]


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
