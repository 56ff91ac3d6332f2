"""The training loop of classifiers: accelerate for device, AMP, accumulation and processes; timm's optimizers,
schedules and mixing; a moving average; a checkpoint after every epoch, and in long ones."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...core.attach import attach, set_requires_grad
from ...errors import TrainingError
from ...measure import Meter
from ...process import RandomStates, random_states, set_random_states
from ...training import checkpoint
from ...training.devices import devices
from ...training.distributed import launch
from ...training.feature_cache import CachedFeatureDataset
from ...training.feature_cache_file import CacheWriter
from ...training.job import Job, keep_best
from ...training.progress import Progress
from ...training.shuffling import Order
from ..classification import Images, loader, score, still_readable
from . import loading
from .arguments import Hyperparameters, check, make_optimizer, precision, select_device
from .data import transform

METRIC = "top1"  # that stands for the others


# ------------------------------------------------------------------------------------------------------------ the average
class Average:
    """A moving average of trained parameters and moving statistics; the rest is the base's, bit for bit."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._pairs: list[tuple[Tensor, Tensor]] = []
        tensors, live = _tensors(model), checkpoint.live(model)
        for name, averaged in _tensors(self.model).items():
            if name in live:  # the tensors themselves, for several processes exchange their values
                self._pairs.append((averaged, tensors[name]))
            elif isinstance(averaged, nn.Parameter):
                averaged.data = tensors[name].data  # frozen parameters are held once

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the live values, at first at once, later slowly."""
        decay = self._decay * (1 - math.exp(-updates / 2000))
        for averaged, live in self._pairs:
            averaged.lerp_(live, 1 - decay) if averaged.is_floating_point() else averaged.copy_(live)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# --------------------------------------------------------------------------------------------------------------- the loop
def run(job: Job) -> None:
    """Train a classifier, in a process per device.

    Raises:
        TrainingError: The loss is no number, or nothing is left to resume.
        ConfigError: An argument is not usable.
    """
    if len(names := devices(job.config.device)) > 1:
        config = dataclasses.replace(job.config, device="cpu" if names[0] == "cpu" else "")
        each = dataclasses.replace(job, config=config)
        return launch(run, each, device=job.config.device, folder=job.folder)
    hyper = check(job.config)
    ours = not AcceleratorState._shared_state
    accelerator = _accelerator(job, hyper)
    loop = None
    try:
        loop = Trainer(job, hyper, accelerator)
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


class Trainer:
    """One run: its model, optimizer, schedule, average and position."""

    def __init__(self, job: Job, hyper: Hyperparameters, accelerator: Accelerator):
        self.job, self.hyper, self.accelerator = job, hyper, accelerator
        set_seed(job.config.seed)
        own = loading.with_head(job.base, job.data.names, job.config.head)
        images: Any = Images(job.data.train, transform(own, job.config.imgsz, hyper))
        held_out = Images(job.data.val, transform(own, job.config.imgsz, None))
        self.own = set_requires_grad(attach(own, job.plan), job.plan).to(accelerator.device)
        self.average = Average(self.own, hyper.ema)
        job.equip(self.own)
        if job.frozen_stages and job.store:
            writer = CacheWriter(
                images,
                job.store.schedule,
                job.frozen_stages,
                lambda samples: torch.stack([image for image, _ in samples]).to(accelerator.device),
                seed=job.config.seed,
                batch=job.config.batch,
                workers=job.config.workers,
            )
            images = CachedFeatureDataset(job.store, writer, job.config.quiet)
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
        self.optimizer = accelerator.prepare(_optimizer(self.own, job, hyper))
        state = {"optimizer": self.optimizer, "average": self.average.model}
        self.meter = Meter(self.own, accelerator.device, stages=job.stages, **state)
        per_epoch = math.ceil(len(self.batches) / accelerator.gradient_accumulation_steps)
        self.schedule = _schedule(self.optimizer, job, hyper, per_epoch)
        self.mix = _mix(hyper, len(job.data.names))
        smoothing = 0.0 if self.mix else hyper.label_smoothing
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.updates, self.history = 0, []  # type: ignore[var-annotated]
        self.best: dict[str, float] = {"epoch": -1, "score": -1.0, "loss": math.inf}
        self.within = Within()

    def run(self) -> None:
        """Train from where the run stands to its end."""
        set_seed(self.job.config.seed, device_specific=True)
        start = self._resume() if self.job.resume else 0
        shown = self.accelerator.is_main_process and not self.job.config.quiet
        progress = Progress(self.job.config.epochs, METRIC, shown)
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
        return epoch - max(self.best["epoch"], waited) >= self.hyper.patience > 0

    def _epoch(self, epoch: int, tell: Callable[[float], object]) -> float:
        """Train on every image once, or on the rest of an epoch that the run was stopped in; return the mean loss."""
        self.job.begin_epoch(self.own, epoch / self.job.config.epochs, self.meter)
        if self.job.store:
            self.images.epoch = epoch  # each reads another view
        at, self.within = self.within, Within()
        began = self.generator.get_state()
        self.meter.start("data")
        for images, labels in islice(self.batches, at.steps if self.order.ahead else 0, None):
            count = len(images)
            if self.mix:
                images, labels = self.mix(images, labels)
            with self.accelerator.accumulate(self.model):
                loss = self._step(images, labels)
                self._check(loss, epoch)
                if self.accelerator.sync_gradients:
                    self.meter.start("optimizer")
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.updates += 1
                self.schedule.step_update(self.updates)
                self.average.update(self.updates)
            self.meter.start("data")
            at = Within(at.steps + 1, at.total + loss * count, at.seen + count)
            tell(at.total / at.seen)
            if self.accelerator.sync_gradients and self.job.saves_now(self.writer):
                self._save_within(epoch, at, began)
        return at.total / at.seen

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self.meter.start("forward")
        with self.accelerator.autocast():
            loss = self.criterion(self.model(images), labels)
        self.meter.start("backward")
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
        result, before = metrics[METRIC], self.best
        best = (result, -metrics["loss"]) > (before["score"], -before["loss"])  # small sets soon tie: then the loss decides
        if best:
            self.best = {"epoch": epoch, "score": result, "loss": metrics["loss"]}
        if not self.accelerator.is_main_process:
            return
        self.job.check_folder()
        group = self.optimizer.param_groups[0]
        self.job.trackers.log(self.history[-1], group["lr"] / group["lr_scale"], self.meter.memory)
        best_delta = [keep_best(self.job, self.average.model, metrics, epoch + 1)] if best else []
        done = epoch + 1 >= self.job.config.epochs or self._patient(epoch)
        content = self._content(epoch=epoch, done=done, sampler=self.generator.get_state())
        self.writer.put(*best_delta, partial(checkpoint.save, self.job.checkpoint, content))

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
        """Return the content of a checkpoint; "epoch" is the last complete one."""
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
        ahead: list[RandomStates] = []
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


# ------------------------------------------------------------------------------------------------------------- the pieces
def _accelerator(job: Job, hyper: Hyperparameters) -> Accelerator:
    cpu = select_device(job.config.device).type == "cpu"
    accumulate = max(round(hyper.nbs / job.config.batch), 1)
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision(job.config.amp, cpu),
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=not cpu),
    )


def _cuda(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda"


def _optimizer(model: Any, job: Job, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """Return timm's optimizer: every parameter at its own rate, and no decay of biases, scales and the like."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not key.endswith(".bias") and key not in spared
            groups.setdefault((*job.param_group_key(key), decays), []).append(parameter)
    # timm's schedules multiply what they set by the group's lr_scale
    parts = [{"params": p, "lr_scale": rate, "weight_decay": hyper.weight_decay * d} for (rate, _, d), p in groups.items()]
    return make_optimizer(job.config.optimizer, parts, lr=job.config.lr0, momentum=hyper.momentum)


def _schedule(optimizer: Any, job: Job, hyper: Hyperparameters, per_epoch: int) -> Any:
    warmup = min(3.0, job.config.epochs / 10) if hyper.warmup_epochs < 0 else min(hyper.warmup_epochs, job.config.epochs)
    return create_scheduler_v2(
        optimizer,
        "cosine" if hyper.cos_lr else "poly",
        decay_rate=1.0,  # of "poly": its power
        num_epochs=job.config.epochs,
        min_lr=job.config.lr0 * hyper.lrf,
        warmup_lr=job.config.lr0 / 100,
        warmup_epochs=round(warmup * per_epoch) / per_epoch,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )[0]


def _mix(hyper: Hyperparameters, classes: int) -> Callable | None:
    """Return a function that mixes a batch's images and labels; None where nothing is mixed."""
    if not (hyper.mixup or hyper.cutmix):
        return None
    mixup = Mixup(hyper.mixup, hyper.cutmix, label_smoothing=hyper.label_smoothing, num_classes=classes)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:  # an odd last batch has no pairs
            return images, mixup_target(labels, classes, smoothing=hyper.label_smoothing)
        return mixup(images, labels)

    return mix
