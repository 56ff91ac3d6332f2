"""COCO: JSON with images, annotations and categories.  Lin et al. 2014, https://cocodataset.org/#format-data

One file per split (annotations/instances_train2017.json), or Roboflow's train/_annotations.coco.json. Read with `json`;
run-length masks are decoded by pycocotools, COCO's own (extra "data"), and traced by OpenCV. pycocotools' COCO class is not
used: it prints, and takes what is malformed for granted. supervision and datumaro would load every image, or bring many
dependencies; Ultralytics' convert_coco reads no compressed run-lengths and knows the 91 categories of COCO only.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...errors import ConfigError, DataError, need
from ...schema import Json
from ..report import Tally
from .base import FORMATS, NOT_FOUND, Annotation, Format, ImageIndex, Request, Sample, Source, split_of

_OTHERS = ("captions", "panoptic", "stuff", "image_info", "person_keypoints")  # what COCO's own annotations/ holds besides


@FORMATS.register("coco")
class Coco(Format):
    """COCO JSON."""

    @staticmethod
    def fits(root: Path) -> bool:
        return root.suffix == ".json" if root.is_file() else bool(_files(root, None))

    @staticmethod
    def read(request: Request) -> Source:
        place = request.annotations or request.root
        files = [place] if place.is_file() else _files(place, request.task)
        if not files:
            raise DataError(f"{place} holds no COCO JSON; give one, or a folder with annotations/*.json")
        parts = {f: split_of(f.stem) or (split_of(f.parent.name) if f.parent != request.root else "") for f in files}
        if "train" in parts.values():  # what trainval holds is there already
            parts = {f: part for f, part in parts.items() if "trainval" not in f.stem}
        files = list(parts)
        for file, part in parts.items():
            if twin := next((f for f in files if f != file and parts[f] == part), None):
                raise DataError(f"{file} and {twin} are both of split '{part}'; give one with --annotations")
        contents = {file: _load(file) for file in files}
        keypoints = _keypoints(contents, request.task)
        tasks = _tasks([a for content in contents.values() for a in content["annotations"]], keypoints)
        source = Source(tasks, keypoints=keypoints)
        source.names = _names(contents, source.skipped)
        for file, content in contents.items():
            source.samples += _samples(file, parts[file], content, request, source)
        if not source.samples:
            raise DataError(f"none of the images that {files[0]} names was found; give their folder with --images")
        return source


def _files(root: Path, task: str | None) -> list[Path]:
    """Return the annotation files of a folder."""
    if roboflow := sorted(root.glob("*/_annotations.coco.json")):
        return roboflow
    files = next((f for folder in (root, root / "annotations") if (f := sorted(folder.glob("*.json")))), [])
    instances = [f for f in files if not f.name.startswith(_OTHERS)]
    pose = [f for f in files if f.name.startswith("person_keypoints")]
    return pose if pose and (task == "pose" or not instances) else instances


def _load(file: Path) -> Json:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{file} is not readable JSON ({' '.join(str(error).split())[:120]})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{file} is no COCO instances file: it has no list '{key}'; see https://cocodataset.org/#format-data"
            )
    if not all(isinstance(x, dict) and "id" in x for key in ("images", "categories") for x in content[key]):
        raise DataError(f"{file} is no COCO instances file: an image or category has no id")
    return content


def _names(contents: dict[Path, Json], skipped: Tally) -> list[str]:
    """Return the categories by id, whatever gaps there are, without one that only stands above others (Roboflow's)."""
    above, used, names = set(), set(), []
    for content in contents.values():
        above |= {c.get("supercategory") for c in content["categories"] if c.get("supercategory") != c.get("name")}
        by_id = {c["id"]: str(c.get("name", c["id"])) for c in content["categories"]}
        used |= {by_id.get(a.get("category_id")) for a in content["annotations"] if isinstance(a, dict)}
        names += [by_id[i] for i in sorted(by_id)]
    names = list(dict.fromkeys(names))
    for name in [n for n in names if n in above and n not in used]:
        skipped.add("category that only stands above others", name)
        names.remove(name)
    return names


def _keypoints(contents: dict[Path, Json], task: str | None) -> tuple[str, ...]:
    """Return the names of the keypoints, where all categories that have any have the same."""
    skeletons = {tuple(map(str, k)) for c in contents.values() for x in c["categories"] if (k := x.get("keypoints"))}
    if len(skeletons) > 1 and task in (None, "pose"):
        raise DataError("the categories have different keypoints, and Ultralytics knows one skeleton; give task=detect")
    return skeletons.pop() if len(skeletons) == 1 else ()


def _tasks(annotations: list[Any], keypoints: tuple[str, ...]) -> tuple[str, ...]:
    """Return what can be written: outlines only where each object has one that is more than its box."""
    tasks = ["detect"]
    masks: list[Any] = [a.get("segmentation") for a in annotations if isinstance(a, dict) and not a.get("iscrowd")]
    if any(masks):
        boxes = sum(isinstance(m, list) and len(m) == 1 and isinstance(m[0], list) and len(m[0]) == 8 for m in masks)
        tasks.insert(0 if all(masks) and boxes < len(masks) else 1, "segment")
    return ("pose", *tasks) if keypoints else tuple(tasks)


def _samples(file: Path, part: str, content: Json, request: Request, source: Source) -> Iterable[Sample]:
    token, here = file.stem.rpartition("_")[2], file.parent  # train2017
    roots = (request.images,) if request.images else (here, request.root, here.parent)
    places = ("", f"images/{token}", token, "images", f"images/{part}", part, f"{part}/images")
    index = ImageIndex(root / place for root in roots for place in places)
    names = {c["id"]: str(c.get("name", c["id"])) for c in content["categories"]}
    of_image: defaultdict[Any, list[Json]] = defaultdict(list)
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and annotation.get("category_id") in names:
            of_image[annotation.get("image_id")].append(annotation)
        else:
            source.skipped.add("annotation of an unknown category", f"{file.name}: id {_id(annotation)}")
    listed = [str(image.get("file_name", "")).replace("\\", "/") for image in content["images"]]
    count_of_last = Counter(name.rpartition("/")[2] for name in set(listed))
    for image, name in zip(content["images"], listed, strict=True):
        last = name.rpartition("/")[2]
        image_file = index.by_name(name) if name else None
        if image_file is None and last != name and count_of_last[last] == 1 and (image_file := index.by_name(last)):
            source.changed.add("image taken from another folder than its annotations say", f"{name}: {image_file}")
        raw = of_image.pop(image["id"], [])
        if image_file is None:
            source.skipped.add(NOT_FOUND, f"{name} ({len(raw)} objects)")
            continue
        width, height = image.get("width"), image.get("height")
        stated = (width, height) if all(isinstance(n, int) and n > 0 for n in (width, height)) else None

        def annotations(task: str, raw: list[Json] = raw, name: str = name) -> Iterable[Annotation]:
            return [made for a in raw if (made := _annotation(a, names, name, task, source.skipped))]

        yield Sample(image_file, name, part, stated, annotations)
    if lost := sum(map(len, of_image.values())):
        source.skipped.add("annotation of an image that is not listed", file.name, lost)


def _id(annotation: Any) -> Any:
    return annotation.get("id") if isinstance(annotation, dict) else "?"


def _annotation(a: Json, names: dict[Any, str], image: str, task: str, skipped: Tally) -> Annotation | None:
    if a.get("iscrowd"):
        skipped.add("crowd (iscrowd), which Ultralytics has no notion of", image)
        return None
    try:
        x, y, width, height = map(float, a["bbox"]) if a.get("bbox") else (math.nan,) * 4
        box = (x, y, x + width, y + height) if not math.isnan(x) else None
        outlines = _outlines(a.get("segmentation"), image, skipped) if task == "segment" or box is None else ()
        keypoints = np.array(a["keypoints"], float).reshape(-1, 3) if task == "pose" and a.get("keypoints") else None
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, IndexError) as error:
        skipped.add("annotation that is malformed", f"{image}: id {_id(a)} ({' '.join(str(error).split())[:60]})")
        return None
    return Annotation(names[a["category_id"]], box, outlines, keypoints)


def _outlines(segmentation: Any, image: str, skipped: Tally) -> tuple[np.ndarray, ...]:
    """Return polygons: given ones, or the outer borders of a run-length mask."""
    if not segmentation:
        return ()
    if not isinstance(segmentation, dict):
        return tuple(np.array(p, float).reshape(-1, 2) for p in segmentation if len(p) >= 6)
    need("pycocotools", "data", "a run-length mask")
    from pycocotools import mask as rle

    height, width = segmentation["size"]
    coded = rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 under NumPy 2
        mask = rle.decode(coded)
    borders, levels = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = [b for b, level in zip(borders, levels[0] if borders else (), strict=True) if level[3] < 0]
    if len(outer) < len(borders):
        skipped.add("hole in a mask that was filled, as YOLO's polygons have none", image, len(borders) - len(outer))
    return tuple(b.reshape(-1, 2).astype(float) for b in outer if len(b) >= 3)
