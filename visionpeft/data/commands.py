"""`visionpeft data`: the commands that look at data sets and convert them. They import what they need when they run."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Group, Parameter

from ..helptext import arguments_of

app = App(
    name="data",
    group=Group("Data", sort_key=0),
    group_commands=Group("Commands"),
    help="Check a data set, convert one to Ultralytics' format, or draw one.",
    default_parameter=Parameter(negative=(), show_default=False),
    help_format="plaintext",
)
Json = Annotated[bool, Parameter(name="--json", help="Print the report as JSON.")]
_WITHOUT = Parameter(help="Classes to leave out: Misc,Tram,...")
_NAME = Parameter(
    help="scenes/satellite, scenes/driving, scenes/night, with -seg, -obb, -pose or -cls: a wrong one lists those there are."
)
_OUT = Parameter(help="The folder to make.")


@app.command
@arguments_of("visionpeft.data.checking", "check")
def check(path: str, *, task: str | None = None, imgsz: int = 640, sheet: str | None = None, json_: Json = False) -> int:
    """Look for what spoils training: exits with 1 where there are problems.

    Missing pairs, unreadable images, malformed labels, copies, images in two splits, classes without objects, tiny objects.
    """
    from .checking import check as check_data

    report = check_data(path, task, imgsz=imgsz, sheet=sheet)
    print(json.dumps(report.to_dict(), indent=2) if json_ else report)
    return 0 if report.ok else 1


@app.command
@arguments_of("visionpeft.data.converting", "convert")
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
    without: Annotated[str | None, _WITHOUT] = None,
    difficult: bool = False,
    copy: bool = False,
    exist_ok: bool = False,
    json_: Json = False,
) -> None:
    """Convert COCO, Pascal VOC, KITTI or DOTA to images/, labels/ and data.yaml; the source stays as it is."""
    from .converting import convert as convert_data

    conversion = convert_data(
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
    print(json.dumps(conversion.to_dict(), indent=2) if json_ else conversion)


@app.command
@arguments_of("visionpeft.scenes.sets", "write")
def draw(
    name: Annotated[str, _NAME],
    out: Annotated[str, _OUT],
    *,
    train: int | None = None,
    val: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> None:
    """Draw a set of generated scenes; prints what `train --data` takes."""
    from .. import scenes

    print(scenes.write(name.removeprefix("scenes/"), out, train=train, val=val, size=size, seed=seed))
