"""The table by which the README chooses a method: what came nearest to full fine-tuning, and what kept the least.

    python benchmarks/choosing.py RESULTS [RESULTS ...]        # folders that `visionpeft benchmark` left

Named are methods with at most a tenth of the body's parameters, and what kept the least for backward among all whose
difference from full has an interval that reaches zero; the head alone stands apart, and rows with another `bn` are left out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence

from visionpeft import benchmark
from visionpeft.benchmark import Row

TENTH = 0.1005  # of full's body, with what rounds to it
NAMED = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for folder in parser.parse_args().results:
        for row in benchmark.compare(benchmark.read(folder)):
            groups[row.names["data"], row.names["model"]].append(row)
    print("| set, net | `full` | with at most a tenth of the body, best first | least kept, not clearly behind | `head` |")
    print("|---|---|---|---|---|")
    for names, rows in groups.items():
        print(line(", ".join(names), rows))


def line(name: str, rows: Sequence[Row]) -> str:
    """Return the table's line of one set and net."""
    full, head = (next(row for row in rows if row.method == method) for method in ("full", "head"))
    others = [row for row in rows if row.difference is not None and ", bn " not in row.method]
    small = [row for row in others if row is not head and row.trained_body <= TENTH * full.trained_body]
    best = sorted(small, key=lambda row: row.difference, reverse=True)[:NAMED]
    least = min((row for row in others if row.difference_high >= 0), key=lambda row: row.saved_bytes)
    kept = f"{least.saved_bytes / 1e6:.0f} instead of {full.saved_bytes / 1e6:.0f} MB"
    cells = [
        name.replace("_", "\\_"),
        f"{full.score_mean:.3f}",
        ", ".join(map(said, best)),
        f"{said(least)}, {kept}",
        f"{head.difference:+.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def said(row: Row) -> str:
    method, _, settings = row.method.partition(", ")
    return f"`{method}`{settings and f', {settings}'} {row.difference:+.3f}"


if __name__ == "__main__":
    main()
