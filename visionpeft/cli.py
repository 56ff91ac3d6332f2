"""The command line: every command is one verb of the API; its options are the verb's arguments."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import yaml
from cyclopts import App, CycloptsError, Group, Parameter

from . import __version__, api, planning, tables
from . import presets as recipes
from .benchmark.commands import benchmark
from .core.method import fields_of
from .data.commands import app as data_app
from .errors import ConfigError, Interrupted, MismatchError, VisionpeftError, printable
from .files import read_yaml
from .registry import FAMILIES, METHODS
from .report import write as write_report

app = App(
    name="visionpeft",
    help="Adapt a pretrained YOLO or timm model to your own images on the GPU you already have.",
    version=__version__,
    default_parameter=Parameter(negative=(), show_default=False),
    name_transform=lambda name: name.rstrip("_"),
    help_format="plaintext",
    group_commands=Group("Options", sort_key=9),
    suppress_keyboard_interrupt=False,  # `main` says it
)
app.register_install_completion_command()
_TRAIN, _USE, _CHECK, _KNOW = (
    Group(name, sort_key=i) for i, name in enumerate(("Train", "Use a delta", "Check a delta", "Know more"), 1)
)
app.command(data_app)
app.command(benchmark, group=_TRAIN)
_ON, _WHAT, _HOW, _RUN = (  # groups of train's options
    Parameter(group=Group(name, sort_key=i))
    for i, name in enumerate(("Model and data", "What trains", "How it trains", "The run"))
)
_OWN = ("options", "config", "quiet", "json_")  # arguments of the command line alone
_TEXT = (
    "model",
    "data",
    "name",
    "project",
    "method",
    "device",
    "optimizer",
    "head",
    "bn",
    "prefix_dtype",
    "lean",
    "memory",
    "trackers",
    "target_modules",
)  # never numbers
Options = Annotated[Any, Parameter(show=False, allow_leading_hyphen=True)]


@app.command(group=_TRAIN)
def train(
    *,
    data: Annotated[str | None, _ON] = None,
    model: Annotated[str | None, _ON] = None,
    method: Annotated[str | None, _WHAT] = None,
    freeze: Annotated[str | None, _WHAT] = None,
    bn: Annotated[str | None, _WHAT] = None,
    head: Annotated[str | None, _WHAT] = None,
    epochs: Annotated[int | None, _HOW] = None,
    imgsz: Annotated[int | None, _HOW] = None,
    batch: Annotated[float | None, _HOW] = None,
    lr0: Annotated[float | None, _HOW] = None,
    lr_scale: Annotated[float | None, _HOW] = None,
    optimizer: Annotated[str | None, _HOW] = None,
    device: Annotated[str | None, _HOW] = None,
    workers: Annotated[int | None, _HOW] = None,
    seed: Annotated[int | None, _HOW] = None,
    amp: Annotated[str | None, _HOW] = None,
    cache: Annotated[str | None, _HOW] = None,
    cache_limit: Annotated[float | None, _HOW] = None,
    prefix_dtype: Annotated[str | None, _HOW] = None,
    lean: Annotated[str | None, _HOW] = None,
    model_args: Annotated[str | None, _ON] = None,
    allow_download: Annotated[bool, _ON] = False,
    delta_dtype: Annotated[str | None, _RUN] = None,
    trackers: Annotated[str | None, _RUN] = None,
    project: Annotated[str | None, _RUN] = None,
    name: Annotated[str | None, _RUN] = None,
    exist_ok: Annotated[bool, _RUN] = False,
    resume: Annotated[str | None, _RUN] = None,
    save_every: Annotated[float | None, _RUN] = None,
    memory: Annotated[str | None, _HOW] = None,
    config: Annotated[str | None, _ON] = None,
    quiet: Annotated[bool, _RUN] = False,
    json_: Annotated[bool, _RUN] = False,
    **options: Options,
) -> None:
    """Train, and leave a delta, a merged checkpoint and run.json in the run's folder.

    Fields of the method (--r 16) and further arguments of the family (--mosaic 0) are options too: see `visionpeft methods`.

    Parameters
    ----------
    data
        A data YAML; for classifiers a folder with train/CLASS and val/CLASS; or scenes/satellite and the like.
    model
        A YOLO checkpoint (a path, or yolo11n.pt, the default), or timm/NAME. With neither data nor model: a small detector
        that ships with visionpeft, adapted to satellite scenes that it draws.
    method
        A name, or several joined by +; full where --freeze is given, else lora.
    freeze
        The first N stages, or indices (0,1,2), or names (model.0,model.1).
    bn
        frozen or train: whether BatchNorm statistics outside the head move.
    head
        keep what of the head fits, or rebuild it.
    epochs
        Passes over the data.
    imgsz
        Image size in pixels.
    batch
        Images per step.
    lr0
        Learning rate of the head.
    lr_scale
        Factor of the body's learning rates, which method and family choose relative to lr0.
    optimizer
        AdamW, SGD, ...
    device
        cpu, 0, 0,1, ...
    workers
        Processes that load images.
    seed
        Of every random choice.
    amp
        true, bf16 or false.
    cache
        K: keep what the frozen stages make of K views of each image (approximate); ram, disk: keep the images.
    cache_limit
        GB that such views may take.
    prefix_dtype
        bf16, fp16 or fp32: the precision of the frozen stages before the first that trains (approximate).
    lean
        memory: keep the least for backward; auto: what costs no time (exact, both); off.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE, pad_type: same}.
    allow_download
        Let Ultralytics fetch images as the data YAML's download: says, which can be code; look at it first.
    delta_dtype
        fp16 or fp32: how the delta stores trained weights.
    trackers
        Where every epoch's numbers go beside metrics.csv: tensorboard, wandb, mlflow (several: tensorboard,wandb).
    project
        Folder of runs.
    name
        Folder of this run in it.
    exist_ok
        Write into an existing folder of that name.
    resume
        A run's folder, or "true" for the newest: go on where it was. SIGTERM, SIGHUP and SIGUSR1 have a run save at its next
        step and exit with 75, to be resumed.
    save_every
        Minutes after which a checkpoint is saved within an epoch, too: 10 by default; 0: at its end only.
    memory
        6GB: method, freeze, lean, batch and imgsz, where not given, are the best that fits (see visionpeft fit).
    config
        A YAML file of these options, or the name of one of visionpeft's; options given besides override it.
    quiet
        Print nothing but mistakes.
    json_
        Print the run as JSON, and nothing else.
    """
    given = {k: v for k, v in locals().items() if v is not None and v is not False and k not in _OWN}
    said = recipes.read(config, "train") if config else {}
    quiet, json_ = quiet or bool(said.pop("quiet", False)), json_ or bool(said.pop("json", False))
    try:
        run = api.train(**_values({**said, **given, **options}), quiet=quiet or json_)
    except ConfigError as error:
        if not said:
            raise
        raise type(error)(f"{error} (options were read from {config})") from error
    if json_:
        print(json.dumps(run.to_dict(), indent=2))
    elif not quiet:
        print(run)


@app.command(group=_TRAIN)
def plan(
    *,
    model: str = "yolo11n.pt",
    data: str | None = None,
    method: str | None = None,
    freeze: str = "0",
    bn: str | None = None,
    head: str | None = None,
    memory: bool = False,
    imgsz: int | None = None,
    batch: int | None = None,
    lean: str | None = None,
    device: str | None = None,
    model_args: str | None = None,
    allow_download: bool = False,
    json_: bool = False,
    **options: Options,
) -> None:
    """Show what `train` would train and add, without training; with --memory, what memory it would take, too.

    Parameters
    ----------
    model
        As for train.
    data
        As for train; without it the model keeps its own classes.
    method
        As for train.
    freeze
        As for train.
    bn
        As for train.
    head
        As for train.
    memory
        Forecast the peak, in seconds, on a GPU; further settings as for train.
    imgsz
        As for train; for --memory, and for methods that look at the images before they plan.
    batch
        As for train; for the same.
    lean
        For --memory, as for train.
    device
        For --memory: cpu, else a GPU is meant.
    model_args
        As for train.
    allow_download
        As for train.
    json_
        Print JSON.
    """
    named = {"model": model, "data": data, "method": method, "freeze": freeze, "bn": bn, "head": head}
    more = {"imgsz": imgsz, "batch": batch, "lean": lean, "device": device}
    options |= {k: v for k, v in more.items() if v is not None}
    given = _values({**named, **options, "model_args": model_args, "allow_download": allow_download})
    if not memory:
        if alone := [k for k in ("lean", "device") if k in options]:
            raise ConfigError(f"{alone[0]} is no part of a plan; add --memory to forecast what it takes")
        made = planning.plan(**given)
        print(json.dumps(made.to_dict(), indent=2) if json_ else made)
        return
    forecast = planning.forecast(**given)
    both = {**forecast.plan.to_dict(), "memory": forecast.to_dict()}
    print(json.dumps(both, indent=2) if json_ else f"{forecast.plan}\n\n{forecast}")


@app.command(group=_TRAIN)
def fit(
    *,
    gpu: str,
    model: str = "yolo11n.pt",
    data: str | None = None,
    method: str | None = None,
    freeze: str | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    lean: str | None = None,
    device: str | None = None,
    model_args: str | None = None,
    allow_download: bool = False,
    json_: bool = False,
    **options: Options,
) -> None:
    """Show how to train a model in a GPU's memory: what fits, best first. Needs neither weights nor GPU.

    Further settings as for train (--objects: labelled objects in the fullest image, where no data are given).

    Parameters
    ----------
    gpu
        Its memory, as 6GB.
    model
        As for train.
    data
        As for train; without it 40 objects in the fullest image are assumed.
    method
        The only one to look at.
    freeze
        The only depth to look at.
    imgsz
        The only image size to look at.
    batch
        The only batch size to look at.
    lean
        The only level to look at.
    device
        cpu: the memory is the machine's.
    model_args
        As for train.
    allow_download
        As for train.
    json_
        Print JSON.
    """
    named = {"model": model, "data": data, "method": method, "freeze": freeze, "imgsz": imgsz, "batch": batch}
    named |= {"lean": lean, "device": device, "model_args": model_args, "allow_download": allow_download}
    found = planning.fit(gpu, **_values({**named, **options}))
    print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command(group=_USE)
def merge(delta: str, out: str, *, model: str | None = None, model_args: str | None = None) -> None:
    """Write base and delta as one plain checkpoint.

    Parameters
    ----------
    delta
        The delta file.
    out
        The checkpoint to write.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    """
    print(api.merge(delta, out, **_base(model, model_args)))


@app.command(group=_USE)
def val(
    delta: str,
    *,
    data: str,
    model: str | None = None,
    model_args: str | None = None,
    allow_download: bool = False,
    **options: Options,
) -> None:
    """Measure an adapted model; prints JSON.

    Parameters
    ----------
    delta
        The delta file.
    data
        As for train.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    allow_download
        As for train.
    """
    given = {**_base(model, model_args), "allow_download": allow_download}
    print(json.dumps(api.val(delta, data, **given, **_values(options)), indent=2))


@app.command(group=_USE)
def forgetting(
    delta: str,
    data: str,
    *,
    model: str | None = None,
    model_args: str | None = None,
    allow_download: bool = False,
    json_: bool = False,
    **options: Options,
) -> None:
    """Measure what the adapted body costs the base's own classes, under the base's own head.

    Parameters
    ----------
    delta
        The delta file.
    data
        Labelled images of the base's classes, under the base's own names.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    allow_download
        As for train.
    json_
        Print JSON.
    """
    given = {**_base(model, model_args), "allow_download": allow_download}
    found = api.forgetting(delta, data, **given, **_values(options))
    print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command(group=_USE)
def predict(delta: str, source: str, *, model: str | None = None, model_args: str | None = None, **options: Options) -> None:
    """Run an adapted model on images; prints one line of JSON per image.

    Parameters
    ----------
    delta
        The delta file.
    source
        An image, or a folder of images.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    """
    for result in api.predict(delta, source, **_base(model, model_args), **_values(options)):
        print(json.dumps(result if isinstance(result, dict) else {"file": result.path, **_found(result)}))


@app.command(group=_USE)
def export(
    delta: str,
    *,
    format: str = "onnx",
    out: str | None = None,
    model: str | None = None,
    model_args: str | None = None,
    exist_ok: bool = False,
    **options: Options,
) -> None:
    """Write an adapted model for deployment, merged first where it can be, or as an adapter for HF peft.

    Parameters
    ----------
    delta
        The delta file.
    format
        onnx or torchscript, or peft: a folder that HF peft reads.
    out
        The file or folder to write; by default beside the delta.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    exist_ok
        Replace a folder that is there.
    """
    print(api.export(delta, format, out, **_base(model, model_args), exist_ok=exist_ok, **_values(options)))


@app.command(name="import", group=_USE)
def import_(
    folder: str,
    *,
    model: str | None = None,
    out: str | None = None,
    data: str | None = None,
    model_args: str | None = None,
    allow_download: bool = False,
) -> None:
    """Make a delta of an adapter that HF peft has saved, or that `export --format peft` has written.

    Parameters
    ----------
    folder
        The folder with adapter_config.json and adapter_model.safetensors.
    model
        The base that the adapter was trained on; a folder of `export` names it itself.
    out
        The delta file to write; by default beside the folder.
    data
        As for train; says what the classes are called where they are not the base's.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}.
    allow_download
        As for train.
    """
    print(api.import_peft(folder, out, data=data, allow_download=allow_download, **_base(model, model_args)))


@app.command(group=_CHECK)
def inspect(delta: str) -> None:
    """Print what a delta file says of itself, as JSON.

    Parameters
    ----------
    delta
        The delta file.
    """
    header = api.inspect(delta)
    brief = {k: v for k, v in header["plan"].items() if k in ("method", "settings", "freeze", "bn")}
    print(json.dumps({**header, "plan": brief}, indent=2))


@app.command(group=_CHECK)
def verify(delta: str, *, model: str | None = None, model_args: str | None = None) -> None:
    """Check a delta and its base against each other; exits with 1 where they do not belong together.

    Parameters
    ----------
    delta
        The delta file.
    model
        The base; by default the one the delta names.
    model_args
        Arguments of timm's create_model, as {checkpoint_path: FILE}; by default those the delta names.
    """
    api.verify(delta, **_base(model, model_args))
    print(f"{delta}: whole, and made for this base")


@app.command(group=_KNOW)
def methods(name: str | None = None, *, markdown: bool = False) -> None:
    """List the methods, or the settings of one.

    Parameters
    ----------
    name
        A method.
    markdown
        Print the README's table.
    """
    if markdown:
        print(tables.methods_markdown(METHODS))
    elif name is None:
        print(tables.text("", ("method", "what it does"), [(n, tables.first_line(c)) for n, c in METHODS.items()]))
    else:
        fields = [(f, kind, default, comment) for f, kind, default, comment in fields_of(METHODS[name])]
        print(tables.first_line(METHODS[name]))
        print(tables.text("", ("setting", "type", "default", "meaning"), fields) if fields else "It has no settings.")


@app.command(group=_KNOW)
def families() -> None:
    """List the families of models."""
    rows = [(n, tables.summary(c)) for n, c in FAMILIES.items()]
    print(tables.text("", ("family", "models"), rows))


@app.command(group=_TRAIN)
def report(*results: str, out: str | None = None, markdown: str | None = None) -> None:
    """Write what `benchmark` found as a page of HTML that needs no network, and as Markdown.

    Parameters
    ----------
    results
        The folder that a benchmark wrote into, or several.
    out
        The page; by default RESULTS/report.html, or report.html here for several folders. With --markdown alone, none.
    markdown
        A file for the tables in Markdown.
    """
    for written in write_report(results, out, markdown):
        print(written)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0; 1 for a mismatch; 2 for a mistake, said in one sentence; 130 after Ctrl-C; 75 where
    a signal stopped a run that can be resumed."""
    if not (log := logging.getLogger("visionpeft")).handlers:
        log.addHandler(handler := logging.StreamHandler())
        handler.setFormatter(_Printable("visionpeft: %(message)s"))
    code = _guarded(lambda: app(arguments, exit_on_error=False, print_error=False))
    sys.exit(code)


class _Printable(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _guarded(run: Callable[[], Any]) -> int:
    try:
        run()
    except (VisionpeftError, CycloptsError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, Interrupted) and error.folder:
            sentence = f"{error.said}; go on with: visionpeft train --resume {shlex.quote(str(error.folder))}"
        print(f"visionpeft: {printable(sentence)}", file=sys.stderr)
        return error.code if isinstance(error, Interrupted) else 1 if isinstance(error, MismatchError) else 2
    except KeyboardInterrupt:
        print("visionpeft: interrupted", file=sys.stderr)
        return 130
    return 0


def _found(result: Any) -> dict[str, Any]:
    """Return what Ultralytics found in an image: boxes (with masks, keypoints, corners), or a class and the next best."""
    if result.probs is None:
        return {"boxes": result.summary()}
    top = [(result.names[i], round(float(p), 5)) for i, p in zip(result.probs.top5, result.probs.top5conf, strict=True)]
    return {"class": top[0][0], "score": top[0][1], "top5": top}


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Turn text from the command line into values: numbers, true and false, lists; freeze's "0,1,2" too."""
    made = {k.replace("-", "_"): _value(v) for k, v in options.items()}
    for name in _TEXT:
        if isinstance(options.get(name), str):
            made[name] = options[name]
    freeze = made.get("freeze")
    if isinstance(freeze, str):
        made["freeze"] = [_value(part) for part in freeze.split(",")]
    if isinstance(made.get("batch"), float) and made["batch"] >= 1:
        made["batch"] = int(made["batch"])
    return made


def _value(given: Any) -> Any:
    """Read a value as YAML does, and 1e-3 as a number, which YAML 1.1 does not."""
    if not isinstance(given, str):
        return given
    try:
        return recipes.number(read_yaml(given))
    except yaml.YAMLError:
        return given


def _base(model: str | None, model_args: str | None) -> dict[str, Any]:
    """Return what a base is loaded with."""
    made = _values({"model_args": model_args})["model_args"]
    if made is not None and not isinstance(made, dict):
        raise ConfigError(f"model_args='{model_args}' is not understood; write {{checkpoint_path: FILE, pad_type: same}}")
    return {"model": model, "model_args": made}
