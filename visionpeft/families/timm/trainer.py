"""The training loop of families that bring none: accelerate for device, AMP, accumulation and processes; timm's optimizers,
schedules and mixing; a moving average; a checkpoint after every epoch, and in long ones."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...config import SettledConfig
from ...core.attach import attach, settle
from ...errors import ConfigError, TrainingError, nearest
from ...measure import Meter, held
from ...process import random_states, set_random_states
from ...training import checkpoint
from ...training.distributed import check_shares, devices, launch
from ...training.feature_cache import CachedFeatureDataset, ViewSchedule
from ...training.job import Job, keep_best
from ...training.progress import Progress
from ...training.shuffling import Order
from ..base import DryRun, Family, Step
from ..classification import Images, loader, score, still_readable


@dataclass(frozen=True)
class Recipe:
    """What `train` takes beside its own arguments, under Ultralytics' names where it has them."""

    lrf: float = 0.01  # the last learning rate, relative to the first
    cos_lr: bool = True  # fall along a cosine, or else along a line
    warmup_epochs: float = -1.0  # rise to the full learning rate over this many; -1: a tenth of all, at most 3
    momentum: float = 0.9  # of optimizers that have one
    weight_decay: float = 0.05  # of weights; biases, scales and the like are never decayed
    nbs: int = 0  # gradients are accumulated to this many images; 0: to one batch
    patience: int = 100  # stop after this many epochs without a better score
    ema: float = 0.9999  # decay of the moving average, reached after some thousand steps; 0: no average
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    mixup: float = 0.0  # alpha of timm's mixup; 0: off
    cutmix: float = 0.0  # alpha of timm's cutmix; 0: off
    scale: float = 0.5  # random crops cover at least 1 less this share of the image
    fliplr: float = 0.5  # probability of a flip left to right
    flipud: float = 0.0  # probability of a flip upside down
    color_jitter: float = 0.4  # strength of random brightness, contrast and saturation
    erasing: float = 0.0  # probability that a patch is erased
    auto_augment: str = ""  # timm's augmentation policy, e.g. "rand-m9-mstd0.5-inc1"; "": none

    def __post_init__(self) -> None:
        shares = {"lrf", "momentum", "ema", "label_smoothing", "scale", "fliplr", "flipud", "erasing"}
        for field in fields(self):
            value, low, high = getattr(self, field.name), -1 if field.name == "warmup_epochs" else 0, math.inf
            high = 1 if field.name in shares else high
            if field.type in ("float", "int") and not (isinstance(value, int | float) and low <= value <= high):
                allowed = f"a number from {low} to {high}" if high == 1 else f"a number of at least {low}"
                raise ConfigError(f"{field.name}={value!r} is not usable; it must be {allowed}")


def check(config: SettledConfig) -> Recipe:
    """Return the recipe among a run's options; refuse what training would stumble over.

    Raises:
        ConfigError: One of them cannot be used.
    """
    recipe = Recipe(**{k: v for k, v in config.options.items() if k in Recipe.__dataclass_fields__})
    if not isinstance(config.batch, int) or config.batch < 1:
        raise ConfigError(f"batch={config.batch} is not usable; for timm models it must be a whole number of at least 1")
    if (recipe.mixup or recipe.cutmix) and config.batch % 2:
        raise ConfigError(f"mixup and cutmix mix pairs of images, but batch={config.batch} is odd; give an even one")
    try:
        create_transform(32, is_training=True, auto_augment=recipe.auto_augment or None)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"auto_augment={recipe.auto_augment!r} is not one of timm's policies; give e.g. 'rand-m9-mstd0.5-inc1'"
        ) from error
    known = [str(n) for n in timm.optim.list_optimizers()]
    if config.optimizer.lower() not in known:
        hint = nearest(config.optimizer, known)
        raise ConfigError(f"optimizer='{config.optimizer}' is not one of timm's, e.g. adamw, sgd, lamb.{hint}")
    if timm.optim.get_optimizer_info(config.optimizer.lower()).second_order:
        raise ConfigError(f"optimizer='{config.optimizer}' needs second derivatives, which training does not make")
    check_shares(config.device, config.batch)
    for name in devices(config.device):
        _precision(config.amp, select_device(name).type == "cpu")
    return recipe


def rounds(views: int, config: SettledConfig) -> ViewSchedule:
    """Return how `views` views of every image are stored: all are augmented alike.

    Raises:
        ConfigError: A setting does not go with stored views.
    """
    if views and (mixing := next((name for name in ("mixup", "cutmix") if config.options.get(name)), None)):
        raise ConfigError(
            f"{mixing}={config.options[mixing]} mixes images, but with cache there are none to mix; leave one out"
        )
    return ViewSchedule(min(views, config.epochs))


def augmentation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings on which what is made of an image depends."""
    names = ("scale", "fliplr", "flipud", "color_jitter", "auto_augment", "erasing")
    return {k: settings.get(k, getattr(Recipe, k)) for k in names}


# ------------------------------------------------------------------------------------------------------------ the average
class Average:
    """A moving average of what trains and of the statistics that move; the rest is the base's, bit for bit."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._pairs: list[tuple[Tensor, Tensor]] = []
        given, live = _tensors(model), checkpoint.live(model)
        for name, own in _tensors(self.model).items():
            if name in live:  # the tensors themselves, for several processes exchange what they hold
                self._pairs.append((own, given[name]))
            elif isinstance(own, nn.Parameter):
                own.data = given[name].data  # what does not train is held once

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the live values, at first at once, later slowly."""
        decay = self._decay * (1 - math.exp(-updates / 2000))
        for own, live in self._pairs:
            own.lerp_(live, 1 - decay) if own.is_floating_point() else own.copy_(live)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# --------------------------------------------------------------------------------------------------------------- the loop
def run(family: Family, job: Job, transform: Callable[[nn.Module, int, Recipe | None], Callable]) -> None:
    """Train.

    Args:
        family: Whose model it is; it fits models and writes results.
        job: What to do.
        transform: Makes what prepares an image for a model, at a size; for training with a recipe, for evaluation without.

    Raises:
        TrainingError: The loss is no number, or nothing is left to resume.
        ConfigError: An argument is not usable.
    """
    if len(names := devices(job.config.device)) > 1:
        config = dataclasses.replace(job.config, device="cpu" if names[0] == "cpu" else "")
        each = dataclasses.replace(job, config=config)
        return launch(run, family, each, transform, device=job.config.device, folder=job.folder)
    recipe = check(job.config)
    ours = not AcceleratorState._shared_state
    accelerator = _accelerator(job, recipe)
    loop = None
    try:
        loop = _Loop(family, job, recipe, accelerator, transform)
        # of several processes, each ends with its part of the run
        with job.trackers if accelerator.num_processes > 1 else nullcontext():
            loop.run()
    finally:
        if loop:
            loop.meter.close()
        if ours and accelerator.num_processes == 1:  # accelerate keeps its first device and precision until told
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@dataclass(frozen=True)
class Within:
    """Where a run is within an epoch."""

    steps: int = 0  # batches trained on
    total: float = 0.0  # of the losses of images
    seen: int = 0  # images


class _Loop:
    """One run: its model, optimizer, schedule, average and position."""

    def __init__(self, family: Family, job: Job, recipe: Recipe, accelerator: Accelerator, transform: Callable):
        self.family, self.job, self.recipe, self.accelerator = family, job, recipe, accelerator
        set_seed(job.config.seed)
        own = family.with_head(job.base, job.data.names, job.config.head)
        images: Any = Images(job.data.facts["train"], transform(own, job.config.imgsz, recipe))
        held_out = Images(job.data.facts["val"], transform(own, job.config.imgsz, None))
        self.own = settle(attach(own, job.plan), job.plan).to(accelerator.device)
        self.average = Average(self.own, recipe.ema)
        job.equip(self.own)
        if job.prefix and job.store:
            images = CachedFeatureDataset(
                images,
                job.store,
                job.prefix,
                lambda samples: torch.stack([image for image, _ in samples]).to(accelerator.device),
                seed=job.config.seed,
                batch=job.config.batch,
                workers=job.config.workers,
                quiet=job.config.quiet,
            )
        self.images, workers = images, 0 if job.store else job.config.workers
        self.model = accelerator.prepare(self.own) if accelerator.num_processes > 1 else self.own
        self.batch = max(job.config.batch // accelerator.num_processes, 1)
        self.generator = torch.Generator().manual_seed(job.config.seed)
        # a last batch of one image is left out: BatchNorm cannot train on it
        alone = len(images) % self.batch == 1 and len(images) > self.batch > 1
        self.order = Order(
            images, self.batch, self.generator, drop_last=alone, ahead=workers > 0, shares=accelerator.num_processes
        )
        how: dict[str, Any] = {"batch_sampler": self.order, "num_workers": workers, "pin_memory": _cuda(accelerator)}
        self.batches = accelerator.prepare(DataLoader(images, generator=self.generator, **how))
        self.held_out = accelerator.prepare(loader(held_out, self.batch, job.config.workers))
        self.optimizer = accelerator.prepare(_optimizer(self.own, job, recipe))
        kept = {"optimizer": self.optimizer, "average": self.average.model}
        self.meter = Meter(self.own, accelerator.device, stages=job.stages, **kept)
        per_epoch = math.ceil(len(self.batches) / accelerator.gradient_accumulation_steps)
        self.schedule = _schedule(self.optimizer, job, recipe, per_epoch)
        self.mix = _mix(recipe, len(job.data.names))
        smoothing = 0.0 if self.mix else recipe.label_smoothing
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.updates, self.history = 0, []  # type: ignore[var-annotated]
        self.best: dict[str, float] = {"epoch": -1, "score": -1.0, "loss": math.inf}
        self.within = Within()

    def run(self) -> None:
        """Train from where the run stands to its end."""
        set_seed(self.job.config.seed, device_specific=True)
        start = self._resume() if self.job.resume else 0
        shown = self.accelerator.is_main_process and not self.job.config.quiet
        progress = Progress(self.job.config.epochs, self.family.primary_metric(self.job.base.task), shown)
        if self.accelerator.is_main_process:
            self.job.trackers.open(start)
        with progress, still_readable(self.job.data), self.job.stop.awaited(), checkpoint.Writer() as self.writer:
            for epoch in range(start, self.job.config.epochs):
                progress.start(epoch, len(self.batches))
                loss = self._epoch(epoch, lambda loss: progress.batch(loss, self.meter.memory))
                metrics = score(self.average.model, self.held_out, len(self.job.data.names), self.accelerator)
                self._check(metrics["loss"], epoch)
                self._save(epoch, loss, metrics)
                progress.end(epoch, loss, metrics)
                self.job.leave_if_asked(self.writer)
                if self._patient(epoch):
                    break

    def _patient(self, epoch: int) -> bool:
        """Say whether the score has not risen for so long that the run stops."""
        waited = math.ceil(self.job.plan.fully_unfrozen_at * self.job.config.epochs - 1e-6) - 1  # the last epoch of waiting
        return epoch - max(self.best["epoch"], waited) >= self.recipe.patience > 0

    def _epoch(self, epoch: int, tell: Callable[[float], object]) -> float:
        """Train on every image once, or on what is left where the run was stopped within the epoch; return the mean loss."""
        self.job.open(self.own, epoch / self.job.config.epochs, self.meter)
        if self.job.store:
            self.images.epoch = epoch  # each reads another view
        at, self.within = self.within, Within()
        began = self.generator.get_state()
        self.meter.begin("data")
        for images, labels in islice(self.batches, at.steps if self.order.ahead else 0, None):
            count = len(images)
            if self.mix:
                images, labels = self.mix(images, labels)
            with self.accelerator.accumulate(self.model):
                loss = self._step(images, labels)
                self._check(loss, epoch)
                if self.accelerator.sync_gradients:
                    self.meter.begin("optimizer")
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.updates += 1
                self.schedule.step_update(self.updates)
                self.average.update(self.updates)
            self.meter.begin("data")
            at = Within(at.steps + 1, at.total + loss * count, at.seen + count)
            tell(at.total / at.seen)
            if self.accelerator.sync_gradients and self.job.saves_now(self.writer):
                self._save_within(epoch, at, began)
        return at.total / at.seen

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self.meter.begin("forward")
        with self.accelerator.autocast():
            loss = self.criterion(self.model(images), labels)
        self.meter.begin("backward")
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # where one process loses it, all stop
            loss = self.accelerator.reduce(loss.detach(), "mean")
        return loss.item()

    def _check(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            after = f"; the last good epoch can be resumed from {self.job.folder}" if self.history else ""
            raise TrainingError(
                f"the loss is no longer a number in epoch {epoch + 1}: lower lr0 (it is {self.job.config.lr0}) or "
                f"lr_scale, or give amp=False{after}"
            )

    def _save(self, epoch: int, loss: float, metrics: dict[str, float]) -> None:
        """Write the delta if this epoch is the best so far, then the checkpoint."""
        self.history.append({"epoch": epoch + 1, "train/loss": round(loss, 5), **metrics})
        result, before = metrics[self.family.primary_metric(self.job.base.task)], self.best
        best = (result, -metrics["loss"]) > (before["score"], -before["loss"])  # small sets soon tie: then the loss decides
        if best:
            self.best = {"epoch": epoch, "score": result, "loss": metrics["loss"]}
        if not self.accelerator.is_main_process:
            return
        self.job.check_folder()
        group = self.optimizer.param_groups[0]
        self.job.trackers.log(self.history[-1], group["lr"] / group["lr_scale"], self.meter.memory)
        kept = [keep_best(self.job, self.average.model, metrics, epoch + 1)] if best else []
        done = epoch + 1 >= self.job.config.epochs or self._patient(epoch)
        content = self._content(epoch=epoch, done=done, sampler=self.generator.get_state())
        self.writer.put(*kept, partial(checkpoint.save, self.job.checkpoint, content))

    def _save_within(self, epoch: int, at: Within, began: Tensor) -> None:
        """Write a checkpoint between two steps of an epoch; `began` is the state of its order's generator at its start."""
        if not self.accelerator.is_main_process:
            return
        self.job.check_folder()
        within = {**dataclasses.asdict(at), "ahead": self.order.fetched_after(at.steps * self.accelerator.num_processes)}
        content = self._content(epoch=epoch - 1, done=False, sampler=began, within=within)
        self.writer.put(partial(checkpoint.save, self.job.checkpoint, content))
        self.job.leave_if_asked(self.writer)

    def _content(self, **position: Any) -> dict[str, Any]:
        """Return what a checkpoint holds; "epoch" is the last complete one."""
        live, scaler = checkpoint.live(self.own), self.accelerator.scaler
        return checkpoint.snapshot(
            {
                **position,
                "model": live,
                "ema": {k: v for k, v in self.average.model.state_dict().items() if k in live},
                "updates": self.updates,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "best": self.best,
                "history": self.history,
                "measured": {**self.meter.report(), "views": getattr(self.images, "report", None)},
                "random": random_states(),
                "origin": self.job.origin,
            }
        )

    @checkpoint.restoring()
    def _resume(self) -> int:
        """Put everything back as it was saved; return the epoch to go on with."""
        saved = checkpoint.load(self.job.checkpoint)
        checkpoint.restore(self.own, saved["model"])
        checkpoint.restore(self.average.model, saved["ema"])
        checkpoint.restore_optimizer(self.optimizer, saved["optimizer"])
        self.schedule.load_state_dict(saved["scheduler"])
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.updates, self.best, self.history = saved["updates"], saved["best"], saved["history"]
        self.meter.restore(saved["measured"])
        self.generator.set_state(saved["sampler"])
        ahead: list[dict[str, Any]] = []
        if self.accelerator.is_main_process:
            set_random_states(saved["random"])
            ahead = [saved["random"]]
        else:  # they are the main process's; the others' only have to differ
            set_seed(self.job.config.seed + 1000 * (saved["epoch"] + 1), device_specific=True)
        if within := dict(saved.get("within") or {}):
            # the order is of all processes' batches, of which each takes its own
            self.order.go_to(
                within["steps"] * self.accelerator.num_processes, [*within.pop("ahead"), *ahead] if ahead else []
            )
            self.within = Within(**within)
        return saved["epoch"] + 1


def rehearse(model: nn.Module, step: Step) -> DryRun:
    """Return a training step of a classifier on made-up data."""
    criterion = nn.CrossEntropyLoss()

    def batch() -> tuple[Tensor, Tensor]:
        return torch.zeros(step.batch, 3, step.imgsz, step.imgsz), torch.zeros(step.batch, dtype=torch.long)

    def loss(given: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(model(given[0]), given[1])

    @torch.no_grad()
    def validate() -> None:
        loss(batch())

    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    average = held(checkpoint.live(model))
    return DryRun(batch, loss, validate, _optimizer_of(step.optimizer, groups, lr=1e-3), average)


# ------------------------------------------------------------------------------------------------------------- the pieces
def _accelerator(job: Job, recipe: Recipe) -> Accelerator:
    cpu = select_device(job.config.device).type == "cpu"
    accumulate = max(round(recipe.nbs / job.config.batch), 1)
    return Accelerator(
        cpu=cpu,
        mixed_precision=_precision(job.config.amp, cpu),
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=not cpu),
    )


def select_device(device: str | None) -> torch.device:
    """Return torch's device for "cpu", "0", "cuda:1" or None, and make a GPU the current one.

    Raises:
        ConfigError: There is no such device.
    """
    name = str(device).removeprefix("cuda:").removeprefix("cuda") if device else ""
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not (name or "0").isdigit() or int(name or 0) >= count:
        here = f"this machine has {count} GPUs, counted from 0" if count else "this machine has no GPU that torch can use"
        raise ConfigError(f"device='{device}' is not there: {here}; give device='cpu' or another number")
    if name:
        torch.cuda.set_device(int(name))
    return torch.device("cuda", torch.cuda.current_device())


def _precision(amp: bool | str | None, cpu: bool) -> str:
    """Return accelerate's name: bf16 by default where the GPU has it, and nothing on a CPU unless asked by name."""
    if amp not in (None, True, False, "bf16", "fp16"):
        raise ConfigError(f"amp={amp!r} is not known; it is True (fp16), 'bf16' or False")
    if cpu:
        return "bf16" if amp == "bf16" else "no"
    if amp is None:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": "bf16", "fp16": "fp16", True: "fp16", False: "no"}[amp]


def _cuda(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda"


def _optimizer(model: Any, job: Job, recipe: Recipe) -> torch.optim.Optimizer:
    """Return timm's optimizer: every parameter at its own rate, and no decay of biases, scales and the like."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not key.endswith(".bias") and key not in spared
            groups.setdefault((*job.kind(key), decays), []).append(parameter)
    # timm's schedules multiply what they set by the group's lr_scale
    made = [{"params": p, "lr_scale": rate, "weight_decay": recipe.weight_decay * d} for (rate, _, d), p in groups.items()]
    return _optimizer_of(job.config.optimizer, made, lr=job.config.lr0, momentum=recipe.momentum)


def _optimizer_of(name: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    try:
        kind = timm.optim.get_optimizer_class(name.lower(), bind_defaults=False)
        # one kernel for all parameters, where the optimizer has such, as most of torch's own do
        how: dict[str, Any] = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
        return timm.optim.create_optimizer_v2(groups, name.lower(), **settings, **how)
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"optimizer='{name}' cannot be used here ({error}); give another") from error


def _schedule(optimizer: Any, job: Job, recipe: Recipe, per_epoch: int) -> Any:
    warmup = min(3.0, job.config.epochs / 10) if recipe.warmup_epochs < 0 else min(recipe.warmup_epochs, job.config.epochs)
    return create_scheduler_v2(
        optimizer,
        "cosine" if recipe.cos_lr else "poly",
        decay_rate=1.0,  # of "poly": its power
        num_epochs=job.config.epochs,
        min_lr=job.config.lr0 * recipe.lrf,
        warmup_lr=job.config.lr0 / 100,
        warmup_epochs=round(warmup * per_epoch) / per_epoch,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )[0]


def _mix(recipe: Recipe, classes: int) -> Callable | None:
    """Return what mixes a batch's images and labels, or None."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:  # an odd last batch has no pairs
            return images, mixup_target(labels, classes, smoothing=recipe.label_smoothing)
        return mixup(images, labels)

    return mix
