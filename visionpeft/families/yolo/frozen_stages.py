"""Frozen stages of YOLO that run apart from the rest, and views of images that stand for them."""

from __future__ import annotations

from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.data.utils import get_split_fraction
from ultralytics.utils.checks import check_imgsz

from ...config import SettledConfig
from ...core.base_model import Base
from ...errors import ConfigError
from ...training.feature_cache_file import ViewSchedule
from ..base import Arguments
from ..capabilities import LeadingStages, SupportsFrozenStages
from .tasks import TASKS

# arguments that no augmentation reads
_NO_VIEW = {"lrf", "momentum", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr", "cos_lr", "nbs"}
_NO_VIEW |= {"box", "cls", "cls_pw", "dfl", "pose", "kobj", "rle", "angle", "dropout", "patience", "val", "plots", "verbose"}
_NO_VIEW |= {"iou", "conf", "max_det", "deterministic", "profile", "half", "save_json"}


class FrozenStages(SupportsFrozenStages):
    """Frozen stages of Ultralytics' networks, and views by its augmentation."""

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
        options = {k: v for k, v in config.options.items() if v is not None}
        use = {**DEFAULT_CFG_DICT, **options, "epochs": config.epochs}
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
        if not (mixes and use["close_mosaic"]) or not TASKS[task].labels:
            return ViewSchedule(min(views, use["epochs"]), share=share)
        return ViewSchedule(min(views, closing), min(views, use["epochs"] - closing), closing, share)

    def augmentation_settings(self, settings: Arguments) -> Arguments:
        return {k: v for k, v in settings.items() if k not in _NO_VIEW}
