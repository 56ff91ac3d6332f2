"""A family: one library's models, and all that visionpeft asks of it. Abilities of some families alone: capabilities.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .. import schema
from ..config import SettledConfig
from ..core.anatomy import Anatomy
from ..core.base_model import Base, Data
from ..errors import DataError, DeltaError, one_line
from ..schema import Malformed
from ..training.job import Job
from ..training.plots import Picture
from .predictions import ImagePredictions

Arguments = Mapping[str, Any]  # of a function of a library, or of `train`, by name


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation."""

    metrics: dict[str, float]
    predictions: ImagePredictions  # for each image


@dataclass(frozen=True)
class NoOutputs:
    """The outputs of a head that is made for classes alone."""


class Family(ABC):
    """One library's models. Registered under its name; found by `supports`."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of a merged file
    defaults: ClassVar[Arguments]  # of train(), where the user says nothing
    body_lr_scale: ClassVar[float] = 1.0  # learning rate that suits the body in full fine-tuning, relative to the head's
    refused: ClassVar[Mapping[str, str]] = {}  # the library's arguments that train() does not take, with what to do instead
    evaluated: ClassVar[frozenset[str]] = frozenset()  # further arguments of train() that its evaluations take, too
    outputs: ClassVar[type] = NoOutputs  # a dataclass: outputs that a head may have beside the classes
    bn: ClassVar[str | None] = None  # whether the body's running statistics move by default; None: as the method says
    data_yamls: ClassVar[Path | None] = None  # folder of the data YAMLs that the library ships
    data_root: ClassVar[Path | None] = None  # folder that its users' data sets lie in, where a data YAML does not say

    # ------------------------------------------------------------------------------------------------------------ arguments
    def train_options(self) -> Iterable[str]:
        """Return the names of the library's own training arguments, which `train` passes on."""
        return ()

    def defaults_for(self, base: Base) -> dict[str, Any]:
        """Return the arguments of `train` for this base, where the user says nothing."""
        return dict(self.defaults)

    def check(self, config: SettledConfig) -> None:  # noqa: B027  (a family may have nothing to refuse)
        """Refuse settings that training would stumble over later: values, optimizer, device.

        Raises:
            ConfigError: One of them cannot be used.
        """

    @abstractmethod
    def primary_metric(self, task: str) -> str:
        """Return the name of the metric that stands for the others."""

    # --------------------------------------------------------------------------------------------------------------- models
    @abstractmethod
    def supports(self, source: str) -> bool:
        """Say whether `source` names one of this family's models."""

    @abstractmethod
    def model_names(self) -> Iterable[str]:
        """Return model names to suggest."""

    @abstractmethod
    def load(self, source: str, **options: Any) -> Base:
        """Load a base.

        Raises:
            ModelError: It cannot be had, or is of a kind that is not supported.
        """

    def load_architecture(self, source: str, **options: Any) -> Base:
        """Load a base as `load` does, but with random weights where its own would have to be fetched.

        Raises:
            ModelError: As for `load`.
        """
        return self.load(source, **options)

    @abstractmethod
    def check_named(self, source: str | None, named: Arguments, own: Arguments, scratch: bool = False) -> Arguments:
        """Check the model that a file from elsewhere names: it must be here already, and can run nothing.

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
    def with_head(self, base: Base, names: Mapping[int, str], head: str, **outputs: Any) -> nn.Module:
        """Return a copy of the base whose head is made for `names`, and for a data set's `outputs`."""

    @abstractmethod
    def anatomy(self, model: nn.Module, name: str) -> Anatomy:
        """Read a model's facts."""

    def read_outputs(self, given: Arguments) -> Arguments:
        """Return the outputs beside the classes that a delta's head has.

        Raises:
            DeltaError: No head of this family has such.
        """
        try:
            schema.check(self.outputs, given, "its outputs")
        except Malformed as error:
            raise DeltaError(f"this delta cannot be used: {error}") from error
        return dict(given)

    # ----------------------------------------------------------------------------------------------------------------- data
    @abstractmethod
    def read_data(
        self, source: str, base: Base | None = None, split: str = "val", train: bool = True, allow_download: bool = False
    ) -> Data:
        """Find the images of a data set, and check them and their labels.

        Args:
            source: The data set.
            base: The model that it is for.
            split: The part to measure on, which is `Data.val`.
            train: Whether its training part is needed; to measure a model, it is not.
            allow_download: Let the library fetch the images as the data say; that can run code of theirs.

        Raises:
            DataError: It is missing, empty or contradicts itself.
        """

    def suited(self, base: Base, data: Data) -> tuple[Base, Arguments]:
        """Return the base made for a data set's images, and the arguments with which `load` makes it so.

        Raises:
            DataError: It cannot read them.
        """
        return base, {}

    def check_classes(self, names: Mapping[int, str], data: Data) -> None:
        """Refuse data that a model of these classes cannot be measured on.

        Raises:
            DataError: It has other classes.
        """
        if dict(names) != dict(data.names):
            raise DataError(
                f"{data.source} has the classes {one_line(list(data.names.values()))}, but the model knows "
                f"{one_line(list(names.values()))}; give data with the same classes in the same order"
            )

    # -------------------------------------------------------------------------------------------------------- training, use
    @abstractmethod
    def train(self, job: Job) -> None:
        """Train: leave `job.checkpoint` after every epoch and `job.delta` at the best one."""

    @abstractmethod
    def evaluate(self, model: nn.Module, data: Data, **options: Any) -> EvalResult:
        """Evaluate a model on the data's validation part."""

    def evaluation_options(self, config: SettledConfig) -> dict[str, Any]:
        """Return the options with which a run is measured: as it trains, on its first device."""
        shared = {name: getattr(config, name) for name in ("imgsz", "batch", "workers")}
        further = {k: v for k, v in config.options.items() if k in self.evaluated}
        return {**shared, "device": config.device.split(",")[0], **further}

    @abstractmethod
    def predict(self, model: nn.Module, source: Any, **options: Any) -> Any:
        """Return the library's own results for images."""

    def to_json(self, prediction: Any) -> dict[str, Any]:
        """Return one of `predict`'s results as plain JSON values."""
        return dict(prediction)

    @abstractmethod
    def draw(self, model: nn.Module | None, data: Data, count: int, **options: Any) -> list[Picture]:
        """Return some validation images, always the same ones, with the model's predictions; None: with their labels."""

    @abstractmethod
    def save_merged(self, model: nn.Module, header: Arguments, out: Path) -> Path:
        """Write a plain checkpoint that the library opens without visionpeft."""

    @abstractmethod
    def open_merged(self, path: Path) -> nn.Module:
        """Open a file of `save_merged`, in single precision."""
