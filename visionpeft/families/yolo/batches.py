"""Batches of training images as Ultralytics reads them, not augmented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import classify_transforms
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from ...core.base_model import Data
from ...training.plots import spread
from ..classification import Images, loader


def batches(data: Data, imgsz: int, batch: int, count: int, stride: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for a network's loss, of images spread over the training part.

    Args:
        data: The set.
        imgsz: Image size in pixels.
        batch: Images in each.
        count: How many, fewer where the set has no more.
        stride: That the size is rounded up to.
    """
    if data.task == "classify":
        items = spread(data.facts["train"], batch * count)
        for images, labels in loader(Images(items, classify_transforms(imgsz)), batch):
            yield {"img": images, "cls": labels}
        return
    said = check_det_dataset(data.source, autodownload=False)
    settings: Any = get_cfg(overrides={"task": data.task, "imgsz": -(-imgsz // stride) * stride})
    dataset: Any = build_yolo_dataset(settings, said["train"], batch, said, mode="val", stride=stride)
    chosen: Any = Subset(dataset, spread(range(len(dataset)), batch * count))
    for made in loader(chosen, batch, collate_fn=dataset.collate_fn):
        yield {k: v for k, v in made.items() if isinstance(v, torch.Tensor)} | {"img": made["img"].float() / 255}
