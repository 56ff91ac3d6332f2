"""What a family is, and what reading an anatomy has in common for all of them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import delta as deltas
from .. import lean, measure, schema
from ..attach import merge, settle, train_mode
from ..checkpoint import Writer
from ..errors import DeltaError, ModelError, OutOfMemory, TrainingError
from ..lean.prefix import Prefix, put_on
from ..pictures import Picture
from ..plan import HEAD, Anatomy, Layer, Param, Plan, Statistics
from ..schema import Malformed
from ..stopping import Stop
from ..trackers import Trackers
from ..twins import plain
from .evidence import ImageEvidence
from .views import Rounds, Store

LARGEST_IMAGE = 4096  # pixels; a file that says more is not believed, for it would fill the memory


# -------------------------------------------------------------------------------------------------- what passes between
@dataclass(frozen=True)
class Base:
    """A pretrained model before any head is rebuilt."""

    source: str  # as the user gave it
    model: nn.Module  # on the CPU, floats as fp32
    task: str
    names: dict[int, str]  # of its classes
    facts: dict[str, Any]  # what a delta must repeat to use it: input size, mean, extra arguments, ...
    pretrained: bool = True  # False: random weights, so there is no base and no delta

    def __post_init__(self) -> None:
        values = (*self.model.named_parameters(), *self.model.named_buffers())
        if bad := next((name for name, v in values if v.is_floating_point() and torch.isnan(v).any()), None):
            raise ModelError(f"{self.source} has values in {bad} that are no numbers (NaN); give another checkpoint")

    @property
    def state(self) -> dict[str, Tensor]:
        """Its tensors, by key."""
        return self.model.state_dict()


@dataclass(frozen=True)
class Data:
    """A data set that was looked at."""

    source: str  # a path
    task: str
    names: dict[int, str]
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)  # the family's own
    outputs: dict[str, Any] = field(default_factory=dict)  # what the head must be made for beside the classes


@dataclass(frozen=True)
class Judged:
    """What an evaluation found."""

    metrics: dict[str, float]
    evidence: ImageEvidence  # of each image


@dataclass(frozen=True)
class Leading:
    """The first stages of a model."""

    modules: Sequence[str]  # paths; together they are the stages
    read: Sequence[str]  # those whose outputs later stages read; none: that of the last to run
    image: tuple[int, int, int]  # what the model reads at an image size, (C, H, W)


@dataclass(frozen=True)
class Job:
    """One training run, all questions settled."""

    base: Base
    data: Data
    plan: Plan
    folder: Path
    merged: Path  # where the plain merged checkpoint goes
    head: str  # "keep" or "rebuild"
    epochs: int
    imgsz: int
    batch: int
    lr0: float
    body_rate: float  # learning rate of the body in full fine-tuning, relative to lr0
    optimizer: str
    device: str
    workers: int
    seed: int
    amp: bool | str | None
    resume: bool
    quiet: bool  # show nothing while it trains
    delta_dtype: str  # of trained weights in the delta: "fp16" or "fp32"
    extra: dict[str, Any]  # the family's own arguments
    header: dict[str, Any]  # what the delta will say of itself
    before: dict[str, float]  # metrics before training
    trackers: Trackers  # where the numbers of its epochs go
    prefix: Prefix | None = None  # what runs the frozen stages apart from the rest
    store: Store | None = None  # where their outputs are kept
    lean: str = "off"  # a level of lean, or "off"
    stages: Mapping[str, str] = field(default_factory=dict)  # labels of the model's modules, see `stage_modules`
    origin: str = ""  # base, data and plan, for the checkpoint
    stop: Stop = field(default_factory=Stop)  # what signals ask for
    save_every: float = 0.0  # minutes after which a checkpoint is due within an epoch; 0: never

    def equip(self, model: nn.Module) -> None:
        """Let the model that trains (not its average, which is validated) run as the job says: apart, and leanly."""
        if self.prefix:
            put_on(model, self.prefix)
        if self.lean != "off":
            lean.apply(model, self.lean)

    def open(self, model: nn.Module, progress: float, meter: measure.Meter) -> None:
        """Put the model in training mode for an epoch that begins after this share of the run: what opens later waits."""
        train_mode(model, self.plan, progress)
        if self.plan.opens:
            before = sum(p.requires_grad for p in model.parameters())
            settle(model, self.plan, progress)
            if sum(p.requires_grad for p in model.parameters()) != before:
                meter.watch_again()

    def rate(self, parameter: str) -> float:
        """Return a parameter's learning rate, relative to lr0: 1 in the head, in the body the plan's."""
        inside_head = parameter.startswith(tuple(f"{h}." for h in self.plan.heads))
        return 1.0 if inside_head else self.body_rate * self.plan.rate(parameter)

    def kind(self, parameter: str) -> tuple[float, float]:
        """Return what parameters of one group of an optimizer have in common: the rate, and when they begin to train, for
        fused optimizers want all of a group or none to have a state."""
        return self.rate(parameter), self.plan.opens.get(parameter, 0.0)

    def saves_now(self, writer: Writer) -> bool:
        """Say between two steps whether a checkpoint is due: a signal came, or the last is old."""
        return bool(self.stop.asked) or 0 < self.save_every * 60 <= writer.age

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


@dataclass(frozen=True)
class Step:
    """What decides, beside model and plan, how much memory a training step takes."""

    batch: int  # images
    imgsz: int
    optimizer: str
    amp: bool  # forward in half precision, under autocast
    objects: int  # labelled ones in an image: the most of the run, for it is the fullest batch that counts
    area: float  # what share of the image one of them covers, on average
    widest: int = 0  # the largest image size trained on, where it varies from batch to batch


@dataclass(frozen=True)
class Rehearsal:
    """A training step on made-up data. It may run on tensors without content, so nothing in it may depend on values but
    by `true`."""

    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor]  # forward, of such a batch
    validate: Callable[[], object]
    optimizer: torch.optim.Optimizer
    average: int  # bytes of the moving average
    true: Callable[[Sequence[int]], int] = math.prod  # how many elements of a mask of this shape are true
    number: Callable[[], int] = lambda: 1  # what a whole number that is read from a tensor is
    loops: bool = False  # whether the loss goes through the images one by one


@dataclass(frozen=True)
class NoOutputs:
    """What heads are made for beside the classes, where that is nothing."""


class Family(ABC):
    """How to deal with one library's models. Registered under its name; found by `claims`."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of a merged file
    defaults: ClassVar[dict[str, Any]]  # of train(), where the user says nothing
    body_rate: ClassVar[float] = 1.0  # learning rate that suits the body in full fine-tuning, relative to the head's
    refused: ClassVar[Mapping[str, str]] = {}  # the library's arguments that train() does not take, with what to do instead
    evaluated: ClassVar[frozenset[str]] = frozenset()  # the further arguments by which a run's validation goes, too
    outputs: ClassVar[type] = NoOutputs  # a dataclass: what a head may be made for beside the classes
    bn: ClassVar[str | None] = None  # whether the body's running statistics move by default; None: as the method says

    @abstractmethod
    def claims(self, source: str) -> bool:
        """Say whether `source` names one of this family's models."""

    @abstractmethod
    def known(self) -> Iterable[str]:
        """Return model names to suggest."""

    @abstractmethod
    def arguments(self) -> Iterable[str]:
        """Return the names of the further training arguments that pass through."""

    def defaults_for(self, base: Base) -> dict[str, Any]:
        """Return what train() uses where the user says nothing."""
        return dict(self.defaults)

    @abstractmethod
    def score(self, task: str) -> str:
        """Return the name of the metric that stands for the others."""

    @abstractmethod
    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that training would stumble over later: values, optimizer, device.

        Raises:
            ConfigError: One of them cannot be used.
        """

    @abstractmethod
    def load(self, source: str, **options: Any) -> Base:
        """Load a base.

        Raises:
            ModelError: It cannot be had, or is of a kind that is not supported.
        """

    @abstractmethod
    def design(self, source: str, **options: Any) -> Base:
        """Return a base as `load` does, but with random weights where its own would have to be fetched.

        Raises:
            ModelError: As for `load`.
        """

    @abstractmethod
    def check_named(
        self, source: str | None, named: Mapping[str, Any], own: Mapping[str, Any], scratch: bool = False
    ) -> dict[str, Any]:
        """Check what a file from elsewhere names as a model: it must be here already, and can run nothing.

        Args:
            source: The model; None where the user names one.
            named: Arguments of `load` that the file names.
            own: Those that the user gives, which go before.
            scratch: Whether the model may be one without weights.

        Returns:
            The arguments with which `load` fetches nothing.

        Raises:
            ModelError: It is not here, or no such thing; the text says what.
        """

    @abstractmethod
    def objects(self, data: Data, settings: Mapping[str, Any]) -> tuple[int, float]:
        """Return how many labelled objects the fullest image of a run of these settings holds, augmentation included, and
        what share of an image one of them covers, on average."""

    def widest(self, imgsz: int, settings: Mapping[str, Any]) -> int:
        """Return the size of the largest images that a run of these settings trains on."""
        return imgsz

    @abstractmethod
    def rehearse(self, model: nn.Module, base: Base, step: Step) -> Rehearsal:
        """Return a training step of a model that a plan is attached to, on made-up data."""

    @abstractmethod
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        """Look a data set up and check it.

        Args:
            source: What names it.
            base: The model that it is for.
            split: What is measured on, called "val" in `Data.facts`.
            train: Whether its training part is needed; to measure a model, it is not.
            allow_download: Let the library fetch the images as the data say; that can run code of theirs.

        Raises:
            DataError: It is missing, empty or contradicts itself.
        """

    def suited(self, base: Base, data: Data) -> tuple[Base, dict[str, Any]]:
        """Return the base made for a data set's images, and the arguments with which `load` makes it so.

        Raises:
            DataError: It cannot read them.
        """
        return base, {}

    @abstractmethod
    def fit(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        """Return a copy of the base whose head is made for `names`, and for a data set's `outputs`."""

    def read_outputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a delta says that its head is made for beside the classes.

        Raises:
            DeltaError: No head of this family is made for that.
        """
        try:
            schema.check(self.outputs, given, "its outputs")
        except Malformed as error:
            raise DeltaError(f"this delta cannot be used: {error}") from error
        return dict(given)

    @abstractmethod
    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        """Read a model's facts."""

    @abstractmethod
    def leading(self, base: Base, stages: int, imgsz: int) -> Leading:
        """Return what the model's first stages (at least one) consist of, to run them apart from the rest or not at all."""

    @abstractmethod
    def rounds(self, views: int, settings: Mapping[str, Any]) -> Rounds:
        """Say how a run of these settings would store `views` views of every image.

        Raises:
            ConfigError: Something in the settings is at odds with stored views; with 0, with stages that run apart.
        """

    @abstractmethod
    def augmentation(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those settings on which an augmented view of an image may depend, beside image size and seed."""

    @abstractmethod
    def losses(self, model: nn.Module, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        """Yield the training loss of `count` batches of training images, spread over the set, not augmented.

        Args:
            model: A fitted model; its statistics stay still.
            data: The set.
            imgsz: Image size in pixels.
            batch: Images in each.
            count: How many, fewer where the set has no more.
        """

    @abstractmethod
    def train(self, job: Job) -> None:
        """Train: leave `job.checkpoint` after every epoch and `job.delta` at the best one."""

    @abstractmethod
    def check_classes(self, names: Mapping[int, str], data: Data) -> None:
        """Refuse data that a model of these classes cannot be judged on.

        Raises:
            DataError: It has others.
        """

    @abstractmethod
    def judge(self, model: nn.Module, data: Data, **options: Any) -> Judged:
        """Evaluate a model on the data's validation part."""

    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> dict[str, float]:
        """Return the metrics of a model on the data's validation part."""
        return self.judge(model, data, **options).metrics

    @abstractmethod
    def hold_back(self, data: Data, folder: Path, share: float) -> str:
        """Split a set's training part by the hash of its file names, and leave what reads it in `folder`.

        Args:
            data: What `read_data` returned.
            folder: An empty one; it holds no copies of images.
            share: Of the training images, to be held back.

        Returns:
            A source for `read_data`: its validation part are the images held back, its training part the others.
        """

    @abstractmethod
    def predict(self, model: nn.Module, source: Any, **options: Any) -> Any:
        """Return the library's own results for images."""

    @abstractmethod
    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        """Return some validation images, always the same ones, with what the model sees; None: with their labels."""

    @abstractmethod
    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        """Write the model in a deployment format ("onnx", "torchscript")."""

    @abstractmethod
    def opening(self, base: Base, header: Mapping[str, Any]) -> str:
        """Return lines of Python that make ``model`` without visionpeft: the base, its head made as a delta's header says.

        The head's values need not be those of the delta.
        """

    @abstractmethod
    def open_merged(self, path: Path) -> nn.Module:
        """Open what `save_merged` wrote, in single precision."""

    @abstractmethod
    def save_merged(self, model: nn.Module, header: Mapping[str, Any], out: Path) -> Path:
        """Write a plain checkpoint that the library opens without visionpeft."""


def out_of_memory(error: torch.OutOfMemoryError) -> OutOfMemory:
    """Return what is said where a GPU's memory is full."""
    return OutOfMemory(
        f"the GPU's memory is full ({str(error).split('.')[0]}); give a smaller batch or imgsz, or freeze more stages"
    )


def keep_best(
    family: Family, job: Job, model: nn.Module, metrics: Mapping[str, float | None], epoch: int
) -> Callable[[], object]:
    """Copy the best epoch's delta; of a model without a base, its merged checkpoint. Returns what writes it."""
    header = {**job.header, "metrics": {"before": job.before, "after": dict(metrics)}, "epoch": epoch}
    if job.base.pretrained:
        return partial(deltas.write, job.delta, deltas.collect(model, job.base.state, header, job.delta_dtype))
    return partial(family.save_merged, merge(copy.deepcopy(model).cpu()), header, job.merged)


# ------------------------------------------------------------------------------------------------------ reading anatomies
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_OTHER_NORMS = {"RmsNorm", "RmsNorm2d", "RmsNormFp32", "RmsNorm2dFp32", "SimpleNorm", "SimpleNorm2d"}  # timm's own classes
_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}  # timm's
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def read_params(model: nn.Module, stage_of: Callable[[str], int | None]) -> tuple[Param, ...]:
    """Return the model's parameters; those whose stage is None never train."""
    modules = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        stage = stage_of(name)
        if stage is None or ".peft_" in f".{name}":
            continue
        norm = isinstance(modules[owner], _NORMS) or any(c.__name__ in _OTHER_NORMS for c in type(modules[owner]).__mro__)
        if norm:
            role = f"norm.{leaf}"
        else:
            role = leaf if leaf in ("bias",) or (leaf == "weight" and parameter.ndim > 1) else "other"
        found.append(Param(name, parameter.numel(), role, stage))
    return tuple(found)


def read_layers(
    model: nn.Module,
    stage_of: Callable[[str], int | None],
    attentions: Iterable[str] = (),
    slices: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]] | None = None,
) -> tuple[Layer, ...]:
    """Return the body's linear and convolutional layers.

    Args:
        model: The model.
        stage_of: The stage of a parameter, by name.
        attentions: Names of the modules whose layers are attention projections.
        slices: Rows of q, k and v of fused projections, by layer name.
    """
    inside = tuple(f"{a}." for a in attentions)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS) or "weight" not in module._parameters or ".peft_" in f".{name}":
            continue
        stage = stage_of(f"{name}.weight")
        if stage is None or stage == HEAD:
            continue
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
            kind = "conv_transpose"
        found.append(
            Layer(
                name=name,
                kind=kind,
                shape=tuple(module._parameters["weight"].shape),  # type: ignore[union-attr]
                groups=getattr(module, "groups", 1),
                stage=stage,
                attention=name.startswith(inside) if inside else False,
                linear=plain(type(module)).__name__ not in _STANDARDISED,
                slices=(slices or {}).get(name, {}),
            )
        )
    return tuple(found)


def read_statistics(model: nn.Module, stage_of: Callable[[str], int | None]) -> tuple[Statistics, ...]:
    """Return the modules with running statistics."""
    found = []
    for name, module in model.named_modules():
        if "running_mean" in module._buffers and module._buffers["running_mean"] is not None:
            stage = stage_of(f"{name}.running_mean")
            numel = sum(module._buffers[n].numel() for n in ("running_mean", "running_var"))  # type: ignore[union-attr]
            found.append(Statistics(name, HEAD if stage is None else stage, numel))
    return tuple(found)


def stage_modules(anatomy: Anatomy) -> dict[str, str]:
    """Return the paths of the outermost modules that belong to one stage, with the stage's label, in the stages' order: what
    runs in them counts as the stage's when a step is measured."""
    labels = {s.index: "stem" if s.kind == "stem" else s.name or f"stage {s.index}" for s in anatomy.stages}
    owners: dict[str, set[int]] = {}  # the stages whose parameters a module holds
    for parameter in anatomy.params:
        parts = parameter.name.split(".")
        for end in range(1, len(parts)):
            owners.setdefault(".".join(parts[:end]), set()).add(parameter.stage)
    found = {s.name: s.index for s in anatomy.stages if s.name}  # also of those without parameters
    for path, (stage, *others) in owners.items():
        if stage != HEAD and not others and len(owners.get(path.rpartition(".")[0], ())) != 1:
            found[path] = stage
    body = {path: labels[stage] for path, stage in sorted(found.items(), key=lambda item: item[1])}
    return {**body, **dict.fromkeys(anatomy.heads, measure.HEAD)}


class Seen(NamedTuple):
    """Shapes around one module while the model ran."""

    given: torch.Size | None  # of its first argument; None where that is no tensor, or not the only one
    out: torch.Size


def observe(model: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, Seen]:
    """Return what the named modules read and put out for input `x`; those that put out no single tensor are left out.

    The model runs once in eval mode without gradients; nothing of it changes.
    """
    seen: dict[str, Seen] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            if isinstance(output, Tensor):
                seen[name] = Seen(given[0].shape if len(given) == 1 and given[0] is args[0] else None, output.shape)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(note(n)) for n in names if n]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def read_stride(given: Sequence[int], out: Sequence[int]) -> int:
    """Return how many times as high and wide a map (H, W) is as another; 0 where no one whole number says so."""
    stride = given[0] // max(out[0], 1)
    return stride if stride and all(g == stride * o for g, o in zip(given, out, strict=True)) else 0
