"""The verbs: train, load, merge, detach, val, forgetting, predict, export, import_peft, verify, inspect. Before a run:
planning.py."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect as introspection
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from . import files, hfpeft, scenes, schema, tables
from .core import attach as attaching
from .core import delta as deltas
from .core.anatomy import GradientStats
from .core.base_model import LARGEST_IMAGE, Base, Data
from .core.delta import Delta
from .core.method import Method
from .core.plan import Plan, make_plan
from .errors import ConfigError, DeltaError, Interrupted, ModelError, TrainingError, nearest, out_of_memory
from .families.base import Family
from .families.classification import still_readable
from .families.frozen_stages import prepare_frozen_stages
from .families.gradient_stats import with_gradient_stats
from .families.introspect import stage_modules
from .lean.frozen_stages import put_on
from .planning import Freeze, fit
from .process import untouched
from .registry import FAMILIES, METHODS
from .schema import Malformed
from .settings import (
    check_names,
    check_settings,
    device_of,
    find_family,
    loader_arguments,
    resolve_path,
    split_options,
    views_of,
)
from .training import checkpoint, run_folder, stopping
from .training import plots as pictures
from .training import trackers as tracking
from .training.distributed import devices
from .training.job import Job
from .training.result import Run
from .training.stopping import Stop
from .training.trackers import Trackers

# of train's arguments, those that are no part of what a run is
_PLACES = ("resume", "project", "name", "exist_ok", "quiet", "allow_download")


# -------------------------------------------------------------------------------------------------------------- training
@untouched(alone=True)
def train(
    data: str | Path | None = None,
    *,
    model: str | Path | None = None,
    method: str | Method | None = None,
    freeze: Freeze = 0,
    bn: str | None = None,
    head: str | None = None,
    epochs: int | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    lr0: float | None = None,
    lr_scale: float | None = None,
    optimizer: str | None = None,
    device: str | int | Sequence[int] | None = None,
    workers: int | None = None,
    seed: int = 0,
    amp: bool | str | None = None,
    delta_dtype: str = "fp16",
    cache: int | str | bool = 0,
    cache_limit: float = 20.0,
    prefix_dtype: str | None = None,
    lean: str = "auto",
    trackers: str | Sequence[str] = "csv",
    quiet: bool = False,
    project: str | Path = "runs/visionpeft",
    name: str | None = None,
    exist_ok: bool = False,
    resume: bool | str | Path = False,
    save_every: float = 10.0,
    memory: str | float | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Run:
    """Adapt a pretrained model to your images.

    Args:
        data: What to train on: for YOLO a data YAML, for classifiers a folder with ``train/CLASS`` and ``val/CLASS``, or a
            set that visionpeft draws ("scenes/satellite", see ``visionpeft data``).
        model: A YOLO checkpoint (a path, or "yolo11n.pt", the default), or "timm/NAME". With neither data nor model, the
            small detector that ships with visionpeft is adapted to generated satellite scenes.
        method: A name (see `list_methods`), several joined by "+", or a configuration such as ``LoraConfig(r=16)``. By
            default `full` where `freeze` is given (layer freezing), else `lora`.
        freeze: Where nothing trains: the first N stages, a list of stage indices, or names.
        bn: "frozen" or "train": whether BatchNorm statistics outside the head move; by default as the method says, of timm's
            classifiers "frozen".
        head: "keep" what of the head fits, or "rebuild" it.
        epochs: Passes over the data.
        imgsz: Image size in pixels.
        batch: Images per step.
        lr0: Learning rate of the head.
        lr_scale: Factor of the body's learning rates, which the method and the family choose relative to `lr0`.
        optimizer: By name; "auto" is refused, for it ignores `lr0`.
        device: "cpu", 0, "0,1", ...; by default a GPU where there is one.
        workers: Processes that load images.
        seed: Of every random choice.
        amp: True (fp16), "bf16" or False; by default bf16 where the GPU has it.
        delta_dtype: How the delta stores trained weights, "fp16" or "fp32"; statistics keep their own type.
        cache: K, at least 1; approximate. What the frozen stages before the first that trains (freeze=10) make of K
            augmented views of every image is computed once and kept on the disk; epochs then read one view after the other
            instead of images. 0: off. For YOLO, "ram", "disk" and True are Ultralytics' own, which keep the images.
        cache_limit: GB that all kept views together may take; those of earlier runs that were used longest ago make room.
        prefix_dtype: "bf16", "fp16" or "fp32"; approximate. The frozen stages before the first that trains run in this
            precision, BatchNorm folded, as at inference. By default they run as the rest does; views that are kept are
            then computed in fp32 and kept as bf16. Validation is of the exact model, and so is the result.
        lean: How exact training saves memory: "memory" keeps the least for backward, "auto" what costs no time, "off"
            trains as PyTorch does.
        trackers: Where the numbers of every epoch go beside ``metrics.csv``: "tensorboard", "wandb", "mlflow", or several
            ("tensorboard,wandb").
        quiet: Print no plan, and show no progress.
        project: Folder of runs.
        name: Folder of this run in it; by default "train", "train2", ...
        exist_ok: Write into an existing folder of that name.
        resume: True for the newest run in `project`, or a run's folder: go on where it was. All other arguments are then
            the run's own, but for `model` and `model_args` where its base lies elsewhere now, and for `trackers`: those that
            send numbers elsewhere (wandb, mlflow) have to be named again.
        save_every: Minutes after which a checkpoint is saved within an epoch, too; 0: at its end only.
        memory: "6GB": those of method, freeze, lean, batch and imgsz that are left at their defaults are the best that fits,
            see `fit`.
        model_args: Further arguments for the family's model loader (timm's ``create_model``).
        allow_download: Let Ultralytics fetch images that are not here as ``download:`` in the data YAML says, which can be
            code; look at it first.
        **options: Fields of the method (``r=16``) and further arguments of the family (for YOLO all of Ultralytics').

    Returns:
        The run, with plan, metrics before and after, memory, time, the delta and the merged file. Of calls in several
        threads one trains at a time; what else draws random numbers meanwhile changes its results.

    Raises:
        VisionpeftError: Something given is not usable; the sentence says what, and what to do.
    """
    given = {k: v for k, v in locals().items() if k not in ("options", *_PLACES)}
    check_names(data=data, model=model, project=project, name=name, resume=None if isinstance(resume, bool) else resume)
    if resume:
        with stopping.heeded() as stop, ExitStack() as held:
            saved = held.enter_context(run_folder.resumed(resume, Path(project), name))
            free = ("data", "model", "model_args", "trackers", "options", *_PLACES)
            defaults = {k: p.default for k, p in introspection.signature(train).parameters.items() if k not in free}
            if changed := [*(k for k, v in defaults.items() if given[k] != v), *options]:
                raise ConfigError(f"a resumed run keeps its own arguments, but {', '.join(changed)} was given; leave it out")
            saved = _arguments_of(saved)
            saved |= _named_again(saved, model, loader_arguments(model_args))
            saved["trackers"] = tracking.again(saved.get("trackers", "csv"), trackers)
            place: dict[str, Any] = {"quiet": quiet, "allow_download": allow_download}
            return _train(**{**defaults, **saved}, **place, stop=stop, held=held)  # the run may be older than some of them
    if data is None and model is None:
        given |= {k: v for k, v in scenes.EMBEDDED.items() if k in given and given[k] is None}
        options = {**{k: v for k, v in scenes.EMBEDDED.items() if k not in given}, **options}
    elif data is None:
        raise ConfigError("data is missing: give a data YAML (YOLO), or a folder with train/ and val/ (classifiers)")
    elif model is None:
        given["model"] = "yolo11n.pt"
    if name and not exist_ok and (Path(project) / name).exists():
        raise run_folder.taken(Path(project) / name)  # before anything is loaded; `run_folder.new` makes sure of it
    if data is None and not quiet:
        print(
            f"Neither data nor model was given: {given['model']}, a small detector of vehicles on the road that ships with "
            f"visionpeft, is adapted to {given['data']}, pictures that it draws. Your own: visionpeft train --data "
            "YOUR.yaml --model yolo11n.pt\n"
        )
    if memory is not None:
        given |= _fitting(given, {**options, "allow_download": allow_download}, quiet)
    place = {"project": Path(project), "name": name, "exist_ok": exist_ok, "allow_download": allow_download}
    with stopping.heeded() as stop, ExitStack() as held:
        return _train(**place, quiet=quiet, **given, options=options, stop=stop, held=held)


def _fitting(given: Mapping[str, Any], options: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Return the settings of the best that fits into the memory given, and say so."""
    views = given["cache"] not in ("ram", "disk", True) and given["cache"]  # those three keep images, not outputs
    if views or given["prefix_dtype"]:
        raise ConfigError("memory does not go with cache or prefix_dtype, which need the depth of freezing; leave one out")
    names = "model data method bn head epochs imgsz batch optimizer amp model_args".split()
    asked = {name: given[name] for name in names}
    levels = {} if given["lean"] == "auto" else {"lean": given["lean"]}
    depth = {"freeze": given["freeze"]} if given["freeze"] else {}
    found = fit(given["memory"], **asked, **levels, **depth, device=device_of(given["device"]), **options)
    if not quiet:
        print(f"{found}\n")
    return {k: v for k, v in found.best.settings.items() if k != "method" or given["method"] is None}


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


@_libraries_apart()
def _train(
    *,
    options: dict[str, Any],
    stop: Stop,
    held: ExitStack,
    resumed: Path | None = None,
    settled: Mapping[str, Any] | None = None,
    done: bool = False,
    origin: str | None = None,
    project: Path = Path(),
    name: str | None = None,
    exist_ok: bool = False,
    quiet: bool = False,
    allow_download: bool = False,
    **given: Any,
) -> Run:
    began = time.perf_counter()
    source = given["model"] = resolve_path(given["model"])
    given["model_args"] = loader_arguments(given["model_args"])
    tracked = tracking.names(given["trackers"])
    family = find_family(source)
    before, configured = given.pop("before", None), given.pop("method_settings", None)
    apart, evidence = given.pop("before_apart", None), given.pop("evidence", None)
    own = introspection.signature(train).parameters
    tuning, extra = split_options(family, given["method"], given["freeze"], options, own, configured)
    views, extra = views_of(family, given["cache"], extra)
    base = family.load(source, **{**given["model_args"], **(settled or {})})
    settings = {k: v if given.get(k) is None else given[k] for k, v in family.defaults_for(base).items()}
    given["device"] = device_of(given["device"])
    check_settings(settings, given)
    family.check({**settings, **extra, **{k: given[k] for k in ("device", "amp", "seed")}})
    if not (base.pretrained or tuning.merges):
        raise ConfigError(
            f"{source} has no base for a delta, and {tuning.name} cannot be merged; give a checkpoint, or train in full"
        )
    data = family.read_data(scenes.find(given["data"]), base, allow_download=allow_download)
    base, made_so = family.suited(base, data)
    given["model_args"] |= made_so
    held.enter_context(still_readable(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given["seed"])
        fitted = family.with_head(base, data.names, settings["head"], **data.outputs)
        anatomy = family.anatomy(fitted, source)
        if evidence:  # a run that is resumed keeps its plan
            anatomy = dataclasses.replace(anatomy, gradient_stats=GradientStats(**evidence))
        else:
            look = {"imgsz": settings["imgsz"], "batch": settings["batch"], "device": given["device"].split(",")[0]}
            anatomy = with_gradient_stats(anatomy, tuning, family, fitted, data, **look)
        made = make_plan(tuning, anatomy, given["freeze"], given["bn"] or family.bn)
        attaching.attach(fitted, made)
    if made.opens and len(devices(given["device"])) > 1:
        raise ConfigError(
            f"method '{tuning.name}' opens stages one after the other, which processes beside each other cannot follow; "
            "give one device"
        )
    if settings["epochs"] < (least := math.ceil(1 / (1 - made.fully_unfrozen_at) - 1e-6)):
        raise ConfigError(
            f"all of method '{tuning.name}' trains only after {made.fully_unfrozen_at:.0%} of the epochs, so "
            f"epochs={settings['epochs']} never come to that; give at least {least}"
        )
    named = {"model": source, "data": str(given["data"]), "method": tuning.name}
    arguments = {**given, **settings, **named, "method_settings": tuning.settings(), "options": extra}
    header = _header(family, base, data, arguments)
    began_with, origin = origin, run_folder.origin(header, made)
    if resumed and began_with:
        run_folder.unchanged(resumed, began_with, origin, source, str(given["data"]))
    prefix, store = prepare_frozen_stages(family, base, data, made, {**settings, **given}, extra, views)
    if not quiet:
        print(made)
    folder = resumed or held.enter_context(run_folder.new(project, name, exist_ok, f"merged{family.suffix}"))
    stop.checkpoint = folder.resolve() / "checkpoint.pt"
    use = {k: settings[k] for k in ("imgsz", "batch", "workers")} | {"device": given["device"].split(",")[0]}
    use |= {k: v for k, v in extra.items() if k in family.evaluated}
    if use["batch"] < 1:  # to be found by Ultralytics for training
        use["batch"] = family.defaults["batch"]
    if before is None:
        before = family.evaluate(fitted, data, **use).metrics
    if prefix and apart is None:
        apart = family.evaluate(put_on(copy.deepcopy(fitted), prefix), data, **use).metrics
    evidence = anatomy.gradient_stats and dataclasses.asdict(anatomy.gradient_stats)
    scores = {"before": before, "before_apart": apart, "evidence": evidence}
    files.write(folder / "train.json", json.dumps({**arguments, **scores}, indent=2, default=str) + "\n")
    job = Job(
        base=base,
        data=data,
        plan=made,
        folder=folder.resolve(),
        merged=folder.resolve() / f"merged{family.suffix}",
        amp=given["amp"],
        seed=given["seed"],
        device=given["device"],
        body_lr_scale=family.body_lr_scale * (1.0 if given["lr_scale"] is None else given["lr_scale"]),
        resume=resumed is not None,
        quiet=quiet,
        extra=extra,
        before=before,
        save_merged=family.save_merged,
        delta_dtype=given["delta_dtype"],
        header=header,
        origin=origin,
        stop=stop,
        save_every=given["save_every"],
        trackers=Trackers(tracked, folder.resolve(), {**arguments, "plan": _totals(made)}, quiet),
        prefix=prefix,
        store=store,
        lean=given["lean"],
        stages=stage_modules(anatomy),
        **settings,
    )
    with job.trackers:
        if not done:
            _run(family, job)
        saved = checkpoint.load(job.checkpoint)
        run = _result(family, job, tuning, saved, arguments, time.perf_counter() - began, use, fitted, apart)
        said = {"before": run.before, "after": run.after, "measured": run.measured, "delta_bytes": run.delta_bytes}
        job.trackers.finish({**said, "seconds": run.seconds})
    return run


def _run(family: Family, job: Job) -> None:
    try:
        family.train(job)
    except KeyboardInterrupt:
        if job.checkpoint.is_file():
            raise Interrupted("interrupted", job.folder) from None
        raise Interrupted("interrupted; no epoch was complete, so start anew") from None
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error


def _result(
    family: Family,
    job: Job,
    method: Method,
    saved: Mapping[str, Any],
    arguments: dict,
    seconds: float,
    use: dict,
    untrained: nn.Module,
    apart: dict[str, float] | None,
) -> Run:
    delta_bytes = {}
    if job.base.pretrained:
        delta = deltas.read(job.delta)
        deltas.verify(delta, job.base.state)
        delta_bytes = {**delta.bytes, "file": job.delta.stat().st_size}
        result = _rebuild(family, job.base, delta)
        if method.merges:
            family.save_merged(attaching.merge(result), delta.header, job.merged)
    if method.merges:  # what is measured and drawn is the file; a model without a base has left it already
        result = family.open_merged(job.merged)
    after = family.evaluate(result, job.data, **use).metrics
    plan = job.plan
    run = Run(
        folder=job.folder,
        plan=plan,
        before=job.before,
        after=after,
        parameters=_totals(plan),
        seconds=round(seconds, 2),
        measured=_measured(family, job, saved["measured"], apart),
        delta=job.delta if job.base.pretrained else None,
        delta_bytes=delta_bytes,
        merged=job.merged if method.merges else None,
        history=saved["history"],
        arguments=json.loads(json.dumps(arguments, default=str)),
        versions=_versions(),
    )
    run.save()  # before anything is drawn, for that is not worth losing it
    run = dataclasses.replace(run, pictures=_pictures(family, job, untrained, result, saved["history"], use))
    run.save()
    return run


def _totals(plan: Plan) -> dict[str, int]:
    """Return how many numbers a plan's model has, how many train, and how many statistics move."""
    trained = {"body": plan.trained_body, "head": plan.trained_head}
    return {"total": plan.total, **trained, "statistics": sum(r.moving for r in plan.rows)}


def _measured(family: Family, job: Job, measured: Mapping[str, Any], apart: dict[str, float] | None) -> dict[str, Any]:
    """Return what a run measured, with what its frozen stages, run apart, did to the score of the untrained model."""
    kept = {k: v for k, v in measured.items() if k != "views"}
    if job.prefix is None or apart is None:
        return kept
    metric = family.primary_metric(job.base.task)
    said = {"stages": job.plan.num_frozen_stages, "dtype": str(job.prefix.stored).removeprefix("torch."), "metric": metric}
    views = {"views": job.store.rounds.total, **measured["views"]} if job.store else {}
    return {**kept, "prefix": {**said, "exact": job.before[metric], "approximate": apart[metric], **views}}


def _pictures(
    family: Family, job: Job, untrained: nn.Module, result: nn.Module, history: list, use: dict
) -> dict[str, Path]:
    """Draw what the run did: some validation images before and after beside their labels, and the curves."""
    how = job.plan.method + (f", freeze={job.plan.freeze}" if job.plan.freeze else "")
    title = f"{how} on {'/'.join(Path(job.header['data']['source']).parts[-2:])}"
    score = family.primary_metric(job.base.task)
    shown = {"imgsz": use["imgsz"], "device": use["device"]}
    columns = {
        "labels": family.draw(None, job.data, 4),
        "before training": family.draw(untrained, job.data, 4, **shown),
        "after": family.draw(result, job.data, 4, **shown),
    }
    return {
        "before_after": pictures.sheet(columns, job.folder / "before_after.jpg", title),
        "curves": pictures.curves(history, job.before, score, job.folder / "curves.png", title),
    }


# ------------------------------------------------------------------------------------------------------- using the result
@dataclass(frozen=True)
class Adapted:
    """A base with a delta on it, from `load`.

    Attributes:
        model: The model, the delta attached, in eval mode.
        delta: What was loaded.
        family: Its family.
        base: The base, untouched.
    """

    model: nn.Module
    delta: Delta
    family: Family
    base: Base

    @property
    def mergeable(self) -> bool:
        """Whether the delta can be folded into the base's own weights."""
        return attaching.mergeable(self.model)


@untouched()
def load(delta: str | Path, *, model: str | Path | None = None, model_args: Mapping[str, Any] | None = None) -> Adapted:
    """Put a delta on its base.

    Args:
        delta: The delta file.
        model: The base; by default the one the delta names.
        model_args: Further arguments for the family's model loader, beside or instead of those the delta names.

    Raises:
        DeltaError: The delta is damaged, too new, or made for another base.
    """
    read, family, base = _checked(delta, model, model_args)
    return Adapted(_rebuild(family, base, read), read, family, base)


def _checked(delta: str | Path, model: Any, model_args: Mapping[str, Any] | None) -> tuple[Delta, Family, Base]:
    """Read a delta and its base, and check that they belong together."""
    check_names(delta=delta, model=model)
    read = deltas.read(delta)
    if read.plan.family not in FAMILIES:
        raise DeltaError(f"{delta} is for models of '{read.plan.family}'; there are {', '.join(FAMILIES)}")
    family: Family = FAMILIES[read.plan.family]()
    base = _named_base(family, read.header["base"], delta, model, loader_arguments(model_args))
    deltas.verify(read, base.state)
    return read, family, base


def _named_base(
    family: Family, said: Mapping[str, Any], file: str | Path, model: str | Path | None, own: Mapping[str, Any]
) -> Base:
    """Load the base that a file names, with what the user gives instead: a file alone can fetch nothing, and run nothing."""
    named = {k: v for k, v in said["model_args"].items() if k not in own}
    try:
        settled = family.check_named(None if model else said["model"], named, own)
    except ModelError as error:
        raise DeltaError(f"{file} names {error}; give a base that you trust with model=... or model_args=...") from error
    return family.load(str(model or said["model"]), **{**named, **own, **settled})


def _fitted(family: Family, base: Base, delta: Delta) -> nn.Module:
    """Return the base with a delta's head, the delta checked against it."""
    outputs = family.read_outputs(delta.header.get("outputs", {}))
    fitted = family.with_head(base, _names(delta.header), delta.header["head"], **outputs)
    deltas.check(delta, fitted, base.state)
    return fitted


def _rebuild(family: Family, base: Base, delta: Delta) -> nn.Module:
    fitted = _fitted(family, base, delta)
    attaching.attach(fitted, delta.plan, start=False)
    return deltas.apply(fitted, delta, base.state).eval()


@untouched()
def merge(
    delta: str | Path | Adapted,
    out: str | Path,
    *,
    model: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Write base and delta as one plain checkpoint, which the library opens without visionpeft.

    Raises:
        ConfigError: The method cannot be merged.
    """
    check_names(out=out)
    adapted = _adapted(delta, model, model_args)
    merged = attaching.merge(copy.deepcopy(adapted.model))
    return adapted.family.save_merged(merged, adapted.delta.header, Path(out))


def detach(adapted: Adapted) -> nn.Module:
    """Take the delta off: the base as it was, its own head included, bit for bit."""
    return copy.deepcopy(adapted.base.model)


@untouched()
def val(
    delta: str | Path | Adapted,
    data: str | Path,
    *,
    model: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Measure an adapted model on the validation part of `data`; `options` are the family's (imgsz, batch, device)."""
    check_names(data=data)
    adapted = _adapted(delta, model, model_args)
    place, split = scenes.find(data), options.get("split", "val")
    checked = adapted.family.read_data(place, adapted.base, split, train=False, allow_download=allow_download)
    return adapted.family.evaluate(adapted.model, checked, **{**_val_use(adapted, options), **options}).metrics


@dataclass(frozen=True)
class Forgetting:
    """What an adapted model lost of its base's classes, from `forgetting`. Prints as a table.

    Attributes:
        data: What it was measured on.
        metric: The score.
        before: Of the base.
        after: Of the adapted body with the base's own head.
        detached: Of the model after the delta was taken off again: the base's.
        per_class: Scores before and after, by class.
    """

    data: str
    metric: str
    before: float
    after: float
    detached: float
    per_class: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [("all", self.before, self.after), *((n, b, a) for n, (b, a) in self.per_class.items())]
        shown = [(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}") for name, before, after in rows]
        return tables.text(f"{self.metric} on {self.data}", ("class", "before", "after", "change"), shown, right=(1, 2, 3))


@untouched()
def forgetting(
    delta: str | Path | Adapted,
    data: str | Path,
    *,
    model: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
    **options: Any,
) -> Forgetting:
    """Measure what an adapted model forgot: the adapted body with the base's own head, on the base's old classes.

    A model that shall find old and new classes needs both heads, and as a body that moved serves either of them only with
    its own weights, two passes over an image: one through the base, one through the adapted model.

    Args:
        delta: The delta file, or what `load` returned.
        data: Labelled images of the base's classes, under the base's own names.
        model: The base; by default the one the delta names.
        model_args: As for `load`.
        allow_download: As for `train`.
        **options: The family's, for the evaluation (imgsz, batch, device); by default training's image size and batch.

    Raises:
        VisionpeftError: As for `load`; or the data has classes that the base does not know.
    """
    check_names(data=data)
    adapted = _adapted(delta, model, model_args)
    family, base, made = adapted.family, adapted.base, adapted.delta.plan
    place, split = scenes.find(data), options.get("split", "val")
    checked = family.read_data(place, base, split, train=False, allow_download=allow_download)
    use = {**_val_use(adapted, options), **options}
    before = family.evaluate(base.model, checked, **use)
    own = attaching.attach(family.with_head(base, base.names, "keep", **checked.outputs), made, start=False)
    heads = tuple(f"{h}." for h in made.heads)
    body = {k: v for k, v in adapted.delta.tensors.items() if not k.startswith(heads)}
    deltas.apply(own, dataclasses.replace(adapted.delta, tensors=body), base.state).eval()
    after = family.evaluate(own, checked, **use)
    attaching.detach(own, base.state)
    same = deltas.fingerprint(own.state_dict()) == adapted.delta.header["base"]["sha256"]
    metric = family.primary_metric(base.task)
    scores = before.predictions.by_class(), after.predictions.by_class()
    return Forgetting(
        data=str(data),
        metric=metric,
        before=before.metrics[metric],
        after=after.metrics[metric],
        detached=before.metrics[metric]
        if same
        else family.evaluate(own, checked, **use).metrics[metric],  # bit for bit the base
        per_class={base.names[i]: (round(scores[0][i], 5), round(scores[1][i], 5)) for i in scores[0]},
    )


@untouched()
def predict(
    delta: str | Path | Adapted,
    source: Any,
    *,
    model: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Run an adapted model on images; returns the library's own results."""
    adapted = _adapted(delta, model, model_args)
    return adapted.family.predict(adapted.model, source, **{**_use(adapted, options), **options})


@untouched()
def export(
    delta: str | Path | Adapted,
    format: str = "onnx",
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    exist_ok: bool = False,
    **options: Any,
) -> Path:
    """Write an adapted model for deployment, merged first where it can be, or as an adapter for HF peft.

    Args:
        delta: The delta file, or what `load` returned.
        format: "onnx", "torchscript", or "peft": a folder that ``peft.PeftModel.from_pretrained`` reads.
        out: The file or folder to write; by default beside the delta.
        model: The base; by default the one the delta names.
        model_args: As for `load`.
        exist_ok: Replace a folder that is there, where it holds nothing else.
        **options: The family's (imgsz, dynamic, ...).
    """
    suffixes = {"onnx": ".onnx", "torchscript": ".torchscript", "peft": ".peft"}
    if format not in suffixes:
        raise ConfigError(f"format='{format}' is not known; it is {' or '.join(suffixes)}.{nearest(format, suffixes)}")
    check_names(out=out)
    adapted = _adapted(delta, model, model_args)
    if out is None:
        out = Path("model" if isinstance(delta, Adapted) else delta).with_suffix(suffixes[format])
    if format == "peft":
        if options:
            raise ConfigError(f"'{next(iter(options))}' is no option of format='peft', which has exist_ok alone")
        opening = adapted.family.loading_snippet(adapted.base, adapted.delta.header)
        return hfpeft.write(adapted.model, adapted.delta, adapted.base, opening, out, exist_ok)
    return adapted.family.export(adapted.model, format, Path(out).resolve(), **{**_use(adapted, options), **options})


@untouched()
def import_peft(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_download: bool = False,
) -> Path:
    """Make a delta of an adapter that HF peft has saved, or that `export` has written for it.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: The delta file to write; by default beside the folder.
        model: The base that the adapter was trained on, as for `train`. A folder of `export` names it itself.
        data: As for `train`; says what the classes are called where they are not the base's. Without it they get numbers.
        model_args: As for `load`.
        allow_download: As for `train`.

    Returns:
        The delta file. Where the folder is of `export`, it is known that the base is the right one, otherwise only that all
        shapes fit.

    Raises:
        DeltaError: The folder is incomplete or damaged, computes something that has no like here, or is for another base.
    """
    check_names(folder=folder, out=out, model=model, data=data)
    adapter = hfpeft.read(folder)
    said = adapter.header
    if model is None and not said:
        raise ConfigError(f"{folder} does not name the base that it was trained on; give it with model=...")
    named = said["base"] if said else {"model": None, "model_args": {}}
    source, own = resolve_path(model or named["model"]), loader_arguments(model_args)
    given = {**named["model_args"], **own}
    family = find_family(source)
    base = _named_base(family, {**named, "model": source}, folder, model and source, own)
    if not base.pretrained:
        raise ConfigError(f"{source} has random weights, which no adapter was trained on; give a checkpoint")
    checked = family.read_data(scenes.find(data), base, allow_download=allow_download) if data else None
    settings = family.defaults_for(base)
    unknown = {
        "family": family.name,
        "task": base.task,
        "input": base.facts,
        "train_args": {k: settings[k] for k in ("imgsz", "batch")},
        "seed": None,
        "data": {"source": str(data or ""), "sha256": checked.fingerprint if checked else ""},
        "parent": None,
        "metrics": {},
    }
    own = {
        "base": {"model": source, "sha256": deltas.fingerprint(base.state), "model_args": given},
        "imported": {"folder": str(Path(folder).resolve()), "peft_version": adapter.config.get("peft_version")},
        "versions": _versions(),
    }
    made = hfpeft.adopt(adapter, family, base, {**(said or unknown), **own}, checked)
    beside = Path(folder).resolve()
    return deltas.write(out or beside.with_name(f"{beside.name}.safetensors"), made)  # not over the delta of an export


def inspect(delta: str | Path) -> dict[str, Any]:
    """Return what a delta file says of itself, after checking it against its checksum."""
    check_names(delta=delta)
    return deltas.read(delta).header


@untouched()
def verify(delta: str | Path, model: str | Path | None = None, *, model_args: Mapping[str, Any] | None = None) -> None:
    """Check a delta against a base, and its tensors against its plan; raises a DeltaError that says what is wrong."""
    read, family, base = _checked(delta, model, model_args)
    _fitted(family, base, read)


def list_methods() -> list[str]:
    """Return the names of all methods."""
    return list(METHODS)


def list_families() -> list[str]:
    """Return the names of all families."""
    return list(FAMILIES)


# --------------------------------------------------------------------------------------------------------------- plumbing
def _named_again(saved: Mapping[str, Any], model: str | Path | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resumed run's model and its arguments, or those that the user gives instead. What ``train.json`` names, which
    may be anybody's, is checked, see `Family.check_named`."""
    source, named = resolve_path(model or saved["model"]), {k: v for k, v in saved["model_args"].items() if k not in own}
    try:
        settled = find_family(source).check_named(None if model else source, named, own, scratch=True)
    except ModelError as error:
        file = saved["resumed"] / "train.json"
        raise TrainingError(f"{file} names {error}; put it where it was, or give model=... or model_args=...") from error
    return {"model": source, "model_args": {**named, **own}, "settled": settled}


def _arguments_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is a run's in its folder: of ``train.json`` its arguments, and what it found before it trained.

    Raises:
        TrainingError: Something of it is missing, or of another type.
    """
    kinds = {**get_type_hints(train), **{k: Mapping[str, Any] for k in ("options", "method_settings", "before")}}
    kinds |= {"before_apart": Mapping[str, Any] | None, "evidence": GradientStats | None, "batch": float | None}
    kinds |= dict.fromkeys(needed := ("model", "data", "method"), str)
    kinds |= {"model_args": Mapping[str, Any], "cache_limit": Real}  # there may be no limit
    kinds = {k: v for k, v in kinds.items() if k not in _PLACES}
    try:
        if missing := next(
            (k for k in (*needed, "method_settings", "model_args", "options", "seed") if k not in values), None
        ):
            raise Malformed(f"it has no {missing}")
        for name in kinds.keys() & values.keys():
            schema.check(kinds[name], values[name], name)
    except Malformed as error:
        raise TrainingError(f"{values['resumed']} cannot be resumed: of its train.json, {error}; start anew") from error
    return {k: v for k, v in values.items() if k in (*kinds, "done", "origin", "resumed")}


def _header(family: Family, base: Base, data: Data, arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(arguments, default=str))
    return {
        "family": family.name,
        "task": base.task,
        "base": {
            "model": base.source,
            "sha256": deltas.fingerprint(base.state),
            "model_args": plain["model_args"],
        },
        "names": {str(k): v for k, v in data.names.items()},
        "head": arguments["head"],
        "outputs": data.outputs,
        "input": {**base.facts, "imgsz": arguments["imgsz"]},
        "train_args": plain,
        "seed": arguments["seed"],
        "data": {"source": arguments["data"], "sha256": data.fingerprint},
        "parent": None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    names = ("visionpeft", "torch", "torchvision", "ultralytics", "timm")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def _names(header: Mapping[str, Any]) -> dict[int, str]:
    return {int(k): v for k, v in header["names"].items()}


def _use(adapted: Adapted, given: Mapping[str, Any]) -> dict[str, Any]:
    return {} if "imgsz" in given else {"imgsz": _usual(adapted, "imgsz", LARGEST_IMAGE)}


def _val_use(adapted: Adapted, given: Mapping[str, Any]) -> dict[str, Any]:
    batch = {} if "batch" in given else {"batch": max(_usual(adapted, "batch", 4096), 1)}  # images are padded to the largest
    return {**_use(adapted, given), **batch}


def _usual(adapted: Adapted, name: str, most: int) -> Any:
    """Return an argument that a delta was trained with, unless using it would fill any memory."""
    value = adapted.delta.header["train_args"][name]
    if not value <= most:
        raise DeltaError(f"the delta says {name}={value}, and more than {most} is used only if you give {name}=...")
    return value


def _adapted(delta: str | Path | Adapted, model: Any, model_args: Mapping[str, Any] | None) -> Adapted:
    return delta if isinstance(delta, Adapted) else load(delta, model=model, model_args=model_args)
