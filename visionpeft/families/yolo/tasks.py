"""What differs between YOLO's tasks, one row of a table each: classes of Ultralytics, metrics, labels."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.models import yolo
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel, PoseModel, SegmentationModel
from ultralytics.utils.torch_utils import intersect_dicts

from ... import schema
from ...core.class_twins import plain
from ...core.delta import MOST_CLASSES
from ...errors import DataError, ModelError
from ...schema import Malformed
from ..predictions import Answers, Detections, ImagePredictions
from .output import quiet
from .sources import check_design
from .validator import sparing

_KEYPOINTS = 1000  # at most


def _polygon(count: int, points: Sequence[int] = ()) -> bool:
    """Say whether so many numbers are a class and at least three corners."""
    return count >= 7 and count % 2 == 1


@dataclass(frozen=True)
class Outputs:
    """What a head may be made for beside the classes."""

    kpt_shape: tuple[int, int] = (0, 0)
    kpt_names: Mapping[str, Any] | Sequence[Any] = ()
    kpt_oks_sigmas: Sequence[float] = ()

    def __post_init__(self) -> None:
        count, numbers = self.kpt_shape
        if self.kpt_shape != (0, 0) and not (1 <= count <= _KEYPOINTS and numbers in (2, 3)):
            raise Malformed(f"kpt_shape is {list(self.kpt_shape)}, but it is 1 to {_KEYPOINTS} keypoints of 2 or 3 numbers")
        if self.kpt_oks_sigmas and not (len(self.kpt_oks_sigmas) == count and all(map(_positive, self.kpt_oks_sigmas))):
            raise Malformed(f"kpt_oks_sigmas are not {count} numbers above 0, one for each keypoint")
        if bad := next((k for k in self.kpt_names if isinstance(self.kpt_names, Mapping) and not k.isdecimal()), None):
            raise Malformed(f"kpt_names are by the number of a class, but one is {bad!r}")


@dataclass(frozen=True)
class Task:
    """One task: its network, its trainer and kin, its metrics, and what a row of its label files holds."""

    name: str
    model: type[Any]
    trainer: type[Any]
    validator: type[Any]
    predictor: type[Any]
    metrics: Mapping[str, str]  # Ultralytics' names to ours
    score: str  # the metric, in our names, that is shown where there is room for one
    row: str = ""  # what a label row holds, for people
    fits: Callable[[int, Sequence[int]], bool] = _polygon  # whether a row may hold so many numbers, given kpt_shape
    imgsz: int = 640  # by default
    hits: str = "tp"  # what the validator calls the true positives that the score is of

    def check_row(self, row: Sequence[str], outputs: Mapping[str, Any]) -> str:
        """Return what is wrong with the length of a label row, or nothing."""
        article = "an" if self.name == "obb" else "a"
        fits = self.fits(len(row), outputs.get("kpt_shape", (0, 0)))
        return "" if fits else f"{len(row)} numbers; a row of {article} {self.name} set is: {self.row}"

    def evidence(self, validator: Any) -> ImagePredictions:
        """Return what a validator that has run saw of each image."""
        dataset = validator.dataloader.dataset
        if self.name != "classify":
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
            sparing(yolo.detect.DetectionValidator),
            yolo.detect.DetectionPredictor,
            _metrics("B"),
            "mAP50-95",
            "class x y w h",
            lambda count, points: count == 5 or _polygon(count),  # of a polygon, Ultralytics takes the box
        ),
        Task(
            "segment",
            SegmentationModel,
            yolo.segment.SegmentationTrainer,
            sparing(yolo.segment.SegmentationValidator),
            yolo.segment.SegmentationPredictor,
            _metrics("B", "M"),
            "mAP50-95(M)",
            "class x1 y1 x2 y2 x3 y3 ...",
            hits="tp_m",
        ),
        Task(
            "pose",
            PoseModel,
            yolo.pose.PoseTrainer,
            sparing(yolo.pose.PoseValidator),
            yolo.pose.PosePredictor,
            _metrics("B", "P"),
            "mAP50-95(P)",
            "class x y w h, then the numbers of every keypoint (kpt_shape in the data YAML)",
            lambda count, points: count == 5 + points[0] * points[1],
            hits="tp_p",
        ),
        Task(
            "obb",
            OBBModel,
            yolo.obb.OBBTrainer,
            sparing(yolo.obb.OBBValidator),
            yolo.obb.OBBPredictor,
            _metrics("B"),
            "mAP50-95",
            "class x1 y1 x2 y2 x3 y3 x4 y4",  # of more corners, Ultralytics takes the rectangle around
        ),
        Task(
            "classify",
            ClassificationModel,
            yolo.classify.ClassificationTrainer,
            sparing(yolo.classify.ClassificationValidator),
            yolo.classify.ClassificationPredictor,
            {"metrics/accuracy_top1": "top1", "metrics/accuracy_top5": "top5"},
            "top1",
            imgsz=224,
        ),
    )
}


def task_of(model: nn.Module) -> Task | None:
    """Return the task of one of Ultralytics' networks, with or without a plan on it; None where it has none of these."""
    return next((task for task in TASKS.values() if plain(type(model)) is task.model), None)


# ----------------------------------------------------------------------------------------------------------------- models
def build(
    task: Task, design: Mapping[str, Any], names: Mapping[int, str] | None, channels: int, **outputs: Any
) -> nn.Module:
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
    own: dict[str, Any] = copy.deepcopy(dict(design))
    own["nc"] = own["nc"] if names is None else len(names)  # said in the design, for Ultralytics reports what overrides it
    own |= {k: v for k, v in outputs.items() if k == "kpt_shape"}
    with quiet():  # a classifier is summarised whenever one is made
        model = task.model(own, ch=channels, nc=own["nc"], verbose=False)
    if names is not None:
        model.names = dict(names)
    for name, value in outputs.items():
        setattr(model, name, {int(k): v for k, v in value.items()} if isinstance(value, Mapping) else value)
    return model


def check_content(model: Any, source: str) -> None:
    """Look at what a loaded network says of itself; class names in a list get their numbers.

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


def fit(source: Any, names: Mapping[int, str], channels: int, head: str, outputs: Mapping[str, Any]) -> nn.Module:
    """Return a new model of `source`'s design for `names`, filled from `source`.

    "keep" is Ultralytics' own `load`: the class towers keep their width and weights, only the last layer is new, and rows
    of classes with the same name are kept. "rebuild" makes the towers anew, as narrow as the class count asks for.
    """
    task = task_of(source)
    assert task is not None, "a base has one of the tasks"
    model: Any = build(task, source.yaml, names, channels, **outputs)
    _check_design(given := source.float().state_dict(), model)
    own = intersect_dicts(given, model.state_dict())
    if task.name == "classify":
        last = f"model.{len(model.model) - 1}.linear."
        model.load_state_dict({k: v for k, v in own.items() if not k.startswith(last)}, strict=False)
        if head == "keep":
            _keep_rows(source, model)
    elif head == "keep":
        model.load(source, verbose=False)
    else:
        model.load_state_dict(own, strict=False)
    return model


def _check_design(given: Mapping[str, torch.Tensor], model: Any) -> None:
    """Refuse a checkpoint whose tensors are not those of its own design: what it lacks would train from random values."""
    own, head = model.state_dict(), f"model.{len(model.model) - 1}."
    odd = [k for k in own if k not in given or (given[k].shape != own[k].shape and not k.startswith(head))]
    if odd := odd + [k for k in given if k not in own]:
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


# ----------------------------------------------------------------------------------------------------------------- labels
def rows_of(label: Path, pose: int = 0) -> list[str]:
    """Return the rows of a label file; none where there is none.

    Args:
        label: The file.
        pose: Rows of so many numbers are cut to class and box, as Ultralytics reads the poses of a set for other tasks.

    Raises:
        DataError: It is no text in UTF-8.
    """
    try:
        text = label.read_text(encoding="utf-8-sig") if os.path.isfile(label) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the labels {label} cannot be read as UTF-8 ({type(error).__name__}); save the file anew"
        ) from error
    rows = [line for line in text.splitlines() if line.strip()]
    return [" ".join(words[:5]) if len(words := row.split()) == pose else row for row in rows] if pose else rows


def pose_length(task: Task, data: Mapping[str, Any], source: str) -> int:
    """Return how many numbers a row of a pose has in a set that is used for another task, or 0.

    Raises:
        DataError: The set says so in a way that is not understood.
    """
    if task.name == "pose" or "kpt_shape" not in data:
        return 0
    shape = data["kpt_shape"]
    if not _wholes(shape) or len(shape) != 2:
        raise DataError(f"{source} has kpt_shape={shape}; leave it out, or write [number of keypoints, 2 or 3]")
    return 5 + shape[0] * shape[1] if shape[0] else 0


def outputs_of(task: Task, data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return what a data YAML asks of the head beside its classes.

    Raises:
        DataError: It says nothing of keypoints where there must be some, or contradicts itself.
    """
    if task.name != "pose":
        return {}
    shape: Any
    sigmas: Any
    shape, flip, sigmas = (data.get(k) for k in ("kpt_shape", "flip_idx", "kpt_oks_sigmas"))
    if not _wholes(shape) or len(shape) != 2 or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(
            f"{source} has kpt_shape={shape}; a pose set says kpt_shape: [number of keypoints, 2 or 3 numbers of each]"
        )
    if flip is not None and (not _wholes(flip) or sorted(flip) != list(range(shape[0]))):
        raise DataError(f"{source} has flip_idx={flip}; it must name each of the keypoints 0 to {shape[0] - 1} once")
    if sigmas is not None and (not isinstance(sigmas, list) or len(sigmas) != shape[0] or not all(map(_positive, sigmas))):
        raise DataError(f"{source} has kpt_oks_sigmas={sigmas}; it must hold a number above 0 for each keypoint")
    given = {k: data[k] for k in ("kpt_names", "kpt_oks_sigmas") if data.get(k)}
    return {"kpt_shape": list(shape), **given}


def _wholes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, int) for v in values)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
