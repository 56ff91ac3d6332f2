"""Sources of YOLO models and data: no file runs code, and only names in the user's own call are fetched."""

from __future__ import annotations

import ast
import copy
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import nn
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn import tasks
from ultralytics.nn.modules import TorchVision
from ultralytics.utils import SETTINGS, YAML
from ultralytics.utils.checks import check_file, check_yolov5u_filename
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES
from yaml.reader import Reader as ReaderOfText
from yaml.reader import ReaderError

from ...errors import DataError, ModelError, nearest
from ...files import read_yaml
from ...pickles import objection_to_array
from ...sources import find
from ..base import Arguments
from .output import stdout_to_stderr

_LARGEST = 1 << 16  # channels, classes and other numbers of a network's YAML
_STRIDE = 256  # pixels of the image to one of the last map
_LAYERS = 1000  # of a network, repetitions counted
_MOST = 1 << 30  # parameters
_METHODS = {name for name, value in vars(nn.Module).items() if callable(value)} - {"type"}  # Ultralytics' own name of a part
_WEB = re.compile(r"\w+:/")  # Ultralytics takes more for an address than "://"


def offline() -> bool:
    """Say whether Ultralytics is told to leave the network alone."""
    return os.environ.get("YOLO_OFFLINE", "").lower() not in ("", "0", "false", "no", "off", "n", "f")


# ------------------------------------------------------------------------------------------------------------- networks
def local(source: str) -> str | None:
    """Return the path of a checkpoint that is here, or in Ultralytics' own folder of weights."""
    source = _as_read(source)
    found = (p for p in (Path(source), Path(SETTINGS["weights_dir"], source)) if p.is_file())
    # with a folder before it, for Ultralytics deletes a damaged file of a bare name, and fetches it anew
    return next((str(p) if len(p.parts) > 1 else os.path.join(".", p) for p in found), None)


def checkpoint(source: str) -> str:
    """Return where a checkpoint is, or will be once Ultralytics has fetched it.

    Raises:
        ModelError: It is neither here nor to be had.
    """
    name = _as_read(_file(source))
    if file := local(name):
        return file
    if not _WEB.match(name) and name not in GITHUB_ASSETS_NAMES:
        hint = nearest(name, GITHUB_ASSETS_NAMES)
        raise ModelError(f"the model {source} is not here, nor one of Ultralytics'; give the path of a .pt file.{hint}")
    if offline():
        raise ModelError(f"the model {source} is not here, and YOLO_OFFLINE is set; give the path of a .pt file")
    return name if _WEB.match(name) else str(Path(SETTINGS["weights_dir"], name))


def check_parts(model: nn.Module) -> None:
    """Refuse a network whose parts carry hooks, or attributes in place of methods: using it would call them.

    Raises:
        ModelError: One does.
    """
    for path, module in nn.Module.named_modules(model):
        attributes = vars(module)
        hooks = [name for name, value in attributes.items() if name.endswith("_hooks") and value]
        if odd := [*hooks, *(attributes.keys() & _METHODS), *(name for name in attributes if name.startswith("__"))]:
            raise ModelError(
                f"the checkpoint's network carries {odd[0]} of its own at '{path}', which is not used; give another"
            )


def check_described(model: Any) -> None:
    """Refuse a checkpoint whose description of its network does not fit it: a model for other classes is made from that.

    Raises:
        ModelError: Its description is of something much larger.
    """
    check_design(model.yaml)
    try:
        described, there = _numbers(model.yaml), sum(p.numel() for p in model.parameters())
        held = all(t.numel() * t.element_size() <= t.untyped_storage().nbytes() for t in model.state_dict().values())
        fits = described <= 2 * there and held and 0 < float(model.stride.max()) <= _STRIDE
    except Exception as error:  # Ultralytics raises what comes
        raise ModelError(f"the checkpoint's description of its network makes none ({error!r}); give another") from error
    if not fits:
        raise ModelError("the checkpoint's description of its network does not fit the network; give another model")


def check_size(design: Arguments) -> None:
    """Refuse a network's YAML that describes more than any network is.

    Raises:
        ModelError: It does.
    """
    check_design(design)
    if (count := _numbers(design)) > _MOST:
        raise ModelError(f"the network's description has {count:,} parameters; give a smaller one")


def _numbers(design: Arguments) -> int:
    """Return how many parameters a network's YAML describes, without making them."""
    with torch.device("meta"):
        layers, _ = tasks.parse_model(copy.deepcopy(dict(design)), design.get("channels", 3), verbose=False)
    return sum(p.numel() for p in layers.parameters())


def check_named(source: str, scratch: bool) -> None:
    """Refuse a model that a file from elsewhere names, unless it is here.

    Args:
        source: What the file says.
        scratch: Whether it may be the YAML of a network without weights.

    Raises:
        ModelError: It is not.
    """
    file = _file(source)
    if file.endswith((".yaml", ".yml")):
        if not scratch or not (Path(source).is_file() or (Path(source).name == source and known(source))):
            raise ModelError(f"the model {source}, which is {'not here' if scratch else 'no checkpoint'}")
    elif file.startswith(("//", "\\\\")) or _as_read(file) != file or local(file) is None:
        raise ModelError(f"the model {source}, which is not here")


def known(design: str) -> bool:
    """Say whether Ultralytics has a network of this name."""
    try:
        return bool(tasks.yaml_model_load(design))
    except FileNotFoundError:
        return False


def _file(source: str) -> str:
    """Return the file that a model's name stands for."""
    return find(source if source.endswith((".pt", ".yaml", ".yml")) else f"{source}.pt")


def _as_read(source: str) -> str:
    """Return a checkpoint's name as Ultralytics reads it."""
    return check_yolov5u_filename(source.strip().replace("'", ""), verbose=False)


def check_design(design: Arguments) -> None:
    """Refuse a network's YAML, or a checkpoint's copy of it, that holds more than names of layers and plain numbers:
    Ultralytics evaluates its text, and makes whatever it names.

    Raises:
        ModelError: It does.
    """
    try:
        rows = [*design["backbone"], *design["head"]]
        scales = [s[:2] for s in (design.get("scales") or {}).values()]
        depths = [1.0, design.get("depth_multiple") or 0, design.get("width_multiple") or 0, *(x for s in scales for x in s)]
        layers = sum(max(n, 1) for _, n, _, _ in rows) * max(depths)
        plain = layers <= _LAYERS and all(
            _plain(of, _LAYERS) and isinstance(n, int) and _layer(name) and isinstance(args, list) and _plain(args)
            for of, n, name, args in rows
        )
        others = {k: v for k, v in design.items() if k not in ("backbone", "head", "activation")}
        plain = plain and _activation(design.get("activation")) and _plain(others, text=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"the network's description is incomplete ({type(error).__name__}: {error}); give another"
        ) from error
    if not plain:
        raise ModelError(
            "the network's description holds more than layers of Ultralytics and torch and plain numbers, and is not built; "
            "give another model"
        )


def _layer(name: str) -> bool:
    """Say whether Ultralytics would find a layer under this name."""
    space, _, last = name.rpartition(".")
    place = {"": tasks, "nn": nn, "torchvision.ops": torchvision.ops}.get(space)
    kind = getattr(place, last, None)
    is_layer = isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not TorchVision  # which fetches weights
    return is_layer and (place is not tasks or kind.__module__.startswith("ultralytics.nn.modules."))


def _activation(text: Any) -> bool:
    """Say whether a text is the call of one of torch's layers with plain numbers."""
    if not text:
        return True
    call = ast.parse(text, mode="eval").body if isinstance(text, str) and len(text) < 200 else None
    if not isinstance(call, ast.Call) or not re.fullmatch(r"(torch\.)?nn\.[A-Z]\w*", name := ast.unparse(call.func)):
        return False
    values = [*call.args, *(k.value for k in call.keywords)]
    kind = getattr(nn, name.rpartition(".")[2], nn.Module)
    small = kind.__module__ == "torch.nn.modules.activation" and kind is not nn.MultiheadAttention
    return (small or kind is nn.Identity) and all(isinstance(v, ast.Constant) and _plain(v.value) for v in values)


def _plain(value: Any, largest: float = _LARGEST, text: bool = True) -> bool:
    """Say whether a value is a number of usual size, or a list of them; with `text`, also the text of one."""
    if isinstance(value, str) and text:
        if len(value) > 100:
            return False
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return bool(re.fullmatch(r"[\w.-]*", value))  # a word
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return len(value) <= _LAYERS and all(_plain(v, largest, text) for v in value)
    return value is None or isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= largest)


# ----------------------------------------------------------------------------------------------------------------- data
def read_set(source: str, split: str = "", allow_download: bool = False) -> dict[str, Any]:
    """Return a data YAML as Ultralytics reads it, after it was looked through.

    Args:
        source: The YAML, or the name of one that Ultralytics ships.
        split: What has to be there; "" for what is validated on.
        allow_download: Let Ultralytics fetch a YAML from an address, and what is not here as its ``download`` says.

    Raises:
        DataError: It cannot be used.
    """
    described = _looked_through(source, allow_download)
    try:
        with stdout_to_stderr():
            fetch = allow_download and not offline()
            return check_det_dataset(described["yaml_file"], autodownload=fetch, split=split)
    except Exception as error:  # Ultralytics raises plain SyntaxError, TypeError, FileNotFoundError, AssertionError, ...
        text = " ".join(str(error).replace("❌", "").split())
        if isinstance(error, FileNotFoundError) and described.get("download") and not allow_download:
            raise DataError(
                f"the {split or 'val'} images of {source} are not here, and its 'download:' is code or an address; it is "
                "used if you say so: look at it, and give allow_download=True (--allow-download), or fetch them yourself"
            ) from error
        raise DataError(f"the data {source} cannot be used: {text if len(text) < 400 else f'{text[:400]}…'}") from error


def check_caches(folders: Iterable[Path]) -> None:
    """Refuse a data set whose caches, which lie beside these folders and are unpickled, are not as Ultralytics writes them.

    Raises:
        DataError: There is one.
    """
    for cache in sorted({folder.with_suffix(".cache") for folder in folders}):
        if cache.is_file() and (why := objection_to_array(cache)):
            raise DataError(f"the cache of labels {cache} is not as Ultralytics writes it ({why}); remove it")


def check_download(source: str, split: str) -> None:
    """Refuse data that Ultralytics, which reads the YAML anew, would fetch.

    Raises:
        DataError: Images of this split are missing, and the YAML says how to get them.
    """
    if source.endswith((".yaml", ".yml")) and _looked_through(source, False).get("download"):
        read_set(source, split)


def _looked_through(source: str, allow_download: bool) -> dict[str, Any]:
    """Return the content of a data YAML: plain values, in a text that no YAML reader takes long for."""
    file: Any = (
        source if Path(source).is_file() else check_file(source, download=allow_download and not offline(), hard=False)
    )
    if not file:
        fetched = " (an address is fetched only with allow_download=True, --allow-download)" if _WEB.match(source) else ""
        raise DataError(f"the data {source} cannot be used: there is no such file{fetched}; give the path of a data YAML")
    try:
        if zipfile.is_zipfile(file) or tarfile.is_tarfile(file):
            raise ValueError("it is an archive")  # which Ultralytics would unpack
        text = Path(file).read_text(encoding="utf-8", errors="ignore")
        try:
            read_yaml(text)
        except ReaderError:  # Ultralytics then leaves out what is no letter
            read_yaml(ReaderOfText.NON_PRINTABLE.sub("", text))
        return YAML.load(file, append_filename=True)  # the same text, in Ultralytics' own words
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise DataError(f"the data {source} cannot be used: {' '.join(str(error).split())[:400]}") from error
