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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import files, presets, schema
from ..errors import ConfigError, DiskFull, Interrupted
from ..schema import Json
from .cell import FULL, file_failure
from .grid import Cell, Grid, make_grid
from .progress import SweepProgress
from .results import FORMAT, CellResult, load, read

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
) -> list[CellResult]:
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
    options = dict(config) if isinstance(config, Mapping) else presets.read(config, "benchmark")
    options |= {k: v for k, v in {"equal": equal, "retain": retain, "seed": seed and list(seed)}.items() if v is not None}
    out = files.writable(Path(out).resolve())
    with files.locked(out, f"another sweep is writing into {out}; let it end, or give another folder with --out"):
        for kind in _KINDS:
            files.clear(files.writable(out / kind))  # a sweep that was killed may have left parts of files
            read(out, kind)  # refuses files of something else, before anything runs
        name = "benchmark" if isinstance(config, Mapping) else Path(config).stem
        grid = make_grid(options, name, root, only)
        _write_about(grid, out)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = threads or int(asked if asked.isdigit() else max((os.cpu_count() or 1) // jobs, 1))
        progress = SweepProgress(quiet)
        with progress.bar, ThreadPoolExecutor(jobs) as pool:
            _Sweep(grid, out, retry, threads, progress, pool).run()
        wanted = {cell.hash for cell in grid.cells}
        return [content for content in read(out) if content["hash"] in wanted]


class _Sweep:
    """One call of `run`: finds the cells that are missing, and runs each in a process."""

    def __init__(self, grid: Grid, out: Path, retry: bool, threads: int, progress: SweepProgress, pool: ThreadPoolExecutor):
        self.grid, self.out, self.retry, self.threads = grid, out, retry, threads
        self.progress, self.pool = progress, pool
        self.stop: Exception | None = None  # ends the sweep
        self._live: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run the trials, then the cells whose training time is the limit of others, then those others."""
        trials = {t.hash: t for c in self.grid.cells for t in self.grid.trials(c)}
        limited = [c for c in self.grid.cells if self.grid.equal == "time" and self.grid.reference(c)]
        phases = list(trials.values()), [c for c in self.grid.cells if c not in limited], limited
        self.progress.set_total(sum(map(len, phases)))
        for phase in phases:
            futures = [self.pool.submit(self._run, cell) for cell in phase]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                self._abort(error, futures)
            if self.stop:
                raise self.stop

    def _abort(self, error: BaseException, futures: list[Future[None]]) -> None:
        with self._lock:
            self.stop = self.stop or (error if isinstance(error, Exception) else Interrupted(""))
            for process in self._live:
                process.kill()
        for future in futures:
            future.cancel()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted; every finished cell is kept, and the same command goes on") from None
        raise error

    def _run(self, cell: Cell) -> None:
        """Run a cell, unless it is there; where the sweep cannot go on, no other starts."""
        if self.stop:
            return
        try:
            self._run_missing(cell)
        except Exception as error:
            self.stop = error
            raise

    def _run_missing(self, cell: Cell) -> None:
        done = self.out / ("trials" if "trial" in cell.spec else "cells") / f"{cell.hash}.json"
        failed = self.out / "failed" / f"{cell.hash}.json"
        if done.is_file():
            failed.unlink(missing_ok=True)
            return self.progress.finish(cell, None, _outcome(cell, done))
        if failed.is_file() and not self.retry:
            return self.progress.finish(cell, None, _outcome(cell, failed))
        self.progress.start(cell)
        began = time.perf_counter()
        try:
            task = {"chosen": self._searched_options(cell), "seconds": self._time_limit(cell)}
        except ConfigError as error:
            file_failure(cell, self.out, type(error).__name__, str(error), 0.0, started=False)
        else:
            failed.unlink(missing_ok=True)
            killed = _killed_for_memory()
            code = self._run_process(cell, task)
            if not (self.stop or done.is_file() or failed.is_file()):
                if code == FULL:
                    raise DiskFull(
                        f"the disk of {self.out} is full; free some and give the same command again: every finished cell is "
                        "kept"
                    )
                kind = "OutOfMemory" if _killed_for_memory() > killed else "Died"
                file_failure(cell, self.out, kind, _exit_reason(code, kind), time.perf_counter() - began)
        if not self.stop:
            outcome = _outcome(cell, done if done.is_file() else failed)
            self.progress.finish(cell, time.perf_counter() - began, outcome)

    def _run_process(self, cell: Cell, task: Mapping[str, object]) -> int:
        """Run a cell in a process of its own; returns the exit code."""
        folder = self.out / "runs" / cell.hash
        shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's
        files.writable(folder)
        task = {"spec": cell.spec, "names": cell.names, "root": cell.root, "out": str(self.out), **task}
        count = str(self.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "visionpeft.benchmark.cell"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its cells
            )
            with self._lock:
                self._live.add(process)
                if self.stop:
                    process.kill()
            assert process.stdin
            with suppress(BrokenPipeError):  # where it has ended already; its exit code says how
                process.stdin.write((json.dumps(task) + "\n").encode())
                process.stdin.flush()  # and it stays open: the process ends when it closes
            code = process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            with self._lock:
                self._live.discard(process)
        return code

    def _searched_options(self, cell: Cell) -> Mapping[str, object]:
        """Return the options that a cell's trials found best; of equals, the first.

        Raises:
            ConfigError: All of them failed.
        """
        if "trial" in cell.spec or not (trials := self.grid.trials(cell)):
            return {}
        results = [self.out / "trials" / f"{t.hash}.json" for t in trials]
        scores = [load(f, "trials")["score"] if f.is_file() else None for f in results]
        best = max((s for s in scores if s is not None), default=None)
        if best is None:
            raise ConfigError(f"none of the {len(trials)} trials of {cell} came to its end; give other values to search")
        return trials[scores.index(best)].spec["trial"]

    def _time_limit(self, cell: Cell) -> float | None:
        """Return the seconds that a cell's training steps may take; None: as many as they need.

        Raises:
            ConfigError: The cell that it is compared with failed, or was too short to be timed.
        """
        if "trial" in cell.spec or self.grid.equal != "time" or (other := self.grid.reference(cell)) is None:
            return None
        file = self.out / "cells" / f"{other.hash}.json"
        if not file.is_file():
            raise ConfigError(f"{other}, whose time this cell would have, failed; mend that first, then --retry")
        if (seconds := load(file, "cells").get("train_seconds")) is None:
            raise ConfigError(f"{other} trained in one step only, whose time is not measured; give more epochs")
        return seconds


def _write_about(grid: Grid, out: Path) -> None:
    """Write the grid to benchmark.json, beside those of earlier sweeps in the folder."""
    file = out / "benchmark.json"
    try:
        content_before = schema.parse(file.read_bytes()) if file.is_file() else {"sweeps": {}}
        earlier = schema.check(dict[str, Json], schema.check(Json, content_before).get("sweeps"), "its sweeps")
    except (OSError, schema.Malformed) as error:
        raise ConfigError(f"{file} is not a benchmark's; move it out of the folder ({error})") from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {**grid.to_dict(), "created": earlier.get(grid.name, {}).get("created", now)}
    about["cells"] = [cell.hash for cell in grid.cells]
    sweeps = {**earlier, grid.name: about}
    content = {"format": FORMAT, "name": ", ".join(sweeps), "created": min(s["created"] for s in sweeps.values())}
    content |= {"grid": about["grid"], "defaults": about["defaults"], "sweeps": sweeps}
    files.write(file, json.dumps(content, indent=1))


def _outcome(cell: Cell, file: Path) -> str:
    """Return the outcome of a cell, from its file, on one line."""
    content = load(file, file.parent.name)
    if "kind" in content:
        return f"failed: {content['error']}"
    if "trial" in cell.spec:
        point = ", ".join(f"{k} {v}" for k, v in cell.spec["trial"].items())
        return f"trial of {point}: {content['error'] or format(content['score'], '.4f')}"
    return f"{content['score']} {content['run']['after'][content['score']]:.4f}"


def _exit_reason(code: int, kind: str) -> str:
    """Return a sentence on how a process ended that could not write one itself."""
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
