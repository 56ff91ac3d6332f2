"""Share of full fine-tuning's gain over the head alone that each method reached: `Method.expected_gain`, which `visionpeft
suggest` orders by.

    python benchmarks/worth.py RESULTS [RESULTS ...]        # folders that `visionpeft benchmark` left

The mean over models and data, and each of them; those where the head alone is as good as full are left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

from visionpeft import benchmark
from visionpeft.benchmark import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    worth: dict[str, list[float]] = defaultdict(list)
    for folder in parser.parse_args().results:
        rows = benchmark.compare(benchmark.read(folder))
        groups: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
        for row in rows:
            groups[row.names["model"], row.names["data"]][row.method] = row
        for names, group in groups.items():
            if (group["head"].difference_high or 0.0) >= 0:
                print(f"left out: {' on '.join(names)}, where full is not clearly better than the head alone")
                continue
            less = {method: row.difference for method, row in group.items()} | {"full": 0.0}  # on the seeds that both have
            for method, difference in less.items():
                if difference is not None:
                    worth[method].append(1 - difference / less["head"])
    print("| method | worth | of each |\n|---|---|---|")
    for method, shares in sorted(worth.items(), key=lambda item: -statistics.mean(item[1])):
        print(f"| {method} | {statistics.mean(shares):.2f} | {', '.join(f'{s:.2f}' for s in shares)} |")


if __name__ == "__main__":
    main()
