"""The command line: every command is one verb of the API; its options are the verb's arguments.

Whatever imports torch is imported by the commands that need it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from cyclopts import App, CycloptsError, Group, Parameter

from . import __version__, config, presets, tables
from .benchmark.commands import benchmark
from .config import OPTIONS, RENAMED, by_new_names
from .data.commands import app as data_app
from .deprecation import Renamed, warn
from .errors import ConfigError, Interrupted, MismatchError, VisionpeftError, printable
from .files import read_yaml
from .helptext import arguments_of

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
_GROUPS = {name: Group(name, sort_key=i) for i, name in enumerate((config.MODEL, config.METHOD, config.HOW, config.RUN), 1)}


def _flags(*names: str, grouped: bool = False) -> type:
    """Return a dataclass of options of `train`, which cyclopts turns into flags; a flag not given is None or False."""
    fields: list[tuple[str, Any, Any]] = []
    for name in names:
        option, kind = OPTIONS[name], _flag_type(config.types()[name])
        said = Parameter(help=option.help)
        parameter = Parameter.combine(said, Parameter(group=_GROUPS[option.group])) if grouped else said
        fields.append((name, Annotated[kind, parameter], dataclasses.field(default=False if kind is bool else None)))
    made = dataclasses.make_dataclass("Flags", fields, namespace={"__module__": __name__}, frozen=True)
    return Parameter(name="*")(made)


def _flag_type(kind: Any) -> Any:
    """Return what a flag takes for an option of this type: a number where it is one, and else text, read by `_read`."""
    kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]) - {NoneType}
    one = next(iter(kinds)) if len(kinds) == 1 else str
    return bool if one is bool else one | None if one in (int, float) else str | None


Options = Annotated[Any, Parameter(show=False, allow_leading_hyphen=True)]
Delta = Annotated[str, Parameter(help="The delta file.")]
Download = Annotated[bool, Parameter(help=OPTIONS["allow_download"].help)]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON.")]
_RUN = Parameter(group=_GROUPS[config.RUN])
_PLAN = ("data", "method", "freeze", "bn", "head", "imgsz", "batch", "lean", "device", "model_args", "allow_download")
_SUGGEST = ("data", "method", "freeze", "imgsz", "batch", "lean", "device", "model_args", "allow_download")
TrainFlags = _flags(*(name for name in OPTIONS if name != "quiet"), grouped=True)
PlanFlags, SuggestFlags = _flags(*_PLAN), _flags(*_SUGGEST)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Base:
    """The base of a delta."""

    model: Annotated[str | None, Parameter(help="The base; by default the one that is named.")] = None
    model_args: Annotated[str | None, Parameter(help="Its loader's arguments, as for train; by default those named.")] = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the verbs."""
        made = _value(self.model_args)
        if made is not None and not isinstance(made, dict):
            raise ConfigError(
                f"model_args='{self.model_args}' is not understood; write {{checkpoint_path: FILE, pad_type: same}}"
            )
        return {"model": self.model, "model_args": made}


@app.command(group=_TRAIN)
def train(
    *,
    flags: TrainFlags = TrainFlags(),  # type: ignore[valid-type]  # noqa: B008
    config: Annotated[str | None, Parameter(group=_GROUPS[config.MODEL])] = None,
    quiet: Annotated[bool, _RUN, Parameter(help=OPTIONS["quiet"].help)] = False,
    json_: Annotated[bool, _RUN] = False,
    **options: Options,
) -> None:
    """Train, and leave a delta, a merged checkpoint and run.json in the run's folder.

    Fields of the method (--r 16) and further arguments of the family (--mosaic 0) are options too: see `visionpeft methods`.

    Parameters
    ----------
    config
        A YAML file of these options, or the name of one of visionpeft's; options given besides override it.
    json_
        Print the run as JSON, and nothing else.
    """
    from . import api

    preset = presets.read(config, "train") if config else {}
    quiet, json_ = quiet or bool(preset.pop("quiet", False)), json_ or bool(preset.pop("json", False))
    try:
        run = api.train(**_read({**by_new_names(preset), **_given(flags), **by_new_names(options)}), quiet=quiet or json_)
    except ConfigError as error:
        if not preset:
            raise
        raise type(error)(f"{error} (options were read from {config})") from error
    if json_:
        print(json.dumps(run.to_dict(), indent=2))
    elif not quiet:
        print(run)


@app.command(group=_TRAIN)
def plan(
    *,
    flags: PlanFlags = PlanFlags(),  # type: ignore[valid-type]  # noqa: B008
    model: str = "yolo11n.pt",
    json_: Json = False,
    **options: Options,
) -> None:
    """Show what `train` would train and add, without training; `forecast` shows the memory that it takes, too.

    Parameters
    ----------
    model
        A YOLO checkpoint, or timm/NAME. Without --data it keeps its own classes.
    """
    from . import planning

    given = {**_given(flags), **options}
    if alone := [k for k in ("lean", "device") if k in given]:
        raise ConfigError(f"{alone[0]} is no part of a plan; forecast the memory that it takes: visionpeft forecast")
    made = planning.plan(model, **_read(given))
    print(json.dumps(made.to_dict(), indent=2) if json_ else made)


@app.command(group=_TRAIN)
def forecast(
    *,
    flags: PlanFlags = PlanFlags(),  # type: ignore[valid-type]  # noqa: B008
    model: str = "yolo11n.pt",
    json_: Json = False,
    **options: Options,
) -> None:
    """Show a plan, and the memory that it takes at its peak, in seconds. Needs neither weights nor GPU.

    Further settings as for train (--objects: labelled objects in the fullest image, where no data are given).

    Parameters
    ----------
    model
        A YOLO checkpoint, or timm/NAME. Without --data it keeps its own classes.
    """
    from . import planning

    made = planning.forecast(model, **_read({**_given(flags), **options}))
    both = {**made.plan.to_dict(), "memory": made.to_dict()}
    print(json.dumps(both, indent=2) if json_ else f"{made.plan}\n\n{made}")


@app.command(group=_TRAIN)
def suggest(
    *,
    flags: SuggestFlags = SuggestFlags(),  # type: ignore[valid-type]  # noqa: B008
    memory: str,
    model: str = "yolo11n.pt",
    json_: Json = False,
    **options: Options,
) -> None:
    """Show how to train a model in a GPU's memory: what fits, best first. Needs neither weights nor GPU.

    What is given stays as it is, the rest is searched. Further settings as for train (--objects: labelled objects in the
    fullest image, where no data are given: else 40).

    Parameters
    ----------
    memory
        The GPU's, as 6GB; with --device cpu the machine's.
    model
        A YOLO checkpoint, or timm/NAME.
    """
    from . import planning

    found = planning.suggest(memory, model=model, **_read({**_given(flags), **options}))
    print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command(group=_USE)
def merge(
    delta: Delta,
    out: Annotated[str, Parameter(help="The checkpoint to write.")],
    *,
    base: Base = Base(),  # noqa: B008
) -> None:
    """Write base and delta as one plain checkpoint."""
    from . import api

    print(api.merge(delta, out, **base.arguments()))


@app.command(group=_USE)
def val(
    delta: Delta,
    *,
    data: Annotated[str, Parameter(help=OPTIONS["data"].help)],
    base: Base = Base(),  # noqa: B008
    allow_download: Download = False,
    **options: Options,
) -> None:
    """Measure an adapted model; prints JSON."""
    from . import api

    given = {**base.arguments(), "allow_download": allow_download}
    print(json.dumps(api.val(delta, data, **given, **_read(options)), indent=2))


@app.command(group=_USE)
def forgetting(
    delta: Delta,
    data: Annotated[str, Parameter(help="Labelled images of the base's classes, under the base's own names.")],
    *,
    base: Base = Base(),  # noqa: B008
    allow_download: Download = False,
    json_: Json = False,
    **options: Options,
) -> None:
    """Measure what the adapted body costs the base's own classes, under the base's own head."""
    from . import api

    given = {**base.arguments(), "allow_download": allow_download}
    found = api.forgetting(delta, data, **given, **_read(options))
    print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command(group=_USE)
def predict(
    delta: Delta,
    source: Annotated[str, Parameter(help="An image, or a folder of images.")],
    *,
    base: Base = Base(),  # noqa: B008
    **options: Options,
) -> None:
    """Run an adapted model on images; prints one line of JSON per image."""
    from . import api

    adapted = api.load(delta, **base.arguments())
    for prediction in api.predict(adapted, source, **_read(options)):
        print(json.dumps(adapted.family.to_json(prediction)))


@app.command(group=_USE)
def export(
    delta: Delta,
    *,
    format: Annotated[str, Parameter(help="onnx or torchscript, or peft: a folder that HF peft reads.")] = "onnx",
    out: Annotated[str | None, Parameter(help="The file or folder to write; by default beside the delta.")] = None,
    base: Base = Base(),  # noqa: B008
    exist_ok: Annotated[bool, Parameter(help="Replace a folder that is there.")] = False,
    **options: Options,
) -> None:
    """Write an adapted model for deployment, merged first where it can be, or as an adapter for HF peft."""
    from . import api

    print(api.export(delta, format, out, **base.arguments(), exist_ok=exist_ok, **_read(options)))


@app.command(name="import", group=_USE)
def import_(
    folder: Annotated[str, Parameter(help="The folder with adapter_config.json and adapter_model.safetensors.")],
    *,
    base: Base = Base(),  # noqa: B008
    out: Annotated[str | None, Parameter(help="The delta file to write; by default beside the folder.")] = None,
    data: Annotated[str | None, Parameter(help="As for train; names the classes where they are not the base's.")] = None,
    allow_download: Download = False,
) -> None:
    """Make a delta of an adapter that HF peft has saved, or that `export --format peft` has written."""
    from . import api

    print(api.import_peft(folder, out, data=data, allow_download=allow_download, **base.arguments()))


@app.command(group=_CHECK)
def inspect(delta: Delta) -> None:
    """Print what a delta file says of itself, as JSON."""
    from . import api

    header = api.inspect(delta)
    brief = {k: v for k, v in header["plan"].items() if k in ("method", "settings", "freeze", "bn")}
    print(json.dumps({**header, "plan": brief}, indent=2))


@app.command(group=_CHECK)
def verify(delta: Delta, *, base: Base = Base()) -> None:
    """Check a delta and its base against each other; exits with 1 where they do not belong together."""
    from . import api

    api.verify(delta, **base.arguments())
    print(f"{delta}: whole, and made for this base")


@app.command(group=_KNOW)
def methods(
    name: Annotated[str | None, Parameter(help="A method.")] = None,
    *,
    markdown: Annotated[bool, Parameter(help="Print the README's table.")] = False,
) -> None:
    """List the methods, or the settings of one."""
    from .core.method import fields_of
    from .registry import METHODS

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
    from .registry import FAMILIES

    print(tables.text("", ("family", "models"), [(n, tables.summary(c)) for n, c in FAMILIES.items()]))


@app.command(group=_TRAIN)
@arguments_of("visionpeft.report.writing", "write")
def report(*results: str, out: str | None = None, markdown: str | None = None) -> None:
    """Write what `benchmark` found as a page of HTML that needs no network, and as Markdown."""
    from .report import write

    for written in write(results, out, markdown):
        print(written)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0; 1 for a mismatch; 2 for a mistake, said in one sentence; 130 after Ctrl-C; 75 where
    a signal stopped a run that can be resumed."""
    if not (log := logging.getLogger("visionpeft")).handlers:
        log.addHandler(handler := logging.StreamHandler())
        handler.setFormatter(_Printable("visionpeft: %(message)s"))
    with warnings.catch_warnings():
        warnings.showwarning = _shown(warnings.showwarning)
        warnings.simplefilter("always", Renamed)
        words = _renamed(sys.argv[1:] if arguments is None else arguments)
        code = _guarded(lambda: app(words, exit_on_error=False, print_error=False))
    sys.exit(code)


class _Printable(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _shown(other: Callable[..., None]) -> Callable[..., None]:
    """Return what shows warnings: of old names in one line, of all else as before."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Renamed):
            logging.getLogger("visionpeft").warning("%s", message)
        else:
            other(message, category, *where, **more)

    return show


def _renamed(words: list[str]) -> list[str]:
    """Return a command line by today's names."""
    if words[:1] == ["fit"]:
        warn("fit --gpu", "suggest --memory")
        return ["suggest", *(f"--memory{word[5:]}" if word.partition("=")[0] == "--gpu" else word for word in words[1:])]
    if words[:1] == ["plan"] and "--memory" in words:
        warn("plan --memory", "forecast")
        return ["forecast", *(word for word in words[1:] if word != "--memory")]
    return words


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


def _given(flags: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(flags).items() if value is not None and value is not False}


def _read(options: config.Options) -> dict[str, Any]:
    """Turn text into values: numbers, true and false, lists; freeze's "0,1,2" too."""
    made = {}
    for name, value in ((k.replace("-", "_"), v) for k, v in options.items()):
        option = OPTIONS.get(RENAMED.get(name, name))
        text = option.text if option else _is_text(name)
        made[name] = value if text else _value(value)
    freeze, batch = made.get("freeze"), made.get("batch")
    if isinstance(freeze, str):
        made["freeze"] = [_value(part) for part in freeze.split(",")]
    if isinstance(batch, float) and batch >= 1:
        made["batch"] = int(batch)
    return made


def _is_text(field: str) -> bool:
    """Say whether a method has a setting of this name that is text: it makes of text what it needs."""
    from .registry import METHODS

    kinds = [str(f.type) for cls in METHODS.values() for f in dataclasses.fields(cls) if f.name == field]
    return any("str" in kind and not any(word in kind for word in ("bool", "int", "float")) for kind in kinds)


def _value(given: Any) -> Any:
    """Read a value as YAML does, and 1e-3 as a number, which YAML 1.1 does not."""
    if not isinstance(given, str):
        return given
    try:
        return presets.number(read_yaml(given))
    except yaml.YAMLError:
        return given
