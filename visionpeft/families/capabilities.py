"""Abilities of some families alone, each a class to derive from; `Capability.of` refuses the others in one sentence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import SettledConfig
from ..core.base_model import Base, Data
from ..errors import ConfigError
from ..training.feature_cache_file import ViewSchedule
from .base import Arguments, Family

if TYPE_CHECKING:
    from typing_extensions import Self


class Capability(ABC):
    """Something that only some families can do."""

    refusal: ClassVar[str]  # the end of a sentence that begins with the models of a family that cannot

    @classmethod
    def of(cls, family: Family) -> Self:
        """Return a family as one that can do this.

        Raises:
            ConfigError: It cannot.
        """
        if not isinstance(family, cls):
            raise ConfigError(f"models of the {family.name} family {cls.refusal}")
        return family


# ----------------------------------------------------------------------------------------------------------- frozen stages
@dataclass(frozen=True)
class LeadingStages:
    """The first stages of a model."""

    modules: Sequence[str]  # paths; together they are the stages
    read: Sequence[str]  # those whose outputs later stages read; none: that of the last to run
    image: tuple[int, int, int]  # (C, H, W) of the model's input, at an image size


class SupportsFrozenStages(Capability):
    """Runs a model's frozen stages apart from the rest (`frozen_dtype`), or stores their outputs (`cache`)."""

    refusal: ClassVar[str] = "cannot run their frozen stages apart from the rest; leave cache and frozen_dtype out"

    @abstractmethod
    def leading_stages(self, base: Base, stages: int, imgsz: int) -> LeadingStages:
        """Return the modules of the model's first stages, of which there is at least one."""

    @abstractmethod
    def view_schedule(self, views: int, config: SettledConfig, task: str) -> ViewSchedule:
        """Return how a run stores `views` views of every image, for a model of this task.

        Raises:
            ConfigError: Something in the settings is at odds with stored views; with 0, with stages that run apart.
        """

    @abstractmethod
    def augmentation_settings(self, settings: Arguments) -> Arguments:
        """Return those settings on which an augmented view of an image may depend, beside image size and seed."""


# ---------------------------------------------------------------------------------------------------------------- dry runs
@dataclass(frozen=True)
class Step:
    """The facts beside model and plan that decide how much memory a training step takes."""

    batch: int  # images
    imgsz: int
    optimizer: str
    amp: bool  # forward in half precision, under autocast
    objects: int  # labelled ones in an image: the most of the run, for it is the fullest batch that counts
    area: float  # share of the image that one of them covers, on average
    widest: int = 0  # the largest image size trained on, where it varies from batch to batch


@dataclass(frozen=True)
class DryRun:
    """A training step on made-up data. It may run on fake tensors, which have shapes and no values: where it needs how many
    elements of a mask are true, it calls `true`."""

    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor]  # forward, of such a batch
    validate: Callable[[], object]
    optimizer: torch.optim.Optimizer
    average: int  # bytes of the moving average
    true: Callable[[Sequence[int]], int] = math.prod  # how many elements of a mask of this shape are true
    number: Callable[[], int] = lambda: 1  # a whole number that is read from a tensor
    loops: bool = False  # whether the loss goes through the images one by one


class SupportsDryRun(Capability):
    """Runs a training step on made-up data, from which memory is forecast."""

    refusal: ClassVar[str] = "have no training step on made-up data, so their memory cannot be forecast; train an epoch"

    @abstractmethod
    def dry_run(self, model: nn.Module, base: Base, step: Step) -> DryRun:
        """Return a training step of a model that a plan is attached to, on made-up data."""

    def max_objects(self, base: Base, data: Data | None, settings: Arguments) -> tuple[int, float]:
        """Return how many labelled objects the fullest image of a run holds, and the share of an image that one covers.

        Args:
            base: The model.
            data: Where the images are; None: a usual number is assumed.
            settings: Of the run, whose augmentation may join images.

        Returns:
            The number, 0 where images have no objects, and the average share.
        """
        return 0, 0.0

    def max_size(self, imgsz: int, settings: Arguments) -> int:
        """Return the size of the largest images that a run of these settings trains on."""
        return imgsz

    def images_per_update(self, settings: Arguments) -> int:
        """Return the images whose gradients are added up before a step of the optimizer; 0: a batch."""
        return settings.get("nbs") or 0


# ------------------------------------------------------------------------------------------------------------------ others
class SupportsGradients(Capability):
    """Computes losses of an untrained model, from whose gradients some methods choose."""

    refusal: ClassVar[str] = "have no losses before they train, by which this method chooses; give another method"

    @abstractmethod
    def losses(self, model: nn.Module, data: Data, *, imgsz: int, batch: int, count: int) -> Iterator[Tensor]:
        """Yield the training loss of some batches of training images, spread over the set, not augmented.

        Args:
            model: A model with its head made for the data; its statistics stay still.
            data: The set.
            imgsz: Image size in pixels.
            batch: Images in each batch.
            count: The number of batches, fewer where the set has no more.
        """


class SupportsExport(Capability):
    """Writes models in formats of others."""

    refusal: ClassVar[str] = "are not exported; merge the delta, and export the file with the library's own means"

    @abstractmethod
    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        """Write the model in a deployment format ("onnx", "torchscript")."""

    @abstractmethod
    def loading_snippet(self, base: Base, header: Arguments) -> str:
        """Return lines of Python that make ``model`` without visionpeft: the base, its head made as a delta's header says.

        The head's values need not be those of the delta.
        """


class SupportsHoldout(Capability):
    """Holds a part of a training set back, on which a benchmark chooses settings."""

    refusal: ClassVar[str] = "hold no training images back to choose settings on; leave search out"

    @abstractmethod
    def holdout_split(self, data: Data, folder: Path, share: float) -> str:
        """Split a set's training part by the hash of its file names, and write into `folder` a set of the two halves.

        Args:
            data: The set, from `read_data`.
            folder: An empty one; no images are copied into it.
            share: Of the training images, to be held back.

        Returns:
            A source for `read_data`: its validation part are the images held back, its training part the others.
        """
