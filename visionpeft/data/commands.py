"""`visionpeft data`: the commands that look at data sets and convert them. They import what they need when they run."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Group, Parameter

app = App(
    name="data",
    group=Group("Data", sort_key=0),
    group_commands=Group("Commands"),
    help="Check a data set, convert one to Ultralytics' format, or draw one.",
    default_parameter=Parameter(negative=(), show_default=False),
    help_format="plaintext",
)
Json = Annotated[bool, Parameter(name="--json")]


@app.command
def check(path: str, *, task: str | None = None, imgsz: int = 640, sheet: str | None = None, json_: Json = False) -> int:
    """Look for what spoils training: exits with 1 where there are problems.

    Missing pairs, unreadable images, malformed labels, copies, images in two splits, classes without objects, tiny objects.

    Parameters
    ----------
    path
        A data YAML, the name of one that Ultralytics ships, or a folder with train/CLASS and val/CLASS.
    task
        detect, segment, pose or obb; by default told from kpt_shape and the rows. Where all rows have nine numbers, they
        are taken for oriented boxes.
    imgsz
        Object sizes are given for images of this size; by default 640.
    sheet
        Write a contact sheet to this file (.png, .jpg): train and val images with their labels drawn.
    json_
        Print the report as JSON.
    """
    from .checking import check as check_data

    report = check_data(path, task, imgsz=imgsz, sheet=sheet)
    print(json.dumps(report.to_dict(), indent=2) if json_ else report)
    return 0 if report.ok else 1


@app.command
def convert(
    source: str,
    out: str,
    *,
    format: str | None = None,
    images: str | None = None,
    annotations: str | None = None,
    task: str | None = None,
    val: float = 0.2,
    names: str | None = None,
    without: str | None = None,
    difficult: bool = False,
    copy: bool = False,
    exist_ok: bool = False,
    json_: Json = False,
) -> None:
    """Convert COCO, Pascal VOC, KITTI or DOTA to images/, labels/ and data.yaml; the source stays as it is.

    Parameters
    ----------
    source
        A COCO JSON, or the folder of a set.
    out
        The folder to make: whole at the end, or absent.
    format
        coco, voc, kitti or dota; by default told from the files.
    images
        The folder of the images, if they are not where the format keeps them.
    annotations
        The file or folder of annotations, where the source holds several.
    task
        detect, segment, pose or obb; by default what the annotations hold.
    val
        Share of images for val, where the source has no val; by default 0.2. Chosen by a hash of the file name.
    names
        Classes in the order wanted: car,bus,... or a data YAML, or a packaged one's name: dior, dota-v2, ai-tod, ...
        Others are left out.
    without
        Classes to leave out: Misc,Tram,...
    difficult
        Keep objects that Pascal VOC or DOTA marks as difficult.
    copy
        Copy the images; by default they are hard links.
    exist_ok
        Replace a folder that an earlier conversion made.
    json_
        Print the report as JSON.
    """
    from .converting import convert as convert_data

    made = convert_data(
        source,
        out,
        format,
        images=images,
        annotations=annotations,
        task=task,
        val=val,
        names=names,
        without=[w.strip() for w in (without or "").split(",") if w.strip()],
        difficult=difficult,
        copy=copy,
        exist_ok=exist_ok,
    )
    print(json.dumps(made.to_dict(), indent=2) if json_ else made)


@app.command
def draw(
    name: str,
    out: str,
    *,
    train: int | None = None,
    val: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> None:
    """Draw a set of generated scenes; prints what `train --data` takes.

    Parameters
    ----------
    name
        scenes/satellite, scenes/driving, scenes/night, with -seg, -obb, -pose or -cls: a wrong one lists those there are.
    out
        The folder to make.
    train
        Pictures to train on; for classification of each kind.
    val
        Pictures to measure on; for classification of each kind.
    size
        Pixels along each side.
    seed
        The same one draws the same pictures.
    """
    from .. import scenes

    print(scenes.write(name.removeprefix("scenes/"), out, train=train, val=val, size=size, seed=seed))
