"""Folders of images, a class each: found, checked, loaded, and what a model makes of them. Registers nothing."""

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
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError
from ..pictures import Picture, guessed, spread
from .base import Data

LOGGER = logging.getLogger("visionpeft")
Items = Sequence[tuple[str, int]]  # image files with the index of their class
_NAMES = {"val": ("val", "valid", "validation", "test")}  # folders that a split may be called


def read_folders(source: str, split: str) -> Data:
    """Find and check the images of train/CLASS and SPLIT/CLASS; those of the split are called "val" in `Data.facts`.

    Raises:
        DataError: Something is missing, empty, unreadable or at odds.
    """
    root, names = Path(source), _NAMES.get(split, (split,))
    if not root.is_dir():
        raise DataError(f"data={source} is no folder; give one that holds train/CLASS/ and val/CLASS/ with images")
    train, other = root / "train", next((root / n for n in names if (root / n).is_dir()), None)
    if other is None or not train.is_dir():
        lacks = " or ".join(names) if train.is_dir() else "train"
        raise DataError(f"{source} has no folder {lacks}; it must hold train/CLASS/ and val/CLASS/ with images")
    found = {"train": _by_class(train), "val": _by_class(other)}
    _compare(source, set(found["train"]), set(found["val"]))
    classes = dict(enumerate(sorted(found["train"])))
    digest, items = hashlib.sha256(), {}
    for part, folder in (("train", train), ("val", other)):
        kept = _readable([(f, i) for i, c in classes.items() for f in found[part][c]], folder)
        for file, _ in kept:
            digest.update(f"{part}/{file.relative_to(folder).as_posix()}|{file.stat().st_size}\n".encode())
        items[part] = [(str(file), i) for file, i in kept]
    return Data(source, "classify", classes, digest.hexdigest(), items)


@contextmanager
def still_readable(data: Data) -> Iterator[None]:
    """Say in a sentence which image of a set was lost since it was looked at; libraries say so in many ways.

    Raises:
        DataError: One was.
    """
    try:
        yield
    except (OSError, SyntaxError, cv2.error) as error:
        items = [item for part in ("train", "val") for item in data.facts.get(part, ())]
        files = [item[0] if isinstance(item, tuple) else item for item in items]
        lost = next((f for f in files if f in str(error)), None) or next((f for f in files if not Path(f).is_file()), None)
        if lost is None and getattr(error, "errno", None) is None:  # of a damaged image, not of the system
            lost = next((f for f in files if not _decodes(Path(f))), None)
        if lost is None:
            raise
        said = "is no longer there" if not Path(lost).is_file() else "can no longer be read"
        raise DataError(f"the image {lost} {said}; put it back (a run can then be resumed)") from error


def held_back(names: Iterable[str], share: float) -> set[str]:
    """Return a share of the names, at least one: those whose hash is least, which hardly depends on the other names."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[: max(round(share * len(ranked)), 1)])


def split_folders(data: Data, folder: Path, share: float) -> str:
    """Split the training images of each class into train/CLASS and val/CLASS in `folder`, as links; returns the folder.

    Raises:
        DataError: A class has one image only.
    """
    for index, name in data.names.items():
        files = sorted(Path(f).resolve() for f, i in data.facts["train"] if i == index)
        if len(files) < 2:
            raise DataError(f"{data.source} has one train image of {name} only; at least two are needed to hold one back")
        back = held_back([f"{name}/{f.name}" for f in files], share)
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


def read_image(source: Any) -> Image.Image:
    """Return a file's, or an image's, RGB."""
    with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
        if "transparency" in image.info:  # Pillow wants these to be made RGBA first
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


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
    from torchmetrics import MeanMetric, MetricCollection  # a second, for it imports transformers where that is installed
    from torchmetrics.classification import MulticlassAccuracy

    device = next(model.parameters()).device
    shares: dict[str, Any] = {f"top{k}": MulticlassAccuracy(classes, top_k=min(k, classes), average="micro") for k in (1, 5)}
    metrics = MetricCollection(shares, compute_groups=False).to(device)
    loss = MeanMetric().to(device)
    model.eval()
    for images, labels in batches:
        with accelerator.autocast() if accelerator else nullcontext():
            logits = model(images.to(device))
        logits, labels = logits.float(), labels.to(device)
        if accelerator:
            logits, labels = accelerator.gather_for_metrics((logits, labels))
        metrics.update(logits, labels)
        if guesses is not None:
            guesses += logits.argmax(1).tolist()
        loss.update(nn.functional.cross_entropy(logits, labels), weight=len(labels))
    found = {**metrics.compute(), "loss": loss.compute()}
    return {name: round(float(value), 5) for name, value in found.items()}


def draw(data: Data, count: int, guess: Callable[[list[Image.Image]], list[tuple[str, float]]] | None) -> list[Picture]:
    """Return some validation images of a classification set with their classes, or with what `guess` says of them."""
    some = spread(data.facts["val"], count)
    images = [read_image(file) for file, _ in some]
    return guessed(images, [data.names[i] for _, i in some], guess and guess(images))


def few(names: Iterable[str]) -> str:
    """Return names for an error's sentence."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder."""
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    found = {c.name: sorted(f for f in c.rglob("*") if _is_image(f)) for c in classes}
    if not any(found.values()):
        where = "its class folders hold none" if found else "it has no class folders"
        raise DataError(f"{folder} has no images ({where}); put them into {folder}/CLASS/, as {', '.join(IMG_EXTENSIONS)}")
    if empty := [c for c, images in found.items() if not images]:
        raise DataError(f"the class folder {folder / empty[0]} holds no images; add some, or remove it")
    return found


def _compare(source: str, train: set[str], val: set[str]) -> None:
    for here, there, more in (("train", "val", train - val), ("val", "train", val - train)):
        if more:
            raise DataError(f"{source} has {few(more)} in {here}, but not in {there}; both must hold the same classes")
    if len(train) < 2:
        raise DataError(f"{source} has one class only ({few(train)}); a classifier needs at least two")


def _readable(items: list[tuple[Path, int]], folder: Path) -> list[tuple[Path, int]]:
    """Return the images that can be read; warn of the rest."""
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        fine = list(pool.map(_decodes, (file for file, _ in items)))
    kept = [item for item, ok in zip(items, fine, strict=True) if ok]
    broken = [file for (file, _), ok in zip(items, fine, strict=True) if not ok]
    if not kept:
        raise DataError(f"none of the {len(items)} images in {folder} can be read, e.g. {broken[0]}; are they whole?")
    if broken:
        count = f"{len(broken)} of {len(items)} images"
        LOGGER.warning("%s in %s cannot be read and are left out, e.g. %s", count, folder, broken[0])
    return kept


def _decodes(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (32, 32))  # of a JPEG only an eighth is computed, but all of it is read
            image.load()
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        return False  # ImportError: where Pillow knows no format, Ultralytics has it look for a HEIF plugin
    return True


def sources(source: Any) -> Iterator[Any]:
    """Return image files and images of what `predict` is given."""
    for one in source if isinstance(source, list | tuple) else [source]:
        if isinstance(one, Image.Image):
            yield one
        elif isinstance(one, str | Path) and Path(one).is_dir():
            found = sorted(f for f in Path(one).rglob("*") if _is_image(f))
            if not found:
                raise DataError(f"{one} holds no images; give a folder with some, a file or a PIL image")
            yield from found
        elif isinstance(one, str | Path) and Path(one).is_file():
            yield one
        else:
            raise DataError(f"there is no image {one!r}; give a file, a folder, a PIL image, or a list of those")


def open_image(image: Any) -> Image.Image:
    """Return the RGB of a file or an image that `sources` found."""
    try:
        return read_image(image)
    except (OSError, SyntaxError, ImportError) as error:
        raise DataError(f"{image} cannot be read as an image; give another") from error
