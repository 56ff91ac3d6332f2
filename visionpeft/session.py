"""One run of `train`: its model and plan are made, it trains, and what it comes to is measured and left in its folder."""

from __future__ import annotations

import copy
import gc
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import files, sources
from .adapted import put_together
from .config import TrainConfig
from .core import attach as attaching
from .core import delta as deltas
from .core.anatomy import Anatomy
from .core.base_model import Base, Data
from .core.plan import Plan, make_plan
from .errors import ConfigError, Interrupted, out_of_memory
from .families.classification import still_readable
from .families.frozen_stages import prepare_frozen_stages
from .families.gradient_stats import with_gradient_stats
from .families.introspect import stage_modules
from .lean.frozen_stages import FrozenStages
from .registry import FAMILIES
from .schema import Json
from .settings import find_family, loader_arguments, resolve_path, split_options
from .training import checkpoint, plots, run_folder
from .training import trackers as tracking
from .training.devices import device_of, devices
from .training.feature_cache import Store
from .training.job import Job
from .training.result import Run, versions
from .training.run_folder import Resumed
from .training.stopping import Stop
from .training.trackers import Trackers


@contextmanager
def _libraries_apart() -> Iterator[None]:
    """Keep the garbage collector from looking through what was there before, some million objects of the libraries: that
    took 0.2 s every time, and a run has it look several times."""
    len(FAMILIES)  # imports them
    if gc.get_freeze_count():  # somebody else's, who will want it to stay
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class TrainSession:
    """One run, from its configuration to its result."""

    def __init__(
        self, config: TrainConfig, stop: Stop, resources: ExitStack, resumed: Resumed | None = None, **settled: Any
    ):
        """Settle the options, and load the model and its data.

        Args:
            config: As `train` was called.
            stop: What signals ask for.
            resources: Closed when the run ends.
            resumed: The run that goes on, of whose folder `config` is.
            **settled: Arguments of the family's loader that fetch nothing.
        """
        self.began = time.perf_counter()
        resources.enter_context(_libraries_apart())
        self.stop, self.resources, self.resumed = stop, resources, resumed
        source, arguments = resolve_path(config.model or ""), loader_arguments(config.model_args)
        config = replace(config, model=source, model_args=arguments, device=device_of(config.device))
        self.trackers = tracking.names(config.trackers)
        self.family = family = find_family(source)
        self.method, config = split_options(family, config, configured=resumed.method_settings if resumed else None)
        base = family.load(source, **{**arguments, **settled})
        settled_config = config.settled(family.defaults_for(base))
        family.check(settled_config)
        if not (base.pretrained or self.method.merges):
            raise ConfigError(
                f"{source} has no base for a delta, and {self.method.name} cannot be merged; give a checkpoint, or "
                "train in full"
            )
        self.data: Data = family.read_data(sources.find(config.data or ""), base, allow_download=config.allow_download)
        self.base: Base
        self.base, more = family.suited(base, self.data)
        self.config = replace(settled_config, data=str(config.data), model_args={**arguments, **more})
        resources.enter_context(still_readable(self.data))

    def run(self) -> Run:
        """Train, and return the result."""
        self._plan()
        frozen, store = prepare_frozen_stages(self.family, self.base, self.data, self.plan, self.config)
        if not self.config.quiet:
            print(self.plan)
        job = self._job(self._folder(), frozen, store)
        with job.trackers:
            if not (self.resumed and self.resumed.done):
                self._train(job)
            saved = checkpoint.load(job.checkpoint)
            run = self._result(job, saved)
            said = {"before": run.before, "after": run.after, "measured": run.measured, "delta_bytes": run.delta_bytes}
            job.trackers.finish({**said, "seconds": run.seconds})
        return run

    def _plan(self) -> None:
        """Make the plan, and the model that trains: the base with its head for the data, the plan attached."""
        config, family = self.config, self.family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = family.with_head(self.base, self.data.names, config.head, **self.data.outputs)
            self.anatomy = self._looked_at(family.anatomy(self.model, config.model))
            self.plan = plan = make_plan(self.method, self.anatomy, config.freeze, config.bn or family.bn)
            attaching.attach(self.model, plan)
        if plan.opens and len(devices(config.device)) > 1:
            raise ConfigError(
                f"method '{plan.method}' opens stages one after the other, which processes beside each other cannot follow; "
                "give one device"
            )
        if config.epochs < (least := math.ceil(1 / (1 - plan.fully_unfrozen_at) - 1e-6)):
            raise ConfigError(
                f"all of method '{plan.method}' trains only after {plan.fully_unfrozen_at:.0%} of the epochs, so "
                f"epochs={config.epochs} never come to that; give at least {least}"
            )
        self.header = _header(self)
        self.origin = run_folder.origin(self.header, plan)
        if self.resumed and self.resumed.origin:
            run_folder.check_origin(self.resumed.folder, self.resumed.origin, self.origin, config.model, config.data)

    def _looked_at(self, anatomy: Anatomy) -> Anatomy:
        """Return the anatomy, with gradients where the method plans by them; a resumed run keeps those it had."""
        if self.resumed and self.resumed.gradient_stats:
            return replace(anatomy, gradient_stats=self.resumed.gradient_stats)
        config = self.config
        device = config.device.split(",")[0]
        look = {"imgsz": config.imgsz, "batch": config.batch, "device": device}
        return with_gradient_stats(anatomy, self.method, self.family, self.model, self.data, **look)

    def _folder(self) -> Path:
        config, merged = self.config, f"merged{self.family.suffix}"
        folder = self.resumed.folder if self.resumed else None
        if folder is None:
            new = run_folder.new(Path(config.project), config.name, config.exist_ok, merged)
            folder = self.resources.enter_context(new)
        self.stop.checkpoint = folder.resolve() / "checkpoint.pt"
        return folder

    def _job(self, folder: Path, frozen: FrozenStages | None, store: Store | None) -> Job:
        """Measure the model before it trains, write ``train.json``, and return what the family's trainer needs to know."""
        config, family, data = self.config, self.family, self.data
        before = self.resumed.before if self.resumed else None
        self.before_apart = self.resumed.before_apart if self.resumed else None
        self.use = family.evaluation_options(config)
        if before is None:
            before = family.evaluate(self.model, data, **self.use).metrics
        if frozen and self.before_apart is None:
            self.before_apart = family.evaluate(frozen.install(copy.deepcopy(self.model)), data, **self.use).metrics
        gradients = self.anatomy.gradient_stats and asdict(self.anatomy.gradient_stats)
        found = {"before": before, "before_apart": self.before_apart, "evidence": gradients}
        files.write(folder / "train.json", json.dumps({**self.arguments, **found}, indent=2, default=str) + "\n")
        folder = folder.resolve()
        scale = 1.0 if config.lr_scale is None else config.lr_scale
        return Job(
            config=config,
            base=self.base,
            data=data,
            plan=self.plan,
            folder=folder,
            merged=folder / f"merged{family.suffix}",
            body_lr_scale=family.body_lr_scale * scale,
            resume=self.resumed is not None,
            header=self.header,
            origin=self.origin,
            before=before,
            save_merged=family.save_merged,
            trackers=Trackers(self.trackers, folder, {**self.arguments, "plan": _totals(self.plan)}, config.quiet),
            frozen_stages=frozen,
            store=store,
            stages=stage_modules(self.anatomy),
            stop=self.stop,
        )

    def _train(self, job: Job) -> None:
        try:
            self.family.train(job)
        except KeyboardInterrupt:
            if job.checkpoint.is_file():
                raise Interrupted("interrupted", job.folder) from None
            raise Interrupted("interrupted; no epoch was complete, so start anew") from None
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error) from error

    def _result(self, job: Job, saved: Mapping[str, Any]) -> Run:
        """Merge and measure what was trained, and leave ``run.json`` and the pictures."""
        family, delta_bytes = self.family, {}
        if job.base.pretrained:
            delta = deltas.read(job.delta)
            deltas.verify(delta, job.base.state)
            delta_bytes = {**delta.bytes, "file": job.delta.stat().st_size}
            result = put_together(family, job.base, delta)
            if self.method.merges:
                family.save_merged(attaching.merge(result), delta.header, job.merged)
        if self.method.merges:  # what is measured and drawn is the file; a model without a base has left it already
            result = family.open_merged(job.merged)
        run = Run(
            folder=job.folder,
            plan=job.plan,
            before=job.before,
            after=family.evaluate(result, job.data, **self.use).metrics,
            parameters=_totals(job.plan),
            seconds=round(time.perf_counter() - self.began, 2),
            measured=self._measured(job, saved["measured"]),
            delta=job.delta if job.base.pretrained else None,
            delta_bytes=delta_bytes,
            merged=job.merged if self.method.merges else None,
            history=saved["history"],
            arguments=_plain(self.arguments),
            versions=versions(),
        )
        run.save()  # before anything is drawn, for that is not worth losing it
        run = replace(run, pictures=self._pictures(job, result, saved["history"]))
        run.save()
        return run

    def _measured(self, job: Job, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run measured, and how its frozen stages in lower precision changed the untrained model's score."""
        kept = {k: v for k, v in measured.items() if k != "views"}
        if job.frozen_stages is None or self.before_apart is None:
            return kept
        metric = self.family.primary_metric(job.base.task)
        dtype = str(job.frozen_stages.stored).removeprefix("torch.")
        said = {"stages": job.plan.num_frozen_stages, "dtype": dtype, "metric": metric}
        views = {"views": job.store.schedule.total, **measured["views"]} if job.store else {}
        scores = {"exact": job.before[metric], "approximate": self.before_apart[metric]}
        return {**kept, "prefix": {**said, **scores, **views}}

    def _pictures(self, job: Job, result: nn.Module, history: list) -> dict[str, Path]:
        """Draw some validation images before and after training beside their labels, and the curves."""
        how = job.plan.method + (f", freeze={job.plan.freeze}" if job.plan.freeze else "")
        title = f"{how} on {'/'.join(Path(self.config.data).parts[-2:])}"
        shown = {"imgsz": self.use["imgsz"], "device": self.use["device"]}
        columns = {
            "labels": self.family.draw(None, job.data, 4),
            "before training": self.family.draw(self.model, job.data, 4, **shown),
            "after": self.family.draw(result, job.data, 4, **shown),
        }
        score = self.family.primary_metric(job.base.task)
        return {
            "before_after": plots.sheet(columns, job.folder / "before_after.jpg", title),
            "curves": plots.curves(history, job.before, score, job.folder / "curves.png", title),
        }

    @property
    def arguments(self) -> Json:
        """What the run is, for its folder and its delta."""
        return {**self.config.arguments(), "method_settings": self.method.settings()}


def _header(session: TrainSession) -> Json:
    """Return what the run's delta says of itself."""
    config, base, data, plain = session.config, session.base, session.data, _plain(session.arguments)
    return {
        "family": session.family.name,
        "task": base.task,
        "base": {
            "model": base.source,
            "sha256": deltas.fingerprint(base.state),
            "model_args": plain["model_args"],
        },
        "names": {str(k): v for k, v in data.names.items()},
        "head": config.head,
        "outputs": data.outputs,
        "input": {**base.facts, "imgsz": config.imgsz},
        "train_args": plain,
        "seed": config.seed,
        "data": {"source": config.data, "sha256": data.fingerprint},
        "parent": None,
        "versions": versions(),
    }


def _plain(values: Json) -> Json:
    """Return values as JSON keeps them."""
    return json.loads(json.dumps(values, default=str))


def _totals(plan: Plan) -> dict[str, int]:
    """Return how many numbers a plan's model has, how many train, and how many statistics move."""
    trained = {"body": plan.trained_body, "head": plan.trained_head}
    return {"total": plan.total, **trained, "statistics": sum(r.moving for r in plan.rows)}
