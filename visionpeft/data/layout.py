"""The layout of a set on disk: images and labels of a data YAML as Ultralytics reads it, or a folder with one per class."""

from __future__ import annotations

import codecs
import difflib
import glob
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..files import read_yaml
from ..registry import FAMILIES

# Ultralytics' own list (ultralytics.data.utils.IMG_FORMATS), so that nothing is imported to look at files
SUFFIXES = frozenset("avif bmp dng heic heif jp2 jpeg jpg mpo png tif tiff webp".split())
_OTHERS = frozenset("gif j2k jfif jpe jpx jxl pbm pgm pnm ppm tga".split())  # pictures, too, but not to Ultralytics
TASKS = ("detect", "segment", "pose", "obb", "classify")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # folders a split may be called
_MAX_CLASSES = 100_000  # classes; a larger nc is a slip, and so many names would not fit in memory
Yaml = dict[str, Any]  # a data YAML's values, checked where they are used
_KEYS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}  # what a data YAML may call it


@dataclass(frozen=True)
class Layout:
    """The files of a set.

    Attributes:
        source: The set's name, as it was given.
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

    def relative(self, file: Path) -> str:
        """Return a file's name for people: relative to the root where it is below it."""
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else str(file)


def read_layout(source: str | Path) -> Layout:
    """Return the layout of a set.

    Args:
        source: A data YAML, the name of one that Ultralytics ships, a folder that holds one, or a folder with train/CLASS.

    Raises:
        DataError: It is missing, not understood, or without images.
    """
    try:
        return _read(Path(source), str(source))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source} names what cannot be a place of images ({str(error)[:80]}); correct it") from error


def _read(path: Path, source: str) -> Layout:
    if path.is_dir():
        yamls = sorted(f for f in path.iterdir() if f.suffix in (".yaml", ".yml"))
        chosen = next((f for f in yamls if f.stem == "data"), yamls[0] if len(yamls) == 1 else None)
        return _read_yaml(chosen, source) if chosen else _read_folders(path, source)
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(
            f"{source} is neither a data YAML nor a folder; give a .yaml, or a folder with train/CLASS and val/CLASS"
        )
    return _read_yaml(path if path.is_file() else _shipped_yaml(path), source)


def label_file(image: Path) -> Path:
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


def _shipped_yaml(path: Path) -> Path:
    """Return the data YAML of that name that Ultralytics ships."""
    shipped = {f.name: f for family in FAMILIES.values() if family.data_yamls for f in family.data_yamls.glob("*.yaml")}
    if path.name != str(path) or path.name not in shipped:
        close = difflib.get_close_matches(path.name, shipped, n=1)
        hint = f" Did you mean '{close[0]}', which Ultralytics ships?" if close else ""
        raise DataError(f"there is no {path}; give a data YAML, or a folder with train/CLASS and val/CLASS.{hint}")
    return shipped[path.name]


def _read_yaml(path: Path, source: str) -> Layout:
    values = read_values(path)
    if not {"train", *_KEYS["val"]} & set(values):
        raise DataError(f"{path} is no data YAML; it must hold train, val and names (Ultralytics' format)")
    root = _root(path, values)
    splits, others = {}, []  # type: ignore[var-annotated]
    for part, keys in _KEYS.items():
        if place := next((values[k] for k in keys if values.get(k)), None):
            splits[part], pictures = _images(root, place, part, source)
            others += pictures
    return Layout(source, root, _names(values, path), splits, tuple(sorted(others)), _kpt_shape(values, path))


def read_values(path: Path) -> Yaml:
    """Return the values of a data YAML.

    Raises:
        DataError: It is no YAML, or a value holds letters that are not UTF-8: Ultralytics would drop them without a word.
    """
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
        values, twice = read_yaml(text), _duplicate_key(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from error
    if twice:
        raise DataError(f"{path} says '{twice}' twice, of which only the last would count; leave one out")
    if strange := _not_utf8(values, wide):
        raise DataError(f"{path} has letters that are not UTF-8 in '{strange}'; save the file as UTF-8")
    return {k: None if v == "None" else v for k, v in values.items()} if isinstance(values, dict) else {}


def _duplicate_key(node: Any) -> str:
    """Return the first key that a YAML, or the mapping of its names, holds twice, or ""."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    keys = [str(key.value) for key, _ in pairs]
    inner = next((value for key, value in pairs if key.value == "names"), None)
    return next((key for key in keys if keys.count(key) > 1), "") or (_duplicate_key(inner) if inner else "")


def _not_utf8(values: Any, wide: bool) -> str:
    """Return the first text of a YAML that Ultralytics, which reads UTF-8 alone, would read otherwise, or ""."""
    if isinstance(values, dict):
        values = [*values, *values.values()]
    if isinstance(values, list):
        return next(filter(None, (_not_utf8(v, wide) for v in values)), "")
    return values if isinstance(values, str) and ("\ufffd" in values or (wide and not values.isascii())) else ""


def read_names(path: Path) -> dict[int, str]:
    """Return the classes that a data YAML names, by index.

    Raises:
        DataError: It is missing, or names none.
    """
    return _names(read_values(path), path)


def _root(path: Path, values: Yaml) -> Path:
    """Return the folder that a data YAML's places are relative to, by Ultralytics' rules."""
    path_value = values.get("path")
    if path_value is not None and not isinstance(path_value, str):
        raise DataError(f"path: {path_value} in {path} is no folder; leave it out to mean the YAML's own")
    root = Path(path_value or path.parent)
    if not root.exists() and not root.is_absolute():
        root = next((family.data_root for family in FAMILIES.values() if family.data_root), Path()) / root
    return root.resolve()


def _names(values: Yaml, path: Path) -> dict[int, str]:
    names = values.get("names")
    try:  # numbers may be written as text
        count = int(str(values["nc"]).removesuffix(".0")) if "nc" in values else None
    except ValueError:
        raise DataError(
            f"{path} has nc: {values['nc']}, which is no number of classes; leave it out, or correct it"
        ) from None
    try:
        if names is None:
            names = [f"class_{i}" for i in range(min(count or 0, _MAX_CLASSES))]
        names = {int(k): str(v) for k, v in (enumerate(names) if isinstance(names, list) else names.items())}
    except (ValueError, TypeError, AttributeError):
        names = {}
    if not names or set(names) != set(range(len(names))):
        raise DataError(f"{path} names no classes; it must hold 'names:', a list, or a mapping from 0, 1, ... to names")
    if count not in (None, len(names)):
        raise DataError(f"{path} has nc: {count}, but names {len(names)} classes; correct one of them")
    return {i: names[i] for i in range(len(names))}


def _kpt_shape(values: Yaml, path: Path) -> tuple[int, int] | None:
    shape = values.get("kpt_shape")
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape) and shape[1] in (2, 3)):
        raise DataError(f"kpt_shape: {shape} in {path} is not understood; write [keypoints, 2] or [keypoints, 3]")
    return shape[0], shape[1]


def listed_images(file: Path) -> list[str]:
    """Return the images that a text file lists, by Ultralytics' rules: ./ is its folder, and a comment, or a line that does
    not end as an image does, is no entry. Blanks around a name count.

    Raises:
        DataError: It is no text in UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no list of images in UTF-8 ({type(error).__name__}); write one image a line") from error
    images = [x for x in lines if x.strip().rpartition(".")[-1].lower() in SUFFIXES]
    images = [x for x in images if not x.startswith("#") or os.path.isfile(x)]
    return [f"{file.parent}{os.sep}{x[2:]}" if x.startswith("./") else x for x in images]


def _images(root: Path, value: Any, part: str, source: str) -> tuple[list[Path], list[Path]]:
    """Return the images of a split, of folders and of text files that list them, and other pictures in the folders."""
    images_found: list[Path] = []
    others: list[Path] = []
    places = [str(place) for place in (value if isinstance(value, list) else [value])]
    for place in places:
        path = root / place
        if not path.exists() and place.startswith("../") and place == value:  # Ultralytics forgives it, for Roboflow's sake
            path = root / place[3:]
        if path.is_dir():
            images, pictures = find_images(path)
            images_found, others = images_found + images, others + pictures
        elif path.is_file():
            images_found += map(Path, listed_images(path))
        else:
            raise DataError(f"the {part} images of {source} are not at {path}; correct '{part}:' or 'path:' in the YAML")
    if not images_found:
        raise DataError(f"{source} has no {part} images in {', '.join(places)}; put some there")
    return sorted(images_found), others


def _read_folders(root: Path, source: str) -> Layout:
    """Find the images of train/CLASS, val/CLASS and test/CLASS."""
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for part, names in SPLITS.items():
        folder = next((root / n for n in names if (root / n).is_dir()), None)
        if folder:
            images, pictures = find_images(folder)
            splits[part] = sorted(f for f in images if f.parent != folder)
            others += pictures
    if not splits.get("train"):
        raise DataError(
            f"{source} holds neither a data YAML nor images in train/CLASS; give a folder with one of them, or convert a "
            "COCO, VOC, KITTI or DOTA set first (visionpeft data convert)"
        )
    classes = sorted({class_of(root, f) for images in splits.values() for f in images})
    if classes == ["images"]:
        raise DataError(f"{source} has train/images, but no data YAML; write one with train, val and names, and give that")
    filled = {k: v for k, v in splits.items() if v}
    return Layout(source, root, dict(enumerate(classes)), filled, tuple(sorted(others)), classify=True)


def class_of(root: Path, image: Path) -> str:
    """Return the class of an image in root/SPLIT/CLASS/."""
    return composed(image.relative_to(root).parts[1])
