"""`visionpeft benchmark`: run a grid, and print its table."""

from __future__ import annotations

import sys

from ..errors import printable
from ..helptext import arguments_of


@arguments_of("visionpeft.benchmark.sweep", "run")
def benchmark(
    *,
    out: str,
    config: str | None = None,
    root: str = ".",
    retry: bool = False,
    equal: str | None = None,
    retain: str | None = None,
    seed: list[int] | None = None,
    only: str | None = None,
    jobs: int = 1,
    threads: int | None = None,
    quiet: bool = False,
) -> int:
    """Train a grid of models, data, methods and seeds beside each other, and print the table as Markdown.

    What is in the folder of results already is not run again, so the same command goes on after Ctrl-C or a crash. Without
    --config, the table of what is there. Exits with 1 where a cell of the folder failed.
    """
    from .comparison import table
    from .results import read
    from .sweep import run

    if config is None:
        print(table(read(out)))
        return 0
    cells = run(
        config,
        out,
        root=root,
        retry=retry,
        equal=equal,
        retain=retain,
        seed=seed,
        only=only,
        jobs=jobs,
        threads=threads,
        quiet=quiet,
    )
    print(table(cells))
    failures = read(out, "failed")
    for failure in failures:
        label = " · ".join(map(str, failure["names"].values()))
        sentence = f"{label} · seed {failure['cell']['seed']} failed: {failure['error']} ({failure['hash']})"
        print(f"visionpeft: {printable(sentence)}", file=sys.stderr)
    return 1 if failures else 0
