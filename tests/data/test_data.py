"""Data sets: what a check finds, what a conversion writes, and the sentence for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import REAL
from PIL import Image
from pycocotools import mask as rle
from ultralytics.data.converter import merge_multi_segment

from visionpeft import cli
from visionpeft.data import CheckReport, check, convert
from visionpeft.data.formats.base import FORMATS, NOT_FOUND, letters_of
from visionpeft.data.label_rows import RowFault, guess_task, parse_row, read_rows
from visionpeft.data.layout import SUFFIXES, label_file, read_layout
from visionpeft.data.pictures import find_copies, inspect_image, read_image
from visionpeft.data.writing import join_parts
from visionpeft.errors import ConfigError, DataError, VisionpeftError
from visionpeft.registry import FAMILIES
from visionpeft.sources import packaged

TAKEN = "image taken from another folder than its annotations say"
SIZE = (96, 64)  # width, height of generated images


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture that is like no other: large random patches."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def make(root: Path, rows: Sequence[str] = ("0 .5 .5 .5 .5", "1 .25 .5 .25 .5"), more: str = "") -> Path:
    """A set of 4 + 2 images with the same rows each; returns its YAML."""
    for part, seeds in (("train", range(4)), ("val", range(4, 6))):
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for seed in seeds:
            picture(seed).save(root / "images" / part / f"{seed}.png")
            (root / "labels" / part / f"{seed}.txt").write_text("\n".join(rows) + "\n")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [red, green]\n{more}")
    return root / "data.yaml"


def kinds(report: CheckReport) -> dict[str, int]:
    return {f.kind: f.count for f in report.findings}


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err.strip()


# ---------------------------------------------------------------------------------------------------------------- check
def test_a_fine_set_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "check", make(tmp_path).name)
    assert code == 0 and out.rstrip().endswith("No problems found.")
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run(capsys, "check", tmp_path, "--json")  # the folder will do
    report = json.loads(out)
    assert code == 0 and report["ok"] and report["task"] == "detect"
    assert report["splits"]["train"]["classes"] == {"red": 4, "green": 4}
    assert report["splits"]["train"]["sizes"] == [list(SIZE)] * 3


def test_the_old_name_of_a_report_warns() -> None:
    with pytest.warns(FutureWarning, match="visionpeft.data.Report is now called visionpeft.data.CheckReport"):
        from visionpeft.data import Report
    assert Report is CheckReport


@pytest.mark.parametrize("words", [("data", "check"), ("data", "convert"), ("data", "draw"), ("benchmark",)], ids=" ".join)
def test_every_option_of_a_command_is_described(words: tuple[str, ...]) -> None:
    command = cli.app
    for word in words:
        command = command[word]
    arguments = command.assemble_argument_collection(parse_docstring=True)
    assert len(arguments) > 4 and not [a.name for a in arguments if not a.parameter.help]


SPOILED: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "truncated image": (lambda d: _cut(d / "images/train/0.png"), "unreadable", True),
    "text as image": (lambda d: (d / "images/train/0.png").write_text("x"), "unreadable", True),
    "text in a row": (lambda d: _rows(d, "red .5 .5 .1 .1"), "malformed", True),
    "row too short": (lambda d: _rows(d, "0 .5 .5 .1"), "malformed", True),
    "class that is no index": (lambda d: _rows(d, "0.5 .5 .5 .1 .1"), "malformed", True),
    "not a number": (lambda d: _rows(d, "0 nan .5 .1 .1"), "malformed", True),
    "a GIF called .png": (lambda d: picture(0).save(d / "images/train/0.png", "GIF"), "unreadable", True),
    "two images, one label file": (lambda d: picture(9).save(d / "images/train/0.jpg"), "shared", True),
    "two classes of one name": (
        lambda d: _yaml(d, "train: images/train\nval: images/val\nnames: [a, a]"),
        "same name",
        True,
    ),
    "labels that are no text": (lambda d: (d / "labels/train/0.txt").write_bytes(b"\xff\xfe\x00"), "malformed", True),
    "polygon among boxes": (lambda d: _rows(d, "0 .5 .5 .1 .1\n0 .1 .1 .2 .1 .2 .2"), "mixed", True),
    "class too high": (lambda d: _rows(d, "2 .5 .5 .1 .1"), "class", True),
    "negative class": (lambda d: _rows(d, "-1 .5 .5 .1 .1"), "class", True),
    "pixels, not shares": (lambda d: _rows(d, "0 320 240 32 32"), "outside", True),
    "no width": (lambda d: _rows(d, "0 .5 .5 0 .1"), "empty", True),
    "no label files": (lambda d: shutil.rmtree(d / "labels/val"), "no labels", True),
    "label without image": (lambda d: (d / "labels/train/9.txt").write_text("0 .5 .5 .1 .1"), "orphan", True),
    "the same image in train and val": (lambda d: _copy(d, "train/0", "val/9"), "leak", True),
    "a re-encoded one": (lambda d: _encode(d, "train/0", "val/9"), "near leak", True),
    "class in val only": (lambda d: [_rows(d, "0 .5 .5 .1 .1", f"train/{i}") for i in range(4)], "no train", True),
    "train only": (lambda d: (d / "data.yaml").write_text("train: images/train\nnames: [red, green]"), "split", True),
    "box over the edge": (lambda d: _rows(d, "0 .9 .5 .4 .1"), "sticks out", False),
    "row twice": (lambda d: _rows(d, "0 .5 .5 .1 .1\n0 .5 .5 .1 .1"), "duplicate row", False),
    "one label file missing": (lambda d: (d / "labels/train/0.txt").unlink(), "unlabelled", False),
    "image twice": (lambda d: _copy(d, "train/0", "train/9"), "copy", False),
    "image re-encoded": (lambda d: _encode(d, "train/0", "train/9"), "near copy", False),
    "class in train only": (lambda d: [_rows(d, "0 .5 .5 .1 .1", f"val/{i}") for i in (4, 5)], "absent", False),
    "tiny objects": (lambda d: _rows(d, "0 .5 .5 .005 .005\n" * 1 + "1 .4 .4 .005 .005"), "tiny", False),
}


def _rows(root: Path, rows: str, name: str = "train/0") -> None:
    (root / "labels" / f"{name}.txt").write_text(rows)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def _copy(root: Path, one: str, other: str) -> None:
    shutil.copy(root / "images" / f"{one}.png", root / "images" / f"{other}.png")
    shutil.copy(root / "labels" / f"{one}.txt", root / "labels" / f"{other}.txt")


def _encode(root: Path, one: str, other: str) -> None:
    _copy(root, one, other)
    image = Image.open(root / "images" / f"{one}.png").resize((120, 80)).point(lambda v: min(255, v + 12))
    (root / "images" / f"{other}.png").unlink()
    image.save(root / "images" / f"{other}.jpg", quality=70)


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_is_found(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, kind, problem = SPOILED[name]
    data = make(tmp_path)
    spoil(tmp_path)
    report = check(data)
    finding = next(f for f in report.findings if f.kind == kind)
    assert finding.problem == problem and report.ok != problem
    assert finding.examples, "it says where"
    code, out, _ = run(capsys, "check", data)
    assert code == (1 if problem else 0) and f"{finding.count} x {finding.title}" in " ".join(out.split())


REJECTED = (  # label files, as Ultralytics judges them
    "0 .5 .5 .1 .1",
    "1 .5 .5 1 1\n0 .2 .2 .1 .1",
    "0 .1 .1 .2 .1 .2 .2",
    "0 .5 .5 .1",
    "0 .5 .5 .1 .1 .9",
    "2 .5 .5 .1 .1",
    "0 1.005 .5 .1 .1",
    "0 1.02 .5 .1 .1",
    "0 -.02 .5 .1 .1",
    "0 .5 .5 .1 .1\n0 .1 .1 .2 .1 .2 .2",
    "0 -.05 .1 .2 .1 .2 .2",
    "0 1.1 .1 1.2 .1 1.2 .2",
    "0 96 10 200 10 200 20",
    "0.5 .5 .5 .1 .1",
    "red .5 .5 .1 .1",
    "0 .5 .5 .1 .1\n0 .5 .5 .1 .1",
    "",
)


REJECTED_POSES = ("0 .5 .5 .1 .1 .4 .4 2", "0 .5 .5 .1 .1 1.4 .4 2", "0 .5 .5 .1 .1 1.4 .4 0", "0 .5 .5 .1 .1 -.4 .4 0")


@pytest.mark.parametrize("text", REJECTED + REJECTED_POSES)
def test_an_image_is_faulted_where_ultralytics_leaves_it_out(text: str, tmp_path: Path) -> None:
    from ultralytics.data.utils import verify_image_label

    pose = text in REJECTED_POSES
    data = make(tmp_path, more="kpt_shape: [1, 3]\n" * pose)
    _rows(tmp_path, text)
    image, label = tmp_path / "images/train/0.png", tmp_path / "labels/train/0.txt"
    theirs = verify_image_label((str(image), str(label), "", pose, 2, int(pose), 3 * pose, False))
    left_out = {"malformed", "mixed", "class", "outside"}
    ours = [f for f in check(data, "pose" if pose else "detect").findings if f.kind in left_out]
    assert bool(theirs[-2]) == any("labels/train/0.txt" in e for f in ours for e in f.examples), theirs[-1]


def test_the_names_of_images_are_ultralytics_own() -> None:
    from ultralytics.data.utils import IMG_FORMATS, img2label_paths

    assert SUFFIXES == IMG_FORMATS
    for image in ("/a/images/train/x y.JPG", "/images/a/images/b/é.png", "/a/b/c.d.png"):
        assert str(label_file(Path(image))) == img2label_paths([image])[0]


def test_a_check_reads_what_training_reads(tmp_path: Path) -> None:
    data = make(tmp_path)
    for part in ("train", "val"):
        lines = "".join(f"./images/{part}/{f.name}\r\n" for f in sorted((tmp_path / "images" / part).iterdir()))
        (tmp_path / f"{part}.txt").write_bytes(b"\xef\xbb\xbf# chosen by hand\r\n" + lines.encode())
    images = "train: images/train\nval: images/val\n"
    for text in (
        "train: train.txt\nval: val.txt\nnames: [red, green]",
        "train: images/train\nvalidation: images/val\nnames: [red, green]",
        images + "names: {'0': red, '1': 7}",
        images + "nc: '2'",
        images + "nc: 2.0\nnames: None",
        images + "path: None\nnames: [red, green]",
    ):
        data.write_text(text)
        report, trained = check(data), FAMILIES["yolo"]().read_data(str(data))
        assert report.ok and report.names == trained.names and len(trained.train) == 4, text
    data.write_bytes(f"{images}names: [red, green]".encode("utf-16"))
    assert check(data).names == FAMILIES["yolo"]().read_data(str(data)).names == {0: "red", 1: "green"}


TASKS = {
    "detect": ("0 .5 .5 .5 .5", ""),
    "segment": ("0 .25 .25 .75 .25 .5 .75", ""),
    "obb": ("0 .5 .25 .75 .5 .5 .75 .25 .5", ""),
    "pose": ("0 .5 .5 .5 .5 .4 .4 2 .6 .6 1 0 0 0", "kpt_shape: [3, 3]\n"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_told_and_drawn(task: str, tmp_path: Path) -> None:
    rows, more = TASKS[task]
    sheet = tmp_path / "made" / "sheet.png"
    report = check(make(tmp_path, [rows], more), sheet=sheet)
    assert report.ok and report.task == task and report.splits["train"].objects == 4
    drawn = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    red = (drawn[..., 0] > 230) & (drawn[..., 1] < 60) & (drawn[..., 2] < 60)
    assert red.sum() > 6 * 300, "the outlines of six objects in the colour of class 0"
    assert report.sheet == str(sheet)


def test_pose_rows_are_checked(tmp_path: Path) -> None:
    report = check(make(tmp_path, ["0 .5 .5 .5 .5 .4 .4 2"], "kpt_shape: [2, 3]\n"))
    assert kinds(report)["malformed"] == 6
    row = parse_row([0, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.6, 0.6], 1, "pose", 1, (2, 2))
    assert not isinstance(row, RowFault) and row.keypoints is not None
    assert row.keypoints.tolist() == [[0.4, 0.4, 1], [0.6, 0.6, 1]]


def test_boxes_of_poses(tmp_path: Path) -> None:
    """A pose set is checked for a detector as Ultralytics reads it then."""
    data = make(tmp_path, ["0 .5 .5 .5 .5 .4 .4 2", "1 .2 .2 .1 .1 .2 .2 1"], "kpt_shape: [1, 3]\n")
    assert check(data).task == "pose"
    report = check(data, "detect")
    assert report.ok and report.splits["train"].objects == 8


TURNED = Image.Exif()
TURNED[0x0112] = 6
WIDE = np.asarray(picture(0, (40, 30)))  # 8 bits; with 257 times as much, the same in 16
DEEP = WIDE[..., 0].astype(np.uint16) * 257 - 100
READ: dict[str, Callable[[Path], object]] = {  # images of every kind, as files
    "turned.JPG": lambda f: Image.fromarray(WIDE).save(f, exif=TURNED),
    "turned.png": lambda f: Image.fromarray(WIDE).save(f, exif=TURNED),
    "turned.tif": lambda f: Image.fromarray(WIDE).save(f, exif=TURNED),
    "turned.webp": lambda f: Image.fromarray(WIDE).save(f, exif=TURNED, lossless=True),
    "deep, turned.png": lambda f: Image.fromarray(DEEP).save(f, exif=TURNED),
    "deep.tif": lambda f: Image.fromarray(DEEP).save(f),
    "deep.jp2": lambda f: Image.fromarray(DEEP).save(f),
    "deep, colour.png": lambda f: cv2.imwrite(str(f), WIDE.astype(np.uint16) * 257 - 100),
    "deep, colour.tif": lambda f: cv2.imwrite(str(f), WIDE.astype(np.uint16) * 257 - 100),
    "grey.png": lambda f: Image.fromarray(WIDE).convert("L").save(f),
    "palette.png": lambda f: Image.fromarray(WIDE).convert("P").save(f, transparency=b"\x00\x80"),
    "two colours.png": lambda f: Image.fromarray(WIDE).convert("1").save(f),
    "alpha.png": lambda f: Image.fromarray(np.dstack([WIDE, WIDE[..., 0]])).save(f),
    "grey alpha.tif": lambda f: Image.fromarray(WIDE[..., :2], "LA").save(f),
    "printed.tif": lambda f: Image.fromarray(WIDE).convert("CMYK").save(f),
    "with a preview.tif": lambda f: _pages(f, WIDE, WIDE[::2, ::2]),
}
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "fractions": (lambda f: Image.fromarray(WIDE[..., 0] / np.float32(255)).save(f), "holds fractions"),
    "32 bits": (lambda f: Image.fromarray(WIDE[..., 0].astype(np.int32)).save(f), "holds numbers of 32 bits"),
    "four bands": (lambda f: Image.new("RGBX", (40, 30)).save(f), "has 4 bands"),
    "pages": (lambda f: _pages(f, WIDE[..., 0], WIDE[..., 1], WIDE[..., 2]), "has 3 pages of one size"),
    "a preview first": (lambda f: Image.fromarray(WIDE).save(f, tiffinfo={254: 1}), "begins with a preview"),
}


def _pages(file: Path, first: np.ndarray, *more: np.ndarray) -> None:
    Image.fromarray(first).save(file, save_all=True, append_images=[Image.fromarray(a) for a in more])


@pytest.mark.parametrize("name", READ)
def test_images_are_read_as_ultralytics_reads_them(name: str, tmp_path: Path) -> None:
    from ultralytics.utils.patches import imread

    READ[name](file := tmp_path / name)
    theirs = imread(file)[..., ::-1]
    assert (np.asarray(read_image(file)) == theirs).all()
    seen = inspect_image(file)
    assert seen.size == theirs.shape[1::-1] and (seen.highest == DEEP.max()) == ("deep" in name and "colour" not in name)
    assert np.asarray(seen.thumb).std() > 10, "copies of it can be found"


@pytest.mark.parametrize("name", UNFIT)
def test_an_image_that_would_be_read_wrongly_is_refused(name: str, tmp_path: Path) -> None:
    spoil, said = UNFIT[name]
    data = make(tmp_path)
    spoil(file := tmp_path / "images/train/9.tif")
    with pytest.raises(DataError, match=f"9.tif {said}"):
        read_image(file)
    [finding] = [f for f in check(data).findings if f.problem]
    assert finding.kind == "unreadable" and said in finding.examples[0]
    with pytest.raises(DataError, match=f"9.tif {said}"):
        FAMILIES["yolo"]().read_data(str(data))


def test_images_of_16_bits_are_said(tmp_path: Path) -> None:
    data = make(tmp_path)
    Image.fromarray(DEEP // 16).save(tmp_path / "images/train/9.png")
    [finding] = [f for f in check(data, sheet=tmp_path / "s.png").findings if f.kind == "deep"]
    assert not finding.problem and finding.examples == (f"images/train/9.png: up to {DEEP.max() // 16}, which becomes 15",)


def test_an_image_too_large_for_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by a check, as training leaves it out, but converted: it can still be cut into tiles."""
    source = one_image(tmp_path / "in", [{"bbox": [24, 16, 48, 32]}])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    made = convert(source, tmp_path / "out")
    assert not made.left and Image.MAX_IMAGE_PIXELS == 1000
    finding = check(made.data).findings[0]
    assert finding.kind == "unreadable" and finding.count == 2 and "cut it into tiles" in finding.examples[0]


def test_copies_are_told_from_others(tmp_path: Path) -> None:
    """Of 120 images and a changed copy of every tenth, the copies are found, and nothing else."""
    originals = [picture(i, (160, 120)) for i in range(120)]
    for i, image in enumerate(originals):
        image.save(tmp_path / f"{i}.png")
    for i in range(0, 120, 10):
        changed = originals[i].resize((100, 75)).point(lambda v: int(v * 0.9))
        changed.save(tmp_path / f"copy{i}.jpg", quality=60)
    names = [f"{i}.png" for i in range(120)] + [f"copy{i}.jpg" for i in range(0, 120, 10)]
    _, across = find_copies([inspect_image(tmp_path / n) for n in names], [0] * 120 + [1] * 12)
    assert {names[a]: names[b] for a, b in across.items()} == {f"copy{i}.jpg": f"{i}.png" for i in range(0, 120, 10)}


def test_folders_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part, seeds in (("train", range(6)), ("validation", range(6, 10))):
        for seed in seeds:
            file = tmp_path / part / ("cat", "dog")[seed % 2] / f"ein Bild {seed} ü.JPG"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(seed).save(file)
    report = check(tmp_path, sheet=tmp_path / "s.jpg")
    assert report.ok and report.task == "classify" and report.splits["val"].classes == {"cat": 2, "dog": 2}
    shutil.copy(tmp_path / "train/cat/ein Bild 0 ü.JPG", tmp_path / "validation/dog/9.JPG")
    assert set(kinds(check(tmp_path))) == {"leak", "conflict"}
    assert run(capsys, "check", tmp_path)[0] == 1


def test_names_that_are_no_utf8_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make(tmp_path)
    name = os.fsdecode(b"\xff.png")
    try:
        (tmp_path / "images/train" / name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    code, out, _ = run(capsys, "check", data, "--sheet", tmp_path / "s.png")
    assert code == 1 and "\\udcff.png" in out


@pytest.mark.parametrize("name", ("aerial_airport", "road_signs", "coco8", "eurosat_rgb_2000"))
def test_real_sets_can_be_checked(name: str, tmp_path: Path) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"needs the real data in {REAL / name}")
    report = check(REAL / name, sheet=tmp_path / "sheet.jpg")
    found = {k for k in kinds(report) if k not in ("copy", "absent", "unlabelled")}
    known = {"road_signs": {"leak"}, "coco8": {"no train"}}  # val/road145.jpg is train/road147.jpg; eight images, 80 classes
    assert found == known.get(name, set())


# -------------------------------------------------------------------------------------------------------------- convert
def coco_of(data: Path, part: str, step: int = 3) -> dict[str, Any]:
    """A YOLO split as COCO's JSON, with gaps between the ids."""
    layout = read_layout(data)
    images, things = [], []
    for i, file in enumerate(layout.splits[part]):
        with Image.open(file) as image:
            width, height = image.size
        images.append({"id": 7 * i, "file_name": file.name, "width": width, "height": height})
        for values in read_rows(label_file(file))[0].values():
            cls, x, y, w, h = values
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            things.append(
                {"id": len(things), "image_id": 7 * i, "category_id": step * int(cls) + 1, "bbox": box, "iscrowd": 0}
            )
    names = [{"id": step * i + 1, "name": n} for i, n in layout.names.items()]
    return {"images": images, "annotations": things, "categories": names[::-1]}


def write_coco(data: Path, root: Path) -> Path:
    """A YOLO set in Roboflow's layout."""
    for part, folder in (("train", "train"), ("val", "valid")):
        (root / folder).mkdir(parents=True)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(coco_of(data, part)))
        for file in read_layout(data).splits[part]:
            shutil.copy(file, root / folder)
    return root


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {f.stem: np.array(list(read_rows(f)[0].values())) for f in sorted(folder.glob("*.txt"))}


def same_labels(one: Path, other: Path) -> int:
    """Compare two YOLO sets; returns how many rows they have."""
    count = 0
    for part in ("train", "val"):
        here, there = labels(one / "labels" / part), labels(other / "labels" / part)
        assert here.keys() == there.keys()
        for stem in here:
            assert here[stem].shape == there[stem].shape, stem
            np.testing.assert_allclose(here[stem], there[stem], atol=1e-6)
        count += sum(map(len, here.values()))
    return count


def test_there_and_back(tmp_path: Path) -> None:
    data = make(tmp_path / "yolo", ["1 .5 .5 .123456 .654321", "0 .25 .5 .25 .5"])
    made = convert(write_coco(data, tmp_path / "coco"), tmp_path / "out")
    assert (made.format, made.task, made.names) == ("coco", "detect", {0: "red", 1: "green"})
    assert made.images == {"train": 4, "val": 2} and made.objects["val"] == {"red": 2, "green": 2}
    assert not made.left and not made.changed
    assert same_labels(tmp_path / "yolo", tmp_path / "out") == 12
    assert check(made.data).ok


def test_there_and_back_with_real_data(tmp_path: Path) -> None:
    source = REAL / "aerial_airport"
    if not source.is_dir():
        pytest.skip(f"needs the real data in {source}")
    made = convert(write_coco(source / "data.yaml", tmp_path / "coco"), tmp_path / "out")
    assert same_labels(source, tmp_path / "out") == sum(sum(o.values()) for o in made.objects.values()) == 3408 + 1018


def one_image(root: Path, annotations: list[dict], categories: list[dict] | None = None, **image: Any) -> Path:
    """COCO's JSON beside two images, the first of which is annotated."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        picture(i).save(root / f"{i}.png")
    stated = {"width": SIZE[0], "height": SIZE[1], **image}
    images = [{"id": 1, "file_name": "0.png", **stated}, {"id": 2, "file_name": "1.png"}]
    things = [{"id": i, "image_id": 1, "category_id": 1, **a} for i, a in enumerate(annotations)]
    content = {"images": images, "annotations": things, "categories": categories or [{"id": 1, "name": "thing"}]}
    (root / "set.json").write_text(json.dumps(content))
    return root / "set.json"


def test_a_name_that_several_images_have(tmp_path: Path) -> None:
    """No image gets the objects of another that has its name in another folder."""
    images = [{"id": 10 * c + i, "file_name": f"cam{c}/{i}.png"} for c in (1, 2) for i in range(2)]
    things = [{"id": k, "image_id": m["id"], "category_id": 1, "bbox": [4 * k, 4, 9, 9]} for k, m in enumerate(images)]
    source = tmp_path / "ann.json"
    for c in (1, 2):
        (tmp_path / f"cam{c}").mkdir()
        for i in range(2):
            picture(10 * c + i).save(tmp_path / f"cam{c}/{i}.png")

    def converted(listed: list[dict], out: str) -> Any:
        content = {"images": listed, "annotations": things, "categories": [{"id": 1, "name": "thing"}]}
        source.write_text(json.dumps(content))
        return convert(source, tmp_path / out, images=tmp_path / "cam1")

    made = converted(images, "a")
    assert sum(made.images.values()) == 2 and not made.changed.keys() & {TAKEN}
    assert made.left[NOT_FOUND] == (2, ("cam2/0.png (1 objects)", "cam2/1.png (1 objects)"))
    made = converted(images[2:], "b")  # as if all had been moved into one folder
    assert made.changed[TAKEN][0] == 2 and not made.left.keys() & {NOT_FOUND}
    twice = [*images[:2], {"id": 20, "file_name": "1.png"}]
    with pytest.raises(VisionpeftError, match="2 x annotation of an image that another annotates, too"):
        converted(twice, "c")  # 1.png is cam1's, too


def test_an_image_in_two_folders(tmp_path: Path) -> None:
    """KITTI's training and testing, given their common folder, hold images of the same names."""
    for part, seed in (("training", 0), ("testing", 9)):
        (tmp_path / part / "image_2").mkdir(parents=True)
        for i in range(2):
            picture(seed + i).save(tmp_path / part / f"image_2/00000{i}.png")
    (tmp_path / "training/label_2").mkdir()
    for i in range(2):
        row = "Car 0.00 0 1.55 24 16 72 48 1.6 1.6 3.7 -0.6 1.7 46.7 -1.5"
        (tmp_path / f"training/label_2/00000{i}.txt").write_text(row, encoding="utf-8-sig")
    (tmp_path / "training/label_2/000002.txt").write_bytes(f"F\xfcchse{row[3:]}".encode("cp1252"))
    made = convert(tmp_path / "training", tmp_path / "out")
    assert sum(made.images.values()) == 2 and made.names[0] == "Car"
    assert {k: n for k, (n, _) in made.left.items()} == {"annotation file that is not UTF-8": 1}
    with pytest.raises(VisionpeftError, match="give them with --images"):
        convert(tmp_path / "training", tmp_path / "other", images=tmp_path)


def row_of(out: Path) -> list[list[float]]:
    file = next(out.glob("labels/*/0.txt"))
    return list(read_rows(file)[0].values())


@pytest.mark.parametrize("coded", ("compressed", "counts"))
def test_a_run_length_mask_becomes_its_polygon(coded: str, tmp_path: Path) -> None:
    mask = np.zeros(SIZE[::-1], np.uint8)
    cv2.ellipse(mask, (40, 30), (25, 14), 20, 0, 360, 1, -1)
    cv2.rectangle(mask, (80, 50), (90, 60), 1, -1)  # a second part
    segmentation = rle.encode(np.asfortranarray(mask))
    segmentation["counts"] = segmentation["counts"].decode()
    if coded == "counts":
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        segmentation["counts"] = np.diff([0, *edges, flat.size]).tolist()
    source = one_image(tmp_path / "in", [{"bbox": [15, 10, 76, 51], "segmentation": segmentation}])
    made = convert(source, tmp_path / "out")
    assert made.task == "segment"
    polygon = np.array(row_of(tmp_path / "out")[0][1:]).reshape(-1, 2) * SIZE
    drawn = cv2.fillPoly(np.zeros_like(mask), [np.rint(polygon).astype(np.int32)], 1)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.95, "but for the thin line between the parts"
    assert check(made.data, "segment").splits


def test_a_run_length_mask_needs_the_extra(tmp_path: Path, lacking) -> None:
    lacking("pycocotools")
    mask = {"size": SIZE[::-1], "counts": [96 * 64]}
    source = one_image(tmp_path / "in", [{"bbox": [15, 10, 76, 51], "segmentation": mask}])
    with pytest.raises(ConfigError, match=r"run-length mask needs pycocotools.*pip install 'visionpeft\[data\]'"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", task="detect").task == "detect"


def test_polygons_and_boxes_are_told_apart(tmp_path: Path) -> None:
    triangle, box = [10, 10, 40, 10, 20, 50], [10, 10, 40, 10, 40, 50, 10, 50]
    source = one_image(tmp_path / "in", [{"bbox": [10, 10, 30, 40], "segmentation": [triangle]}])
    assert convert(source, tmp_path / "a").task == "segment"
    np.testing.assert_allclose(
        np.array(row_of(tmp_path / "a")[0][1:]).reshape(-1, 2) * SIZE, np.array(triangle).reshape(-1, 2)
    )
    assert convert(source, tmp_path / "b", task="detect").task == "detect"
    source = one_image(tmp_path / "in", [{"bbox": [10, 10, 30, 40], "segmentation": [box]}])
    assert convert(source, tmp_path / "c").task == "detect", "a box written as a polygon is a box"
    source = one_image(tmp_path / "in", [{"bbox": [10, 10, 30, 40], "segmentation": [triangle]}, {"bbox": [1, 1, 5, 5]}])
    assert convert(source, tmp_path / "d").task == "detect", "not every object has an outline"
    made = convert(source, tmp_path / "e", task="segment")
    assert made.left["object without an outline (task=detect takes its box)"][0] == 1


def test_keypoints_and_their_mirror_images(tmp_path: Path) -> None:
    person = {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"]}
    points = [48, 32, 2, 24, 16, 1, 0, 0, 0]
    source = one_image(tmp_path / "in", [{"bbox": [0, 0, 96, 64], "keypoints": points}], [person])
    made = convert(source, tmp_path / "out")
    content = yaml.safe_load(Path(made.data).read_text())
    assert made.task == "pose" and content["kpt_shape"] == [3, 3] and content["flip_idx"] == [0, 2, 1]
    np.testing.assert_allclose(row_of(tmp_path / "out")[0], [0, 0.5, 0.5, 1, 1, 0.5, 0.5, 2, 0.25, 0.25, 1, 0, 0, 0])
    assert check(made.data).task == "pose"


@pytest.mark.parametrize("where", ("{part}2017", "images/{part}2017", "{part}/images"))
def test_the_layouts_of_coco_and_ai_tod(where: str, tmp_path: Path) -> None:
    """Images beside annotations/, or in images/; what else lies in annotations/ is not taken for boxes."""
    data = make(tmp_path / "yolo")
    notes = tmp_path / "in" / "annotations"
    notes.mkdir(parents=True)
    for part in ("train", "val"):
        content = json.dumps(coco_of(data, part))
        for name in (f"instances_{part}2017", f"person_keypoints_{part}2017"):
            (notes / f"{name}.json").write_text(content)
        (notes / f"captions_{part}2017.json").write_text("{}")
        shutil.copytree(tmp_path / "yolo/images" / part, tmp_path / "in" / where.format(part=part))
    shutil.copy(notes / "instances_train2017.json", notes / "instances_trainval2017.json")
    made = convert(tmp_path / "in", tmp_path / "out")
    assert made.images == {"train": 4, "val": 2} and not made.left
    assert same_labels(tmp_path / "yolo", tmp_path / "out") == 12
    one = convert(notes / "instances_val2017.json", tmp_path / "one")
    assert one.images == {"train": 1, "val": 1}, "a single file is split by the hash of the names"


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    things = [
        {"bbox": [80, 50, 40, 40]},  # sticks out
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [10, 10, 5, 5], "iscrowd": 1},
        {"bbox": [10, 10, 5]},
        {"bbox": [200, 200, 5, 5]},
        {"bbox": [10, 10, 5, 5], "category_id": 99},
        {"bbox": [10, 10, 5, 5], "image_id": 99},
        {"segmentation": [[0, 0, 48, 0, 48, 32, 0, 32]]},  # no box: the one around its outline
    ]
    names = [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 1, "name": "thing", "supercategory": "things"}]
    made = convert(one_image(tmp_path / "in", things, names), tmp_path / "out", task="detect")
    assert {k: n for k, (n, _) in made.left.items()} == {
        "category that only stands above others": 1,
        "object without width or height": 2,
        "crowd (iscrowd), which Ultralytics has no notion of": 1,
        "annotation that is malformed": 1,
        "annotation of an unknown category": 1,
        "annotation of an image that is not listed": 1,
    }
    np.testing.assert_allclose(
        row_of(tmp_path / "out"),
        [[0, 88 / 96, 57 / 64, 16 / 96, 14 / 64], [0, 0.25, 0.25, 0.5, 0.5]],
        atol=1e-7,
    )
    assert made.changed["outline or box clipped to its image"][0] == 2


def voc(root: Path, stem: str, things: str, size: str = "<size><width>96</width><height>64</height></size>") -> None:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    picture(len(list((root / "JPEGImages").iterdir()))).save(root / "JPEGImages" / f"{stem}.JPG")
    text = f"<annotation><filename>{stem}.JPG</filename>{size}{things}</annotation>"
    (root / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")


def thing(name: str, *edges: float, more: str = "") -> str:
    tags = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{tags}</bndbox></object>"


def test_pascal_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    hard = thing("bus", 0, 0, 9, 9, more="<difficult>1</difficult>")
    voc(root, "a b", thing("car", 24, 16, 72, 48) + hard)
    voc(root, "ü", thing("bus", 0, 0, 96, 64), size="")  # its image says how large it is
    voc(root, "c", thing("car", 24, 16, 72, 48), size="<source><database>The VOC2007 Database</database></source>")
    voc(root, "d", thing("car", 24, 16, 72, 48))
    voc(root, "broken", "<object>")
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a b\nü\nbroken\n".replace("a b", "c"), encoding="utf-8")
    (root / "ImageSets/Main/val.txt").write_text("d\n")
    made = convert(root, tmp_path / "out")
    assert made.format == "voc" and made.images == {"train": 2, "val": 1} and made.names == {0: "bus", 1: "car"}
    assert {k: n for k, (n, _) in made.left.items()} == {
        "image that ImageSets does not list": 1,
        "XML file that is not readable": 1,
    }
    found = labels(tmp_path / "out/labels/train") | labels(tmp_path / "out/labels/val")
    np.testing.assert_allclose(found["d"], [[1, 0.5, 0.5, 0.5, 0.5]])
    np.testing.assert_allclose(found["c"], [[1, 47.5 / 96, 31.5 / 64, 49 / 96, 33 / 64]], atol=1e-7)  # counted from 1
    np.testing.assert_allclose(found["ü"], [[0, 0.5, 0.5, 1, 1]])
    assert check(made.data).ok
    shutil.rmtree(root / "ImageSets")
    kept = convert(root, tmp_path / "all", difficult=True, names=["car", "BUS"])
    assert sum(o.get("BUS", 0) for o in kept.objects.values()) == 2 and kept.names == {0: "car", 1: "BUS"}


def test_oriented_boxes_of_dior(tmp_path: Path) -> None:
    corners = zip(
        ("left_top", "right_top", "right_bottom", "left_bottom"), ((48, 16), (72, 32), (48, 48), (24, 32)), strict=True
    )
    tags = "".join(f"<x_{c}>{x}</x_{c}><y_{c}>{y}</y_{c}>" for c, (x, y) in corners)
    for stem in "abc":
        voc(tmp_path / "in", stem, f"<object><name>ship</name><robndbox>{tags}</robndbox></object>")
    made = convert(tmp_path / "in", tmp_path / "out")
    assert made.task == "obb" and check(made.data).task == "obb"
    row = next(iter(labels(tmp_path / "out/labels/train").values()))[0]
    np.testing.assert_allclose(row, [0, 0.5, 0.25, 0.75, 0.5, 0.5, 0.75, 0.25, 0.5])


def test_annotations_that_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets of XML files of the same images are refused, and one of them can be given, by any spelling of its path."""
    root = tmp_path / "DIOR"
    for stem in "abc":
        voc(root, stem, thing("ship", 24, 16, 72, 48))
    (root / "Annotations").rename(root / "Horizontal")
    shutil.copytree(root / "Horizontal", root / "Annotations" / "Oriented")
    shutil.move(root / "Horizontal", root / "Annotations" / "Horizontal")
    with pytest.raises(VisionpeftError, match="both annotate a; give one of the two with --annotations"):
        convert(root, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    made = convert("DIOR", "out", annotations=root / "Annotations" / "Horizontal")
    assert sum(made.images.values()) == 3
    shutil.move(root / "Annotations", tmp_path / "XML")
    made = convert(root, tmp_path / "b", "voc", annotations="XML/Oriented", images=root / "JPEGImages")
    assert sum(made.images.values()) == 3


def test_kitti(tmp_path: Path) -> None:
    for folder in ("label_2", "image_2"):
        (tmp_path / "training" / folder).mkdir(parents=True)
    tail = "1.6 1.6 3.7 -0.6 1.7 46.7 -1.5"
    for i in range(5):
        picture(i).save(tmp_path / f"training/image_2/00000{i}.png")
        rows = [
            f"Car 0.00 0 1.55 24 16 72 48 {tail}",
            f"DontCare -1 -1 -10 0 0 9 9 {tail}",
            f"Misc 0 0 0 0 0 9 9 {tail}",
            "Car 1",
        ]
        (tmp_path / f"training/label_2/00000{i}.txt").write_text("\n".join(rows))
    made = convert(tmp_path, tmp_path / "out", without=["misc"], val=0.4)
    assert made.names == dict(enumerate("Car Van Truck Pedestrian Person_sitting Cyclist Tram".split()))
    assert {k: n for k, (n, _) in made.left.items()} == {
        "DontCare region": 5,
        "row that is malformed": 5,
        "object of class Misc": 5,
    }
    for rows in labels(tmp_path / "out/labels/train").values():
        np.testing.assert_allclose(rows, [[0, 0.5, 0.5, 0.5, 0.5]])
    again = convert(tmp_path, tmp_path / "again", without=["misc"], val=0.4)
    assert again.images == made.images
    assert sorted(os.listdir(tmp_path / "out/images/val")) == sorted(os.listdir(tmp_path / "again/images/val"))


def write_dota(root: Path, folder: str, rows: str) -> None:
    """Write a DOTA set of one picture in each split, with the same rows."""
    for part, seed in (("train", 0), ("val", 1)):
        for name in ("images", folder):
            (root / part / name).mkdir(parents=True)
        picture(seed).save(root / part / "images/P0.png")
        (root / part / folder / "P0.txt").write_text(rows)


def test_oriented_boxes_are_not_bent_at_the_edge(tmp_path: Path) -> None:
    """Corners outside stay where they are, as cutting them off would turn the box, and Ultralytics takes such boxes."""
    from ultralytics.data.utils import verify_image_label

    write_dota(tmp_path / "in", "labelTxt", "-6 20 20 -6 40 14 14 40 ship 0\n-40 -40 -20 -40 -20 -20 -40 -20 ship 0\n")
    made = convert(tmp_path / "in", tmp_path / "out")
    assert {k: n for k, (n, _) in made.left.items()} == {"object without area": 2}
    label = tmp_path / "out/labels/train/P0.txt"
    expected = np.array([-6, 20, 20, -6, 40, 14, 14, 40]).reshape(4, 2) / SIZE
    np.testing.assert_allclose(labels(label.parent)["P0"][:, 1:], expected.reshape(1, 8), atol=1e-7)
    assert not verify_image_label((str(tmp_path / "out/images/train/P0.png"), str(label), "", False, 1, 0, 0, False))[-2]


def test_classes_that_differ_in_marks_only(tmp_path: Path) -> None:
    names = [{"id": i, "name": n} for i, n in enumerate(("+", "-", "Car", "car"), 1)]
    things = [{"bbox": [8 * i, 8, 8, 8], "category_id": i} for i in (1, 2, 3, 4)]
    made = convert(one_image(tmp_path / "in", things, names), tmp_path / "out")
    assert list(made.names.values()) == ["+", "-", "Car", "car"] and [r[0] for r in row_of(tmp_path / "out")] == [0, 1, 2, 3]
    made = convert(tmp_path / "in/set.json", tmp_path / "b", names=["car", "bus"], without=["-"])
    assert [r[0] for r in row_of(tmp_path / "b")] == [0, 0] and made.left["object of class -"][0] == 1


def test_dota(tmp_path: Path) -> None:
    rows = "imagesource:GoogleEarth\ngsd:0.146\n48 16 72 32 48 48 24 32 large-vehicle 0\n1 1 9 1 9 9 1 9 ship 1\n"
    write_dota(tmp_path / "DOTA", "labelTxt-v2.0", rows)
    made = convert(tmp_path / "DOTA", tmp_path / "out")
    assert made.task == "obb" and made.names == {0: "large-vehicle"} and made.images == {"train": 1, "val": 1}
    np.testing.assert_allclose(labels(tmp_path / "out/labels/val")["P0"], [[0, 0.5, 0.25, 0.75, 0.5, 0.5, 0.75, 0.25, 0.5]])
    assert check(made.data).task == "obb"


def test_images_are_linked_or_copied_and_keep_apart(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "images" / "a").mkdir(parents=True)
    images = []
    for i, name in enumerate(("a/x.png", "x.png", "x.jpg", "a\\y.png", "../../in/images/z.png")):
        picture(i).save(root / "images" / name.replace("\\", "/"))
        images.append({"id": i, "file_name": name})
    things = [{"id": i, "image_id": i, "category_id": 5, "bbox": [24, 16, 48, 32]} for i in range(5)]
    content = {"images": images, "annotations": things, "categories": [{"id": 5, "name": "é"}]}
    (root / "train.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    made = convert(root / "train.json", tmp_path / "out", images=root / "images")
    files = sorted(f for f in (tmp_path / "out/images").rglob("*") if f.is_file())
    assert len(files) == 5 and all(f.stat().st_nlink == 2 for f in files)
    assert all(len(read_rows(label_file(f))[0]) == 1 for f in files)
    assert yaml.safe_load(Path(made.data).read_text(encoding="utf-8"))["names"] == {0: "é"}
    convert(root / "train.json", tmp_path / "copied", images=root / "images", copy=True)
    assert all(f.stat().st_nlink == 1 for f in (tmp_path / "copied/images").rglob("*.png"))


def test_a_photograph_annotated_before_it_was_turned_is_left_out(tmp_path: Path) -> None:
    source = one_image(tmp_path / "in", [{"bbox": [24, 16, 48, 32]}])
    content = json.loads(source.read_text())
    content["images"][1] |= {"file_name": "1.JPG", "width": SIZE[0], "height": SIZE[1]}
    content["images"].append({"id": 3, "file_name": "2.JPG", "width": SIZE[1], "height": SIZE[0]})
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "in/1.JPG", exif=exif)
    picture(2).save(tmp_path / "in/2.JPG", exif=exif)
    source.write_text(json.dumps(content))
    made = convert(source, tmp_path / "out")
    assert made.left["image that was annotated before its EXIF tag turned it"][0] == 1
    assert sum(made.images.values()) == 2


def test_trained_on_what_was_converted(tmp_path: Path) -> None:
    """Ultralytics reads a converted set: as many objects, and none dropped."""
    from ultralytics.data.dataset import YOLODataset

    made = convert(write_coco(make(tmp_path / "yolo"), tmp_path / "coco"), tmp_path / "out")
    data = yaml.safe_load(Path(made.data).read_text()) | {"channels": 3}
    found = YOLODataset(img_path=str(tmp_path / "out/images/train"), data=data, task="detect", imgsz=64)
    assert sum(len(label["cls"]) for label in found.labels) == 8


# ------------------------------------------------------------------------------------------------------------- mistakes
def _json(root: Path, text: str) -> Path:
    (root / "set.json").write_text(text)
    return root / "set.json"


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


MISTAKES: dict[str, tuple[Callable[[Path], list], str]] = {
    "check: no such file": (lambda d: ["check", d / "no.yaml"], "there is no .*no.yaml; give a data YAML"),
    "check: a name nearly known": (lambda d: ["check", "DOTAv2.yaml"], "Did you mean 'DOTAv1.yaml'"),
    "check: no such folder": (lambda d: ["check", d / "nowhere"], "neither a data YAML nor a folder"),
    "check: empty folder": (lambda d: ["check", _empty(d)], "neither a data YAML nor images in train/CLASS"),
    "check: YOLO folders without YAML": (lambda d: ["check", _bare(d)], "has train/images, but no data YAML"),
    "check: broken YAML": (lambda d: ["check", _yaml(d, "a: [")], "not readable YAML"),
    "check: another YAML": (lambda d: ["check", _yaml(d, "a: 1")], "no data YAML"),
    "check: no names": (lambda d: ["check", _yaml(d, "train: x")], "not at .*; correct 'train:'"),
    "check: nameless": (lambda d: ["check", _yaml(d, "train: .\nval: .", True)], "names no classes"),
    "check: another code page": (lambda d: ["check", _yaml(d, b"train: .\nnames: [F\xfcchse]")], "not UTF-8 in 'F.chse'"),
    "check: nc at odds": (lambda d: ["check", _yaml(d, "train: .\nnames: [a]\nnc: 2", True)], "nc: 2, but names 1 class"),
    "check: nc that is none": (lambda d: ["check", _yaml(d, "train: .\nnc: 1.5", True)], "nc: 1.5, which is no number"),
    "check: names twice": (lambda d: ["check", _yaml(d, "train: .\nnames: {0: a, 0: b}", True)], "says '0' twice"),
    "check: no path": (lambda d: ["check", _yaml(d, 'path: "a\\0b"\ntrain: .')], "cannot be a place"),
    "check: a list that is none": (lambda d: ["check", _yaml(d, "train: 0.png", True)], "no list of images in UTF-8"),
    "check: no images": (lambda d: ["check", _yaml(d, "train: .\nnames: [a]")], "has no train images"),
    "check: bad task": (lambda d: ["check", make(d), "--task", "boxes"], "task=boxes is not known.*detect, segment"),
    "check: pose without kpt_shape": (lambda d: ["check", make(d), "--task", "pose"], "needs 'kpt_shape"),
    "check: bad kpt_shape": (lambda d: ["check", make(d, more="kpt_shape: 17")], "kpt_shape: 17"),
    "check: bad imgsz": (lambda d: ["check", make(d), "--imgsz", "0"], "imgsz=0 is no image size"),
    "check: sheet that cannot be": (lambda d: ["check", make(d), "--sheet", d / "data.yaml/x.png"], "contact sheet .*yaml"),
    "check: bad sheet": (lambda d: ["check", make(d), "--sheet", d / "x.txt"], "no image file; end it in"),
    "convert: no such source": (lambda d: ["convert", d / "no", d / "out"], "source=.*no is not there"),
    "convert: empty folder": (lambda d: ["convert", _empty(d), d / "out"], "looks like none of coco, dota, kitti, voc"),
    "convert: format unknown": (lambda d: ["convert", d, d / "out", "--format", "cocoo"], "no format 'cocoo'.*mean 'coco'"),
    "convert: broken JSON": (lambda d: ["convert", _json(d, "{"), d / "out"], "not readable JSON"),
    "convert: JSON that is not text": (lambda d: ["convert", _bytes(d), d / "out"], "not readable JSON"),
    "convert: another JSON": (lambda d: ["convert", _json(d, "[1]"), d / "out"], "no COCO instances file"),
    "convert: captions": (lambda d: ["convert", _json(d, '{"images": [], "annotations": []}'), d / "out"], "'categories'"),
    "convert: images elsewhere": (lambda d: ["convert", _lost(d), d / "out"], "was found; give their folder with --images"),
    "convert: no images there": (lambda d: ["convert", _lost(d), d / "out", "--images", d / "no"], "images=.*is not there"),
    "convert: nothing usable": (lambda d: ["convert", one_image(d, [{"bbox": [0] * 4}]), d / "out"], "no object that can"),
    "convert: one image": (lambda d: ["convert", _single(d), d / "out"], "no usable image for"),
    "convert: task not held": (lambda d: ["convert", _good(d), d / "out", "--task", "pose"], "task=pose cannot be made"),
    "convert: bad val": (lambda d: ["convert", _good(d), d / "out", "--val", "20"], "val=20.0 is no share"),
    "convert: class unknown": (lambda d: ["convert", _good(d), d / "out", "--without", "thin"], "without=thin is no class"),
    "convert: names unknown": (lambda d: ["convert", _good(d), d / "out", "--names", "a,b"], "none of the classes a, b"),
    "convert: names empty": (lambda d: ["convert", _good(d), d / "out", "--names", ","], "names no classes"),
    "convert: OUT is taken": (lambda d: ["convert", _good(d), make(d / "y").parent], "no conversion made it"),
    "convert: OUT is a file": (lambda d: ["convert", _good(d), d / "0.png"], "is a file; give a folder"),
    "convert: OUT holds the source": (lambda d: ["convert", _good(d / "a"), d], "holds the source"),
    "convert: OUT below a file": (lambda d: ["convert", _good(d), d / "set.json" / "out"], "cannot write .*set.json"),
    "convert: two splits of one name": (lambda d: ["convert", _twice(d), d / "out"], "are both of split 'train'"),
    "convert: no VOC": (lambda d: ["convert", d, d / "out", "--format", "voc"], "holds no XML files"),
    "convert: no KITTI": (lambda d: ["convert", d, d / "out", "--format", "kitti"], "holds no KITTI labels"),
    "convert: no DOTA": (lambda d: ["convert", d, d / "out", "--format", "dota"], "no usable DOTA labels"),
    "convert: all XML broken": (lambda d: ["convert", _xml(d, "<annotation>"), d / "out"], "the 1 XML files.*not readable"),
    "convert: other XML": (lambda d: ["convert", _xml(d, "<kml/>"), d / "out"], "none of the 1 XML files.*not Pascal VOC"),
    "convert: VOC size at odds": (lambda d: ["convert", _odd(d), d / "out"], "2 x image that is not of the shape"),
}  # fmt: skip


def _bare(root: Path) -> Path:
    (root / "set/train/images").mkdir(parents=True)
    picture(0).save(root / "set/train/images/0.png")
    return root / "set"


def _yaml(root: Path, text: str | bytes, images: bool = False) -> Path:
    if images:
        picture(0).save(root / "0.png")
    (root / "data.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / "data.yaml"


def _bytes(root: Path) -> Path:
    (root / "set.json").write_bytes(b'{"images": "\xff\xfe"}')
    return root / "set.json"


def _good(root: Path) -> Path:
    return one_image(root, [{"bbox": [24, 16, 48, 32]}])


def _lost(root: Path) -> Path:
    source = _good(root)
    for file in root.glob("*.png"):
        file.unlink()
    return source


def _single(root: Path) -> Path:
    source = _good(root)
    (root / "1.png").unlink()
    return source


def _twice(root: Path) -> Path:
    source = _good(root / "in")
    shutil.copy(source, root / "in/a_train.json")
    source.rename(root / "in/b_train.json")
    return root / "in"


def _xml(root: Path, text: str) -> Path:
    (root / "in").mkdir()
    (root / "in" / "0.xml").write_text(text)
    return root / "in"


def _odd(root: Path) -> Path:
    for stem in "ab":
        voc(root / "in", stem, thing("car", 1, 1, 5, 5), "<size><width>500</width><height>64</height></size>")
    return root / "in"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments, words = MISTAKES[name]
    given = arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *given)
    assert code == 2 and not out, out
    assert len(err.splitlines()) == 1 and err.startswith("visionpeft: ")
    assert re.search(words, err), err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError(28, "No space left on device")))
def test_an_interrupted_conversion_leaves_nothing(error: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    source = _good(tmp_path / "in")
    place = os.link
    calls = []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        place(*arguments)

    monkeypatch.setattr(os, "link", failing)
    if error is not KeyboardInterrupt:  # copying fails too
        monkeypatch.setattr(shutil, "copy2", lambda *_: (_ for _ in ()).throw(error))
    code, _, err = run(capsys, "convert", source, tmp_path / "out")
    assert len(calls) == 2 and code == (130 if error is KeyboardInterrupt else 2)
    assert [f.name for f in tmp_path.iterdir()] == ["in"]
    assert error is KeyboardInterrupt or "No space left on device" in err


def test_only_a_conversion_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = _good(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    assert run(capsys, "convert", source, out)[0] == 0, "an empty folder is no obstacle"
    code, _, err = run(capsys, "convert", source, out)
    assert code == 2 and "an earlier conversion; replace it with --exist-ok" in err
    (out / "images" / "old.png").write_text("")
    assert run(capsys, "convert", source, out, "--exist-ok")[0] == 0 and not (out / "images" / "old.png").exists()
    with pytest.raises(VisionpeftError, match="no object"):
        convert(one_image(tmp_path / "bad", [{"bbox": [0, 0, 0, 0]}]), out, exist_ok=True)
    assert check(out).splits, "what was there stays where the new one fails"
    made = make(tmp_path / "mine").parent
    code, _, err = run(capsys, "convert", source, made, "--exist-ok")
    assert code == 2 and "no conversion made it" in err


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    source = _good(tmp_path / "in")
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    code, _, err = run(capsys, "convert", source, tmp_path / "out")
    assert code == 2 and "cannot write" in err and "Permission denied" in err


def test_the_task_is_what_most_rows_are_of() -> None:
    boxes, polygons = {1: [0.0] * 5, 2: [0.0] * 5}, {1: [0.0] * 9, 2: [0.0] * 7, 3: [0.0] * 9}
    assert guess_task([boxes], None) == guess_task([], None) == "detect" and guess_task([boxes, polygons], None) == "segment"
    assert guess_task([{1: [0.0] * 9}, {}], None) == "obb" and guess_task([boxes], (17, 3)) == "pose"


# ------------------------------------------------------------------------------------------------------ packaged YAMLs
PACKAGED = packaged("datasets")
README = (PACKAGED["dior"].parent / "README.md").read_text(encoding="utf-8")
LISTED = [[c.strip() for c in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
HEADER = ["set", "YAML", "task", "images", "classes", "licence", "size", "how to get and convert it"]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_yaml_is_whole_and_listed(name: str) -> None:
    content = yaml.safe_load(PACKAGED[name].read_text(encoding="utf-8"))
    assert content["train"] == "images/train" and content["val"] == "images/val"
    assert list(content["names"]) == list(range(len(content["names"])))
    assert len({letters_of(n) for n in content["names"].values()}) == len(content["names"])
    rows = [row for row in LISTED if f"`{name}.yaml`" in row[1]]
    assert rows and all(row[5] for row in rows), "the README has it, with a licence"
    assert all(str(len(content["names"])) in row[4] for row in rows)


def test_the_readme_names_what_there_is() -> None:
    from ultralytics.utils import ROOT

    shipped = {f.name: f for f in (ROOT / "cfg" / "datasets").glob("*.yaml")}
    rows = [row for row in LISTED if row != HEADER and set(row[0]) != {"-"}]
    assert len(rows) > 20 and all(len(row) == len(HEADER) and all(row) for row in rows)
    for row in rows:
        for yaml_name in re.findall(r"`([\w.-]+\.yaml)`", row[1]):
            if "Ultralytics" in row[1]:
                assert yaml_name in shipped
            else:
                assert yaml_name.removesuffix(".yaml") in PACKAGED and yaml_name not in shipped
    for row in rows:
        for option, value in re.findall(r"--(format|names|without) ([\w-]+)", row[7]):
            assert option != "format" or value in FORMATS
            assert option != "names" or value in PACKAGED


def test_the_order_of_dota_is_ultralytics_own() -> None:
    from ultralytics.utils import ROOT

    ours = yaml.safe_load(PACKAGED["dota-v2"].read_text())["names"]
    for name, count in (("DOTAv1", 15), ("DOTAv1.5", 16)):
        theirs = yaml.safe_load((ROOT / "cfg" / "datasets" / f"{name}.yaml").read_text())["names"]
        assert theirs == {i: ours[i] for i in range(count)}


def test_a_packaged_name_gives_the_order(tmp_path: Path) -> None:
    for stem, name in (("a", "windmill"), ("b", "Expressway-toll-station"), ("c", "golffield")):
        voc(tmp_path / "in", stem, thing(name, 24, 16, 72, 48))
    made = convert(tmp_path / "in", tmp_path / "out", names="dior")
    found = labels(tmp_path / "out/labels/train") | labels(tmp_path / "out/labels/val")
    assert len(made.names) == 20 and not made.left
    assert {stem: rows[0][0] for stem, rows in found.items()} == {"a": 19, "b": 8, "c": 9}


def test_parts_of_an_outline_are_joined_as_ultralytics_joins_them() -> None:
    numbers = np.random.default_rng(0)
    for count in (2, 2, 3, 4, 5) * 20:
        parts = [numbers.integers(0, 9, (numbers.integers(3, 8), 2)).astype(float) for _ in range(count)]
        expected = np.concatenate(merge_multi_segment([part.ravel().tolist() for part in parts]))
        assert np.array_equal(join_parts(parts), expected)
