"""Data sets as Ultralytics reads them: a YAML with images and label files, or a folder with a folder per class."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import Subset
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import classify_transforms
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset, img2label_paths

from ...core.base_model import Data
from ...data.layout import SUFFIXES, composed, find_images, listed_images, read_names, read_values
from ...data.pictures import inspect_image, refuse_unfit
from ...errors import DataError
from ...training.plots import spread
from ..base import Arguments
from ..classification import (
    FOLDERS,
    Images,
    choose_holdout,
    loader,
    read_folders,
    shorten_list,
    split_folders,
    warn_of_left_out,
)
from .output import one_line
from .sources import check_caches, read_set
from .tasks import TASKS, Task, is_positive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages(Data):
    """A set whose labels lie in files beside its images."""

    pose_length: int = 0  # numbers of a row that is a pose, in a set that is used for another task; 0: there are none

    def rows(self, images: Sequence[str]) -> list[list[str]]:
        """Return the rows of some images' label files."""
        return [rows_of(Path(label), self.pose_length) for label in img2label_paths(list(images))]


# -------------------------------------------------------------------------------------------------------------- reading it
def read_data(source: str, task: Task, split: str, train: bool, allow_download: bool) -> Data:
    """Find and check a set; see `Family.read_data`.

    Raises:
        DataError: It is missing, empty or contradicts itself.
    """
    if not task.labels:
        # with train, too: without it, Ultralytics would split the rest anew
        return _own_folders(read_folders(source, split, SUFFIXES), split)
    if not str(source).endswith((".yaml", ".yml")):
        raise DataError(f"data={source} is no data YAML; give a .yaml with train, val and names (Ultralytics' format)")
    if Path(source).is_file():
        read_names(Path(source))  # says clearly where they are wrong
    described = read_set(str(source), "" if train else split, allow_download)
    source = str(source if Path(source).is_file() else described["yaml_file"])  # a name or an address until now
    outputs, digest = outputs_of(task, described, source), hashlib.sha256()
    names, channels = dict(described["names"]), described["channels"]
    pose = _pose_length(task, described, source)
    parts: dict[str, list[str]] = {}
    owners: dict[str, set[str]] = {}  # the images that have a label file's rows
    for part in ("train", split) if train else (split,):
        images = find_part(described.get(part), part, source, warn=True)
        if channels in (1, 3):  # else Ultralytics reads all bands, and all pages as bands
            refuse_unfit(images)
        boxes = 0
        for image, label in zip(images, img2label_paths(list(images)), strict=True):
            if not os.path.isfile(image):
                quoted = f"{image[:200]!r}"  # with the blanks around it
                raise DataError(f"{source} lists the {part} image {quoted}, which is not there; correct the list")
            rows = rows_of(Path(label), pose)
            owners.setdefault(label, set()).update([image] if rows else [])
            boxes += len(rows)
            _check_rows(rows, described["nc"], label, task, outputs)
            digest.update(f"{Path(image).name}|{os.path.getsize(image)}|{rows}\n".encode())
        if not boxes:
            raise DataError(
                f"the {len(images)} {part} images of {source} have no labels; put one .txt per image into a folder "
                "'labels' beside 'images'"
            )
        parts["train" if train and part == "train" else "val"] = images
    check_caches(Path(label).parent for label in owners)
    _warn_of_twins(source, owners, names)
    return LabelledImages(
        source, task.name, names, digest.hexdigest(), **parts, channels=channels, outputs=outputs, pose_length=pose
    )


def _warn_of_twins(source: str, owners: Mapping[str, set[str]], names: Mapping[int, str]) -> None:
    """Warn of images that share a label file, and of classes that share a name."""
    if shared := [label for label, images in owners.items() if len(images) > 1]:
        log.warning(
            f"more than one image of {source} has the labels {shorten_list(shared)}, so all but one train on another's "
            "boxes; rename the images"
        )
    if len(set(names.values())) < len(names):
        log.warning(f"{source} has classes of the same name, which scores cannot tell apart: {one_line(names)}")


def find_part(places: Any, part: str, source: str, warn: bool = False) -> list[str]:
    """Return the image files of one part of a data set, as Ultralytics finds them; `warn` of pictures that it leaves out."""
    found: list[str] = []
    for place in map(Path, places if isinstance(places, list) else [places] if places else []):
        if place.is_dir():
            images, others = find_images(place)
            found += map(str, images)
            if warn:
                warn_of_left_out(others, place)
        elif place.is_file():
            found += listed_images(place)
        else:
            raise DataError(f"the {part} images of {source} are not at {place}; correct '{part}:' or 'path:' in the YAML")
    if not found:
        raise DataError(f"the data {source} has no {part} images (looked in {places}); give a folder that holds images")
    return sorted(found)


def _own_folders(data: Data, split: str) -> Data:
    """Return a classification set in whose folders Ultralytics, which walks them itself, finds the same classes and images.

    Raises:
        DataError: It would find other classes, or other images.
    """
    check_caches(Path(data.source, part) for part in ("train", *FOLDERS["val"], "test"))
    for part in ("train", split):
        for folder in filter(Path.is_dir, (Path(data.source) / name for name in FOLDERS.get(part, (part,)))):
            for hidden in sorted(folder.rglob(".*")):
                if hidden.is_dir() and hidden.parent == folder:
                    raise DataError(f"Ultralytics would take the hidden folder {hidden} for a class; remove it")
                for file in hidden.rglob("*") if hidden.is_dir() else [hidden]:
                    if file.suffix[1:].lower() in SUFFIXES and not inspect_image(file).fault:
                        raise DataError(f"Ultralytics would train on {file}, though {hidden.name} is hidden; remove that")
            spelled = {composed(name): name for name in data.names.values()}
            for place in folder.iterdir():
                if place.is_dir() and spelled.get(composed(place.name), place.name) != place.name:
                    raise DataError(
                        f"{place} has the name of a class in train, but not its accents, which one of them writes apart "
                        "from their letters (decomposed Unicode); to Ultralytics, these are two classes: rename one"
                    )
    return data


# ----------------------------------------------------------------------------------------------------------------- labels
def rows_of(label: Path, pose: int = 0) -> list[str]:
    """Return the rows of a label file; none where there is none.

    Args:
        label: The file.
        pose: Rows of so many numbers are cut to class and box, as Ultralytics reads the poses of a set for other tasks.

    Raises:
        DataError: It is no text in UTF-8.
    """
    try:
        text = label.read_text(encoding="utf-8-sig") if os.path.isfile(label) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the labels {label} cannot be read as UTF-8 ({type(error).__name__}); save the file anew"
        ) from error
    rows = [line for line in text.splitlines() if line.strip()]
    return [" ".join(words[:5]) if len(words := row.split()) == pose else row for row in rows] if pose else rows


def _pose_length(task: Task, data: Arguments, source: str) -> int:
    """Return how many numbers a row of a pose has in a set that is used for another task, or 0.

    Raises:
        DataError: The set says so in a way that is not understood.
    """
    if _has_keypoints(task) or "kpt_shape" not in data:
        return 0
    shape = data["kpt_shape"]
    if not _wholes(shape) or len(shape) != 2:
        raise DataError(f"{source} has kpt_shape={shape}; leave it out, or write [number of keypoints, 2 or 3]")
    return 5 + shape[0] * shape[1] if shape[0] else 0


def outputs_of(task: Task, data: Arguments, source: str) -> dict[str, Any]:
    """Return the outputs of the head, beside its classes, that a data YAML asks for.

    Raises:
        DataError: It says nothing of keypoints where there must be some, or contradicts itself.
    """
    if not _has_keypoints(task):
        return {}
    shape: Any
    sigmas: Any
    shape, flip, sigmas = (data.get(k) for k in ("kpt_shape", "flip_idx", "kpt_oks_sigmas"))
    if not _wholes(shape) or len(shape) != 2 or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(
            f"{source} has kpt_shape={shape}; a pose set says kpt_shape: [number of keypoints, 2 or 3 numbers of each]"
        )
    if flip is not None and (not _wholes(flip) or sorted(flip) != list(range(shape[0]))):
        raise DataError(f"{source} has flip_idx={flip}; it must name each of the keypoints 0 to {shape[0] - 1} once")
    if sigmas is not None and (not isinstance(sigmas, list) or len(sigmas) != shape[0] or not all(map(is_positive, sigmas))):
        raise DataError(f"{source} has kpt_oks_sigmas={sigmas}; it must hold a number above 0 for each keypoint")
    more = {k: data[k] for k in ("kpt_names", "kpt_oks_sigmas") if data.get(k)}
    return {"kpt_shape": list(shape), **more}


def _wholes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, int) for v in values)


def _has_keypoints(task: Task) -> bool:
    return task.labels is not None and task.labels.has_keypoints


def _check_rows(rows: list[str], count: int, label: str, task: Task, outputs: Arguments) -> None:
    for row in rows:
        first, *_ = parts = row.split()
        try:
            index, *_ = numbers = [float(p) for p in parts]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
        except ValueError:
            form = task.labels.row if task.labels else ""
            raise DataError(f"{label} has the row '{row[:40]}'; a row is: {form}, all numbers") from None
        if wrong := task.check_row(parts, outputs):
            raise DataError(f"{label} has a row of {wrong}")
        if not 0 <= index < count or index != int(index):
            raise DataError(f"{label} has class {first}, but the data YAML names {count} classes (0 to {count - 1})")


# --------------------------------------------------------------------------------------------------------------- using it
def split_off(data: Data, folder: Path, share: float) -> str:
    """Split a set's training part; see `SupportsHoldout.holdout_split`."""
    if not isinstance(data, LabelledImages):
        return split_folders(data, folder, share)
    back = choose_holdout({Path(f).name for f in data.train}, share)
    for part, held in (("train", False), ("val", True)):
        files = [f for f in data.train if (Path(f).name in back) == held]
        (folder / f"{part}.txt").write_text("".join(f"{Path(f).absolute()}\n" for f in files))
    values = read_values(Path(data.source))
    rest = {k: v for k, v in values.items() if k not in ("path", "train", "val", "test", "download")}
    lists = {part: str((folder / f"{part}.txt").resolve()) for part in ("train", "val")}
    (folder / "data.yaml").write_text(yaml.safe_dump({**rest, **lists}, sort_keys=False), encoding="utf-8")
    return str(folder / "data.yaml")


def batches(data: Data, imgsz: int, batch: int, count: int, stride: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for a network's loss, of images spread over the training part, not augmented.

    Args:
        data: The set.
        imgsz: Image size in pixels.
        batch: Images in each.
        count: The number of batches, fewer where the set has no more.
        stride: That the size is rounded up to.
    """
    if not TASKS[data.task].labels:
        items = spread(data.train, batch * count)
        for images, labels in loader(Images(items, classify_transforms(imgsz)), batch):
            yield {"img": images, "cls": labels}
        return
    described = check_det_dataset(data.source, autodownload=False)
    settings: Any = get_cfg(overrides={"task": data.task, "imgsz": -(-imgsz // stride) * stride})
    dataset: Any = build_yolo_dataset(settings, described["train"], batch, described, mode="val", stride=stride)
    chosen: Any = Subset(dataset, spread(range(len(dataset)), batch * count))
    for labelled in loader(chosen, batch, collate_fn=dataset.collate_fn):
        tensors = {k: v for k, v in labelled.items() if isinstance(v, torch.Tensor)}
        yield tensors | {"img": labelled["img"].float() / 255}


def warn_of_lost(data: Data, part: str, dataset: Any, share: float = 1.0) -> None:
    """Warn of images of a part that Ultralytics does not use.

    Args:
        data: The set.
        part: "train" or "val".
        dataset: Ultralytics' own, made of that part.
        share: Of the images that it was made of: the first; above 1, their number.
    """
    files: Sequence[Any] = data.train if part == "train" else data.val
    if TASKS[data.task].labels:
        used = dataset.im_files
        files = files[: share if isinstance(share, int) else max(1, round(len(files) * share))]
    elif share == 1.0:  # a share of them would be spread over all
        used, files = [sample[0] for sample in dataset.samples], [file for file, _ in files]
    else:
        return
    there = set(map(os.path.realpath, used))
    if lost := [f for f in dict.fromkeys(files) if os.path.realpath(f) not in there]:
        named = ", ".join(lost[:5])
        log.warning(f"{len(lost)} of {len(files)} {part} images cannot be used and are left out: {named}")


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Say in a sentence that Ultralytics finds no image of a set readable, or labels of another task."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        known = ("No valid images found", "No labels found", "dataset requires equal numbers")
        if not any(words in str(error) for words in known):
            raise
        raise DataError(f"the data {source} cannot be used: {one_line(error)}") from error
