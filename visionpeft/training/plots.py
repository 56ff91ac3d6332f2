"""Pictures of a run: labels, before and after side by side; curves of loss and metrics. Needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import files
from ..errors import printable

Item = TypeVar("Item")
Picture = np.ndarray  # (H, W, 3), uint8, RGB
SIDE = 400  # pixels of the square that a picture is fitted into
_INK, _PAPER, _RIGHT, _WRONG = "#1f2430", "#ffffff", "#1a7f37", "#cf222e"
_COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of the items (or all, where there are fewer), evenly spaced from first to last."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in picks]


def guessed(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    guesses: Sequence[tuple[str, float]] | None = None,
    side: int = SIDE,
) -> list[Picture]:
    """Return images with their class below; with a classifier's guess instead, green where it is right, else red.

    Args:
        images: RGB.
        labels: The classes.
        guesses: Classes with their scores, or None.
        side: Of the square that each image is fitted into, in pixels; the line of text is added to it.
    """
    if guesses is None:
        return [_captioned(*x, _INK, side) for x in zip(images, labels, strict=True)]
    return [
        _captioned(image, f"{name} {score:.2f}", _RIGHT if name == label else _WRONG, side)
        for image, (name, score), label in zip(images, guesses, labels, strict=True)
    ]


def _captioned(image: Image.Image, text: str, colour: str, side: int) -> Picture:
    tile = Image.new("RGB", (side, side + 28), _PAPER)
    tile.paste(_fitted(image, side), (0, 0))
    ImageDraw.Draw(tile).text((6, side + 5), printable(text), fill=colour, font=ImageFont.load_default(15))
    return np.asarray(tile)


def sheet(columns: Mapping[str, Sequence[Picture]], out: Path, title: str = "", side: int = SIDE) -> Path:
    """Write pictures side by side.

    Args:
        columns: Pictures by the title above them; all of the same number.
        out: The file, e.g. a .jpg.
        title: Above all of it.
        side: Of the square that each picture is fitted into, in pixels.
    """
    gap, head, top = 10, 28, 34 if title else 6
    rows = max(map(len, columns.values()))
    tiles = {k: [_fitted(Image.fromarray(p), side) for p in pictures] for k, pictures in columns.items()}
    heights = [max(t[i].height for t in tiles.values() if i < len(t)) for i in range(rows)]
    width, height = gap + (side + gap) * len(columns), top + head + sum(heights) + gap * rows
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), printable(title), fill=_INK, font=ImageFont.load_default(18))
    for x, (name, pictures) in zip(range(gap, width, side + gap), tiles.items(), strict=False):
        draw.text((x, top + 3), printable(name), fill=_INK, font=ImageFont.load_default(16))
        y = top + head
        for tile, tall in zip(pictures, heights, strict=False):
            page.paste(tile, (x, y))
            y += tall + gap
    return files.replace(out, lambda temporary: page.save(temporary, quality=90))


def curves(
    history: Sequence[Mapping[str, Any]], before: Mapping[str, float], score: str, out: Path, title: str = ""
) -> Path:
    """Draw losses and metrics over the epochs.

    Args:
        history: One record per epoch: "epoch", losses as "train/NAME" (and "loss": of validation), metrics.
        before: The metrics before training; that of `score` is drawn at epoch 0.
        score: The metric that is drawn thick.
        out: The file, e.g. a .png.
        title: Above both.
    """
    from matplotlib import font_manager  # 0.3 s, only where something is drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    keys = [k for k in history[0] if k != "epoch"] if history else []
    losses = [k for k in keys if k.startswith("train/") or k == "loss"]
    metrics = sorted((k for k in keys if k not in losses), key=lambda k: k != score)
    if len(metrics) > 4:  # of masks or keypoints beside boxes
        metrics = [k for k in metrics if not k.startswith(("precision", "recall"))]
    panels = {"loss": losses, "metric": metrics}
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), fontsize=12, parse_math=False)
    axes = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in history]
    for ax, (label, names) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            x, y = list(epochs), [r.get(name) for r in history]
            if label == "metric" and before.get(name) is not None:
                x, y = [0, *x], [before[name], *y]
            values = [np.nan if v is None else v for v in y]
            text = "validation" if name == "loss" else name.removeprefix("train/").removesuffix("_loss")
            thick = label == "loss" or name == score
            colour, style = _COLOURS[i % len(_COLOURS)], "--" if name == "loss" else "-"
            ax.plot(
                x, values, style, marker=".", label=text, color=colour, lw=2 if thick else 1.2, alpha=1 if thick else 0.6
            )
        ax.set_xlabel("epoch")
        ax.set_title("loss" if label == "loss" else "on the validation images", fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if names:
            ax.legend(frameon=False, fontsize=9)
    if panels["metric"]:
        axes[1].set_ylim(0, 1)
    try:
        return files.replace(out, lambda temporary: figure.savefig(temporary, dpi=110))
    finally:
        if cached := getattr(font_manager, "_get_font", None):  # it keeps the fonts' files open
            cached.cache_clear()


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Return the image, scaled so that its longer side is `side`."""
    scale = side / max(image.size)
    how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), how)
