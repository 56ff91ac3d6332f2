"""The part of a run that is computed apart from the rest: its frozen stages, and where their outputs are kept."""

from __future__ import annotations

from importlib.metadata import version

import torch

from ..config import SettledConfig
from ..core import delta as deltas
from ..core.base_model import Base, Data
from ..core.plan import Plan
from ..errors import ConfigError
from ..lean.frozen_stages import DTYPES, FrozenStages
from ..sources import cache_folder
from ..training.devices import devices
from ..training.feature_cache import Store, content, key
from .base import Family
from .capabilities import SupportsFrozenStages

FORMAT = 1  # of stored views; another one when they are computed otherwise


def prepare_frozen_stages(
    family: Family, base: Base, data: Data, plan: Plan, config: SettledConfig
) -> tuple[FrozenStages | None, Store | None]:
    """Return the frozen stages, made to run apart, and the store of their outputs; None where neither is asked for.

    Args:
        family: Whose model it is.
        base: The model; its frozen stages stay as they are in it.
        data: What it trains on.
        plan: What trains.
        config: Of the run.

    Raises:
        ConfigError: The first stage trains, something is at odds with it, or there is no room for the views.
    """
    dtype, limit, views = config.frozen_dtype, config.cache_limit, config.views
    if dtype is None and not views:
        return None, None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ConfigError(f"cache_limit={limit} is not usable; it must be a number of GB above 0")
    able = SupportsFrozenStages.of(family)
    require_frozen_stages(plan, views, dtype)
    if views and len(devices(config.device)) > 1:
        raise ConfigError(f"device='{config.device}' does not go with cache, which serves one device; leave one out")
    rounds = able.view_schedule(views, config, base.task)
    leading = able.leading_stages(base, plan.num_frozen_stages, config.imgsz)
    stored = DTYPES[dtype or "bf16"]
    example = torch.rand(2, *leading.image, generator=torch.Generator().manual_seed(0))
    prefix = FrozenStages(base.model, leading.modules, example, leading.read, DTYPES[dtype or "fp32"], stored)
    if not views:
        return prefix, None
    name = key(
        format=FORMAT,
        versions=[version(name) for name in ("torch", "torchvision", "ultralytics", "timm")],  # they augment
        base=deltas.fingerprint(base.state),
        modules=[prefix.modules, prefix.read, leading.image],
        types=[str(prefix.dtype), str(stored)],
        data=data.fingerprint,  # names, sizes and labels
        images=content(data.train),
        input=base.facts,  # the mean and so on that images are prepared with
        augmentation=able.augmentation_settings(config.options),
        rounds=repr(rounds).replace("ViewSchedule", "Rounds"),  # its old name: views of earlier runs are found again
        seed=config.seed,
    )
    store = Store(cache_folder() / "views" / f"{name}.views", rounds, limit)
    if not store.file.is_file():
        images, share = len(data.train), rounds.share
        count = min(int(share), images) if share > 1 else round(images * share)
        store.check_room(count * rounds.total * prefix.length * stored.itemsize)
    return prefix, store


def require_frozen_stages(plan: Plan, views: int, dtype: str | None) -> None:
    """Refuse a plan whose first stage trains, where stages are to run apart.

    Raises:
        ConfigError: It does, or `dtype` is not known.
    """
    if dtype is not None and dtype not in tuple(DTYPES):
        raise ConfigError(f"frozen_dtype='{dtype}' is not known; it is {', '.join(map(repr, DTYPES))}")
    if not plan.num_frozen_stages:
        option = f"cache={views}" if views else f"frozen_dtype='{dtype}'"
        raise ConfigError(
            f"{option} needs frozen stages before the first that trains, is edited or has moving statistics, but with "
            f"freeze={plan.freeze} and method='{plan.method}' there are none; freeze more, e.g. freeze=10, or leave it out"
        )
