"""Folders of images, a class each: found, checked, loaded, scored and drawn."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..core.base_model import Data
from ..data.layout import SUFFIXES, composed, find_images
from ..data.pictures import READ_ERRORS, read_image, unfit_reason
from ..errors import DataError
from ..training.plots import Picture, guessed, spread

LOGGER = logging.getLogger("visionpeft")
Items = Sequence[tuple[str, int]]  # image files with the index of their class
PILLOW = SUFFIXES | {"pgm", "ppm"}  # suffixes of images that are read here
FOLDERS = {"val": ("val", "validation", "valid", "test")}  # folders that a split may be called, as Ultralytics has it


def read_folders(source: str, split: str, suffixes: frozenset[str] = PILLOW, train: bool = True) -> Data:
    """Find and check the images of train/CLASS and SPLIT/CLASS; those of the split are `Data.val`.

    A class is called as its folder in train is; elsewhere its accents may be written otherwise.

    Args:
        source: The folder that holds both.
        split: What is measured on.
        suffixes: Of image files.
        train: Whether train/CLASS is needed; without it, the classes are those of the split.

    Raises:
        DataError: Something is missing, empty, unreadable or at odds.
    """
    root, names = Path(source), FOLDERS.get(split, (split,))
    if not root.is_dir():
        raise DataError(f"data={source} is no folder; give one that holds train/CLASS/ and val/CLASS/ with images")
    folders = {"train": root / "train"} if train else {}
    folders["val"] = next((root / n for n in names if (root / n).is_dir()), root / " or ".join(names))
    if lacks := next((folder.name for folder in folders.values() if not folder.is_dir()), None):
        raise DataError(f"{source} has no folder {lacks}; it must hold train/CLASS/ and val/CLASS/ with images")
    spelled: dict[str, str] = {}
    files = {part: _by_class(folder, suffixes, spelled) for part, folder in folders.items()}
    files["val"] = {c: images for c, images in files["val"].items() if images}
    if train:
        _compare(source, files["train"], set(files["val"]))
    classes = dict(enumerate(sorted(files["train" if train else "val"])))
    digest = hashlib.sha256()
    items: dict[str, Items] = {}
    for part, folder in folders.items():
        usable = _readable([(f, i) for i, c in classes.items() for f in files[part].get(c, ())], folder)
        for file, _ in usable:
            digest.update(f"{part}/{file.relative_to(folder).as_posix()}|{file.stat().st_size}\n".encode())
        items[part] = [(str(file), i) for file, i in usable]
    return Data(source, "classify", classes, digest.hexdigest(), items.get("train", ()), items["val"])


@contextmanager
def still_readable(data: Data) -> Iterator[None]:
    """Say in a sentence which image of a set was lost since it was looked at; libraries say so in many ways.

    Raises:
        DataError: One was.
    """
    try:
        yield
    except (OSError, SyntaxError, cv2.error) as error:
        files = [item[0] if isinstance(item, tuple) else item for item in (*data.train, *data.val)]
        lost = next((f for f in files if f in str(error)), None) or next((f for f in files if not Path(f).is_file()), None)
        if lost is None and getattr(error, "errno", None) is None:  # of a damaged image, not of the system
            lost = next((f for f in files if _fault(Path(f)) is None), None)
        if lost is None:
            raise
        fate = "is no longer there" if not Path(lost).is_file() else "can no longer be read"
        raise DataError(f"the image {lost} {fate}; put it back (a run can then be resumed)") from error


def choose_holdout(names: Iterable[str], share: float) -> set[str]:
    """Return a share of the names, at least one: those whose hash is least, which hardly depends on the other names."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[: max(round(share * len(ranked)), 1)])


def split_folders(data: Data, folder: Path, share: float) -> str:
    """Split the training images of each class into train/CLASS and val/CLASS in `folder`, as links; returns the folder.

    Raises:
        DataError: A class has one image only.
    """
    for index, name in data.names.items():
        files = sorted(Path(f).resolve() for f, i in data.train if i == index)
        if len(files) < 2:
            raise DataError(f"{data.source} has one train image of {name} only; at least two are needed to hold one back")
        back = choose_holdout([f"{name}/{f.name}" for f in files], share)
        for number, file in enumerate(files):  # numbered, for names may repeat in folders below the class's
            part = folder / ("val" if f"{name}/{file.name}" in back else "train") / name
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number:06}{file.suffix}").symlink_to(file)
    return str(folder)


class Images(Dataset):
    """Image files, read as RGB."""

    def __init__(self, items: Items, transform: Callable[[Image.Image], Tensor]):
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return self.transform(read_image(path)), label


def loader(images: Dataset, batch: int, workers: int = 0, **more: Any) -> DataLoader:
    """Return a loader of images in their order."""
    return DataLoader(images, batch_size=batch, num_workers=workers, **more)


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable, classes: int, accelerator: Any = None, guesses: list[int] | None = None
) -> dict[str, float]:
    """Return the share of images whose class is the first guess (top1) or among five (top5), and the mean loss.

    Args:
        model: The classifier.
        batches: Of images and labels.
        classes: How many there are.
        accelerator: accelerate's, where several processes share the batches.
        guesses: Takes the first guess of each image.
    """
    device = next(model.parameters()).device
    totals, count = torch.zeros(3, device=device), 0  # of right first guesses, of those among five, of losses
    model.eval()
    for images, labels in batches:
        with accelerator.autocast() if accelerator else nullcontext():
            logits = model(images.to(device))
        logits, labels = logits.float(), labels.to(device)
        if accelerator:
            logits, labels = accelerator.gather_for_metrics((logits, labels))
        first, best = logits.argmax(1), logits.topk(min(5, classes)).indices
        right, among = (first == labels).sum(), (best == labels[:, None]).sum()
        totals += torch.stack([right, among, nn.functional.cross_entropy(logits, labels) * len(labels)])
        count += len(labels)
        if guesses is not None:
            guesses += first.tolist()
    return {name: round(value, 5) for name, value in zip(("top1", "top5", "loss"), (totals / count).tolist(), strict=True)}


def draw(data: Data, count: int, guess: Callable[[list[Image.Image]], list[tuple[str, float]]] | None) -> list[Picture]:
    """Return some validation images of a classification set with their classes, or with the answers of `guess`."""
    some = spread(data.val, count)
    images = [read_image(file) for file, _ in some]
    return guessed(images, [data.names[i] for _, i in some], guess and guess(images))


def shorten_list(names: Iterable[str]) -> str:
    """Return names for an error's sentence."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def warn_of_left_out(others: Sequence[Path], place: object) -> None:
    """Say which pictures are left out for their format."""
    if others:
        LOGGER.warning("%s pictures in %s are of formats that are not read, e.g. %s", len(others), place, min(others))


def _by_class(folder: Path, suffixes: frozenset[str], spelled: dict[str, str]) -> dict[str, list[Path]]:
    """Return the image files of each class; `spelled` has the names of classes by their composed ones, and is added to."""
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    found: dict[str, list[Path]] = {}
    others: list[Path] = []
    for place in classes:
        images, more = find_images(place, suffixes)
        found.setdefault(spelled.setdefault(composed(place.name), place.name), []).extend(sorted(images))
        others += more
    warn_of_left_out(others, folder)
    if not any(found.values()):
        where = "its class folders hold none" if found else "it has no class folders"
        raise DataError(f"{folder} has no images ({where}); put them into {folder}/CLASS/, as {', '.join(sorted(suffixes))}")
    return found


def _compare(source: str, train: dict[str, list[Path]], val: set[str]) -> None:
    """Refuse classes that cannot be learned; warn of classes that cannot be measured."""
    if empty := [c for c, images in train.items() if not images]:
        raise DataError(f"the class folder {source}/train/{empty[0]} holds no images; add some, or remove it")
    if more := val - set(train):
        raise DataError(f"{source} has {shorten_list(more)} in val, but not in train; a class must be there to be learned")
    if len(train) < 2:
        raise DataError(f"{source} has one class only ({shorten_list(train)}); a classifier needs at least two")
    if more := set(train) - val:
        LOGGER.warning("%s has no val images of %s: the scores say nothing of them", source, shorten_list(more))


def _readable(items: list[tuple[Path, int]], folder: Path) -> list[tuple[Path, int]]:
    """Return the images that can be read; warn of the rest.

    Raises:
        DataError: None can be, or something of one would be lost.
    """
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        faults = list(pool.map(_fault, (file for file, _ in items)))
    if why := next((f"{file} {fault}" for (file, _), fault in zip(items, faults, strict=True) if fault), None):
        raise DataError(f"{why} ({sum(map(bool, faults))} such images in {folder})")
    usable = [item for item, fault in zip(items, faults, strict=True) if fault is not None]
    broken = [file for (file, _), fault in zip(items, faults, strict=True) if fault is None]
    if not usable:
        raise DataError(f"none of the {len(items)} images in {folder} can be read, e.g. {broken[0]}; are they whole?")
    if broken:
        count = f"{len(broken)} of {len(items)} images"
        LOGGER.warning("%s in %s cannot be read and are left out, e.g. %s", count, folder, broken[0])
    return usable


def _fault(file: Path) -> str | None:
    """Return why an image would be read otherwise than it is meant, "" where it is fine, None where it is broken."""
    try:
        with Image.open(file) as image:
            if why := unfit_reason(image):
                return why
            image.draft("RGB", (32, 32))  # of a JPEG only an eighth is computed, but all of it is read
            image.load()
    except READ_ERRORS:
        return None
    return ""


def image_sources(source: Any) -> Iterator[Any]:
    """Yield the image files and images that `predict` is to read."""
    for one in source if isinstance(source, list | tuple) else [source]:
        if isinstance(one, Image.Image):
            yield one
        elif isinstance(one, str | Path) and Path(one).is_dir():
            found, others = find_images(Path(one), PILLOW)
            warn_of_left_out(others, one)
            if not found:
                raise DataError(f"{one} holds no images; give a folder with some, a file or a PIL image")
            yield from sorted(found)
        elif isinstance(one, str | Path) and Path(one).is_file():
            yield one
        else:
            raise DataError(f"there is no image {one!r}; give a file, a folder, a PIL image, or a list of those")


def open_image(image: Any) -> Image.Image:
    """Return the RGB of a file or an image that `image_sources` found."""
    try:
        return read_image(image)
    except DataError:
        raise
    except READ_ERRORS as error:
        raise DataError(f"{image} cannot be read as an image; give another") from error
