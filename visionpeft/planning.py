"""The verbs before a run: plan, forecast, suggest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import deprecation
from .config import Freeze, ModelArgs, TrainConfig
from .core.method import Method
from .core.plan import Plan, make_plan
from .errors import ConfigError
from .families.capabilities import Step, SupportsDryRun, SupportsFrozenStages
from .families.frozen_stages import require_frozen_stages
from .families.gradient_stats import with_gradient_stats
from .memory import forecast as forecasting
from .memory import search
from .memory.forecast import Forecast, ForecastRequest
from .memory.search import Fit
from .process import untouched
from .settings import build_with_head, find_family, loader_arguments, resolve_path, split_options
from .training.devices import check_shares, count_devices


@untouched(alone=True)
def plan(
    model: str | Path = "yolo11n.pt",
    *,
    data: str | Path | None = None,
    method: str | Method | None = None,
    freeze: Freeze = 0,
    bn: str | None = None,
    head: str | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    model_args: ModelArgs | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Plan:
    """Say what `train` would train and add, without training. Arguments that are not described here are those of `train`.

    Args:
        data: As for `train`; without it the model keeps its own classes.
        imgsz: As for `train`, of methods that look at the images before they plan; no part of another's plan.
        batch: The same.
        seed: The same: a new head is drawn by it.
        **options: Fields of the method.

    Raises:
        VisionpeftError: As for `train`.
    """
    config = TrainConfig.from_call(locals())
    family = find_family(str(model))
    tuning, config = split_options(family, config)
    if not tuning.needs_gradients and (seen := [k for k in ("imgsz", "batch", "seed") if getattr(config, k) is not None]):
        raise ConfigError(f"{seen[0]} is no part of a plan of '{tuning.name}'; `forecast` says what it takes")
    base = family.load(str(model), **loader_arguments(model_args))
    settled = config.settled({"seed": 0, **family.defaults_for(base)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settled.seed)  # as `train` draws the head
        _, own, checked = build_with_head(family, base, settled)
    anatomy = family.anatomy(own, str(model))
    anatomy = with_gradient_stats(anatomy, tuning, family, own, checked, imgsz=settled.imgsz, batch=settled.batch)
    return make_plan(tuning, anatomy, freeze, bn or family.bn)


@untouched(alone=True)
def forecast(
    model: str | Path = "yolo11n.pt",
    *,
    data: str | Path | None = None,
    method: str | Method | None = None,
    freeze: Freeze = 0,
    bn: str | None = None,
    head: str | None = None,
    epochs: int | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    device: str | int | Sequence[int] | None = None,
    amp: bool | str | None = None,
    cache: int | str | bool = 0,
    frozen_dtype: str | None = None,
    lean: str = "auto",
    objects: int | None = None,
    model_args: ModelArgs | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Forecast:
    """Say how much memory `train` would take at its peak, in seconds, without weights, GPU or the memory itself.

    Arguments that are not described here are those of `train`.

    Args:
        model: As for `train`; of a model that is not here, the design is enough.
        data: As for `train`; from it come the classes, and the number of labelled objects in the fullest image.
        epochs: As for `train`: in more of them, mosaic puts fuller images together.
        device: "cpu", or else a GPU is meant, whether there is one or not.
        amp: As for `train`; by default half precision on a GPU.
        objects: Labelled objects in the fullest image, where there are no data to count them in; by default 40.
        **options: Fields of the method, and further arguments of the family.

    Returns:
        The bytes, by what takes them. What CUDA takes beside tensors is assumed, and said apart.

    Raises:
        VisionpeftError: As for `train`.
    """
    session = ForecastSession(TrainConfig.from_call(locals(), with_idle=True), objects)
    made = session.trace(session.plan, lean, session.config.imgsz)
    return made.at(session.config.batch)


@untouched(alone=True)
def suggest(
    memory: str | float,
    *,
    model: str | Path = "yolo11n.pt",
    data: str | Path | None = None,
    method: str | Method | None = None,
    freeze: Freeze | None = None,
    bn: str | None = None,
    head: str | None = None,
    epochs: int | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    device: str | int | Sequence[int] | None = None,
    amp: bool | str | None = None,
    lean: str | None = None,
    objects: int | None = None,
    model_args: ModelArgs | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Fit:
    """Say how to train a model in a GPU's memory: methods, freezing, lean, batch and image sizes that fit, best first.

    What is given stays as it is; the rest is searched.

    Arguments that are not described here are those of `train` and of `forecast`.

    Args:
        memory: "6GB", "6GiB", or a number of GB.
        device: As for `forecast`; with "cpu", `memory` is the machine's.
        **options: Fields of the method, and further arguments of the family.

    Raises:
        ConfigError: Nothing fits; the sentence says the least that does.
        VisionpeftError: As for `train`.
    """
    given = {**locals(), "freeze": freeze or 0, "lean": lean or "auto"}
    return search_memory(TrainConfig.from_call(given, with_idle=True), objects, freeze=freeze, lean=lean)


def fit(*args: Any, **kwargs: Any) -> Fit:
    """`suggest`, by its old name."""
    deprecation.warn("fit", "suggest")
    return suggest(*args, **kwargs)


def search_memory(
    config: TrainConfig, objects: int | None = None, *, freeze: Freeze | None = None, lean: str | None = None
) -> Fit:
    """Return values for a configuration's open settings with which the run fits into its `memory`, best first.

    Args:
        config: What is given in it stays.
        freeze: The only depth to look at; None: several.
        lean: The only level to look at; None: all.
    """
    amount = forecasting.parse_memory(config.memory)
    session = ForecastSession(config, objects)
    fields = config.options.keys() - session.config.options.keys()  # of a method
    return search.search(
        session.anatomy,
        amount,
        session.trace,
        imgsz=session.config.imgsz,
        batch=session.config.batch,
        method=session.tuning if config.method or fields else None,
        freeze=freeze,
        bn=config.bn or session.family.bn,
        lean=lean,
        fixed=[k for k in ("imgsz", "batch") if getattr(config, k) is not None],
    )


class ForecastSession:
    """One model and its configuration, of which several plans are forecast.

    Args:
        objects: Labelled objects in the fullest image, where there are no data to count them in.
    """

    def __init__(self, config: TrainConfig, objects: int | None = None):
        self.validation: dict[int, Sequence[tuple[int, int]]] = {}
        self.family = family = find_family(str(config.model))
        self.able = SupportsDryRun.of(family)
        own = [*(f.name for f in dataclasses.fields(config)), "objects"]
        self.tuning, config = split_options(family, config, own)
        with torch.random.fork_rng(devices=[]):  # random weights are as good as any
            base = family.load_architecture(resolve_path(str(config.model)), **loader_arguments(config.model_args))
            settled = config.settled({"seed": 0, **family.defaults_for(base)})
            self.devices, self.gpu = count_devices(config.device)
            family.check(dataclasses.replace(settled, device="cpu"))
            self.amp = config.amp == "bf16" if not self.gpu else config.amp not in (False, "fp32")
            if settled.batch < 1:
                raise ConfigError(f"batch={settled.batch} is found on the GPU; give a number of images")
            self.config = dataclasses.replace(settled, batch=int(settled.batch))
            check_shares(",".join(["cpu"] * self.devices), self.config.batch)
            torch.manual_seed(settled.seed)  # as `train` draws the head
            if config.data:
                self.base, self.fitted, data = build_with_head(family, base, settled)
            else:  # it is the base's own head
                self.base, self.fitted, data = base, base.model, None
        look = {"imgsz": self.config.imgsz, "batch": self.config.batch}
        seen = family.anatomy(self.fitted, str(config.model))
        self.anatomy = with_gradient_stats(seen, self.tuning, family, self.fitted, data, **look)
        settings = {"epochs": self.config.epochs, **self.config.options}
        self.objects, self.area = self.able.max_objects(self.base, data, settings)
        if self.objects and objects is not None:
            if isinstance(objects, bool) or not isinstance(objects, int) or objects < 1:
                raise ConfigError(f"objects={objects} is not usable; it must be a whole number of at least 1")
            self.objects = objects

    @property
    def plan(self) -> Plan:
        """The plan of what was given."""
        return make_plan(self.tuning, self.anatomy, self.config.freeze, self.config.bn or self.family.bn)

    def trace(self, plan: Plan, lean: str, imgsz: int) -> forecasting.MemoryModel:
        """Return what a plan takes."""
        config, leading = self.config, None
        if config.views or config.frozen_dtype:
            require_frozen_stages(plan, config.views, config.frozen_dtype)
            leading = SupportsFrozenStages.of(self.family).leading_stages(self.base, plan.num_frozen_stages, imgsz)
        widest = self.able.max_size(imgsz, config.options)
        step = Step(1, imgsz, config.optimizer, self.amp, self.objects, self.area, widest)
        case = ForecastRequest(
            self.able,
            self.base,
            self.fitted,
            plan,
            step,
            lean,
            self.gpu,
            leading,
            config.frozen_dtype,
            cached=bool(config.views),
            devices=self.devices,
            nbs=self.able.images_per_update(config.options),
        )
        if plan.edits or case.leading:
            return forecasting.memory_model(case)
        made = forecasting.memory_model(case, self.validation.get(imgsz, ()))  # all that edit nothing are validated alike
        self.validation[imgsz] = made.validation
        return made
