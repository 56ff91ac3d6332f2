"""timm: image classifiers by any of its architectures' names, on folders of images, trained by the loop in loop.py."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import get_session
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from ... import files, schema
from ...config import SettledConfig
from ...core.anatomy import Anatomy
from ...core.attach import attached, merge, mergeable
from ...core.base_model import Base, Data
from ...core.delta import read_metadata
from ...data.layout import composed
from ...errors import ConfigError, DataError, ModelError, nearest
from ...pickles import objection
from ...registry import FAMILIES
from ...schema import Malformed
from ...training.feature_cache import ViewSchedule
from ...training.job import Job
from ...training.plots import Picture, spread
from ..base import DryRun, EvalResult, Family, LeadingStages, Step
from ..classification import Images, draw, few, loader, open_image, read_folders, score, sources, split_folders
from ..introspect import observe
from ..predictions import Answers
from . import trainer as loop
from .anatomy import classifiers, input_size, leading, read_anatomy
from .sources import check_named

LOGGER = logging.getLogger("visionpeft")
KEY = "timm"  # the metadata of a merged file: what opens it again
_SOURCES = {"checkpoint_path", "pretrained", "num_classes", "cache_dir"}  # arguments that say where a base comes from


@dataclass(frozen=True)
class Merged:
    """What `save_merged` writes of a model beside its tensors."""

    architecture: str
    model_args: Mapping[str, Any]
    names: Mapping[str, str]
    input: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.names.keys() != {str(i) for i in range(len(self.names))}:
            raise Malformed("its names are not those of classes numbered from 0 on")


@FAMILIES.register("timm")
class Timm(Family):
    """Classifiers of timm: "timm/NAME", or NAME alone; a local file with model_args={"checkpoint_path": ...}."""

    suffix: ClassVar[str] = ".safetensors"
    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 30,
        "imgsz": None,  # the model's own, see defaults_for
        "batch": 32,
        "lr0": 1e-3,
        "optimizer": "adamw",
        "workers": 4,
        "head": "rebuild",
    }
    body_lr_scale: ClassVar[float] = 0.6  # a new classifier may learn faster than the pretrained body should change
    bn: ClassVar[str | None] = "frozen"  # a batch's statistics of small late maps are noise (benchmarks/defaults.md)

    def supports(self, source: str) -> bool:
        return source.startswith("timm/") or timm.is_model(source)

    def model_names(self) -> Iterable[str]:
        return [f"timm/{name}" for name in timm.list_models()]

    def train_options(self) -> Iterable[str]:
        return list(loop.Recipe.__dataclass_fields__)

    def defaults_for(self, base: Base) -> dict[str, Any]:
        return {**self.defaults, "imgsz": base.facts["imgsz"]}

    def primary_metric(self, task: str) -> str:
        return "top1"

    def check(self, config: SettledConfig) -> None:
        loop.check(config)

    def load(self, source: str, **options: Any) -> Base:
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
        return Base(source, model, "classify", dict(model.names), _facts(model), bool(pretrained))

    def load_architecture(self, source: str, **options: Any) -> Base:
        if options.get("checkpoint_path") is not None and Path(options["checkpoint_path"]).is_file():
            return self.load(source, **options)
        return self.load(source, **{**options, "checkpoint_path": None, "pretrained": False})

    def check_named(
        self, source: str | None, named: Mapping[str, Any], own: Mapping[str, Any], scratch: bool = False
    ) -> dict[str, Any]:
        return check_named(source and source.removeprefix("timm/"), named, own, scratch)

    # ---------------------------------------------------------------------------------------------------------- the data
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        return read_folders(source, split, train=train)

    # --------------------------------------------------------------------------------------------------------- the model
    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
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

    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        return read_anatomy(model, self.name, name)

    def leading_stages(self, base: Base, stages: int, imgsz: int) -> LeadingStages:
        return LeadingStages(leading(base.model, stages), (), (3, imgsz, imgsz))

    def view_schedule(self, views: int, config: SettledConfig, task: str) -> ViewSchedule:
        return loop.rounds(views, config)

    def augmentation_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return loop.augmentation(settings)

    def max_objects(self, data: Data, settings: Mapping[str, Any]) -> tuple[int, float]:
        return 0, 0.0

    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
        if step.imgsz != base.facts["imgsz"]:
            _check_size(base.model, step.imgsz, base.facts["imgsz"])
        return loop.rehearse(model, step)

    # ------------------------------------------------------------------------------------------------------------ the run
    def losses(self, model: nn.Module, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        images = Images(spread(data.facts["train"], batch * count), transform(model, imgsz))
        device = next(model.parameters()).device
        for inputs, labels in loader(images, batch):
            yield nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))

    def train(self, job: Job) -> None:
        loop.run(self, job, transform)

    def check_classes(self, names: Mapping[int, str], data: Data) -> None:
        known = set(map(composed, names.values()))
        if strange := [name for name in data.names.values() if composed(name) not in known]:
            raise DataError(
                f"{data.source} has the class '{strange[0]}', which this model does not know; it knows {few(names.values())}"
            )

    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        use = _use(options, imgsz=None, batch=32, device=None, workers=0)
        device = loop.select_device(use["device"])
        own: Any = copy.deepcopy(model).to(device)
        names = getattr(own, "names", data.names)
        self.check_classes(names, data)
        index = {composed(name): i for i, name in names.items()}
        items = [(file, index[composed(data.names[i])]) for file, i in data.facts["val"]]
        images = Images(items, transform(own, use["imgsz"]))
        guesses: list[int] = []
        metrics = score(own, loader(images, use["batch"], use["workers"]), len(index), guesses=guesses)
        return EvalResult(metrics, Answers.gather([f for f, _ in items], [i for _, i in items], guesses))

    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        return split_folders(data, folder, share)

    @torch.no_grad()
    def predict(self, model: nn.Module, source: Any, **options: Any) -> list[dict[str, Any]]:
        """Return {"file", "class", "score", "top5"} of each image; `source`: a path, a folder, a PIL image, or a list."""
        use = _use(options, imgsz=None, batch=32, device=None)
        own: Any = _merged_copy(model).to(loop.select_device(use["device"]))
        prepare = transform(own, use["imgsz"])
        images = list(sources(source))
        results = []
        for start in range(0, len(images), use["batch"]):
            chunk = images[start : start + use["batch"]]
            batch = torch.stack([prepare(open_image(image)) for image in chunk])
            shares, classes = own(batch.to(next(own.parameters()).device)).softmax(1).topk(min(5, len(own.names)))
            for image, share, guess in zip(chunk, shares.tolist(), classes.tolist(), strict=True):
                top = [(own.names[i], round(p, 5)) for i, p in zip(guess, share, strict=True)]
                file = None if isinstance(image, Image.Image) else str(image)
                results.append({"file": file, "class": top[0][0], "score": top[0][1], "top5": top})
        return results

    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        def guess(images: list[Image.Image]) -> list[tuple[str, float]]:
            return [(r["class"], r["score"]) for r in self.predict(model, images, **options)]  # type: ignore[arg-type]

        return draw(data, count, guess if model is not None else None)

    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        use = _use(options, imgsz=None, dynamic=True)
        own = _merged_copy(model)
        transform(own, use["imgsz"])  # refuses a size that the model cannot read
        _, *size = input_size(own)
        x = torch.zeros(2, 3, *([use["imgsz"]] * 2 if use["imgsz"] else size))

        def write(path: Path) -> None:
            if format == "torchscript":
                torch.jit.save(torch.jit.trace(own, x, check_trace=False), str(path))
                return
            axes = {"images": {0: "batch"}, "logits": {0: "batch"}} if use["dynamic"] else None
            names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
            torch.onnx.export(own, (x,), str(path), dynamo=False, dynamic_axes=axes, **names)

        with torch.no_grad():
            return files.replace(out, write)

    def loading_snippet(self, base: Base, header: Mapping[str, Any]) -> str:
        name, given = base.source.removeprefix("timm/"), header["base"]["model_args"]
        arguments = {**given, "num_classes": len(base.names)}
        if path := given.get("checkpoint_path"):
            arguments = {k: v for k, v in {**arguments, **_from_file(name, path, given)}.items() if v is not None}
        if not path or "img_size" in given:
            arguments = {"pretrained": base.pretrained, **arguments}
        lines = ["import timm", f"model = timm.create_model({name!r}, {_written(arguments)})"]
        if len(header["names"]) != len(base.names):
            lines.append(f"model.reset_classifier({len(header['names'])})")
        return "\n".join(lines)

    def open_merged(self, path: Path) -> nn.Module:
        return open_merged(path)

    def save_merged(self, model: Any, header: Mapping[str, Any], out: Path) -> Path:
        said = {
            "architecture": header["base"]["model"].removeprefix("timm/"),
            "model_args": {k: v for k, v in header["base"]["model_args"].items() if k not in _SOURCES},
            "names": header["names"],
            "input": header["input"],
        }
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        return files.write(out, save_tensors(tensors, {KEY: json.dumps(said, sort_keys=True)}))


# ------------------------------------------------------------------------------------------------------ loading and using
def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Call create_model, and say in one sentence what it could not do."""
    path = options.get("checkpoint_path")
    arguments = {**options, "num_classes": options.get("num_classes")}
    try:
        if path is not None:
            arguments = {**arguments, "pretrained": False, **_from_file(name, str(path), options)}
        elif arguments.setdefault("pretrained", True):
            arguments = {**arguments, **_from_hub(name, options)}
        model = _sized(timm.create_model(name, **arguments), options)
        model.pretrained_cfg.pop("state_dict", None)  # what was loaded is in the model now
        return model
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"there is no checkpoint {path}; give the path of a file that timm can read") from error
    except Exception as error:  # timm raises RuntimeError, TypeError, KeyError, AssertionError, SafetensorError, ...
        text = " ".join(str(error).split())
        if "weights_only" in text:  # the advice to unpickle it all the same
            text = "the checkpoint holds more than tensors and plain values"
        given = f" with {dict(options)}" if options else ""
        raise ModelError(f"timm cannot make {name}{given}: {text[:200] + '…' if len(text) > 200 else text}") from error


def _sized(model: Any, options: Mapping[str, Any]) -> Any:
    """Let a model that was made for an image size of its own say so."""
    if size := options.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.pretrained_cfg["input_size"][0], height, width)}
    return model


def _from_file(name: str, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that load a checkpoint with as many classes as it has."""
    if not path.endswith(".safetensors") and Path(path).is_file() and (why := objection(path)):
        raise ModelError(f"the checkpoint {path} cannot be read: {why}")
    given = load_state_dict(path, weights_only=True)  # in timm's own words, its default: not of all versions
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    cfg = timm.get_pretrained_cfg(name)
    state = _unwrapped(given, str(getattr(cfg, "first_conv", "")))
    classifier = getattr(cfg, "classifier", None) or ""
    weight = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    count = options.get("num_classes", 0 if weight is None else len(weight))
    if "img_size" not in options and state is given:
        return {"num_classes": count}
    # loaded as pretrained weights, position embeddings are resized to the new image size, and names may be the model's own
    overlay |= {"file": path} if state is given else {"state_dict": state}
    overlay["num_classes"] = count
    return {"num_classes": count, "checkpoint_path": None, "pretrained": True, "pretrained_cfg_overlay": overlay}


def _unwrapped(state: Mapping[str, Any], first_layer: str) -> Mapping[str, Any]:
    """Return a checkpoint's tensors by the names that the model itself has: training loops save them within a module of
    theirs ("model.", as Lightning does), or under a key of their own."""
    tensors = state.get("model_state_dict", state)
    outer = {name.partition(".")[0] for name in tensors}
    if len(outer) != 1 or f"{first_layer}.weight" in tensors:
        return tensors
    return {name.partition(".")[2]: value for name, value in tensors.items()}


def _from_hub(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
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


def _class_names(model: Any, options: Mapping[str, Any]) -> dict[int, str]:
    """Return what the classes are called: as our merged file says, as timm's own weights say, or by number."""
    path = str(options.get("checkpoint_path") or "")
    if said := _said(Path(path)) if path.endswith(".safetensors") else None:
        return {int(i): name for i, name in said["names"].items()}
    labels = model.pretrained_cfg.get("label_names")
    subset = None if path or not options.get("pretrained", True) else infer_imagenet_subset(model)
    if subset and not labels:
        labels = ImageNetInfo(subset).label_names()
    plainly = labels if isinstance(labels, list | tuple) and len(labels) == model.num_classes else range(model.num_classes)
    return {i: str(name) for i, name in enumerate(plainly)}


def _said(path: Path) -> dict[str, Any] | None:
    """Return what `save_merged` wrote about a file, or None."""
    try:
        if not (text := read_metadata(path).get(KEY)):
            return None
        said = schema.parse(text)
        schema.check(Merged, said, newer=False)
    except (SafetensorError, Malformed) as error:
        raise ModelError(f"what visionpeft wrote into {path} cannot be used ({error}); get the file again") from error
    return said


def _facts(model: Any) -> dict[str, Any]:
    config = resolve_model_data_config(model)
    size = input_size(model)
    if size[1] != size[2]:
        raise ModelError(f"this model reads images of {size[1]}×{size[2]}, but only square ones are supported")
    numbers = {"mean": list(config["mean"]), "std": list(config["std"])}
    return {"imgsz": size[1], **numbers, **{k: config[k] for k in ("interpolation", "crop_pct", "crop_mode")}}


def open_merged(path: Path) -> nn.Module:
    """Open a merged file as its user would: with timm.create_model.

    Raises:
        ModelError: It is no file that visionpeft wrote.
    """
    said = _said(path) if path.is_file() else None
    if said is None:
        raise ModelError(f"{path} is no merged file of visionpeft; give one, or a delta file")
    model: Any = timm.create_model(
        said["architecture"], num_classes=len(said["names"]), checkpoint_path=str(path), **said["model_args"]
    )
    model.names = {int(i): name for i, name in said["names"].items()}
    return _sized(model, said["model_args"]).eval()


def transform(model: Any, imgsz: int | None, recipe: loop.Recipe | None = None) -> Any:
    """Return timm's transform for a model: the one of training with a recipe, else the one of evaluation.

    Raises:
        ConfigError: The model cannot read images of this size.
    """
    _, own, _ = input_size(model)
    size = int(imgsz or own)
    if size != own:
        _check_size(model, size, own)
    config = {**resolve_model_data_config(model), "input_size": (3, size, size)}
    if recipe is None:
        return create_transform(**config)
    return create_transform(
        **config,
        is_training=True,
        scale=(1 - min(recipe.scale, 0.99), 1.0),
        hflip=recipe.fliplr,
        vflip=recipe.flipud,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment or None,
        re_prob=recipe.erasing,
    )


def _check_size(model: nn.Module, size: int, own: int) -> None:
    try:
        observe(model, torch.zeros(1, 3, size, size).to(next(model.parameters())), ())
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"this model cannot read images of imgsz={size}: it was made for {own}; leave imgsz out, or make it for "
            f"that size with model_args={{'img_size': {size}}}"
        ) from error


def _merged_copy(model: nn.Module) -> Any:
    model = copy.deepcopy(model).cpu().eval()
    return merge(model) if attached(model) is not None and mergeable(model) else model


def _written(arguments: Mapping[str, Any]) -> str:
    """Return arguments as Python, whatever they are called."""
    return ", ".join(f"{k}={v!r}" if k.isidentifier() else f"**{ {k: v}!r}" for k, v in arguments.items())


def _use(options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    if strange := [k for k in options if k not in defaults]:
        hint = nearest(strange[0], defaults)
        raise ConfigError(f"'{strange[0]}' is no option here; there are {', '.join(defaults)}.{hint}")
    return {**defaults, **options}


def _inside(model: nn.Module, head: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((f"{head}.{n}", p) for n, p in model.get_submodule(head).named_parameters())


def _keep_rows(new: Any, old: Any, rows: list[tuple[int, int]], classes: int, old_classes: int) -> None:
    """Copy from a classifier's old parameter what still has a meaning: rows of classes, or the whole of what has none."""
    if old is None or old.shape[1:] != new.shape[1:]:
        return
    if len(new) == classes and len(old) == old_classes:
        for to, of in rows:
            new[to] = old[of]
    elif new.shape == old.shape:
        new.copy_(old)
