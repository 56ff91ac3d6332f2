"""One training run, all questions settled; and what trainers of every family do at its beginning and its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import lean, measure
from ..config import SettledConfig
from ..core import delta as deltas
from ..core.anatomy import inside
from ..core.attach import merge, set_requires_grad, train_mode
from ..core.base_model import Base, Data
from ..core.plan import Plan
from ..errors import TrainingError
from ..lean.frozen_stages import FrozenStages
from .checkpoint import Writer
from .feature_cache import Store
from .stopping import Stop
from .trackers import Trackers


@dataclass(frozen=True)
class Job:
    """One training run, all questions settled."""

    config: SettledConfig
    base: Base
    data: Data
    plan: Plan
    folder: Path
    merged: Path  # where the plain merged checkpoint goes
    body_lr_scale: float  # learning rate of the body in full fine-tuning, relative to lr0
    resume: bool
    header: dict[str, Any]  # what the delta will say of itself
    before: dict[str, float]  # metrics before training
    save_merged: Callable[[nn.Module, Mapping[str, Any], Path], Path]  # of the family
    trackers: Trackers  # where the numbers of its epochs go
    frozen_stages: FrozenStages | None = None  # what runs the frozen stages apart from the rest
    store: Store | None = None  # where their outputs are kept
    stages: Mapping[str, str] = field(default_factory=dict)  # labels of the model's modules, see `stage_modules`
    origin: str = ""  # base, data and plan, for the checkpoint
    stop: Stop = field(default_factory=Stop)  # what signals ask for

    def equip(self, model: nn.Module) -> None:
        """Let the model that trains (not its average, which is validated) run as the job says: apart, and leanly."""
        if self.frozen_stages:
            self.frozen_stages.install(model)
        if self.config.lean != "off":
            lean.apply(model, self.config.lean)

    def begin_epoch(self, model: nn.Module, progress: float, meter: measure.Meter) -> None:
        """Set training mode and `requires_grad` for an epoch; `progress` is the share of the run that is done."""
        train_mode(model, self.plan, progress)
        if self.plan.opens:
            before = sum(p.requires_grad for p in model.parameters())
            set_requires_grad(model, self.plan, progress)
            if sum(p.requires_grad for p in model.parameters()) != before:
                meter.rearm()

    def rate(self, parameter: str) -> float:
        """Return a parameter's learning rate, relative to lr0: 1 in the head, in the body the plan's."""
        return 1.0 if inside(parameter, self.plan.heads) else self.body_lr_scale * self.plan.rate(parameter)

    def param_group_key(self, parameter: str) -> tuple[float, float]:
        """Return what parameters of one group of an optimizer have in common: the rate, and when they begin to train, for
        fused optimizers want all of a group or none to have a state."""
        return self.rate(parameter), self.plan.opens.get(parameter, 0.0)

    def saves_now(self, writer: Writer) -> bool:
        """Say between two steps whether a checkpoint is due: a signal came, or the last is old."""
        return bool(self.stop.asked) or 0 < self.config.save_every * 60 <= writer.age

    def leave_if_asked(self, writer: Writer) -> None:
        """End the run where a signal asks for it, once all is written.

        Raises:
            Stopped: One does.
        """
        if self.stop.asked:
            writer.wait()
            raise self.stop.error()

    def check_folder(self) -> None:
        """Refuse to write into a folder that was removed while the run trained: it would be made again, but not whole.

        Raises:
            TrainingError: It was.
        """
        if not (self.folder / "train.json").is_file():
            raise TrainingError(f"the run's folder {self.folder} was removed, or emptied, while it trained; start anew")

    @property
    def checkpoint(self) -> Path:
        """Where the run can be resumed from."""
        return self.folder / "checkpoint.pt"

    @property
    def delta(self) -> Path:
        """Where the best epoch's delta goes."""
        return self.folder / "delta.safetensors"


def keep_best(job: Job, model: nn.Module, metrics: Mapping[str, float | None], epoch: int) -> Callable[[], object]:
    """Copy the best epoch's delta; of a model without a base, its merged checkpoint. Returns what writes it."""
    header = {**job.header, "metrics": {"before": job.before, "after": dict(metrics)}, "epoch": epoch}
    if job.base.pretrained:
        return partial(deltas.write, job.delta, deltas.collect(model, job.base.state, header, job.config.delta_dtype))
    return partial(job.save_merged, merge(copy.deepcopy(model).cpu()), header, job.merged)
