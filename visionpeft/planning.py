"""The verbs before a run: plan, forecast, fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .core.method import Method
from .core.plan import Plan, make_plan
from .errors import ConfigError
from .families.base import Step
from .families.frozen_stages import require_frozen_stages
from .families.gradient_stats import with_gradient_stats
from .memory import forecast as forecasting
from .memory import search as budget
from .memory.forecast import Case, Forecast
from .memory.search import Fit
from .process import untouched
from .settings import (
    check_names,
    check_settings,
    device_of,
    find_family,
    fitted,
    loader_arguments,
    resolve_path,
    split_options,
    views_of,
)
from .training.distributed import check_shares, devices

Freeze = int | Sequence[int | str]
# arguments of train() on which memory does not depend
IDLE = "lr0 lr_scale workers seed delta_dtype cache_limit trackers quiet project name exist_ok save_every".split()
OBJECTS, AREA = 40, 0.02  # assumed where there are no data to count in: objects of the fullest image, the share each covers


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
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Plan:
    """Say what `train` would train and add, without training.

    Args:
        model: As for `train`.
        data: As for `train`; without it the model keeps its own classes.
        method: As for `train`.
        freeze: As for `train`.
        bn: As for `train`.
        head: As for `train`.
        imgsz: As for `train`, of methods that look at the images before they plan; no part of another's plan.
        batch: The same.
        seed: The same: a new head is drawn by it.
        model_args: As for `train`.
        allow_download: As for `train`.
        **options: Fields of the method.

    Raises:
        VisionpeftError: As for `train`.
    """
    seen = {k: v for k, v in (("imgsz", imgsz), ("batch", batch), ("seed", seed)) if v is not None}
    check_names(model=model, data=data)
    family = find_family(str(model))
    tuning, _ = split_options(family, method, freeze, options)
    if seen and not tuning.needs_gradients:
        given = next(iter(seen))
        raise ConfigError(f"{given} is no part of a plan of '{tuning.name}'; a forecast (--memory) says what it takes")
    base = family.load(str(model), **loader_arguments(model_args))
    settings = {"seed": 0, **family.defaults_for(base), **seen}
    check_settings(settings, {"seed": settings["seed"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])  # as `train` draws the head
        _, own, checked = fitted(family, base, data, head, allow_download)
    anatomy = family.anatomy(own, str(model))
    anatomy = with_gradient_stats(anatomy, tuning, family, own, checked, imgsz=settings["imgsz"], batch=settings["batch"])
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
    prefix_dtype: str | None = None,
    lean: str = "auto",
    objects: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Forecast:
    """Say how much memory `train` would take at its peak, in seconds, without weights, GPU or the memory itself.

    Args:
        model: As for `train`; of a model that is not here, the design is enough.
        data: As for `train`; from it come the classes, and the number of labelled objects in the fullest image.
        method: As for `train`.
        freeze: As for `train`.
        bn: As for `train`.
        head: As for `train`.
        epochs: As for `train`: in more of them, mosaic puts fuller images together.
        imgsz: As for `train`.
        batch: As for `train`.
        optimizer: As for `train`.
        device: "cpu", or else a GPU is meant, whether there is one or not.
        amp: As for `train`; by default half precision on a GPU.
        cache: As for `train`.
        prefix_dtype: As for `train`.
        lean: As for `train`.
        objects: Labelled objects in the fullest image, where there are no data to count them in; by default 40.
        model_args: As for `train`.
        allow_download: As for `train`.
        **options: Fields of the method, and further arguments of the family.

    Returns:
        The bytes, by what takes them. What CUDA takes beside tensors is assumed, and said apart.

    Raises:
        VisionpeftError: As for `train`.
    """
    given = {k: v for k, v in locals().items() if k != "options"}
    rehearsed = ForecastSession(given, options)
    made = rehearsed.trace(rehearsed.plan, lean, rehearsed.settings["imgsz"])
    return made.at(rehearsed.settings["batch"])


@untouched(alone=True)
def fit(
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
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Fit:
    """Say how to train a model in a GPU's memory: methods, freezing, lean, batch and image sizes that fit, best first.

    What is given stays as it is; the rest is searched.

    Args:
        memory: "6GB", "6GiB", or a number of GB.
        model: As for `forecast`.
        data: As for `forecast`.
        method: As for `train`.
        freeze: As for `train`.
        bn: As for `train`.
        head: As for `train`.
        epochs: As for `forecast`.
        imgsz: As for `train`.
        batch: As for `train`.
        optimizer: As for `train`.
        device: As for `forecast`; with "cpu", `memory` is the machine's.
        amp: As for `forecast`.
        lean: As for `train`.
        objects: As for `forecast`.
        model_args: As for `train`.
        allow_download: As for `train`.
        **options: Fields of the method, and further arguments of the family.

    Raises:
        ConfigError: Nothing fits; the sentence says the least that does.
        VisionpeftError: As for `train`.
    """
    given = {k: v for k, v in locals().items() if k not in ("options", "memory")}
    amount = forecasting.parse_memory(memory)
    rehearsed = ForecastSession(given, options)
    settled = method or set(options) - set(rehearsed.extra) - set(IDLE)  # the rest are fields of a method
    return budget.search(
        rehearsed.anatomy,
        amount,
        rehearsed.trace,
        imgsz=rehearsed.settings["imgsz"],
        batch=rehearsed.settings["batch"],
        method=rehearsed.tuning if settled else None,
        freeze=freeze,
        bn=bn or rehearsed.family.bn,
        lean=lean,
        fixed=[k for k in ("imgsz", "batch") if given[k] is not None],
    )


class ForecastSession:
    """What forecasts of one model have in common."""

    def __init__(self, given: Mapping[str, Any], options: Mapping[str, Any]):
        check_names(model=given["model"], data=given["data"])
        self.given = given
        self.validation: dict[int, Sequence[tuple[int, int]]] = {}
        self.family = family = find_family(str(given["model"]))
        idle = {k: v for k, v in options.items() if k in IDLE}  # of train's arguments, those that memory does not depend on
        options = {k: v for k, v in options.items() if k not in idle}
        self.tuning, extra = split_options(family, given["method"], given["freeze"] or 0, options, given)
        self.views, self.extra = views_of(family, given.get("cache"), extra)
        with torch.random.fork_rng(devices=[]):  # random weights are as good as any
            self.base = family.load_architecture(resolve_path(given["model"]), **loader_arguments(given["model_args"]))
            defaults = family.defaults_for(self.base)
            said = {**idle, **{k: v for k, v in given.items() if v is not None}}
            self.settings = {k: said.get(k, v) for k, v in defaults.items()}
            check_settings(self.settings, said)
            self.devices, self.gpu = _devices(given["device"])
            amp = given["amp"]
            family.check({**self.settings, **self.extra, "device": "cpu", "amp": amp, "seed": idle.get("seed", 0)})
            self.amp = amp == "bf16" if not self.gpu else amp not in (False, "fp32")
            if self.settings["batch"] < 1:
                raise ConfigError(f"batch={self.settings['batch']} is found on the GPU; give a number of images")
            self.settings["batch"] = int(self.settings["batch"])
            check_shares(",".join(["cpu"] * self.devices), self.settings["batch"])
            self.fitted, data = self.base.model, None
            if given["data"]:  # else it is the base's own head
                torch.manual_seed(idle.get("seed", 0))  # as `train` draws the head
                allowed = given["allow_download"]
                self.base, self.fitted, data = fitted(family, self.base, given["data"], given["head"], allowed)
        look = {"imgsz": self.settings["imgsz"], "batch": self.settings["batch"]}
        seen = family.anatomy(self.fitted, str(given["model"]))
        self.anatomy = with_gradient_stats(seen, self.tuning, family, self.fitted, data, **look)
        self.objects, self.area = (
            (OBJECTS, AREA) if data is None else family.max_objects(data, {**self.settings, **self.extra})
        )
        if self.base.task == "classify":
            self.objects, self.area = 0, 0.0
        elif (objects := given["objects"]) is not None:
            if isinstance(objects, bool) or not isinstance(objects, int) or objects < 1:
                raise ConfigError(f"objects={objects} is not usable; it must be a whole number of at least 1")
            self.objects = objects

    @property
    def plan(self) -> Plan:
        """The plan of what was given."""
        return make_plan(self.tuning, self.anatomy, self.given["freeze"], self.given["bn"] or self.family.bn)

    def trace(self, plan: Plan, lean: str, imgsz: int) -> forecasting.Trace:
        """Return what a plan takes."""
        dtype, leading = self.given.get("prefix_dtype"), None
        if self.views or dtype:
            require_frozen_stages(plan, self.views, dtype)
            leading = self.family.leading_stages(self.base, plan.num_frozen_stages, imgsz)
        widest = self.family.max_size(imgsz, self.extra)
        step = Step(1, imgsz, self.settings["optimizer"], self.amp, self.objects, self.area, widest)
        case = Case(
            self.family,
            self.base,
            self.fitted,
            plan,
            step,
            lean,
            self.gpu,
            leading,
            dtype,
            cached=bool(self.views),
            devices=self.devices,
            nbs=self.extra.get("nbs", 0),
        )
        if plan.edits or case.leading:
            return forecasting.trace(case)
        made = forecasting.trace(case, self.validation.get(imgsz, ()))  # all that edit nothing are validated alike
        self.validation[imgsz] = made.validation
        return made


def _devices(device: Any) -> tuple[int, bool]:
    """Return how many devices are meant, and whether they are GPUs, which need not be here."""
    names = devices("" if device is None else device_of(device))
    if strange := [n for n in names if n not in ("", "cpu", "cuda", "mps") and not n.removeprefix("-").isdigit()]:
        raise ConfigError(f"device='{strange[0]}' is not known; give 'cpu', or the number of a GPU: 0, or '0,1' for two")
    return len(names), names[0] != "cpu"
