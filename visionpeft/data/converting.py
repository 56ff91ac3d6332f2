"""The conversion of a data set to Ultralytics' layout: images/SPLIT, labels/SPLIT and data.yaml.

Everything is written into a hidden folder beside OUT, which is renamed at the end: OUT is whole or absent.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from PIL import Image

from .. import tables
from ..errors import ConfigError, DataError, nearest
from .formats.base import FORMATS, Entry, Request, Source, Thing, plain
from .layout import SPLITS, SUFFIXES, read_names
from .pictures import turned
from .report import Tally, listed, printable, watched

_MARK = "# Made by visionpeft data convert"  # what may be replaced
_LEAST = 1e-3  # pixels: what is thinner has no width


@dataclass(frozen=True)
class Conversion:
    """What was written; ``print`` it or take `to_dict()`.

    Attributes:
        data: The data YAML, for `train` and `check`.
        format: What was read.
        task: What the labels are for.
        names: Classes by index.
        images: Per split.
        objects: Per split and class.
        left: What was left out, and why: a count, and the first few.
        changed: What was changed: boxes clipped, images copied where they could not be linked, ...
    """

    data: str
    format: str
    task: str
    names: dict[int, str]
    images: dict[str, int]
    objects: dict[str, dict[str, int]]
    left: dict[str, tuple[int, tuple[str, ...]]]
    changed: dict[str, tuple[int, tuple[str, ...]]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(n, f"{self.images[n]:,}", f"{sum(o.values()):,}") for n, o in self.objects.items()]
        title = f"{self.format} to {self.task}, {len(self.names)} class{'es' * (len(self.names) != 1)}"
        parts = [tables.text(title, ("split", "images", "objects"), rows, 80, (1, 2))]
        for heading, found in (("left out:", self.left), ("changed:", self.changed)):
            lines = [line for what, (n, examples) in found.items() for line in listed(what, n, examples)]
            parts += ["\n".join([heading, *lines])] if lines else []
        return "\n\n".join([*parts, f"data: {printable(self.data)}"])


def convert(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    task: str | None = None,
    val: float = 0.2,
    names: Sequence[str] | str | Path | None = None,
    without: Iterable[str] = (),
    difficult: bool = False,
    copy: bool = False,
    exist_ok: bool = False,
) -> Conversion:
    """Convert a data set to Ultralytics' layout. The source is not changed.

    Args:
        source: A COCO JSON, or the folder of a COCO, Pascal VOC, KITTI or DOTA set.
        out: The folder to make.
        format: coco, voc, kitti or dota; by default told from the files.
        images: Where the images are, if not where the format keeps them.
        annotations: The file or folder of annotations, where `source` holds several.
        task: detect, segment, pose or obb; by default what the annotations hold.
        val: Share of images that goes to val where the source has no val split. It is chosen by a hash of each image's
            name, so it is the same every time, and stays when images are added.
        names: Classes in the order wanted, or a data YAML that names them, or the name of a packaged one (dior, ...).
            Others are left out; case, spaces and marks do not count. By default the source's.
        without: Classes to leave out.
        difficult: Keep objects that VOC or DOTA marks as difficult.
        copy: Copy images; by default they are hard links, which take no space.
        exist_ok: Replace `out` if an earlier conversion made it.

    Returns:
        What was written, left out and changed.

    Raises:
        DataError: The source is missing, not understood, or holds nothing that can be used.
        ConfigError: An option makes no sense, or `out` is taken or cannot be written.
    """
    if not 0 < val < 1:
        raise ConfigError(f"val={val} is no share; give a number between 0 and 1, such as 0.2")
    request = Request(
        _there(source, "source"), _there(images, "images", folder=True), _there(annotations, "annotations"), task, difficult
    )
    out = Path(out)
    _refuse_taken(out, request.root, exist_ok)
    name = format or _guess(request.root)
    read = FORMATS[name].read(request)
    if task is not None and task not in read.tasks:
        raise ConfigError(f"task={task} cannot be made of this {name} set; it holds {', '.join(read.tasks)}")
    task = task or read.tasks[0]
    order, numbers, dropped = _order(read.names, names, without)
    job = _Job(task, numbers, dropped, read.left, Tally(), copy)
    counts: dict[str, Counter[str]] = {}
    written: Counter[str] = Counter()
    with _staged(out) as folder:
        for entry in watched(with_splits(read.entries, val, job.changed), "converting", len(read.entries)):
            if (objects := job.write(entry, folder)) is not None:
                counts.setdefault(entry.split, Counter()).update(order[i] for i in objects)
                written[entry.split] += 1
        if not sum(map(len, counts.values())):
            raise DataError(f"{source} has no object that can be used: {_sums(job.left)}")
        if lacking := {"train", "val"} - set(counts):
            raise DataError(f"{source} has no usable image for {lacking.pop()}: {_sums(job.left)}; give more images")
        parts = [p for p in SPLITS if p in counts]
        (folder / "data.yaml").write_text(_yaml(request.root, name, parts, order, task, read), encoding="utf-8")
    return Conversion(
        str(out / "data.yaml"),
        name,
        task,
        dict(enumerate(order)),
        {p: written[p] for p in parts},
        {p: dict(counts[p]) for p in parts},
        _found(job.left),
        _found(job.changed),
    )


@dataclass(frozen=True)
class _Job:
    """How entries are written."""

    task: str
    numbers: Mapping[str, int]  # of the source's classes
    dropped: frozenset[str]  # classes that are left out on request
    left: Tally
    changed: Tally
    copy: bool

    def write(self, entry: Entry, folder: Path) -> list[int] | None:
        """Write an image and its labels; return the classes of its objects, or None where it is left out."""
        size = self._size(entry)
        if size is None:
            return None
        rows = [row for thing in entry.things(self.task) if (row := self._row(thing, size, entry.name))]
        image = self._free(folder / "images" / entry.split, entry)
        label = folder / "labels" / image.relative_to(folder / "images").with_suffix(".txt")
        for file in (image, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        self._place(entry.file, image)
        label.write_text("".join(f"{cls} {' '.join(f'{v:.8g}' for v in values)}\n" for cls, values in rows))
        return [cls for cls, _ in rows]

    def _size(self, entry: Entry) -> tuple[int, int] | None:
        """Return the size that the annotations refer to, or None where the image cannot be used with them."""
        if entry.file.suffix[1:].lower() not in SUFFIXES:
            self.left.add("image of a format that Ultralytics does not read", entry.name)
            return None
        try:
            with Image.open(entry.file) as image:
                raw, size = image.size, turned(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.left.add("image that is not readable", f"{entry.name}: {' '.join(str(error).split())[:80]}")
            return None
        stated = entry.size or size
        if stated == size or abs(stated[0] * size[1] / (stated[1] * size[0]) - 1) < 0.01:  # the same, or resized
            return stated
        turned_after = raw != size and abs(stated[0] * raw[1] / (stated[1] * raw[0]) - 1) < 0.01
        why = "was annotated before its EXIF tag turned it" if turned_after else "is not of the shape its annotations state"
        self.left.add(f"image that {why}", f"{entry.name}: {size[0]}x{size[1]}, not {stated[0]}x{stated[1]}")
        return None

    def _row(self, thing: Thing, size: tuple[int, int], image: str) -> tuple[int, list[float]] | None:
        """Return an object's class and numbers, as shares of the image."""
        cls = self.numbers.get(thing.name)
        if cls is None:
            asked = thing.name in self.dropped
            self.left.add(f"object of class {thing.name}" if asked else "object of a class that is not named", image)
            return None
        outlines = [o for o in thing.outlines if len(o) >= 3]
        if self.task in ("segment", "obb") and not outlines:
            self.left.add("object without an outline (task=detect takes its box)", image)
            return None
        if self.task == "pose" and thing.keypoints is None:
            self.left.add("object without keypoints (task=detect takes its box)", image)
            return None
        if self.task in ("segment", "obb"):
            outlines = [
                o if self.task == "obb" and _mostly_inside(o, size) else self._clip(o, size, image) for o in outlines
            ]
            if not (outlines := [o for o in outlines if _area(o) > _LEAST**2]):
                self.left.add("object without area", image)
                return None
            return cls, list((_joined(outlines) / size).ravel())
        if thing.box is None and not outlines:
            self.left.add("object without a box", image)
            return None
        corners = np.concatenate(outlines) if thing.box is None else np.array(thing.box).reshape(2, 2)
        if thing.box is None:
            corners = np.stack((corners.min(0), corners.max(0)))
        (left, top), (right, bottom) = self._clip(corners, size, image)
        if right - left < _LEAST or bottom - top < _LEAST:
            self.left.add("object without width or height", image)
            return None
        width, height = size
        values = [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
        if self.task == "pose" and thing.keypoints is not None:
            points = thing.keypoints.copy()
            points[:, :2] = np.where(points[:, 2:] > 0, np.clip(points[:, :2] / size, 0, 1), 0)
            values += list(points.ravel())
        return cls, values

    def _clip(self, points: np.ndarray, size: tuple[int, int], image: str) -> np.ndarray:
        clipped = np.clip(points, 0, size)
        if np.abs(clipped - points).max() > 0.01:  # pixels; less is rounding
            self.changed.add("outline or box clipped to its image", image)
        return clipped

    def _free(self, folder: Path, entry: Entry) -> Path:
        """Return where an image goes: under its own name, folders included, unless another has that name or stem."""
        named = PurePosixPath(entry.name).with_suffix(entry.file.suffix)
        safe = not named.is_absolute() and not {"..", "images"} & set(named.parts)  # Ultralytics looks for `images`
        image = folder.joinpath(*(named.parts if safe else (named.name,)))
        stem, count = image.stem, 1
        while (folder.parents[1] / "labels" / folder.name / image.relative_to(folder)).with_suffix(".txt").exists():
            count += 1
            image = image.with_stem(f"{stem}-{count}")
        if count > 1:
            self.changed.add("image renamed, as another has its name", f"{entry.name} to {image.name}")
        return image

    def _place(self, file: Path, image: Path) -> None:
        if not self.copy:
            try:
                os.link(file.resolve(), image)
                return
            except OSError:  # another disk, or a file system without hard links
                self.changed.add("image copied, as it could not be linked", file.name)
        shutil.copy2(file, image)


def with_splits(entries: Sequence[Entry], val: float, changed: Tally) -> Iterator[Entry]:
    """Give every entry train, val or test. Where the source does not have both train and val, all but test is split anew.

    An image goes to val where the SHA-1 of its name, as a share of all, is below `val`; where that leaves one of the two
    empty, the nearest image goes there.
    """
    parts = {e.split for e in entries}
    if "val" in parts and parts & {"train", ""}:
        yield from (replace(e, split=e.split or "train") for e in entries)
        return
    loose = parts - {"test"} or parts
    shares = {i: _share(e.name) for i, e in enumerate(entries) if e.split in loose}
    order = sorted(shares, key=lambda i: (shares[i], i))
    count = sum(share < val for share in shares.values())
    if len(order) > 1:
        count = min(max(count, 1), len(order) - 1)
    chosen = set(order[:count])
    changed.add(f"image put into train or val by the hash of its name ({count:,} into val)", count=len(order))
    for i, entry in enumerate(entries):
        yield replace(entry, split="val" if i in chosen else "train") if i in shares else entry


def _share(name: str) -> float:
    return int(hashlib.sha1(os.fsencode(name)).hexdigest(), 16) / 16**40


def _there(place: str | Path | None, what: str, folder: bool = False) -> Any:
    """Return a path that was given, if it is there."""
    if place is None:
        return None
    path = Path(place)
    if not (path.is_dir() if folder else path.exists()):
        raise DataError(f"{what}={place} is not there; give a {'folder' if folder else 'file or folder'} that is")
    return path


def _guess(root: Path) -> str:
    fits = [name for name, form in FORMATS.items() if form.fits(root)]
    if len(fits) != 1:
        found = f"looks like {' and '.join(fits)}" if fits else f"looks like none of {', '.join(FORMATS)}"
        raise DataError(f"{root} {found}; say which with --format" + ("" if fits else ", or give another folder"))
    return fits[0]


def _order(
    found: Sequence[str], names: Sequence[str] | str | Path | None, without: Iterable[str]
) -> tuple[list[str], dict[str, int], frozenset[str]]:
    """Choose the classes to write.

    Returns:
        Their names in order; the index of each class of the source that is written; and those left out on request.
    """
    dropped = set()
    for name in without:
        if (own := _match(name, found)) is None:
            raise ConfigError(f"without={name} is no class here; there are {', '.join(found)}.{nearest(name, found)}")
        dropped.add(own)
    wanted = list(found) if names is None else _named(names)
    matched = {name: _match(name, wanted) for name in found if name not in dropped}
    order = [n for n in wanted if names is not None or n not in dropped]
    numbers = {name: order.index(own) for name, own in matched.items() if own is not None}
    if not numbers:
        raise ConfigError(f"none of the classes {', '.join(order[:5])} is in the set; it has {', '.join(found[:20])}")
    return order, numbers, frozenset(dropped)


def _match(name: str, names: Sequence[str]) -> str | None:
    """Return the name among `names`: itself, or the only one that is the same but for case, spaces and marks."""
    if name in names:
        return name
    same = [n for n in names if plain(n) == plain(name) != ""]
    return same[0] if len(same) == 1 else None


def _named(names: Sequence[str] | str | Path) -> list[str]:
    """Return class names from a list, from text with commas, from a data YAML, or from a packaged one by its name."""
    if isinstance(names, str) and (own := packaged()).get(names):
        names = own[names]
    if isinstance(names, str | Path) and Path(names).suffix in (".yaml", ".yml"):
        return list(read_names(Path(names)).values())
    words = names.split(",") if isinstance(names, str) else [str(n) for n in names] if not isinstance(names, Path) else []
    kept = [w.strip() for w in words if w.strip()]
    if not kept:
        raise ConfigError(f"names={names} names no classes; give car,bus,..., or a data YAML")
    return kept


def packaged() -> dict[str, Path]:
    """Return the data YAMLs that come with visionpeft, by name."""
    here = Path(__file__).parents[1] / "datasets"
    folder = here if here.is_dir() else Path(__file__).parents[2] / "datasets"  # in a checkout
    return {f.stem: f for f in sorted(folder.glob("*.yaml"))}


def _joined(outlines: list[np.ndarray]) -> np.ndarray:
    """Return one polygon: parts are connected by thin lines, Ultralytics' way."""
    if len(outlines) == 1:
        return outlines[0]
    from ultralytics.data.converter import merge_multi_segment

    return np.concatenate(merge_multi_segment([o.ravel().tolist() for o in outlines]))


def _mostly_inside(outline: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether Ultralytics takes an oriented box as it is: cutting its corners off would turn it."""
    low, high = outline.min(0), outline.max(0)
    return bool((low + high >= 0).all() and (low + high <= 2 * np.array(size)).all() and (high - low <= size).all())


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _yaml(root: Path, format: str, parts: list[str], order: list[str], task: str, read: Source) -> str:
    """Return the data YAML. It has no path: folders resolve beside it, wherever it is moved."""
    values: dict[str, Any] = {p: f"images/{p}" for p in parts}
    if task == "pose":
        points = list(read.keypoints)
        values["kpt_shape"] = [len(points), 3]
        if mirrored := [_mirror(p) for p in points]:
            if set(mirrored) == set(points):  # else Ultralytics must not flip left and right
                values["flip_idx"] = [points.index(m) for m in mirrored]
        values["kpt_names"] = {i: points for i in range(len(order))}
    values["names"] = dict(enumerate(order))
    origin = printable(f"{_MARK} --format {format} from {root.resolve()}")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"{origin.splitlines()[0]}\n{text}"


def _mirror(keypoint: str) -> str:
    """Return a keypoint's name on the other side."""
    return keypoint.replace("left", "\0").replace("right", "left").replace("\0", "right")


def _refuse_taken(out: Path, root: Path, exist_ok: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder that is not there yet")
    if root.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"out={out} holds the source {root}; give another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    ours = (out / "data.yaml").is_file() and (out / "data.yaml").read_bytes().startswith(_MARK.encode())
    if not ours:
        raise ConfigError(f"out={out} is there already, and no conversion made it; give another folder")
    if not exist_ok:
        raise ConfigError(f"out={out} is an earlier conversion; replace it with --exist-ok, or give another folder")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` if all goes well, and disappears if not."""
    stage = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder = stage / "new"
        folder.mkdir()
        yield folder
        if out.exists():  # checked before: empty, or ours and to be replaced
            out.rename(stage / "old")
        folder.rename(out)
    except OSError as error:
        reason = f"{error.strerror or type(error).__name__}: {error.filename}"
        raise ConfigError(f"cannot write {out} ({reason}); give another folder, or make room") from error
    finally:
        if stage is not None:
            if not out.exists() and (stage / "old").exists():
                (stage / "old").rename(out)
            shutil.rmtree(stage, ignore_errors=True)


def _found(tally: Tally) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {kind: (n, tuple(tally.examples[kind])) for kind, n in tally.counts.items()}


def _sums(tally: Tally) -> str:
    return ", ".join(f"{n} x {kind}" for kind, n in tally.counts.items()) or "it has no objects"
