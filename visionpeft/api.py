"""The verbs: train, load, merge, detach, val, forgetting, predict, export, import_peft, verify, inspect. Before a run:
planning.py."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from . import hfpeft, scenes, sources
from .adapted import Adapted, head_of, load_named, opened, read_on_base, trusted
from .config import OPTIONS, Freeze, ModelArgs, Options, TrainConfig, check_paths
from .core import attach as attaching
from .core import delta as deltas
from .core.base_model import Data
from .core.method import Method
from .errors import ConfigError, ModelError, TrainingError, nearest, need
from .families.capabilities import SupportsExport
from .forgetting import Forgetting
from .forgetting import measure as measure_forgetting
from .planning import search_memory
from .process import untouched
from .registry import FAMILIES, METHODS
from .schema import Json
from .session import TrainSession
from .settings import find_family, loader_arguments, resolve_path
from .training import run_folder, stopping
from .training import trackers as tracking
from .training.devices import device_of
from .training.result import Run, versions


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
    frozen_dtype: str | None = None,
    lean: str = "auto",
    trackers: str | Sequence[str] = "csv",
    quiet: bool = False,
    project: str | Path = "runs/visionpeft",
    name: str | None = None,
    exist_ok: bool = False,
    resume: bool | str | Path = False,
    save_every: float = 10.0,
    memory: str | float | None = None,
    model_args: ModelArgs | None = None,
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
        frozen_dtype: "bf16", "fp16" or "fp32"; approximate. The frozen stages before the first that trains run in this
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
            see `suggest`.
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
    config = TrainConfig.from_call(locals())
    return _resume(config) if resume else _begin(config)


def _begin(config: TrainConfig) -> Run:
    """Train anew."""
    own = config.data is None and config.model is None
    if own:
        config = config.or_else(scenes.EMBEDDED)
    elif config.data is None:
        raise ConfigError("data is missing: give a data YAML (YOLO), or a folder with train/ and val/ (classifiers)")
    config = config.or_else({"model": "yolo11n.pt"})
    if config.name and not config.exist_ok and (folder := Path(config.project) / config.name).exists():
        raise run_folder.taken(folder)  # before anything is loaded; `run_folder.new` makes sure of it
    if own and not config.quiet:
        print(
            f"Neither data nor model was given: {config.model}, a small detector of vehicles on the road that ships with "
            f"visionpeft, is adapted to {config.data}, pictures that it draws. Your own: visionpeft train --data "
            "YOUR.yaml --model yolo11n.pt\n"
        )
    if config.memory is not None:
        config = _within(config)
    with stopping.stop_on_signals() as stop, ExitStack() as resources:
        return TrainSession(config, stop, resources).run()


def _resume(config: TrainConfig) -> Run:
    """Go on with a run: as it was begun, but for what may be given again."""
    with stopping.stop_on_signals() as stop, ExitStack() as resources:
        run = resources.enter_context(run_folder.resumed(config.resume, Path(config.project), config.name))
        free = {name for name, option in OPTIONS.items() if option.placement or option.resumable}
        if changed := [name for name in config.changed() if name not in free]:
            raise ConfigError(f"a resumed run keeps its own arguments, but {', '.join(changed)} was given; leave it out")
        own, begun = loader_arguments(config.model_args), run.config
        try:
            model, arguments, settled = trusted(None, begun.arguments(), config.model, own, scratch=True)
        except ModelError as error:
            file = run.folder / "train.json"
            raise TrainingError(f"{file} names {error}; put it where it was, or give model=... or model_args=...") from error
        begun = dataclasses.replace(
            begun,
            model=model,
            model_args=arguments,
            trackers=tracking.again(begun.trackers, config.trackers),
            quiet=config.quiet,
            allow_download=config.allow_download,
        )
        return TrainSession(begun, stop, resources, run, **settled).run()


def _within(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the settings of the best that fits into its memory, and say so."""
    if config.views or config.frozen_dtype:
        raise ConfigError("memory does not go with cache or frozen_dtype, which need the depth of freezing; leave one out")
    levels = None if config.lean == "auto" else config.lean
    here = dataclasses.replace(config, device=device_of(config.device))  # no GPU is meant where there is none
    found = search_memory(here, freeze=config.freeze or None, lean=levels)
    if not config.quiet:
        print(f"{found}\n")
    best = {k: v for k, v in found.best.settings.items() if k != "method" or config.method is None}
    return dataclasses.replace(config, **best)


# ------------------------------------------------------------------------------------------------------- using the result


@untouched()
def load(delta: str | Path, *, model: str | Path | None = None, model_args: ModelArgs | None = None) -> Adapted:
    """Put a delta on its base.

    Args:
        delta: The delta file.
        model: The base; by default the one the delta names.
        model_args: Further arguments for the family's model loader, beside or instead of those the delta names.

    Raises:
        DeltaError: The delta is damaged, too new, or made for another base.
    """
    return opened(delta, model, model_args)


@untouched()
def merge(
    delta: str | Path | Adapted,
    out: str | Path,
    *,
    model: str | Path | None = None,
    model_args: ModelArgs | None = None,
) -> Path:
    """Write base and delta as one plain checkpoint, which the library opens without visionpeft.

    Raises:
        ConfigError: The method cannot be merged.
    """
    check_paths(out=out)
    adapted = opened(delta, model, model_args)
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
    model_args: ModelArgs | None = None,
    allow_download: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Measure an adapted model on the validation part of `data`; `options` are the family's (imgsz, batch, device)."""
    check_paths(data=data)
    adapted = opened(delta, model, model_args)
    checked = _read_to_measure(adapted, data, options, allow_download)
    return adapted.family.evaluate(adapted.model, checked, **adapted.as_trained(options, "imgsz", "batch")).metrics


def _read_to_measure(adapted: Adapted, data: str | Path, options: Options, allow_download: bool) -> Data:
    """Look up the part of a data set to measure a model on."""
    split = options.get("split", "val")
    return adapted.family.read_data(sources.find(data), adapted.base, split, train=False, allow_download=allow_download)


@untouched()
def forgetting(
    delta: str | Path | Adapted,
    data: str | Path,
    *,
    model: str | Path | None = None,
    model_args: ModelArgs | None = None,
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
    check_paths(data=data)
    adapted = opened(delta, model, model_args)
    checked = _read_to_measure(adapted, data, options, allow_download)
    return measure_forgetting(adapted, checked, str(data), adapted.as_trained(options, "imgsz", "batch"))


@untouched()
def predict(
    delta: str | Path | Adapted,
    source: Any,
    *,
    model: str | Path | None = None,
    model_args: ModelArgs | None = None,
    **options: Any,
) -> Any:
    """Run an adapted model on images; returns the library's own results."""
    adapted = opened(delta, model, model_args)
    return adapted.family.predict(adapted.model, source, **adapted.as_trained(options, "imgsz"))


@untouched()
def export(
    delta: str | Path | Adapted,
    format: str = "onnx",
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    model_args: ModelArgs | None = None,
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
    if format == "onnx":  # which Ultralytics would install
        need("onnx", "export", "format='onnx'")
    check_paths(out=out)
    adapted = opened(delta, model, model_args)
    if out is None:
        out = Path("model" if isinstance(delta, Adapted) else delta).with_suffix(suffixes[format])
    if format == "peft":
        if options:
            raise ConfigError(f"'{next(iter(options))}' is no option of format='peft', which has exist_ok alone")
        opening = SupportsExport.of(adapted.family).loading_snippet(adapted.base, adapted.delta.header)
        return hfpeft.write(adapted.model, adapted.delta, adapted.base, opening, out, exist_ok)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: constants that are constant here, and its own deprecation
        able, use = SupportsExport.of(adapted.family), adapted.as_trained(options, "imgsz")
        return able.export(adapted.model, format, Path(out).resolve(), **use)


@untouched()
def import_peft(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    model_args: ModelArgs | None = None,
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
    check_paths(folder=folder, out=out, model=model, data=data)
    adapter = hfpeft.read(folder)
    said = adapter.header
    if model is None and not said:
        raise ConfigError(f"{folder} does not name the base that it was trained on; give it with model=...")
    named = said["base"] if said else {"model": None, "model_args": {}}
    source, own = resolve_path(model or named["model"]), loader_arguments(model_args)
    given = {**named["model_args"], **own}
    family = find_family(source)
    base = load_named(family, {**named, "model": source}, folder, model and source, own)
    if not base.pretrained:
        raise ConfigError(f"{source} has random weights, which no adapter was trained on; give a checkpoint")
    checked = family.read_data(sources.find(data), base, allow_download=allow_download) if data else None
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
        "versions": versions(),
    }
    made = hfpeft.adopt(adapter, family, base, {**(said or unknown), **own}, checked)
    beside = Path(folder).resolve()
    return deltas.write(out or beside.with_name(f"{beside.name}.safetensors"), made)  # not over the delta of an export


def inspect(delta: str | Path) -> Json:
    """Return what a delta file says of itself, after checking it against its checksum."""
    check_paths(delta=delta)
    return deltas.read(delta).header


@untouched()
def verify(delta: str | Path, model: str | Path | None = None, *, model_args: ModelArgs | None = None) -> None:
    """Check a delta against a base, and its tensors against its plan; raises a DeltaError that says what is wrong."""
    read, family, base = read_on_base(delta, model, model_args)
    head_of(family, base, read)


def list_methods() -> list[str]:
    """Return the names of all methods."""
    return list(METHODS)


def list_families() -> list[str]:
    """Return the names of all families."""
    return list(FAMILIES)
