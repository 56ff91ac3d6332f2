"""Images with boxes, masks, keypoints and names on them, drawn by Ultralytics: of labels and of predictions alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.engine.results import Results
from ultralytics.utils.ops import xywh2xyxy, xyxyxyxy2xywhr
from ultralytics.utils.patches import imread

from ...errors import printable
from ...training.plots import SIDE, Picture


def scaled(image: Any) -> np.ndarray:
    """Return an image (H, W, 3), BGR, in the size of a picture: lines and names on all of them then have one size."""
    scale = SIDE / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def predicted(result: Any) -> Picture:
    """Return a prediction as a picture. It was made on the image as it is; only what it found is scaled."""
    image = scaled(result.orig_img)
    height, width = image.shape[:2]
    scale = width / result.orig_shape[1]
    given: dict[str, Any] = {}
    if result.obb is not None:
        given["obb"] = result.obb.data.clone().cpu()
        given["obb"][:, :4] *= scale
    elif result.boxes is not None:
        given["boxes"] = result.boxes.data.clone().cpu()
        given["boxes"][:, :4] *= scale
    if result.masks is not None:
        given["masks"] = torch.from_numpy(np.array([_filled(x * scale, height, width) for x in result.masks.xy]))
    if result.keypoints is not None:
        given["keypoints"] = result.keypoints.data.clone().cpu()
        given["keypoints"][..., :2] *= scale
    return _plotted(Results(image, result.path, _printable(result.names), **given))


def _printable(names: Mapping[int, str]) -> dict[int, str]:
    return {cls: printable(name) for cls, name in names.items()}


def _plotted(result: Results, **options: Any) -> Picture:
    named = len(result.names) > 1  # one name on everything only hides what it stands on
    return np.ascontiguousarray(result.plot(line_width=2, font_size=13, labels=named, **options)[..., ::-1])


def _filled(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask of a polygon (N, 2) in pixels."""
    mask = np.zeros((height, width), np.uint8)
    return cv2.fillPoly(mask, [outline.round().astype(np.int32)], 1) if len(outline) else mask


def labelled(file: str, rows: Sequence[str], task: str, names: Mapping[int, str], outputs: Mapping[str, Any]) -> Picture:
    """Return an image with its labels drawn.

    Args:
        file: The image.
        rows: Of its label file.
        task: Their task.
        names: Of the classes.
        outputs: The data set's, with kpt_shape for keypoints.
    """
    image = scaled(imread(file))
    height, width = image.shape[:2]
    scale = np.array([width, height], np.float32)
    boxes: list[list[Any]] = []
    more: list[Any] = []
    for row in rows:
        kind, *numbers = map(float, row.split())
        values = np.array(numbers, np.float32)
        if task in ("detect", "pose") and (task == "pose" or len(values) == 4):
            x = xywh2xyxy(values[None, :4])[0].reshape(2, 2) * scale
        else:
            x = values.reshape(-1, 2) * scale
        boxes.append([*x.min(0), *x.max(0), 1.0, kind])
        if task == "obb":
            more.append([*xyxyxyxy2xywhr(x.reshape(1, -1))[0].tolist(), 1.0, kind])
        elif task == "segment":
            more.append(_filled(x, height, width))
        elif task == "pose":
            points = values[4:].reshape(outputs["kpt_shape"])
            more.append(np.concatenate([points[:, :2] * scale, points[:, 2:]], 1))
    part = {"segment": "masks", "pose": "keypoints", "obb": "obb"}.get(task)
    given: dict[str, Any] = {} if task == "obb" else {"boxes": torch.tensor(boxes).reshape(-1, 6)}
    if part and more:
        given[part] = torch.from_numpy(np.array(more, np.uint8 if task == "segment" else np.float32))
    return _plotted(Results(image, file, _printable(names), **given), conf=False)
