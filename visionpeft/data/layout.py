"""Where the images and labels of a set lie: a data YAML as Ultralytics reads it, or a folder with a folder per class."""

from __future__ import annotations

import difflib
import glob
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError

# Ultralytics' own list (ultralytics.data.utils.IMG_FORMATS), so that nothing is imported to look at files
SUFFIXES = frozenset("avif bmp dng heic heif jp2 jpeg jpg mpo png tif tiff webp".split())
_OTHERS = frozenset("gif j2k jfif jpe jpx jxl pbm pgm pnm ppm tga".split())  # pictures, too, but not to Ultralytics
TASKS = ("detect", "segment", "pose", "obb", "classify")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # folders a split may be called


@dataclass(frozen=True)
class Layout:
    """A set's files.

    Attributes:
        source: What was given.
        root: The folder that files are named relative to.
        names: Classes by index.
        splits: Image files of train, val and test, where there are any.
        others: Pictures beside them, of formats that Ultralytics does not read.
        kpt_shape: Of a pose set: keypoints and numbers per keypoint.
        classify: Whether an image's class is its folder; then there are no label files.
    """

    source: str
    root: Path
    names: dict[int, str]
    splits: dict[str, list[Path]]
    others: tuple[Path, ...] = ()
    kpt_shape: tuple[int, int] | None = None
    classify: bool = False

    def short(self, file: Path) -> str:
        """Return a file's name for people: relative to the root where it is below it."""
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else str(file)


def read_layout(source: str | Path) -> Layout:
    """Find a set's images.

    Args:
        source: A data YAML, the name of one that Ultralytics ships, a folder that holds one, or a folder with train/CLASS.

    Raises:
        DataError: It is missing, not understood, or without images.
    """
    path = Path(source)
    if path.is_dir():
        yamls = sorted(f for f in path.iterdir() if f.suffix in (".yaml", ".yml"))
        chosen = next((f for f in yamls if f.stem == "data"), yamls[0] if len(yamls) == 1 else None)
        return _read_yaml(chosen, str(source)) if chosen else _read_folders(path, str(source))
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(
            f"{source} is neither a data YAML nor a folder; give a .yaml, or a folder with train/CLASS and val/CLASS"
        )
    return _read_yaml(path if path.is_file() else _shipped(path), str(source))


def label_of(image: Path) -> Path:
    """Return where Ultralytics looks for an image's labels: the last folder `images` is called `labels`."""
    here, there = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"
    return Path(there.join(str(image).rsplit(here, 1))).with_suffix(".txt")


def is_image(file: Path) -> bool:
    """Return whether Ultralytics would read a file of this name."""
    return file.suffix[1:].lower() in SUFFIXES and not file.name.startswith(".")


def find_images(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> tuple[list[Path], list[Path]]:
    """Return the images below a folder, and the pictures of formats that are none of `suffixes`.

    They are found as Ultralytics finds them: in folders that links lead to, too, and not where a name begins with a dot.
    """
    named = map(Path, glob.glob(str(Path(glob.escape(str(folder))) / "**" / "*.*"), recursive=True))
    known = [(f, f.suffix[1:].lower()) for f in named]
    return [f for f, s in known if s in suffixes], [f for f, s in known if s in _OTHERS - suffixes]


def composed(name: str) -> str:
    """Return a name as it is to be compared: macOS writes the accents of file names apart from their letters."""
    return unicodedata.normalize("NFC", name)


def _shipped(path: Path) -> Path:
    """Return the data YAML of that name that Ultralytics ships."""
    from ultralytics.utils import ROOT

    shipped = {f.name: f for f in (ROOT / "cfg" / "datasets").glob("*.yaml")}
    if path.name != str(path) or path.name not in shipped:
        close = difflib.get_close_matches(path.name, shipped, n=1)
        hint = f" Did you mean '{close[0]}', which Ultralytics ships?" if close else ""
        raise DataError(f"there is no {path}; give a data YAML, or a folder with train/CLASS and val/CLASS.{hint}")
    return shipped[path.name]


def _read_yaml(path: Path, source: str) -> Layout:
    values = _load(path)
    if not {"train", "val"} & set(values):
        raise DataError(f"{path} is no data YAML; it must hold train, val and names (Ultralytics' format)")
    root = _root(path, values)
    splits, others = {}, []  # type: ignore[var-annotated]
    for part, keys in SPLITS.items():
        if place := next((values[k] for k in keys if values.get(k)), None):
            splits[part], more = _images(root, place if isinstance(place, list) else [place], part, source)
            others += more
    return Layout(source, root, _names(values, path), splits, tuple(sorted(others)), _kpt_shape(values, path))


def _load(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, OSError) as error:
        raise DataError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from error
    return values if isinstance(values, dict) else {}


def read_names(path: Path) -> dict[int, str]:
    """Return the classes that a data YAML names, by index.

    Raises:
        DataError: It is missing, or names none.
    """
    return _names(_load(path), path)


def _root(path: Path, values: dict[str, Any]) -> Path:
    """Return the folder that a data YAML's places are relative to, by Ultralytics' rules."""
    given = values.get("path")
    if given is not None and not isinstance(given, str):
        raise DataError(f"path: {given} in {path} is no folder; leave it out to mean the YAML's own")
    root = Path(given or path.parent)
    if not root.exists() and not root.is_absolute():
        from ultralytics.utils import DATASETS_DIR

        root = DATASETS_DIR / root
    return root.resolve()


def _names(values: dict[str, Any], path: Path) -> dict[int, str]:
    names, count = values.get("names"), values.get("nc")
    if names is None and isinstance(count, int) and count > 0:
        return {i: f"class_{i}" for i in range(count)}
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or set(names) != set(range(len(names))):
        raise DataError(f"{path} names no classes; it must hold 'names:', a list, or a mapping from 0, 1, ... to names")
    return {i: str(names[i]) for i in range(len(names))}


def _kpt_shape(values: dict[str, Any], path: Path) -> tuple[int, int] | None:
    shape = values.get("kpt_shape")
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape) and shape[1] in (2, 3)):
        raise DataError(f"kpt_shape: {shape} in {path} is not understood; write [keypoints, 2] or [keypoints, 3]")
    return shape[0], shape[1]


def _images(root: Path, places: Iterable[Any], part: str, source: str) -> tuple[list[Path], list[Path]]:
    """Return the images of a split, of folders and of text files that list them, and other pictures in the folders."""
    found: list[Path] = []
    others: list[Path] = []
    for place in map(str, places):
        path = root / place
        if not path.exists() and place.startswith("../"):  # as Ultralytics forgives it, for Roboflow's sake
            path = root / place[3:]
        if path.is_dir():
            images, more = find_images(path)
            found, others = found + images, others + more
        elif path.is_file():
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            found += [path.parent / line[2:] if line.startswith("./") else Path(line) for line in lines if line]
        else:
            raise DataError(f"the {part} images of {source} are not at {path}; correct '{part}:' or 'path:' in the YAML")
    if not found:
        raise DataError(f"{source} has no {part} images in {', '.join(map(str, places))}; put some there")
    return sorted(found), others


def _read_folders(root: Path, source: str) -> Layout:
    """Find the images of train/CLASS, val/CLASS and test/CLASS."""
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for part, names in SPLITS.items():
        folder = next((root / n for n in names if (root / n).is_dir()), None)
        if folder:
            images, more = find_images(folder)
            splits[part] = sorted(f for f in images if f.parent != folder)
            others += more
    if not splits.get("train"):
        raise DataError(
            f"{source} holds neither a data YAML nor images in train/CLASS; give a folder with one of them, or convert a "
            "COCO, VOC, KITTI or DOTA set first (visionpeft data convert)"
        )
    classes = sorted({class_of(root, f) for images in splits.values() for f in images})
    if classes == ["images"]:
        raise DataError(f"{source} has train/images, but no data YAML; write one with train, val and names, and give that")
    kept = {k: v for k, v in splits.items() if v}
    return Layout(source, root, dict(enumerate(classes)), kept, tuple(sorted(others)), classify=True)


def class_of(root: Path, image: Path) -> str:
    """Return the class of an image in root/SPLIT/CLASS/."""
    return composed(image.relative_to(root).parts[1])
