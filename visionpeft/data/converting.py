"""The conversion of a data set to Ultralytics' layout: images/SPLIT, labels/SPLIT and data.yaml.

Everything is written into a hidden folder beside OUT, which is renamed at the end: OUT is whole or absent.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import tables
from ..errors import ConfigError, DataError, printable
from ..process import untouched
from ..schema import Json
from .formats.base import FORMATS, Request, Sample, Source
from .layout import SPLITS
from .naming import order_classes
from .report import Tally, counted_lines, with_progress
from .writing import SampleWriter

_MARK = "# Made by visionpeft data convert"  # what may be replaced


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion; ``print`` it or take `to_dict()`.

    Attributes:
        data: The data YAML, for `train` and `check`.
        format: The format that was read.
        task: The task that the labels are for.
        names: Classes by index.
        images: Count per split.
        objects: Count per split and class.
        left: Images and objects left out: by reason a count, and the first few.
        changed: Changes, such as boxes that were clipped, images that were copied as they could not be linked: the same.
    """

    data: str
    format: str
    task: str
    names: dict[int, str]
    images: dict[str, int]
    objects: dict[str, dict[str, int]]
    left: dict[str, tuple[int, tuple[str, ...]]]
    changed: dict[str, tuple[int, tuple[str, ...]]]

    def to_dict(self) -> Json:
        """Return all of it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(n, f"{self.images[n]:,}", f"{sum(o.values()):,}") for n, o in self.objects.items()]
        title = f"{self.format} to {self.task}, {len(self.names)} class{'es' * (len(self.names) != 1)}"
        parts = [tables.text(title, ("split", "images", "objects"), rows, 80, (1, 2))]
        for heading, counted in (("left out:", self.left), ("changed:", self.changed)):
            lines = [line for what, (n, examples) in counted.items() for line in counted_lines(what, n, examples)]
            parts += ["\n".join([heading, *lines])] if lines else []
        return "\n\n".join([*parts, f"data: {printable(self.data)}"])


@untouched()
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
        out: The folder to make: whole at the end, or absent.
        format: coco, voc, kitti or dota; by default told from the files.
        images: The folder of the images, if they are not where the format keeps them.
        annotations: The file or folder of annotations, where the source holds several.
        task: detect, segment, pose or obb; by default what the annotations hold.
        val: Share of images for val, where the source has no val; by default 0.2. Chosen by a hash of the file name, so it
            is the same every time, and stays when images are added.
        names: Classes in the order wanted: car,bus,... or a data YAML, or a packaged one's name: dior, dota-v2, ai-tod, ...
            Others are left out; case, spaces and marks do not count. By default the source's.
        without: Classes to leave out.
        difficult: Keep objects that Pascal VOC or DOTA marks as difficult.
        copy: Copy the images; by default they are hard links, which take no space.
        exist_ok: Replace a folder that an earlier conversion made.

    Returns:
        Counts of all that was written, left out and changed.

    Raises:
        DataError: The source is missing, not understood, or holds nothing that can be used.
        ConfigError: An option makes no sense, or `out` is taken or cannot be written.
    """
    if not 0 < val < 1:
        raise ConfigError(f"val={val} is no share; give a number between 0 and 1, such as 0.2")
    places = _existing(source, "source"), _existing(images, "images", folder=True), _existing(annotations, "annotations")
    request = Request(*places, task, difficult)
    out = Path(out)
    _refuse_taken(out, request.root, exist_ok)
    name = format or _detect_format(request.root)
    read = FORMATS[name].read(request)
    if task is not None and task not in read.tasks:
        raise ConfigError(f"task={task} cannot be made of this {name} set; it holds {', '.join(read.tasks)}")
    task = task or read.tasks[0]
    order, numbers, dropped = order_classes(read.names, names, without)
    writer = SampleWriter(task, numbers, dropped, read.skipped, read.changed, copy)
    objects: dict[str, Counter[str]] = {}
    written: Counter[str] = Counter()
    samples = list(assign_splits(_unshared(read), val, read.changed))
    with _staged(out) as folder:
        for sample in with_progress(samples, "converting", len(samples)):
            if (classes := writer.write(sample, folder)) is not None:
                objects.setdefault(sample.split, Counter()).update(order[i] for i in classes)
                written[sample.split] += 1
        reasons = read.skipped.summary() or "it has no objects"
        if not any(objects.values()):
            raise DataError(f"{source} has no object that can be used: {reasons}")
        if lacking := {"train", "val"} - set(objects):
            raise DataError(f"{source} has no usable image for {lacking.pop()}: {reasons}; give more images")
        parts = [p for p in SPLITS if p in objects]
        (folder / "data.yaml").write_text(_yaml(request.root, name, parts, order, task, read), encoding="utf-8")
    return Conversion(
        str(out / "data.yaml"),
        name,
        task,
        dict(enumerate(order)),
        {p: written[p] for p in parts},
        {p: dict(objects[p]) for p in parts},
        read.skipped.to_dict(),
        read.changed.to_dict(),
    )


def _unshared(source: Source) -> list[Sample]:
    """Return the samples but those whose image another annotates, too: nobody knows which are its objects."""
    claims = Counter(sample.file for sample in source.samples)
    for sample in source.samples:
        if claims[sample.file] > 1:
            source.skipped.add("annotation of an image that another annotates, too", f"{sample.name} ({sample.file.name})")
    return [sample for sample in source.samples if claims[sample.file] == 1]


def assign_splits(samples: Sequence[Sample], val: float, changed: Tally) -> Iterator[Sample]:
    """Give every sample train, val or test. Where the source does not have both train and val, all but test is split anew.

    An image goes to val where the SHA-1 of its name, as a share of all, is below `val`; where that leaves one of the two
    empty, the nearest image goes there.
    """
    parts = {s.split for s in samples}
    if "val" in parts and parts & {"train", ""}:
        yield from (replace(s, split=s.split or "train") for s in samples)
        return
    loose = parts - {"test"} or parts
    shares = {i: _share(s.name) for i, s in enumerate(samples) if s.split in loose}
    order = sorted(shares, key=lambda i: (shares[i], i))
    count = sum(share < val for share in shares.values())
    if len(order) > 1:
        count = min(max(count, 1), len(order) - 1)
    chosen = set(order[:count])
    changed.add(f"image put into train or val by the hash of its name ({count:,} into val)", count=len(order))
    for i, sample in enumerate(samples):
        yield replace(sample, split="val" if i in chosen else "train") if i in shares else sample


def _share(name: str) -> float:
    return int(hashlib.sha1(os.fsencode(name)).hexdigest(), 16) / 16**40


def _existing(place: str | Path | None, what: str, folder: bool = False) -> Any:
    """Return a path that was given, or None.

    Raises:
        DataError: It is not there.
    """
    if place is None:
        return None
    path = Path(place)
    if not (path.is_dir() if folder else path.exists()):
        raise DataError(f"{what}={place} is not there; give a {'folder' if folder else 'file or folder'} that is")
    return path


def _detect_format(root: Path) -> str:
    fits = [name for name, form in FORMATS.items() if form.fits(root)]
    if len(fits) != 1:
        likeness = f"looks like {' and '.join(fits)}" if fits else f"looks like none of {', '.join(FORMATS)}"
        raise DataError(f"{root} {likeness}; say which with --format" + ("" if fits else ", or give another folder"))
    return fits[0]


def _yaml(root: Path, format: str, parts: list[str], order: list[str], task: str, read: Source) -> str:
    """Return the data YAML. It has no path: folders resolve beside it, wherever it is moved."""
    values: dict[str, object] = {p: f"images/{p}" for p in parts}
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
    """Yield a folder that becomes `out` if all goes well, and disappears if not."""
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
