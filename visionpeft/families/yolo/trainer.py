"""Ultralytics' trainer, tuned: a mixin that attaches the plan, keeps it in force, and writes deltas instead of pickles."""

from __future__ import annotations

import inspect
import logging
import math
import subprocess
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics import __version__ as ULTRALYTICS
from ultralytics.data.build import build_dataloader
from ultralytics.data.utils import get_split_fraction
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import ModelEMA, init_seeds, unwrap_model

from ...core.attach import attach, set_requires_grad
from ...core.plan import Plan
from ...errors import ModelError, TrainingError
from ...measure import Meter
from ...process import random_states, set_random_states
from ...training import checkpoint
from ...training.distributed import raise_worker_error, read_worker_error, report_error_to_parent
from ...training.feature_cache_file import CacheWriter
from ...training.job import Job, keep_best
from ...training.progress import Progress
from ..classification import still_readable
from .data import readable, warn_of_lost
from .loader import CachedViews, ReplayableLoader
from .output import quiet
from .sources import check_download
from .tasks import TASKS, Task, with_head

log = logging.getLogger(__name__)


class PeftTrainerMixin:
    """Mixin over an Ultralytics trainer: attaches the plan, keeps it in force, and writes deltas instead of pickles."""

    job: Job

    def __init__(self, *args: Any, **kwargs: Any):
        with self._talking():  # in the processes that Ultralytics starts, too
            super().__init__(*args, **kwargs)

    def _talking(self) -> AbstractContextManager:
        return nullcontext() if self.job.config.options.get("verbose") else quiet()

    @property
    def _plan(self) -> Plan:
        return self.job.plan

    @property
    def _task(self) -> Task:
        return TASKS[self.job.base.task]

    def train(self: Any) -> None:
        shown = RANK in (-1, 0) and not (self.ddp or self.job.config.quiet or self.job.config.options.get("verbose"))
        with Progress(self.epochs, self._task.score, shown) as self._progress, self._talking():
            # for several GPUs, Ultralytics starts processes, which come here too
            with self._errors_between_processes():
                try:
                    with (
                        self.job.trackers if RANK >= 0 else nullcontext(),
                        still_readable(self.job.data),
                        nullcontext() if self.ddp else self.job.stop.awaited(),
                        checkpoint.Writer() as self._writer,
                    ):
                        super().train()  # type: ignore[misc]
                except subprocess.CalledProcessError:
                    raise read_worker_error(self.job.folder) from None

    def _errors_between_processes(self: Any) -> AbstractContextManager:
        if self.ddp:
            return raise_worker_error(self.job.folder)
        return report_error_to_parent(self.job.folder) if RANK >= 0 else nullcontext()

    def get_dataset(self: Any) -> Any:
        check_download(str(self.args.data), self.args.split)
        return super().get_dataset()  # type: ignore[misc]

    def check_resume(self: Any, overrides: Any) -> None:
        # Ultralytics would read its own pickles, which lack the live weights: `resume_training` does it instead.
        self.resume = True  # or else its multi-GPU launcher removes the run's folder

    def setup_model(self: Any) -> None:
        self.model = self.get_model()  # the base is at hand, so Ultralytics need not open its file
        return super().setup_model()  # type: ignore[misc]

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        outputs = self.job.data.outputs
        model = with_head(self.job.base.model, self.data["names"], self.data["channels"], self.job.config.head, outputs)
        if self.args.dropout and not self._task.labels:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.args.dropout
        attach(model, self._plan)
        for parameter in model.parameters():  # Ultralytics warns of each that does not require a gradient; see below
            parameter.requires_grad_(True)
        return model

    def build_optimizer(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model = unwrap_model(model)
        set_requires_grad(model, self._plan)  # Ultralytics has just let everything train
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        kinds = {id(p): self.job.param_group_key(n) for n, p in model.named_parameters() if p.requires_grad}
        groups = []
        for group in optimizer.param_groups:
            for kind in sorted(set(kinds.values())):
                params = [p for p in group["params"] if kinds.get(id(p)) == kind]
                if params:
                    groups.append({**group, "params": params, "lr": group["lr"] * kind[0]})
        optimizer.param_groups = groups
        fusing = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
        if self.device.type == "cpu" and self.job.config.lean != "off" and type(optimizer) in fusing:
            for group in groups:  # as Ultralytics has it on CUDA; "off" is its own arithmetic, bit for bit
                group |= {"fused": True, "foreach": False}
        return optimizer

    def _build_train_pipeline(self: Any) -> None:
        if self.job.config.batch < 1 and "nbs" not in self.job.config.options:  # Ultralytics has just found the batch size
            self.args.nbs = self.batch_size
        if self.world_size > 1:
            self.model = _rewrapped(self.model, self._plan)
        super()._build_train_pipeline()  # type: ignore[misc]
        # Ultralytics counts batches across epochs, so a resumed run would step elsewhere: `optimizer_step` counts instead
        self._accumulate, self.accumulate = self.accumulate, 1
        self._batch, self._validated = 0, -1

    def get_dataloader(self: Any, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        with readable(self.job.data.source):
            loader = super().get_dataloader(dataset_path, batch_size, rank, mode)  # type: ignore[misc]
        if mode == "train":  # lost images of val are named where it is evaluated
            warn_of_lost(self.job.data, mode, loader.dataset, get_split_fraction(self.args.fraction, mode))
            loader = self._stored(loader) if self.job.store else loader
            loader.__class__ = ReplayableLoader
        return loader

    def _stored(self: Any, loader: Any) -> Any:
        """Return a loader of stored views of the images that `loader` loads."""

        def prepare(samples: Any) -> torch.Tensor:
            return super(PeftTrainerMixin, self).preprocess_batch(loader.collate_fn(samples))["img"]  # type: ignore[misc]

        writer = CacheWriter(
            dataset := loader.dataset,
            self.job.store.schedule,
            self.job.frozen_stages,
            prepare,
            seed=self.job.config.seed,
            batch=loader.batch_size,
            workers=loader.num_workers,
            close=lambda: dataset.close_mosaic(copy(self.args)),
        )
        views = CachedViews(self.job.store, writer, self.job.config.quiet)
        return build_dataloader(views, loader.batch_size, workers=0, device=self.device)  # there is nothing to decode

    def resume_training(self: Any, ckpt: Any) -> None:
        model: Any = unwrap_model(self.model)
        self.ema.__class__ = TrainedEMA
        self.ema.pair(model)  # while all that will ever train is open
        self.job.equip(model)
        state = {"optimizer": self.optimizer, "average": self.ema.ema}
        self._meter = Meter(model, self.device, stages=self.job.stages, compiled=bool(self.args.compile), **state)
        self.scaler.__class__ = type("MeteredScaler", (MeteredScaler, type(self.scaler)), {"meter": self._meter})
        self._history: list[dict[str, float]] = []
        # steps to pass over of the epoch that a resumed run was stopped in, and the mean losses after them
        self._within: tuple[int, dict[str, torch.Tensor]] = (0, {})
        if self.job.resume:
            self._go_on(model)
        if RANK in (-1, 0):
            self.job.trackers.open(self.start_epoch)

    @checkpoint.restoring()
    def _go_on(self: Any, model: Any) -> None:
        """Put everything back as it was saved."""
        saved = checkpoint.load(self.job.checkpoint)
        checkpoint.restore(model, saved["model"])
        checkpoint.restore(self.ema.ema, saved["ema"])
        self.ema.updates = saved["updates"]
        checkpoint.restore_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.best_fitness, self.start_epoch = saved["best_fitness"], saved["epoch"] + 1
        self.stopper.__dict__.update(saved["stopper"])
        self._history = saved["history"]
        self._meter.restore(saved["measured"])
        if getattr(model.model[-1], "one2one_cv2", None) is not None:
            model.criterion = model.init_criterion()
            model.criterion.updates = self.start_epoch - 1
            model.criterion.update()
        dataset = self.train_loader.dataset
        for index in saved["buffer"]:  # the images that mosaic chooses from, in their order
            dataset.load_image(index)
        self._saved_states = saved["random"], saved["sampler"]
        if within := saved.get("within"):
            self._within = within["steps"], {k: v.to(self.device) for k, v in within["losses"].items()}
        self.add_callback("on_train_start", _restore_random_states)

    def get_validator(self: Any) -> Any:
        validator = super().get_validator()  # type: ignore[misc]
        validator.__class__ = self._task.validator
        return validator

    def _model_train(self: Any) -> None:
        super()._model_train()  # type: ignore[misc]
        self._meter.close()  # of a step that ran out of memory, after which Ultralytics starts its first epoch anew
        progress = self.epoch / self.epochs  # which with time= is not the job's number, but found on the way
        self.job.begin_epoch(unwrap_model(self.model), progress, self._meter)
        if progress < self._plan.fully_unfrozen_at:  # patience counts once all of the plan trains
            self.stopper.best_epoch = self.epoch + 1
        self._batch = 0
        if self.job.store:
            self.train_loader.dataset.epoch = self.epoch  # each reads another view
        self._meter.start("data")
        self._progress.start(self.epoch, len(self.train_loader))

    def preprocess_batch(self: Any, batch: dict | None) -> dict:
        if batch is None:
            self.model = Passed(self.model, self._within[1], self.device)
            return {"img": torch.empty(1, 1, 1, 1)}  # Ultralytics counts and measures it
        self._meter.start("forward")
        if not self.job.store:
            return super().preprocess_batch(batch)  # type: ignore[misc]
        vectors = batch["img"].to(self.device, non_blocking=self.device.type == "cuda")
        none = vectors.new_empty(0, 1, 1, 1)  # Ultralytics would divide by 255
        return {**super().preprocess_batch({**batch, "img": none}), "img": vectors}  # type: ignore[misc]

    def plot_training_samples(self: Any, batch: dict, ni: int) -> None:
        if not self.job.store and len(batch) > 1:  # of stored views, and of steps passed over, there are no pictures
            super().plot_training_samples(batch, ni)  # type: ignore[misc]

    def optimizer_step(self: Any) -> None:
        self._batch += 1
        if isinstance(self.model, Passed):
            self.model, self.tloss = self.model.model, self.model.losses
            self._meter.close()
            self._meter.start("data")
            return
        stepped = self._batch % self._accumulate == 0 or self._batch == len(self.train_loader)
        if stepped:
            self._meter.start("optimizer")
            super().optimizer_step()  # type: ignore[misc]
        self._meter.start("data")
        self._progress.batch(float(sum(self.tloss.values())), self._meter.memory)
        if stepped and RANK in (-1, 0) and self.job.saves_now(self._writer):
            self.job.check_folder()
            content = self._content(epoch=self.epoch - 1, done=False, within={"steps": self._batch, "losses": self.tloss})
            self._writer.put(partial(checkpoint.save, self.job.checkpoint, content))
            self.job.leave_if_asked(self._writer)

    def _handle_nan_recovery(self: Any, epoch: int) -> bool:
        lost = torch.tensor(not all(math.isfinite(v) for v in self.tloss.values()), dtype=torch.float, device=self.device)
        if RANK != -1:  # where one process stops, all do
            dist.all_reduce(lost, dist.ReduceOp.MAX)
        if not lost:
            return False
        after = f"; the last good epoch can be resumed from {self.job.folder}" if self._history else ""
        raise TrainingError(
            f"the loss is no longer a number in epoch {epoch + 1}: lower lr0 (it is {self.args.lr0}), and look at the "
            f"labels with extreme boxes{after}"
        )

    def validate(self: Any) -> Any:
        self._validated = self.epoch
        return super().validate()  # type: ignore[misc]

    def save_model(self: Any) -> bool:
        self.job.check_folder()
        seen = self.metrics if self._validated == self.epoch else {}  # with val=False, only the last epoch's
        names = {k: seen.get(key) for key, k in self._task.metrics.items()}
        losses = {f"train/{k}": float(v) for k, v in self.tloss.items()}
        self._history.append({"epoch": self.epoch + 1, **losses, **names})
        group = self.optimizer.param_groups[0]
        rate = self.args.lr0 * group["lr"] / group["initial_lr"]
        self.job.trackers.log({"train/loss": sum(losses.values()), **self._history[-1]}, rate, self._meter.memory)
        best = self.fitness == self.best_fitness
        best_delta = [keep_best(self.job, self.ema.ema, names, self.epoch + 1)] if best else []
        content = self._content(epoch=self.epoch, done=bool(self.stop))
        self._writer.put(*best_delta, partial(checkpoint.save, self.job.checkpoint, content))
        self._progress.end(self.epoch, sum(losses.values()), names)
        self.job.leave_if_asked(self._writer)
        return True

    def _content(self: Any, **position: Any) -> dict[str, Any]:
        """Return the content of a checkpoint; "epoch" is the last complete one."""
        live = checkpoint.live(unwrap_model(self.model))
        return checkpoint.snapshot(
            {
                **position,
                "model": live,
                "ema": {k: v for k, v in self.ema.ema.state_dict().items() if k in live},
                "updates": self.ema.updates,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best_fitness": None if self.best_fitness is None else float(self.best_fitness),
                "stopper": {"best_fitness": float(self.stopper.best_fitness), "best_epoch": self.stopper.best_epoch},
                "history": self._history,
                "measured": {**self._meter.report(), "views": getattr(self.train_loader.dataset, "report", None)},
                "random": random_states(),
                "sampler": self.train_loader.position(),
                "buffer": list(getattr(self.train_loader.dataset, "buffer", ())),
                "origin": self.job.origin,
            }
        )

    def final_eval(self: Any) -> None:
        """Validate nothing: train() evaluates the merged file, as its user would."""
        with suppress(OSError):
            self.wdir.rmdir()  # Ultralytics' own folder of weights, empty

    def close(self: Any) -> None:
        """Stop measuring, wherever the run ended."""
        if meter := getattr(self, "_meter", None):
            meter.close()


_CHECKED = "8.4.190"  # the Ultralytics whose methods are overridden here
# methods that override nothing
_OWN = {"_talking", "_errors_between_processes", "_stored", "_go_on", "_content", "close", "position", "go_to"}


def check_hooks(*classes: type) -> None:
    """Refuse an Ultralytics whose methods are not those that our classes override: a freeze would silently not hold.

    Args:
        *classes: Of ours, each over one of Ultralytics.

    Raises:
        ModelError: It is too new, or too old.
    """
    for cls in classes:
        ours = [c for c in cls.__mro__ if c.__module__.startswith("visionpeft.")]
        theirs = cls.__mro__[len(ours) :]
        for name, own in ((n, f) for c in ours for n, f in vars(c).items() if inspect.isfunction(f) and n not in _OWN):
            found = next((vars(c)[name] for c in theirs if name in vars(c)), None)
            if found is None:
                raise _unlike(f"{theirs[0].__name__}.{name}", "gone")
            wanted, given = (list(inspect.signature(f).parameters) for f in (own, found))
            named = wanted.index("args") if "args" in wanted else None  # all that follows is handed on as it comes
            if wanted[1:named] != given[1:named]:
                raise _unlike(f"{theirs[0].__name__}.{name}", f"({', '.join(given)})")


def _unlike(name: str, now: str) -> ModelError:
    return ModelError(
        f"Ultralytics {ULTRALYTICS} does not fit: {name}, on which visionpeft builds, is {now}; "
        f"pip install ultralytics=={_CHECKED}, which it was checked with"
    )


def _rewrapped(wrapper: Any, plan: Plan) -> nn.Module:
    """Close the parameters that do not train, and wrap the model anew for several processes: Ultralytics wrapped it when all
    parameters trained, so that the gradients of all would travel."""
    model = set_requires_grad(unwrap_model(wrapper), plan)
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as Ultralytics has it
    options = {"find_unused_parameters": wrapper.find_unused_parameters, "static_graph": wrapper.static_graph, still: False}
    return DistributedDataParallel(model, device_ids=wrapper.device_ids, **options)


class MeteredScaler:
    """Mixin over a gradient scaler, which Ultralytics gives the loss between forward and backward, scaling or not."""

    meter: Meter

    def scale(self, outputs: Any) -> Any:
        self.meter.start("backward")
        return super().scale(outputs)  # type: ignore[misc]


class Passed(nn.Module):
    """Stands for the model in a step that a resumed run made before it was stopped, and returns the losses up to then.

    Ultralytics' loop counts an epoch's steps itself, for warmup and mean losses, so it goes through these again.
    """

    def __init__(self, model: nn.Module, losses: dict[str, torch.Tensor], device: torch.device):
        super().__init__()
        self.__dict__["model"] = model  # no part of this one
        self.losses, self.device = losses, device

    def forward(self, *_: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(1, device=self.device, requires_grad=True), self.losses

    loss = forward  # the name that Ultralytics calls with compile=True


class TrainedEMA(ModelEMA):
    """Ultralytics' moving average of trained parameters and moving statistics; the rest is the base's, bit for bit."""

    def pair(self, model: nn.Module) -> None:
        """Settle which tensors are averaged."""
        if not hasattr(self, "_pairs"):  # all would be
            raise _unlike("ModelEMA._pairs", "gone")
        averaged, live = self.ema.state_dict(), checkpoint.live(model)
        keys = [k for k in live if live[k].is_floating_point()]
        self._pairs = [averaged[k] for k in keys], [live[k] for k in keys]


@checkpoint.restoring()
def _restore_random_states(trainer: Any) -> None:
    states, position = trainer._saved_states
    if RANK in (-1, 0):
        set_random_states(states)
    else:  # they are the first process's; the others' only have to differ
        init_seeds(trainer.args.seed + 1 + RANK + 1000 * trainer.start_epoch)
    closing, (passed, _) = max(trainer.epochs - trainer.args.close_mosaic, 0), trainer._within
    # where mosaic closes, the uninterrupted run's loader starts anew too
    anew = bool(trainer.args.close_mosaic) and trainer.start_epoch == closing and not passed
    trainer.train_loader.go_to(position, anew, passed)
