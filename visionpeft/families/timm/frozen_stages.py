"""Frozen stages of timm's classifiers that run apart from the rest, and views of images that stand for them."""

from __future__ import annotations

from ...config import SettledConfig
from ...core.base_model import Base
from ...errors import ConfigError
from ...training.feature_cache_file import ViewSchedule
from ..base import Arguments
from ..capabilities import LeadingStages, SupportsFrozenStages
from .anatomy import leading
from .arguments import Hyperparameters


class FrozenStages(SupportsFrozenStages):
    """Frozen stages of timm's networks, and views by its transforms."""

    def leading_stages(self, base: Base, stages: int, imgsz: int) -> LeadingStages:
        return LeadingStages(leading(base.model, stages), (), (3, imgsz, imgsz))

    def view_schedule(self, views: int, config: SettledConfig, task: str) -> ViewSchedule:
        """All views are augmented alike."""
        if views and (mixing := next((name for name in ("mixup", "cutmix") if config.options.get(name)), None)):
            raise ConfigError(
                f"{mixing}={config.options[mixing]} mixes images, but with cache there are none to mix; leave one out"
            )
        return ViewSchedule(min(views, config.epochs))

    def augmentation_settings(self, settings: Arguments) -> Arguments:
        names = ("scale", "fliplr", "flipud", "color_jitter", "auto_augment", "erasing")
        return {k: settings.get(k, getattr(Hyperparameters, k)) for k in names}
