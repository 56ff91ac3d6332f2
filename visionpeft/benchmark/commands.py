"""`visionpeft benchmark`: run a grid, and print its table."""

from __future__ import annotations

import sys

from ..errors import printable


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

    Parameters
    ----------
    out
        The folder of results.
    config
        A YAML file, or the name of one of visionpeft's: scenes, aerial_airport, road_signs, eurosat, eurosat_vit.
    root
        What relative paths in the config are relative to.
    retry
        Run those cells again that failed.
    equal
        epochs: all cells train as many; time: as many as fit into the time that full fine-tuning trains.
    retain
        A data set of the base's own classes, to measure what is forgotten.
    seed
        A seed instead of the config's; several: --seed 0 --seed 1.
    only
        A regular expression for methods as the table calls them: 'full|lora|lora, budget 2%'.
    jobs
        Cells at a time.
    threads
        Of each cell; by default $OMP_NUM_THREADS, else the cores shared among the jobs.
    quiet
        Show no progress.
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
    failed = read(out, "failed")
    for one in failed:
        said = f"{' · '.join(one['names'].values())} · seed {one['cell']['seed']} failed: {one['error']} ({one['hash']})"
        print(f"visionpeft: {printable(said)}", file=sys.stderr)
    return 1 if failed else 0
