"""What a training step costs when its frozen stages run apart, or are read from the disk: the figures in docs/memory.md.

    python benchmarks/prefix.py --model yolo11n --freeze 23   # the head alone trains
    python benchmarks/prefix.py --model yolo11n --freeze 10

A step is forward, loss and backward of a net with random weights, four images of 320 pixels, ten objects each, one thread.
The first line is Ultralytics' own freeze: no gradients and still statistics in the frozen stages. The others train the same
layers of the same weights. Steps of all kinds take turns; printed are medians of the CPU seconds, and of the ratios within
each turn. Vectors are read from a file as a run reads them. `error` is the norm of the difference between what the prefix
puts out and what it puts out in fp32, relative to the latter, for images of noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_VERBOSE", "False")

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from visionpeft.lean.frozen_stages import FrozenStages
from visionpeft.settings import find_family

BATCH, SIDE, OBJECTS = 4, 320, 10


def frozen(base: nn.Module, stages: int) -> nn.Module:
    """Freeze a new copy as Ultralytics' trainer does."""
    model: Any = copy.deepcopy(base).train()
    model.args = get_cfg()
    for i, stage in enumerate(model.model):
        stage.requires_grad_(i >= stages)
        stage.train(i >= stages)
    model.model[-1].dfl.requires_grad_(False)
    return model


def objects() -> dict[str, Tensor]:
    """Return the labels of a batch."""
    count = BATCH * OBJECTS
    return {
        "cls": torch.randint(0, 80, (count, 1)).float(),
        "bboxes": torch.cat([torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.2 + 0.1], 1),
        "batch_idx": torch.arange(BATCH).repeat_interleave(OBJECTS).float(),
    }


def step(model: nn.Module, labels: dict[str, Tensor], images: Callable[[], Tensor]) -> Callable[[], float]:
    """Return a function that trains on one batch, and says how many CPU seconds that took."""

    def run() -> float:
        model.zero_grad()
        began = time.process_time()
        loss, _ = model({**labels, "img": images()})
        loss.sum().backward()
        return time.process_time() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--freeze", type=int, default=23)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = find_family(f"{given.model}.yaml")
    base = family.load(f"{given.model}.yaml")
    leading = family.leading_stages(base, given.freeze, SIDE)
    images, labels = torch.rand(BATCH, *leading.image), objects()
    kinds = {
        "fp32": FrozenStages(base.model, leading.modules, images, leading.read),
        "bf16": FrozenStages(base.model, leading.modules, images, leading.read, torch.bfloat16),
        "stored, bf16": FrozenStages(base.model, leading.modules, images, leading.read, stored=torch.bfloat16),
    }
    exact = kinds["fp32"].flatten(kinds["fp32"](images))
    steps = {"Ultralytics": step(frozen(base.model, given.freeze), labels, lambda: images)}
    errors = {"Ultralytics": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for name, prefix in kinds.items():
            vectors = prefix.flatten(prefix(images))
            errors[name] = float((vectors.float() - exact).norm() / exact.norm())
            read = partial(torch.clone, images)
            if name.startswith("stored"):
                file = Path(folder) / "vectors"
                file.write_bytes(vectors.contiguous().view(torch.uint8).numpy().tobytes())
                stored = torch.from_file(str(file), shared=False, size=vectors.numel(), dtype=vectors.dtype)
                read = partial(torch.stack, list(stored.view(vectors.shape)))
            steps[name] = step(prefix.install(frozen(base.model, given.freeze)), labels, read)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(given.rounds + 1):
            for name, run in steps.items():
                seconds = run()
                times[name] += [seconds] if turn else []  # the first one warms up
    print(f"{given.model}, {BATCH}×{SIDE}, freeze {given.freeze}; {kinds['bf16'].length} numbers an image\n")
    print("| frozen stages | CPU ms a step | ratio | error |\n| --- | --- | --- | --- |")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["Ultralytics"], strict=True))
        print(f"| {name} | {statistics.median(own) * 1e3:.0f} | {ratio:.2f} | {errors[name]:.1e} |")


if __name__ == "__main__":
    main()
