"""Pascal VOC: an XML file per image.  Everingham et al. 2010, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf

Read with the standard library: torchvision's VOCDetection fixes the years' file layout, and gives the same dictionary
untouched. Splits come from ImageSets/Main, or from folders called train, val, test. Oriented boxes (<robndbox> with four
corners, as DIOR-R writes them) are read too. VOC's own boxes count pixels from 1 and include the last; every tool since
writes edges from 0: files whose <database> says "The VOC..." are read the former way.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ...errors import DataError
from ..report import Tally
from .base import FORMATS, NOT_FOUND, Annotation, Format, ImageIndex, Request, Source, image_folders, listed_splits, split_of

_CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")  # of <robndbox>: x_left_top, y_left_top, ...


@FORMATS.register("voc")
class Voc(Format):
    """Pascal VOC XML."""

    @staticmethod
    def fits(root: Path) -> bool:
        return root.is_dir() and any(root.rglob("*.xml"))

    @staticmethod
    def read(request: Request) -> Source:
        root, source = request.root, Source(("detect",))
        place = request.annotations or root
        files = sorted(place.rglob("*.xml")) if place.is_dir() else []
        if not files:
            raise DataError(f"{place} holds no XML files; give a folder with Pascal VOC's, such as VOCdevkit/VOC2012")
        splits = listed_splits(root)
        parts = {f: splits.get(f.stem) if splits else _folder_split(f, root) for f in files}
        _refuse_twins(files, parts)
        indices: dict[Path, ImageIndex] = {}
        for file, part in parts.items():
            if part is None:
                source.skipped.add("image that ImageSets does not list", file.name)
                continue
            if (tree := _parse(file, source.skipped)) is None:
                continue
            if (folder := file.parent) not in indices:
                indices[folder] = ImageIndex([request.images] if request.images else image_folders(root, folder))
            stated = Path(tree.findtext("filename") or "").name
            by_stem = (indices[folder].by_stem(stem, folder.name, stated) for stem in (file.stem, Path(stated).stem))
            if (image := next(filter(None, by_stem), None)) is None:
                source.skipped.add(NOT_FOUND, f"for {file.name} ({len(tree.findall('object'))} objects)")
                continue
            annotations = list(_annotations(tree, file, request.difficult, source.skipped))
            if any(a.outlines for a in annotations):
                source.tasks = ("obb", "detect")
            source.add(file, image, part, annotations, _size(tree))
        if not source.samples:
            raise DataError(
                f"none of the {len(files)} XML files in {place} can be used: {source.skipped.summary()}; give the images' "
                "folder with --images, or correct the files"
            )
        return source


def _folder_split(file: Path, root: Path) -> str:
    folders = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else (file.parent.name,)
    return next((part for folder in reversed(folders) if (part := split_of(folder))), "")


def _refuse_twins(files: list[Path], parts: dict[Path, str | None]) -> None:
    """Refuse a folder with two sets of annotations of the same images, as DIOR's horizontal and oriented ones."""
    seen: dict[tuple[str, str | None], Path] = {}
    for file in files:
        twin = seen.setdefault((file.stem, parts[file]), file)
        if twin is not file and twin.parent != file.parent:
            raise DataError(
                f"'{twin.parent}' and '{file.parent}' both annotate {file.stem}; give one of the two with --annotations"
            )


def _parse(file: Path, skipped: Tally) -> ElementTree.Element | None:
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        skipped.add("XML file that is not readable", f"{file.name}: {error}")
        return None
    if tree.tag != "annotation":
        skipped.add("XML file that is not Pascal VOC's", f"{file.name}: <{tree.tag}>, not <annotation>")
        return None
    return tree


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Return the stated size; tools often write 0, or nothing: then the image's own counts."""
    try:
        width, height = int(float(tree.findtext("size/width", ""))), int(float(tree.findtext("size/height", "")))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _annotations(tree: ElementTree.Element, file: Path, difficult: bool, skipped: Tally) -> Iterable[Annotation]:
    first = 1.0 if (tree.findtext("source/database") or "").startswith("The VOC") else 0.0
    for node in tree.findall("object"):
        name = (node.findtext("name") or "").strip()
        if not difficult and (node.findtext("difficult") or "0").strip() == "1":
            skipped.add("object marked as difficult (--difficult keeps it)", f"{file.name}: {name}")
            continue
        try:
            if not name:
                raise ValueError("no name")
            if (box := node.find("robndbox")) is not None:
                corners = [[float(box.findtext(f"{axis}_{c}", "")) for axis in "xy"] for c in _CORNERS]
                yield Annotation(name, None, (np.array(corners),))
                continue
            edges = [float(node.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            skipped.add("object that is malformed", f"{file.name}: {name} ({error})")
            continue
        yield Annotation(name, (edges[0] - first, edges[1] - first, edges[2], edges[3]))
