"""What a family is: one library's models, and all that is asked of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import schema
from ..config import SettledConfig
from ..core.anatomy import Anatomy
from ..core.base_model import Base, Data
from ..errors import DeltaError
from ..schema import Malformed
from ..training.feature_cache import ViewSchedule
from ..training.job import Job
from ..training.plots import Picture
from .predictions import ImagePredictions


# -------------------------------------------------------------------------------------------------- what passes between
@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    predictions: ImagePredictions  # of each image


@dataclass(frozen=True)
class LeadingStages:
    """The first stages of a model."""

    modules: Sequence[str]  # paths; together they are the stages
    read: Sequence[str]  # those whose outputs later stages read; none: that of the last to run
    image: tuple[int, int, int]  # what the model reads at an image size, (C, H, W)


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
class DryRun:
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
    body_lr_scale: ClassVar[float] = 1.0  # learning rate that suits the body in full fine-tuning, relative to the head's
    refused: ClassVar[Mapping[str, str]] = {}  # the library's arguments that train() does not take, with what to do instead
    evaluated: ClassVar[frozenset[str]] = frozenset()  # the further arguments by which a run's validation goes, too
    data_yamls: ClassVar[Path | None] = None  # folder of the data YAMLs that the library ships
    data_root: ClassVar[Path | None] = None  # folder that its users' data sets lie in, where a data YAML does not say
    outputs: ClassVar[type] = NoOutputs  # a dataclass: what a head may be made for beside the classes
    bn: ClassVar[str | None] = None  # whether the body's running statistics move by default; None: as the method says

    @abstractmethod
    def supports(self, source: str) -> bool:
        """Say whether `source` names one of this family's models."""

    @abstractmethod
    def model_names(self) -> Iterable[str]:
        """Return model names to suggest."""

    @abstractmethod
    def train_options(self) -> Iterable[str]:
        """Return the names of the further training arguments that pass through."""

    def defaults_for(self, base: Base) -> dict[str, Any]:
        """Return what train() uses where the user says nothing."""
        return dict(self.defaults)

    @abstractmethod
    def primary_metric(self, task: str) -> str:
        """Return the name of the metric that stands for the others."""

    @abstractmethod
    def check(self, config: SettledConfig) -> None:
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
    def load_architecture(self, source: str, **options: Any) -> Base:
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
    def max_objects(self, data: Data, settings: Mapping[str, Any]) -> tuple[int, float]:
        """Return how many labelled objects the fullest image of a run of these settings holds, augmentation included, and
        what share of an image one of them covers, on average."""

    def max_size(self, imgsz: int, settings: Mapping[str, Any]) -> int:
        """Return the size of the largest images that a run of these settings trains on."""
        return imgsz

    @abstractmethod
    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
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
    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
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
    def leading_stages(self, base: Base, stages: int, imgsz: int) -> LeadingStages:
        """Return what the model's first stages (at least one) consist of, to run them apart from the rest or not at all."""

    @abstractmethod
    def view_schedule(self, views: int, config: SettledConfig, task: str) -> ViewSchedule:
        """Say how a run would store `views` views of every image, for a model of this task.

        Raises:
            ConfigError: Something in the settings is at odds with stored views; with 0, with stages that run apart.
        """

    @abstractmethod
    def augmentation_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
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
    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        """Evaluate a model on the data's validation part."""

    @abstractmethod
    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        """Split a set's training part by the hash of its file names, and leave what reads it in `folder`.

        Args:
            data: What `read_data` returned.
            folder: An empty one; it holds no copies of images.
            share: Of the training images, to be held back.

        Returns:
            A source for `read_data`: its validation part are the images held back, its training part the others.
        """

    def evaluation_options(self, config: SettledConfig) -> dict[str, Any]:
        """Return what a run is measured with: as it trains, on its first device."""
        own = {k: v for k, v in config.options.items() if k in self.evaluated}
        device = config.device.split(",")[0]
        return {"imgsz": config.imgsz, "batch": config.batch, "workers": config.workers, "device": device, **own}

    @abstractmethod
    def predict(self, model: nn.Module, source: Any, **options: Any) -> Any:
        """Return the library's own results for images."""

    def to_json(self, prediction: Any) -> dict[str, Any]:
        """Return what `predict` said of one image, as plain JSON values."""
        return dict(prediction)

    @abstractmethod
    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        """Return some validation images, always the same ones, with what the model sees; None: with their labels."""

    @abstractmethod
    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        """Write the model in a deployment format ("onnx", "torchscript")."""

    @abstractmethod
    def loading_snippet(self, base: Base, header: Mapping[str, Any]) -> str:
        """Return lines of Python that make ``model`` without visionpeft: the base, its head made as a delta's header says.

        The head's values need not be those of the delta.
        """

    @abstractmethod
    def open_merged(self, path: Path) -> nn.Module:
        """Open what `save_merged` wrote, in single precision."""

    @abstractmethod
    def save_merged(self, model: nn.Module, header: Mapping[str, Any], out: Path) -> Path:
        """Write a plain checkpoint that the library opens without visionpeft."""


# ------------------------------------------------------------------------------------------------------ reading anatomies
