"""Networks of Ultralytics: opened or refused by their kind; made from a YAML; given other channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.nn.tasks import guess_model_task, torch_safe_load, yaml_model_load
from ultralytics.utils.downloads import attempt_download_asset

from ...core.attach import attached, merge, mergeable
from ...core.base_model import LARGEST_IMAGE, Base
from ...errors import DataError, ModelError, VisionpeftError
from ...files import read_yaml
from ...pickles import objection
from .output import one_line, stdout_to_stderr
from .sources import check_described, check_parts, check_size, checkpoint
from .tasks import TASKS, Task, build, check_content, task_of

_REFUSED = {
    "RTDETRDetectionModel": "RT-DETR",
    "WorldModel": "YOLO-World",
    "YOLOEModel": "YOLOE",
    "YOLOESegModel": "YOLOE",
    "SemanticSegmentationModel": "semantic segmentation",
    "DepthModel": "depth",
}
_OTHERS = {"rtdetr": "RT-DETR", "-world": "YOLO-World", "yoloe": "YOLOE", "-sem": "semantic segmentation", "-depth": "depth"}
_INSTEAD = "give a YOLOv8, YOLO11 or YOLO26 model that detects, segments, classifies, or finds poses or oriented boxes"
_UNREADABLE = (RuntimeError, TypeError, EOFError, LookupError, AttributeError, ImportError, ValueError, yaml.YAMLError)


def load(source: str) -> Base:
    """Load a base; see `Family.load`.

    Raises:
        ModelError: It cannot be had, or is of a kind that is not supported.
    """
    stem = Path(source).stem.lower()
    kinds = (kind for mark, kind in _OTHERS.items() if mark in stem and stem.startswith(("yolo", "rtdetr")))
    if not Path(source).is_file() and (other := next(kinds, None)):
        raise ModelError(f"{source} is a {other} model, which is not supported; {_INSTEAD}")
    pretrained = not source.endswith((".yaml", ".yml"))
    try:
        model = _from_checkpoint(source) if pretrained else _from_yaml(source)
    except VisionpeftError:
        raise
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise ModelError(
            f"the model {source} is not here and could not be downloaded; give the path of a .pt file ({one_line(error)})"
        ) from error
    except _UNREADABLE as error:
        raise ModelError(f"{source} is not a checkpoint that Ultralytics can read ({one_line(error)})") from error
    task = supported(model, source)
    check_content(model, source)
    model.args = dict(getattr(model, "args", {}))
    if pretrained:
        check_described(model)
    model = model.float().eval()
    imgsz = model.args.get("imgsz")
    imgsz = imgsz if isinstance(imgsz, int) and 0 < imgsz <= LARGEST_IMAGE else task.imgsz
    facts = {"imgsz": imgsz, "mean": [0.0] * 3, "std": [1.0] * 3, "channels": int(model.yaml.get("channels", 3))}
    return Base(source, model, task.name, dict(model.names), facts, pretrained)


def with_channels(base: Base, channels: Any, source: str) -> Base:
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


def supported(model: nn.Module, source: str) -> Task:
    """Return the task of a model that was loaded.

    Raises:
        ModelError: It is none of those that are supported.
    """
    if task := task_of(model):
        return task
    kind = type(model).__name__
    raise ModelError(f"{source} is a {_REFUSED.get(kind, kind)} model, which is not supported; {_INSTEAD}")


def read_checkpoint(file: str) -> dict[str, Any]:
    """Return the content of a checkpoint, through Ultralytics' allow-list instead of unpickling.

    Raises:
        ModelError: It would run something.
    """
    if not Path(file).is_file():  # fetched now, so that it can be looked through
        with stdout_to_stderr():
            file = attempt_download_asset(file)
    if why := objection(file, networks=True):
        raise ModelError(f"{file} is not a checkpoint that Ultralytics can read ({why})")
    with stdout_to_stderr():
        return torch_safe_load(file, safe_only=True)[0]


def for_inference(model: Any) -> Any:
    """Return a copy that Ultralytics may fuse: merged where it can be."""
    model = copy.deepcopy(model).eval()
    if attached(model) is not None and mergeable(model):
        merge(model)
    if not hasattr(model, "args") or not isinstance(model.args, dict):
        model.args = dict(DEFAULT_CFG_DICT)
    model.task = settled_task(model).name
    return model


def settled_task(model: nn.Module) -> Task:
    """Return the task of a model that `load` did not refuse."""
    task = task_of(model)
    assert task is not None, "models of no task are refused when they are loaded"
    return task


def _from_checkpoint(source: str) -> Any:
    # Ultralytics' allow-list instead of unpickling: a delta may name a base that its user never looked at
    content = read_checkpoint(checkpoint(source))
    model = _network(content, source)
    model.args = content.get("train_args") or {}
    return model


def _from_yaml(source: str) -> Any:
    """Return a network with random weights, always the same."""
    if Path(source).is_file():
        read_yaml(Path(source).read_text(encoding="utf-8", errors="ignore"))  # that nothing in it takes for ever
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
    if type(model) is nn.Sequential:  # so Ultralytics reads it
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
