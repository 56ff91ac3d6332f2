"""Images with boxes, masks, keypoints and names on them, drawn by Ultralytics: of labels and of predictions alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.engine.results import Results
from ultralytics.utils.patches import imread

from ...core.base_model import Data
from ...errors import printable
from ...training.plots import SIDE, Picture
from .labels import filled
from .tasks import TASKS


def scaled(image: Any) -> np.ndarray:
    """Return an image (H, W, 3), BGR, in the size of a picture: lines and names on all of them then have one size."""
    scale = SIDE / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def predicted(result: Any) -> Picture:
    """Return a prediction as a picture. It was made on the image as it is; only its boxes and the like are scaled."""
    image = scaled(result.orig_img)
    height, width = image.shape[:2]
    scale = width / result.orig_shape[1]
    shown: dict[str, torch.Tensor] = {}
    if result.obb is not None:
        shown["obb"] = result.obb.data.clone().cpu()
        shown["obb"][:, :4] *= scale
    elif result.boxes is not None:
        shown["boxes"] = result.boxes.data.clone().cpu()
        shown["boxes"][:, :4] *= scale
    if result.masks is not None:
        shown["masks"] = torch.from_numpy(np.array([filled(x * scale, height, width) for x in result.masks.xy]))
    if result.keypoints is not None:
        shown["keypoints"] = result.keypoints.data.clone().cpu()
        shown["keypoints"][..., :2] *= scale
    return _plotted(Results(image, result.path, _printable(result.names), **shown))  # type: ignore[arg-type]


def _printable(names: Mapping[int, str]) -> dict[int, str]:
    return {cls: printable(name) for cls, name in names.items()}


def _plotted(result: Results, **options: Any) -> Picture:
    named = len(result.names) > 1  # one name on everything only hides what it stands on
    return np.ascontiguousarray(result.plot(line_width=2, font_size=13, labels=named, **options)[..., ::-1])


def labelled(file: str, rows: Sequence[str], data: Data) -> Picture:
    """Return an image with its labels drawn, the rows of its label file."""
    image, labels = scaled(imread(file)), TASKS[data.task].labels
    assert labels, "images of a class have no label files"
    numbers = [(cls, np.array(values, np.float32)) for cls, *values in (map(float, row.split()) for row in rows)]
    shown = labels.drawn(numbers, (image.shape[1], image.shape[0]), data.outputs.get("kpt_shape", ()))
    return _plotted(Results(image, file, _printable(data.names), **shown), conf=False)  # type: ignore[arg-type]
