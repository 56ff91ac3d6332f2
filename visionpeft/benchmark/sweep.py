"""Runs the cells of a grid, each in a process of its own, and goes on where an earlier sweep of the same folder ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import files, schema
from .. import presets as recipes
from ..errors import ConfigError, DiskFull, Interrupted, printable
from . import cell as cells
from .grid import Cell, Grid, make_grid
from .results import FORMAT, load, read

_KINDS = ("cells", "failed", "trials")


def run(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    root: str | Path = ".",
    retry: bool = False,
    equal: str | None = None,
    retain: str | None = None,
    seed: Sequence[int] | None = None,
    only: str | None = None,
    jobs: int = 1,
    threads: int | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run the cells of a grid that are missing, and return all that it has.

    A configuration may be given as a mapping, too: see `grid.make_grid`.

    Args:
        config: A YAML file, or the name of one of visionpeft's: scenes, aerial_airport, road_signs, eurosat, eurosat_vit.
        out: The folder of results. Cells that are there already are not run again.
        root: What relative paths in the config are relative to.
        retry: Run those cells again that failed.
        equal: epochs: all cells train as many; time: as many as fit into the time that full fine-tuning trains.
        retain: A data set of the base's own classes, to measure what is forgotten.
        seed: Seeds instead of the config's; several: --seed 0 --seed 1.
        only: A regular expression for methods as the table calls them: 'full|lora|lora, budget 2%'.
        jobs: Cells at a time.
        threads: Of each cell; by default $OMP_NUM_THREADS, else the cores shared among the jobs.
        quiet: Show no progress.

    Raises:
        VisionpeftError: Something given is not usable, another sweep writes into the folder, a file in it is not a
            benchmark's, or the disk is full. A cell that fails raises nothing: it is filed under RESULTS/failed.
    """
    if jobs < 1 or (threads is not None and threads < 1):
        raise ConfigError(f"jobs={jobs}, threads={threads} is not usable; each must be at least 1")
    given = dict(config) if isinstance(config, Mapping) else recipes.read(config, "benchmark")
    given |= {k: v for k, v in {"equal": equal, "retain": retain, "seed": seed and list(seed)}.items() if v is not None}
    out = files.writable(Path(out).resolve())
    with files.locked(out, f"another sweep is writing into {out}; let it end, or give another folder with --out"):
        for kind in _KINDS:
            files.clear(files.writable(out / kind))  # of what a sweep left that was killed
            read(out, kind)  # refuses what is not ours, before anything runs
        name = "benchmark" if isinstance(config, Mapping) else Path(config).stem
        grid = make_grid(given, name, root, only)
        _note(grid, out)
        said = os.environ.get("OMP_NUM_THREADS", "")
        share = threads or int(said if said.isdigit() else max((os.cpu_count() or 1) // jobs, 1))
        with _Board(grid, quiet) as board, ThreadPoolExecutor(jobs) as pool:
            _Sweep(grid, out, retry, share, board, pool).run()
        wanted = {cell.hash for cell in grid.cells}
        return [content for content in read(out) if content["hash"] in wanted]


class _Sweep:
    """One call of `run`: which cells are missing, and the processes that run them."""

    def __init__(self, grid: Grid, out: Path, retry: bool, threads: int, board: _Board, pool: ThreadPoolExecutor):
        self.grid, self.out, self.retry, self.threads = grid, out, retry, threads
        self.board, self.pool = board, pool
        self.stop: Exception | None = None  # what ends the sweep
        self._live: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run the trials, then the cells whose time others are given, then the others."""
        trials = {t.hash: t for c in self.grid.cells for t in self.grid.trials(c)}
        timed = [c for c in self.grid.cells if self.grid.equal == "time" and self.grid.reference(c)]
        phases = list(trials.values()), [c for c in self.grid.cells if c not in timed], timed
        self.board.count(sum(map(len, phases)))
        for phase in phases:
            futures = [self.pool.submit(self._one, cell) for cell in phase]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                self._end(error, futures)
            if self.stop:
                raise self.stop

    def _end(self, error: BaseException, futures: list) -> None:
        with self._lock:
            self.stop = self.stop or (error if isinstance(error, Exception) else Interrupted(""))
            for process in self._live:
                process.kill()
        for future in futures:
            future.cancel()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted; every finished cell is kept, and the same command goes on") from None
        raise error

    def _one(self, cell: Cell) -> None:
        """Run a cell, unless it is there; where the sweep cannot go on, let no other start."""
        if self.stop:
            return
        try:
            self._run(cell)
        except Exception as error:
            self.stop = error
            raise

    def _run(self, cell: Cell) -> None:
        done = self.out / ("trials" if "trial" in cell.spec else "cells") / f"{cell.hash}.json"
        failed = self.out / "failed" / f"{cell.hash}.json"
        if done.is_file():
            failed.unlink(missing_ok=True)
            return self.board.tell(cell, None, load(done, done.parent.name))
        if failed.is_file() and not self.retry:
            return self.board.tell(cell, None, load(failed, "failed"))
        self.board.start(cell)
        began = time.perf_counter()
        try:
            task = {"chosen": self._chosen(cell), "seconds": self._seconds(cell)}
        except ConfigError as error:
            said = cells.failed(cell, type(error).__name__, str(error), self.out / "none", 0.0)
            files.write(failed, json.dumps(said, indent=1) + "\n")
        else:
            failed.unlink(missing_ok=True)
            self._process(cell, task, done, failed)
        if self.stop:
            return
        found = done if done.is_file() else failed
        self.board.tell(cell, time.perf_counter() - began, load(found, found.parent.name))

    def _process(self, cell: Cell, task: Mapping[str, Any], done: Path, failed: Path) -> None:
        folder = self.out / "runs" / cell.hash
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's
        files.writable(folder)
        given = {"spec": cell.spec, "names": cell.names, "root": cell.root, "out": str(self.out), **task}
        count = str(self.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        before, began = _killed_for_memory(), time.perf_counter()
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "visionpeft.benchmark.cell"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its cells
            )
            with self._lock:
                self._live.add(process)
                if self.stop:
                    process.kill()
            assert process.stdin
            with suppress(BrokenPipeError):  # where it has ended already; its exit code says how
                process.stdin.write((json.dumps(given) + "\n").encode())
                process.stdin.flush()  # and it stays open: the process ends when it closes
            code = process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            with self._lock:
                self._live.discard(process)
        if self.stop or done.is_file() or failed.is_file():
            return
        if code == cells.FULL:
            raise DiskFull(
                f"the disk of {self.out} is full; free some and give the same command again: every finished cell is kept"
            )
        kind = "OutOfMemory" if _killed_for_memory() > before else "Died"
        said = cells.failed(cell, kind, _obituary(code, kind), folder, time.perf_counter() - began)
        files.write(failed, json.dumps(said, indent=1) + "\n")

    def _chosen(self, cell: Cell) -> dict[str, Any]:
        """Return the options that a cell's trials found best; of equals, the first.

        Raises:
            ConfigError: All of them failed.
        """
        if "trial" in cell.spec or not (trials := self.grid.trials(cell)):
            return {}
        found = [self.out / "trials" / f"{t.hash}.json" for t in trials]
        scores = [load(f, "trials")["score"] if f.is_file() else None for f in found]
        best = max((s for s in scores if s is not None), default=None)
        if best is None:
            raise ConfigError(f"none of the {len(trials)} trials of {cell} came to its end; give other values to search")
        return dict(trials[scores.index(best)].spec["trial"])

    def _seconds(self, cell: Cell) -> float | None:
        """Return the time that a cell's training steps may take.

        Raises:
            ConfigError: The cell that says so failed, or does not say.
        """
        if "trial" in cell.spec or self.grid.equal != "time" or (other := self.grid.reference(cell)) is None:
            return None
        file = self.out / "cells" / f"{other.hash}.json"
        if not file.is_file():
            raise ConfigError(f"{other}, whose time this cell would have, failed; mend that first, then --retry")
        if (seconds := load(file, "cells").get("train_seconds")) is None:
            raise ConfigError(f"{other} trained in one step only, whose time is not measured; give more epochs")
        return seconds


class _Board:
    """What people see of a sweep: a line per cell on stderr, and a bar over all of them."""

    def __init__(self, grid: Grid, quiet: bool):
        self._quiet, self._total, self._done = quiet, 0, 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        columns = TextColumn("{task.fields[count]}"), BarColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=quiet, transient=True)
        self._task = self._bar.add_task("", total=None, count="")
        self._running: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> _Board:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def count(self, total: int) -> None:
        """So many cells and trials are wanted."""
        self._total = total
        self._bar.update(self._task, total=total, count=f"0/{total}")

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        with self._lock:
            self._running.append(str(cell))
            self._bar.update(self._task, description=self._running[0])

    def tell(self, cell: Cell, seconds: float | None, content: Mapping[str, Any]) -> None:
        """A cell has ended; seconds is None where it was there before."""
        with self._lock:
            if str(cell) in self._running:
                self._running.remove(str(cell))
            self._done += 1
            now: dict[str, Any] = {"description": "", "count": f"{self._done}/{self._total}"}
            if self._running:
                now["description"] = self._running[0]
            self._bar.update(self._task, advance=1, **now)
            if not self._quiet:
                self._console.print(self._line(cell, seconds, content), markup=False)

    def _line(self, cell: Cell, seconds: float | None, content: Mapping[str, Any]) -> str:
        if "kind" in content:
            result = f"failed: {content['error']}"
        elif "trial" in cell.spec:
            point = ", ".join(f"{k} {v}" for k, v in cell.spec["trial"].items())
            result = f"trial of {point}: {content['error'] or format(content['score'], '.4f')}"
        else:
            result = f"{content['score']} {content['run']['after'][content['score']]:.4f}"
        width = len(str(self._total))
        took = "there already" if seconds is None else f"{seconds:.0f} s"
        return printable("   ".join((f"{self._done:>{width}}/{self._total}", str(cell), result, took)))


def _note(grid: Grid, out: Path) -> None:
    """Write down what was asked for, beside what an earlier sweep of the folder was asked for."""
    file = out / "benchmark.json"
    try:
        found = schema.parse(file.read_bytes()) if file.is_file() else {"sweeps": {}}
        earlier = schema.check(dict[str, dict[str, Any]], schema.check(dict[str, Any], found).get("sweeps"), "its sweeps")
    except (OSError, schema.Malformed) as error:
        raise ConfigError(f"{file} is not a benchmark's; move it out of the folder ({error})") from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    said = {**grid.to_dict(), "created": earlier.get(grid.name, {}).get("created", now)}
    said["cells"] = [cell.hash for cell in grid.cells]
    sweeps = {**earlier, grid.name: said}
    names = {"format": FORMAT, "name": ", ".join(sweeps), "created": min(s["created"] for s in sweeps.values())}
    files.write(file, json.dumps({**names, "grid": said["grid"], "defaults": said["defaults"], "sweeps": sweeps}, indent=1))


def _obituary(code: int, kind: str) -> str:
    """Say how a process died that could not say so itself."""
    if code >= 0:
        return f"its process ended with exit code {code}; its last lines are in the log"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if kind == "OutOfMemory":
        return f"memory was full, so the system killed the process ({name}); give a smaller batch or imgsz, or fewer jobs"
    more = " (by hand, or by a system whose memory was full)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{more}"


def _killed_for_memory() -> int:
    """Return how many processes Linux has killed because memory was full; elsewhere 0."""
    file = Path("/proc/vmstat")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
