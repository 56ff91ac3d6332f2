"""What the runs of a benchmark forgot of their base's own classes: the adapted bodies under the base's own head.

    python benchmarks/forgetting.py RESULTS --root DATA [--data coco128_640/data.yaml] [--seed 0]

RESULTS is what `visionpeft benchmark` left, with its runs/. (With `retain` in a sweep's configuration, the same is measured
beside each cell; this does it afterwards.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import visionpeft
from visionpeft import benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--data", default="coco128_640/data.yaml")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = [c for c in benchmark.read(given.results) if c["cell"]["seed"] == given.seed and c["run"]["delta"]]
    found: dict[str, dict[str, float]] = {}
    before = 0.0
    for cell in cells:
        run = cell["run"]
        use = {k: run["arguments"][k] for k in ("imgsz", "batch", "device")}
        made = visionpeft.forgetting(
            given.results / "runs" / cell["hash"] / "delta.safetensors", given.root / given.data, **use
        )
        before = made.before
        found.setdefault(cell["names"]["method"], {})[cell["names"]["data"]] = made.after
    sets = sorted({name for scores in found.values() for name in scores})
    print(f"| method | {' | '.join(f'after {name}' for name in sets)} |\n|---|{'---|' * len(sets)}")
    print(f"| the base | {' | '.join(f'{before:.3f}' for _ in sets)} |")
    for method, scores in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        print(f"| {method} | {' | '.join(f'{scores[name]:.3f}' if name in scores else '–' for name in sets)} |")


if __name__ == "__main__":
    main()
