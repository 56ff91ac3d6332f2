"""The rows of label files, a class per task: how long one is, where its object lies, how it is drawn, and made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from ultralytics.utils.ops import xywh2xyxy, xyxyxyxy2xywhr

Row = tuple[float, np.ndarray]  # a class, and the numbers behind it, (N,)


class Boxes:
    """Boxes to detect; of a polygon, Ultralytics takes the box."""

    row: ClassVar[str] = "class x y w h"  # for people
    has_keypoints: ClassVar[bool] = False

    def fits(self, count: int, kpt_shape: Sequence[int]) -> bool:
        """Say whether a row may hold so many numbers."""
        return count == 5 or _is_polygon(count)

    def is_box(self, count: int) -> bool:
        """Say whether so many numbers behind the class begin with a box, or else are an outline."""
        return count == 4

    def area(self, numbers: Sequence[float]) -> float:
        """Return the share of an image that the box around an object covers."""
        if self.is_box(len(numbers)):
            return numbers[2] * numbers[3]
        x, y = numbers[::2], numbers[1::2]
        return (max(x) - min(x)) * (max(y) - min(y))

    def corners(self, numbers: np.ndarray) -> np.ndarray:
        """Return the two corners of an object's box, or those of its outline, (N, 2)."""
        return (xywh2xyxy(numbers[None, :4])[0] if self.is_box(len(numbers)) else numbers).reshape(-1, 2)

    def drawn(self, rows: Sequence[Row], size: tuple[int, int], kpt_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return the arguments of Ultralytics' `Results` that show these rows on an image of this size (W, H)."""
        scale = np.array(size, np.float32)
        corners = [(cls, self.corners(numbers) * scale) for cls, numbers in rows]
        return {"boxes": torch.tensor([[*x.min(0), *x.max(0), 1.0, cls] for cls, x in corners]).reshape(-1, 6)}

    def made_up(self, model: Any, images: int, objects: int, side: int) -> dict[str, Tensor]:
        """Return the labels of a batch, of so many objects each, as Ultralytics' loaders give them."""
        return {
            "batch_idx": torch.arange(images, dtype=torch.float).repeat_interleave(objects),
            "cls": torch.zeros(images * objects, 1),
            "bboxes": torch.zeros(images * objects, 4),
        }


class Outlines(Boxes):
    """Outlines to segment."""

    row: ClassVar[str] = "class x1 y1 x2 y2 x3 y3 ..."

    def fits(self, count: int, kpt_shape: Sequence[int]) -> bool:
        return _is_polygon(count)

    def drawn(self, rows: Sequence[Row], size: tuple[int, int], kpt_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        scale, (width, height) = np.array(size, np.float32), size
        masks = [filled(self.corners(numbers) * scale, height, width) for _, numbers in rows]
        shown = {"masks": torch.from_numpy(np.array(masks, np.uint8))} if masks else {}
        return {**super().drawn(rows, size), **shown}

    def made_up(self, model: Any, images: int, objects: int, side: int) -> dict[str, Tensor]:
        masks = {n: torch.zeros(images, side // 4, side // 4, dtype=torch.uint8) for n in ("masks", "sem_masks")}
        return {**super().made_up(model, images, objects, side), **masks}


class Poses(Boxes):
    """Poses: a box, and its keypoints."""

    row: ClassVar[str] = "class x y w h, then the numbers of every keypoint (kpt_shape in the data YAML)"
    has_keypoints: ClassVar[bool] = True

    def fits(self, count: int, kpt_shape: Sequence[int]) -> bool:
        return count == 5 + kpt_shape[0] * kpt_shape[1]

    def is_box(self, count: int) -> bool:
        return True

    def drawn(self, rows: Sequence[Row], size: tuple[int, int], kpt_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        scale, poses = np.array(size, np.float32), [numbers[4:].reshape(kpt_shape) for _, numbers in rows]
        points = [np.concatenate([pose[:, :2] * scale, pose[:, 2:]], 1) for pose in poses]
        shown = {"keypoints": torch.from_numpy(np.array(points, np.float32))} if points else {}
        return {**super().drawn(rows, size), **shown}

    def made_up(self, model: Any, images: int, objects: int, side: int) -> dict[str, Tensor]:
        points = {"keypoints": torch.zeros(images * objects, *model.model[-1].kpt_shape)}
        return {**super().made_up(model, images, objects, side), **points}


class OrientedBoxes(Boxes):
    """Boxes that are turned; of more corners than four, Ultralytics takes the rectangle around."""

    row: ClassVar[str] = "class x1 y1 x2 y2 x3 y3 x4 y4"

    def fits(self, count: int, kpt_shape: Sequence[int]) -> bool:
        return _is_polygon(count)

    def drawn(self, rows: Sequence[Row], size: tuple[int, int], kpt_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        scale = np.array(size, np.float32)
        corners = [(cls, self.corners(numbers) * scale) for cls, numbers in rows]
        boxes = [[*xyxyxyxy2xywhr(x.reshape(1, -1))[0].tolist(), 1.0, cls] for cls, x in corners]
        return {"obb": torch.from_numpy(np.array(boxes, np.float32))} if boxes else {}

    def made_up(self, model: Any, images: int, objects: int, side: int) -> dict[str, Tensor]:
        return {**super().made_up(model, images, objects, side), "bboxes": torch.zeros(images * objects, 5)}


def filled(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask of a polygon (N, 2) in pixels."""
    mask = np.zeros((height, width), np.uint8)
    return cv2.fillPoly(mask, [outline.round().astype(np.int32)], 1) if len(outline) else mask


def _is_polygon(count: int) -> bool:
    """Say whether so many numbers are a class and at least three corners."""
    return count >= 7 and count % 2 == 1
