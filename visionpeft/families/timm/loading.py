"""Classifiers of timm: made with the weights of a file or of the hub, or refused in a sentence; merged files; heads."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import nn

from ... import files, schema
from ...core.attach import attached, merge, mergeable
from ...core.base_model import Base
from ...core.delta import read_metadata
from ...data.layout import composed
from ...errors import ModelError, nearest, one_line
from ...pickles import objection
from ...schema import Malformed
from ..base import Arguments
from .anatomy import classifiers, input_size

LOGGER = logging.getLogger("visionpeft")
KEY = "timm"  # of the metadata of a merged file, with the facts that open it again
_SOURCES = {"checkpoint_path", "pretrained", "num_classes", "cache_dir"}  # arguments that say where a base comes from


@dataclass(frozen=True)
class Merged:
    """The facts that a merged file holds beside its tensors."""

    architecture: str
    model_args: Arguments
    names: Mapping[str, str]
    input: Arguments

    def __post_init__(self) -> None:
        if self.names.keys() != {str(i) for i in range(len(self.names))}:
            raise Malformed("its names are not those of classes numbered from 0 on")


def load(source: str, options: Arguments) -> Base:
    """Load a base; see `Family.load`.

    Raises:
        ModelError: It cannot be had, or does not classify RGB images.
    """
    name = source.removeprefix("timm/")
    if not timm.is_model(name):
        raise ModelError(f"timm has no model '{name}'.{nearest(name, timm.list_models())}")
    pretrained = options.get("checkpoint_path") is not None or options.get("pretrained", True)
    with torch.random.fork_rng(devices=[]):
        if not pretrained:
            torch.manual_seed(0)  # random weights, but always the same: a run that is resumed has them again
        model: Any = _create(name, options)
    if not hasattr(model, "get_classifier") or options.get("in_chans", input_size(model)[0]) != 3:
        raise ModelError(f"{source} with {options} does not classify RGB images; give a model that does")
    model = model.float().eval()
    model.names = _class_names(model, options)
    return Base(source, model, "classify", dict(model.names), _input(model), bool(pretrained))


def _create(name: str, options: Arguments) -> nn.Module:
    """Call create_model, and say in one sentence why it failed."""
    path = options.get("checkpoint_path")
    arguments = {**options, "num_classes": options.get("num_classes")}
    try:
        if path is not None:
            arguments = {**arguments, "pretrained": False, **from_file(name, str(path), options)}
        elif arguments.setdefault("pretrained", True):
            arguments = {**arguments, **_from_hub(name, options)}
        model = _sized(timm.create_model(name, **arguments), options)
        model.pretrained_cfg.pop("state_dict", None)  # the weights are in the model now
        return model
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"there is no checkpoint {path}; give the path of a file that timm can read") from error
    except Exception as error:  # timm raises RuntimeError, TypeError, KeyError, AssertionError, SafetensorError, ...
        text = one_line(error, 200)
        if "weights_only" in str(error):  # the advice to unpickle it all the same
            text = "the checkpoint holds more than tensors and plain values"
        with_options = f" with {dict(options)}" if options else ""
        raise ModelError(f"timm cannot make {name}{with_options}: {text}") from error


def _sized(model: Any, options: Arguments) -> Any:
    """Let a model that was made for an image size of its own say so."""
    if size := options.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.pretrained_cfg["input_size"][0], height, width)}
    return model


def from_file(name: str, path: str, options: Arguments) -> Arguments:
    """Return the arguments that load a checkpoint with as many classes as it has."""
    if not path.endswith(".safetensors") and Path(path).is_file() and (why := objection(path)):
        raise ModelError(f"the checkpoint {path} cannot be read: {why}")
    saved = load_state_dict(path, weights_only=True)  # in timm's own words, its default: not of all versions
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    cfg = timm.get_pretrained_cfg(name)
    state = _unwrapped(saved, str(getattr(cfg, "first_conv", "")))
    classifier = getattr(cfg, "classifier", None) or ""
    weight = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    count = options.get("num_classes", 0 if weight is None else len(weight))
    if "img_size" not in options and state is saved:
        return {"num_classes": count}
    # loaded as pretrained weights, position embeddings are resized to the new image size, and names may be the model's own
    overlay |= {"file": path} if state is saved else {"state_dict": state}
    overlay["num_classes"] = count
    return {"num_classes": count, "checkpoint_path": None, "pretrained": True, "pretrained_cfg_overlay": overlay}


def _unwrapped(state: Arguments, first_layer: str) -> Arguments:
    """Return a checkpoint's tensors by the names that the model itself has: training loops save them within a module of
    theirs ("model.", as Lightning does), or under a key of their own."""
    tensors = state.get("model_state_dict", state)
    outer = {name.partition(".")[0] for name in tensors}
    if len(outer) != 1 or f"{first_layer}.weight" in tensors:
        return tensors
    return {name.partition(".")[2]: value for name, value in tensors.items()}


def _from_hub(name: str, options: Arguments) -> Arguments:
    """Return the arguments that spare the user minutes of retries where the hub cannot be reached.

    Raises:
        ModelError: It cannot be reached, and the weights have not been downloaded before.
    """
    cfg = timm.get_pretrained_cfg(name)
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    repository = overlay.get("hf_hub_id") or getattr(cfg, "hf_hub_id", None)
    if not repository or overlay.get("file") or overlay.get("state_dict"):
        return {}
    try:
        if not hub.HF_HUB_OFFLINE:
            get_session().head(hub.ENDPOINT, timeout=5)
            return {}
    except Exception:  # of whichever HTTP client the hub's library uses
        LOGGER.debug("the hub cannot be reached", exc_info=True)
    file = overlay.get("hf_hub_filename") or getattr(cfg, "hf_hub_filename", None) or "model.safetensors"
    try:
        path = hf_hub_download(repository, file, cache_dir=options.get("cache_dir"), local_files_only=True)
    except OSError as error:
        raise ModelError(
            f"the weights of {name} are not here and {hub.ENDPOINT} cannot be reached; give a local file with "
            "model_args={'checkpoint_path': ...}, or random weights with model_args={'pretrained': False}"
        ) from error
    return {"pretrained_cfg_overlay": {**overlay, "file": path}}


def _class_names(model: Any, options: Arguments) -> dict[int, str]:
    """Return the names of the classes: as our merged file says, as timm's own weights say, or by number."""
    path = str(options.get("checkpoint_path") or "")
    if facts := _read_facts(Path(path)) if path.endswith(".safetensors") else None:
        return {int(i): name for i, name in facts.names.items()}
    labels = model.pretrained_cfg.get("label_names")
    subset = None if path or not options.get("pretrained", True) else infer_imagenet_subset(model)
    if subset and not labels:
        labels = ImageNetInfo(subset).label_names()
    plainly = labels if isinstance(labels, list | tuple) and len(labels) == model.num_classes else range(model.num_classes)
    return {i: str(name) for i, name in enumerate(plainly)}


def _read_facts(path: Path) -> Merged | None:
    """Return the facts that `save_merged` wrote into a file; None in one of others."""
    try:
        if not (text := read_metadata(path).get(KEY)):
            return None
        return schema.check(Merged, schema.parse(text), newer=False)
    except (SafetensorError, Malformed) as error:
        raise ModelError(f"what visionpeft wrote into {path} cannot be used ({error}); get the file again") from error


def _input(model: Any) -> dict[str, Any]:
    """Return how a model reads images, which a delta repeats."""
    config = resolve_model_data_config(model)
    size = input_size(model)
    if size[1] != size[2]:
        raise ModelError(f"this model reads images of {size[1]}×{size[2]}, but only square ones are supported")
    numbers = {"mean": list(config["mean"]), "std": list(config["std"])}
    return {"imgsz": size[1], **numbers, **{k: config[k] for k in ("interpolation", "crop_pct", "crop_mode")}}


# ------------------------------------------------------------------------------------------------------------ merged files
def save_merged(model: Any, header: Arguments, out: Path) -> Path:
    """Write a file that timm opens, with the facts that its arguments lack."""
    facts = Merged(
        architecture=header["base"]["model"].removeprefix("timm/"),
        model_args={k: v for k, v in header["base"]["model_args"].items() if k not in _SOURCES},
        names=header["names"],
        input=header["input"],
    )
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    return files.write(out, save_tensors(tensors, {KEY: json.dumps(asdict(facts), sort_keys=True)}))


def open_merged(path: Path) -> nn.Module:
    """Open a merged file as its user would: with timm.create_model.

    Raises:
        ModelError: It is no file that visionpeft wrote.
    """
    facts = _read_facts(path) if path.is_file() else None
    if facts is None:
        raise ModelError(f"{path} is no merged file of visionpeft; give one, or a delta file")
    model: Any = timm.create_model(
        facts.architecture, num_classes=len(facts.names), checkpoint_path=str(path), **facts.model_args
    )
    model.names = {int(i): name for i, name in facts.names.items()}
    return _sized(model, facts.model_args).eval()


def merged_copy(model: nn.Module) -> Any:
    model = copy.deepcopy(model).cpu().eval()
    return merge(model) if attached(model) is not None and mergeable(model) else model


# ------------------------------------------------------------------------------------------------------------------- heads
def with_head(base: Base, names: Mapping[int, str], head: str) -> nn.Module:
    """Return a copy of a base whose classifier is made for `names`; see `Family.with_head`."""
    model: Any = copy.deepcopy(base.model)
    if head == "keep" and dict(names) == base.names:
        return model
    before = {n: p for h in classifiers(model) for n, p in _inside(model, h)}
    model.reset_classifier(len(names))
    model.names = dict(names)
    if head == "keep":
        old = {composed(name): i for i, name in base.names.items()}
        rows = [(i, old[composed(name)]) for i, name in names.items() if composed(name) in old]
        with torch.no_grad():
            for name, parameter in (x for h in classifiers(model) for x in _inside(model, h)):
                _keep_rows(parameter, before.get(name), rows, len(names), len(base.names))
    return model


def _inside(model: nn.Module, head: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((f"{head}.{n}", p) for n, p in model.get_submodule(head).named_parameters())


def _keep_rows(new: Any, old: Any, rows: list[tuple[int, int]], classes: int, old_classes: int) -> None:
    """Copy the rows of a classifier's old parameter that still have a meaning: of classes that stay, or all."""
    if old is None or old.shape[1:] != new.shape[1:]:
        return
    if len(new) == classes and len(old) == old_classes:
        for to, of in rows:
            new[to] = old[of]
    elif new.shape == old.shape:
        new.copy_(old)
