"""Ultralytics' validators, faster: the same numbers, bit for bit, without work that cannot change them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class KeepingMixin:
    """Mixin over an Ultralytics validator: its predictions for each image are kept, and the model is not copied."""

    def get_stats(self: Any) -> dict[str, Any]:
        """Keep the statistics of each image, which Ultralytics forgets when it has the numbers."""
        self.kept = {name: list(arrays) for name, arrays in getattr(self.metrics, "stats", {}).items()}
        return super().get_stats()  # type: ignore[misc]

    def get_model(self: Any, model: Any, trainer: Any = None) -> nn.Module:
        """Return the model as it is, where Ultralytics copies one that it was given: `evaluate` gives a copy."""
        return super().get_model(model, trainer) if trainer is not None else model  # type: ignore[misc]


class FastNmsMixin(KeepingMixin):
    """Mixin over an Ultralytics validator: boxes that are certain to be dropped are not compared with each other.

    An image's detections are the best `max_det` boxes that no better box overlaps, so they do not depend on the boxes that
    score below the last of them. Of a new head, nearly all boxes pass the threshold, and comparing each with each takes
    longer than the network itself.
    """

    def postprocess(self: Any, preds: Any) -> Any:
        if self.end2end:  # it has nothing to compare
            return super().postprocess(preds)  # type: ignore[misc]
        boxes = preds
        while not isinstance(boxes, Tensor):
            boxes = boxes[0]  # (B, 4 + classes + more, N)
        scores = boxes[:, 4 : 4 + self.nc]
        given, wanted = scores.clone(), 4 * self.args.max_det
        while wanted < given[0].numel():
            least = given.flatten(1).topk(wanted).values[:, -1]  # (B,)
            whole = least <= self.args.conf  # the threshold leaves fewer
            if whole.all():
                break
            scores.copy_(torch.where(given > least[:, None, None], given, 0))
            found = super().postprocess(preds)  # type: ignore[misc]
            if all(w or len(f["conf"]) == self.args.max_det for w, f in zip(whole.tolist(), found, strict=True)):
                return found
            wanted *= 4
        scores.copy_(given)
        return super().postprocess(preds)  # type: ignore[misc]


def with_fast_nms(validator: type[Any]) -> type[Any]:
    """Return a validator class of Ultralytics without work that cannot change its numbers; it keeps its predictions."""
    return type(f"FastNms{validator.__name__}", (FastNmsMixin, validator), {"__module__": __name__})


def keeping_predictions(validator: type[Any]) -> type[Any]:
    """Return a validator class of Ultralytics that keeps its predictions: of a classifier there is nothing to spare, and
    rotated boxes of one score are in no certain order."""
    return type(f"Keeping{validator.__name__}", (KeepingMixin, validator), {"__module__": __name__})
