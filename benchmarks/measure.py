"""What it costs to measure a step: yolo11n with random weights, 4 images of 320 pixels with five objects each.

    OMP_NUM_THREADS=1 python benchmarks/measure.py

CPU seconds of a step that nobody measures, of one that is timed (every one but the first), and of one that is watched (the
first), interleaved; medians of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

os.environ.setdefault("YOLO_VERBOSE", "False")
os.environ.setdefault("YOLO_OFFLINE", "True")

from ultralytics.cfg import get_cfg

from visionpeft import lean
from visionpeft.families.introspect import stage_modules
from visionpeft.measure import Meter
from visionpeft.settings import find_family

PARTS = ("forward", "backward", "optimizer", "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind")
    parser.add_argument("--pixels", type=int, default=320, help="side of an image")
    given = parser.parse_args()
    rounds, pixels = given.rounds, given.pixels
    torch.manual_seed(0)
    for level in ("off", *lean.LEVELS):
        family = find_family("yolo11n.yaml")
        model = family.load("yolo11n.yaml").model
        stages = stage_modules(family.anatomy(model, "yolo11n.yaml"))
        model.train().requires_grad_(True).args = get_cfg()
        if level != "off":
            lean.apply(model, level)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
        batch = {
            "img": torch.rand(4, 3, pixels, pixels),
            "cls": torch.zeros(20, 1),
            "bboxes": torch.rand(20, 4) * 0.5 + 0.2,
            "batch_idx": torch.arange(20) // 5,
        }

        def step(meter: Meter | None, model=model, batch=batch, optimizer=optimizer) -> float:
            begin = meter.start if meter else lambda part: None
            began = time.process_time()
            begin("forward")
            loss = model(batch)[0].sum()
            begin("backward")
            loss.backward()
            begin("optimizer")
            optimizer.step()
            optimizer.zero_grad()
            begin("data")
            return time.process_time() - began

        timed = Meter(model, torch.device("cpu"), stages=stages, optimizer=optimizer)
        step(timed), step(None)
        seconds = [
            (step(None), step(timed), step(Meter(model, torch.device("cpu"), stages=stages, optimizer=optimizer)))
            for _ in range(rounds)
        ]
        plain = statistics.median(s[0] for s in seconds)
        ratios = [statistics.median(s[i] / s[0] for s in seconds) for i in (1, 2)]
        idle = Meter(model, torch.device("cpu"))
        idle.restore({"saved_bytes": 0, "peak_bytes": 0, "state_bytes": {"gradients": 0}})  # it need not watch
        began = time.process_time()
        for _ in range(1000):
            for part in PARTS:
                idle.start(part)
        marks = (time.process_time() - began) / 1000
        print(
            f"lean {level:6}: a step {plain:.3f} s; timed {ratios[0]:.3f}, watched {ratios[1]:.2f} times that; "
            f"the timing itself {1e6 * marks:.1f} µs"
        )


if __name__ == "__main__":
    main()
