"""The check of a data set: every file is read, every row parsed, every picture compared.

A problem is what Ultralytics would leave out or read wrongly without a word that one sees; a note is what it copes with.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, DataError
from ..process import untouched
from .label_rows import LabelRow, RowFault, guess_task, parse_row, read_rows, sticks_out
from .layout import TASKS, Layout, class_of, composed, is_image, label_file, read_layout
from .pictures import ImageFacts, find_copies, inspect_images
from .report import CheckReport, Finding, Split, Tally
from .sheet import Tile, choose_tiles, draw_sheet

_TINY = 8  # pixels: the stride of the finest map that YOLO's heads look at
KINDS = {  # kind: (is a problem, title, advice)
    "unreadable": (True, "image that cannot be used", "It is left out of training, or stops it; replace or remove it."),
    "malformed": (True, "row that is not understood", "Ultralytics leaves out the whole image."),
    "mixed": (True, "label file with boxes and polygons", "Ultralytics leaves out the whole image."),
    "class": (True, "row with a class that 'names' lacks", "Ultralytics leaves out the whole image."),
    "outside": (True, "row with a number outside 0 to 1", "Ultralytics leaves out the whole image."),
    "empty": (True, "row without width or height", "It teaches nothing; remove it."),
    "no labels": (True, "split without any object", "Put one .txt per image into 'labels' beside 'images'."),
    "shared": (True, "label file of more than one image", "All but one train on another's boxes; rename them."),
    "same name": (True, "class with another's name", "Their counts and scores cannot be told apart; rename it."),
    "orphan": (True, "label file without an image", "Its objects are lost; add the image or remove the file."),
    "leak": (True, "image that an earlier split holds too", "Scores on it say nothing about new images."),
    "near leak": (True, "image nearly the same as one in an earlier split", "Scores on it say little about new images."),
    "conflict": (True, "image in two classes", "The two labels contradict each other."),
    "no train": (True, "class with objects to measure, but none to train on", "It cannot be learned."),
    "split": (True, "split that the set lacks", "Training wants train and val."),
    "spelling": (True, "class spelled in two ways", "Accents apart from their letters or not: two classes to YOLO."),
    "sticks out": (False, "box that sticks out of its image", "Training clips it."),
    "duplicate row": (False, "row that is there twice", "Ultralytics uses it once."),
    "unlabelled": (False, "image without a label file", "It counts as background; right only if it shows no object."),
    "copy": (False, "image that its split holds twice", "It weighs double."),
    "near copy": (False, "image nearly the same as another of its split", "Frames of one film, or an augmented export?"),
    "deep": (False, "image of 16 bits", "Training sees the upper 8; spread small values over 0 to 65535 first."),
    "other format": (False, "picture of a format that is not read", "Training leaves it out; convert it."),
    "absent": (False, "class without objects in a split", "Its score there says nothing."),
    "tiny": (False, "split where every tenth object or more is tiny", f"Under {_TINY} px: try a larger imgsz, or tiles."),
}


@untouched()
def check(path: str | Path, task: str | None = None, *, imgsz: int = 640, sheet: str | Path | None = None) -> CheckReport:
    """Check a data set for what spoils training or measuring.

    Args:
        path: A data YAML, the name of one that Ultralytics ships, or a folder with train/CLASS and val/CLASS.
        task: detect, segment, pose or obb; by default told from kpt_shape and the rows. Where all rows have nine numbers,
            they are taken for oriented boxes.
        imgsz: Object sizes are given for images of this size; by default 640.
        sheet: Write a contact sheet to this file (.png, .jpg): train and val images with their labels drawn.

    Returns:
        Counts and findings.

    Raises:
        DataError: The set is missing or not understood.
        ConfigError: `imgsz` makes no sense, or the sheet cannot be written.
    """
    if imgsz < 32:
        raise ConfigError(f"imgsz={imgsz} is no image size; give 32 or more")
    layout = read_layout(path)
    tasks = ("classify",) if layout.classify else TASKS[:-1]
    if task not in (None, *tasks):
        raise DataError(f"task={task} is not known here; give one of {', '.join(tasks)}, or leave it out")
    pictures = inspect_images(f for images in layout.splits.values() for f in images)
    notes = Tally()
    for file, picture in pictures.items():
        if picture.fault:
            notes.add("unreadable", f"{layout.relative(file)}: {picture.fault}")
        if picture.highest is not None:
            notes.add("deep", f"{layout.relative(file)}: up to {picture.highest}, which becomes {picture.highest >> 8}")
    for file in layout.others:
        notes.add("other format", layout.relative(file))
    for part in sorted({"train", "val"} - set(layout.splits)):
        notes.add("split", part)
    for name, count in Counter(layout.names.values()).items():
        if count > 1:
            notes.add("same name", name, count - 1)
    if layout.classify:
        task = "classify"
        splits, tiles = _count_folders(layout, pictures)
        spelled = {f.relative_to(layout.root).parts[1] for f in pictures}
        for name in sorted(spelled - set(layout.names.values())):
            if composed(name) in spelled:
                notes.add("spelling", name)
    else:
        splits, task, tiles = _count_rows(layout, pictures, task, imgsz, notes)
        _orphans(layout, notes)
    _compare_classes(layout.names, splits, notes)
    _compare_pictures(layout, pictures, notes)
    drawn = str(draw_sheet(sheet, choose_tiles(tiles), layout.names)) if sheet else None
    findings = tuple(
        Finding(kind, title, problem, notes.counts[kind], advice, tuple(notes.examples[kind]))
        for kind, (problem, title, advice) in KINDS.items()  # problems first
        if notes.counts[kind]
    )
    return CheckReport(layout.source, task, layout.names, splits, findings, imgsz, _TINY, drawn)


Tiles = dict[str, list[Tile]]


def _count_folders(layout: Layout, pictures: Mapping[Path, ImageFacts]) -> tuple[dict[str, Split], Tiles]:
    splits, tiles = {}, {}
    numbers = {name: i for i, name in layout.names.items()}
    for part, images in layout.splits.items():
        good = [f for f in images if not pictures[f].fault]
        counts = Counter(class_of(layout.root, f) for f in good)
        classes = {name: counts[name] for name in layout.names.values()}
        splits[part] = Split(len(images), len(good), sizes=_sizes(pictures, good), classes=classes)
        tiles[part] = [Tile(f, part, (), numbers[class_of(layout.root, f)]) for f in good]
    return splits, tiles


def _count_rows(
    layout: Layout, pictures: Mapping[Path, ImageFacts], task: str | None, imgsz: int, notes: Tally
) -> tuple[dict[str, Split], str, Tiles]:
    labels = {file: label_file(file) for file in pictures}
    read = {label: read_rows(label) for label in labels.values() if os.path.isfile(label)}
    for label, count in Counter(labels.values()).items():
        if count > 1 and label in read:
            owners = ", ".join(f.name for f in labels if labels[f] == label)
            notes.add("shared", f"{layout.relative(label)}: {owners}")
    if task is None:
        task = guess_task((rows for rows, _ in read.values()), layout.kpt_shape)
    if task == "pose" and layout.kpt_shape is None:
        raise ConfigError(f"task=pose needs 'kpt_shape: [keypoints, 3]' in {layout.source}; add it, or give another task")
    parsed = {label: _parse(layout, label, numbers, faults, task, notes) for label, (numbers, faults) in read.items()}
    splits, tiles = {}, {}
    for part, images in layout.splits.items():
        splits[part] = _split(layout, pictures, {f: parsed.get(labels[f]) for f in images}, read, imgsz)
        tiles[part] = [Tile(f, part, tuple(parsed.get(labels[f], ()))) for f in images if not pictures[f].fault]
        if not splits[part].objects:
            notes.add("no labels", part)
            continue
        for image in images:
            if labels[image] not in read:
                notes.add("unlabelled", layout.relative(image))
        if splits[part].tiny >= 0.1:
            notes.add("tiny", f"{part}: {splits[part].tiny:.0%}")
    return splits, task, tiles


def _parse(
    layout: Layout, label: Path, numbers: dict[int, list[float]], faults: list[RowFault], task: str, notes: Tally
) -> list[LabelRow]:
    """Return the objects of a label file, and note its faults."""
    name = layout.relative(label)
    if layout.kpt_shape and task != "pose":  # of a pose, Ultralytics takes the box
        length = 5 + math.prod(layout.kpt_shape)
        numbers = {line: values[:5] if len(values) == length else values for line, values in numbers.items()}
    lengths = {len(values) for values in numbers.values()}
    if task in ("detect", "segment", "obb") and 5 in lengths and max(lengths) > 6:
        notes.add("mixed", name)
    rows, seen, faults = [], set(), list(faults)
    for line, values in numbers.items():
        row = parse_row(values, line, task, len(layout.names), layout.kpt_shape)
        if isinstance(row, RowFault):
            faults.append(row)
        elif tuple(values) in seen:
            notes.add("duplicate row", f"{name}:{line}")
        else:
            rows.append(row)
            if sticks_out(row):
                notes.add("sticks out", f"{name}:{line}")
        seen.add(tuple(values))
    for fault in sorted(faults, key=lambda f: f.line):
        notes.add(fault.kind, f"{name}:{fault.line}: {fault.reason}")
    return rows


def _split(
    layout: Layout,
    pictures: Mapping[Path, ImageFacts],
    labelled: Mapping[Path, list[LabelRow] | None],
    read: Mapping[Path, tuple],
    imgsz: int,
) -> Split:
    classes = dict.fromkeys(layout.names.values(), 0)
    sides = []
    for file, rows in labelled.items():
        size = pictures[file].size
        if size is None:
            continue
        for row in rows or ():
            classes[layout.names[row.cls]] += 1
            width, height = row.side
            sides.append(math.sqrt(width * size[0] * height * size[1]) * imgsz / max(size))
    return Split(
        images=len(labelled),
        objects=len(sides),
        background=sum(rows is not None and not any(read[label_file(f)]) for f, rows in labelled.items()),
        unlabelled=sum(rows is None for rows in labelled.values()),
        sizes=_sizes(pictures, labelled),
        classes=classes,
        side=round(statistics.median(sides), 2) if sides else None,
        tiny=round(sum(s < _TINY for s in sides) / len(sides), 4) if sides else 0.0,
    )


def _sizes(pictures: Mapping[Path, ImageFacts], files: Mapping[Path, object] | list[Path]) -> tuple[tuple[int, int], ...]:
    """Return the smallest, median and largest size by area."""
    sizes = sorted((s for f in files if (s := pictures[f].size)), key=math.prod)
    return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else ()


def _orphans(layout: Layout, notes: Tally) -> None:
    """Note the label files beside those in use to which no image belongs, of any split or none."""
    folders: dict[Path, Path] = {}
    for images in layout.splits.values():
        folders.update((label_file(f).parent, f.parent) for f in images)
    for labels, folder in sorted(folders.items()):
        if labels == folder or not labels.is_dir() or not folder.is_dir():
            continue
        stems = {f.stem for f in folder.iterdir() if is_image(f)}
        for file in sorted(labels.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":  # which labelImg writes
                notes.add("orphan", layout.relative(file))


def _compare_classes(names: Mapping[int, str], splits: Mapping[str, Split], notes: Tally) -> None:
    train = splits.get("train", Split())  # without it there are no objects to compare with
    for name in names.values():
        for part, split in splits.items():
            if not split.classes[name] and split.objects:
                notes.add("absent", f"{name} in {part}")
            elif part != "train" and train.objects and not train.classes[name]:
                notes.add("no train", f"{name}: {split.classes[name]} in {part}")


def _compare_pictures(layout: Layout, pictures: Mapping[Path, ImageFacts], notes: Tally) -> None:
    files = [(f, i) for i, images in enumerate(layout.splits.values()) for f in images]
    facts = [pictures[f] for f, _ in files]
    within, across = find_copies(facts, [i for _, i in files])
    for pairs, exact, near in ((within, "copy", "near copy"), (across, "leak", "near leak")):
        for here, there in sorted(pairs.items()):
            one, other = files[here][0], files[there][0]
            same = facts[here].digest == facts[there].digest
            pair = layout.relative(one) + (f" = {layout.relative(other)}" if one != other else ", the same file")
            notes.add(exact if same else near, pair)
            if layout.classify and same and class_of(layout.root, one) != class_of(layout.root, other):
                notes.add("conflict", pair)
