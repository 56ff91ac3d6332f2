"""The interface of a format: a reader of annotations in pixels, which counts what it skips."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...registry import Registry
from ..layout import SPLITS, is_image
from ..report import Tally

NOT_FOUND = "image that was not found, or is one of several of its name"
FORMATS = Registry("visionpeft.data.formats", "format")


@dataclass(frozen=True)
class Annotation:
    """An annotated object, in pixels of the image as it was annotated.

    Attributes:
        name: Its class.
        box: (left, top, right, bottom), or None.
        outlines: Polygons, each (N, 2); the parts of one object. Four corners of an oriented box.
        keypoints: (K, 3): x, y, visibility.
    """

    name: str
    box: tuple[float, float, float, float] | None = None
    outlines: tuple[np.ndarray, ...] = ()
    keypoints: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """An image and its annotations.

    Attributes:
        file: The image.
        name: Its name in the source, which may hold folders.
        split: train, val or test, or "" where the source does not say.
        size: Width and height that the source states, or None.
        annotations: Returns its objects for a task; called once, when they are written.
    """

    file: Path
    name: str
    split: str
    size: tuple[int, int] | None
    annotations: Callable[[str], Iterable[Annotation]]


@dataclass
class Source:
    """A data set as it was read.

    Attributes:
        tasks: The tasks its annotations can be written for, the likeliest first.
        names: Classes in order.
        samples: Its images.
        skipped: Counts of what cannot be used, by reason.
        changed: Counts of what is not quite as the annotations say.
        keypoints: Names of the keypoints, of a pose set.
    """

    tasks: tuple[str, ...]
    names: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    skipped: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    keypoints: tuple[str, ...] = ()

    def add(
        self,
        label: Path,
        image: Path | None,
        split: str,
        annotations: list[Annotation],
        size: tuple[int, int] | None = None,
    ) -> None:
        """Add the image of a label file, and its classes in the order of the alphabet; an image of None is skipped."""
        if image is None:
            self.skipped.add(NOT_FOUND, f"for {label.name} ({len(annotations)} objects)")
        else:
            self.names = sorted({*self.names, *(a.name for a in annotations)})
            self.samples.append(Sample(image, image.name, split, size, lambda task: annotations))


@dataclass(frozen=True)
class Request:
    """A request to read a data set.

    Attributes:
        root: The file or folder given.
        images: A folder to find images in, or None to look where the format keeps them.
        annotations: A file or folder of annotations in it, where the format's usual place is not meant.
        task: The task asked for, or None.
        difficult: Whether objects that VOC and DOTA mark as difficult are kept.
    """

    root: Path
    images: Path | None = None
    annotations: Path | None = None
    task: str | None = None
    difficult: bool = False


class Format(ABC):
    """A format of annotations. Its module's docstring says where it is specified."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def fits(root: Path) -> bool:
        """Return whether a file or folder looks like this format."""

    @staticmethod
    @abstractmethod
    def read(request: Request) -> Source:
        """Read a data set of this format.

        Raises:
            DataError: It is not this format, or nothing in it can be used.
        """


def split_of(words: str) -> str:
    """Return the split that a file's or folder's name says, or "": instances_train2017 is train, trainval is neither."""
    tokens = re.findall(r"[a-z]+", words.lower())
    return next((part for part, names in SPLITS.items() if any(n in tokens for n in names)), "")


def letters_of(name: str) -> str:
    """Return a class's name without case, spaces and marks: 'Expressway-toll-station' is 'expresswaytollstation'."""
    return re.sub(r"[\W_]+", "", name.casefold())


class ImageIndex:
    """The image files below some folders, found by the name or the stem that annotations give them."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(dict.fromkeys(f for f in folders if f.is_dir()))

    def by_name(self, name: str) -> Path | None:
        """Return the file of a name, which may hold folders, one of those given among them; composed and decomposed accents
        are the same."""
        for form in dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))):
            first, _, rest = form.partition("/")
            for folder in self.folders:
                if (folder / form).is_file():
                    return folder / form
                if rest and folder.name == first and (folder / rest).is_file():
                    return folder / rest
        return None

    def by_stem(self, stem: str, beside: str = "", name: str = "") -> Path | None:
        """Return the file of a stem in the first folder that has it. Where several below that have, it is the only one that
        lies in a folder called `beside`, or is called `name`; None where there is no such."""
        candidates = next((stems[stem] for stems in self._stems if stem in stems), [])
        for fits in (lambda f: f.parent.name == beside, lambda f: f.name == name):
            candidates = [f for f in candidates if fits(f)] or candidates
        return candidates[0] if len(candidates) == 1 else None

    @cached_property
    def _stems(self) -> list[dict[str, list[Path]]]:
        """The image files of each folder, by stem."""
        folders: list[dict[str, list[Path]]] = []
        for folder in self.folders:
            folders.append({})
            for file in sorted(f for f in folder.rglob("*") if is_image(f)):
                folders[-1].setdefault(file.stem, []).append(file)
        return folders


def image_folders(root: Path, start: Path) -> Iterator[Path]:
    """Yield where images may lie that folder `start` annotates: there, and in images/, JPEGImages/, ... up to the root."""
    yield start
    below = start.resolve().is_relative_to(root.resolve())
    depth = len(start.resolve().relative_to(root.resolve()).parts) if below else 1
    for folder in (start, *start.parents)[: depth + 1]:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and re.match(r"(jpeg|png|tiff?)?(images?|img)", child.name.lower()):
                yield child


def text_lines(file: Path, skipped: Tally) -> list[str] | None:
    """Return the lines of a text of annotations, or None where it is not UTF-8: class names would be garbled."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        skipped.add("annotation file that is not UTF-8", file.name)
        return None


def listed_splits(root: Path) -> dict[str, str]:
    """Return the split of each stem that root/ImageSets lists; "" for those of trainval only."""
    folders = [root / "ImageSets" / "Main", root / "ImageSets", root / "Main"]
    splits: dict[str, str] = {}
    for part in ("trainval", "train", "val", "test"):  # train and val say more than trainval
        file = next((f / f"{part}.txt" for f in folders if (f / f"{part}.txt").is_file()), None)
        if file:
            text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # as the names of files are read
            stems = [line.split()[0] for line in text.splitlines() if line.split()]
            splits.update(dict.fromkeys(stems, part if part in SPLITS else ""))
    return splits
