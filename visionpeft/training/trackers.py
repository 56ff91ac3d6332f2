"""Where a run's numbers go while it trains: always a CSV; on request TensorBoard, W&B and MLflow, with the same keys."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from .. import files
from ..errors import ConfigError, nearest, need

log = logging.getLogger(__name__)
Row = dict[str, float]

_LOCAL = ("csv", "tensorboard")  # which write to the run's folder alone
_CSV, _IDS = "metrics.csv", "trackers.json"  # in the run's folder; the latter holds the names of runs at W&B and MLflow
_ALL = 2**31  # epochs: after the last, whichever that was
_EVENTS = "events.out.tfevents.*"  # TensorBoard's files


def names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of trackers in "csv,tensorboard" or a list of them.

    Raises:
        ConfigError: One is not known, or its package is not installed.
    """
    parts = given.split(",") if isinstance(given, str) else [] if given is None else given
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"trackers={given!r} is not understood; give names such as 'tensorboard,wandb'")
    wanted = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for name in wanted:
        if name not in TRACKERS:
            raise ConfigError(f"trackers='{name}' is not known; there are {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}")
    for name in wanted:
        if package := TRACKERS[name].package:
            need(package, "trackers", f"trackers='{name}'")
    return wanted


def again(then: str | Sequence[str], now: str | Sequence[str]) -> str | Sequence[str]:
    """Return the trackers of a run that goes on: a folder from elsewhere may not say where numbers are sent.

    Args:
        then: Those it began with.
        now: Those of the call that resumes it.
    """
    had, given = names(then), names(now)
    if unnamed := [name for name in had if name not in (*_LOCAL, *given)]:
        log.warning("%s is used again only if this call names it, too; give trackers='%s'", unnamed[0], ",".join(had))
    kept = [name for name in had if name not in unnamed] + [name for name in given if name not in (*had, "csv")]
    return then if tuple(kept) == had else kept


def clear(folder: Path) -> None:
    """Remove what trackers left in the folder of an earlier run: a new one does not go on with it."""
    for file in (folder / _CSV, folder / _IDS, *folder.glob(_EVENTS)):
        file.unlink(missing_ok=True)


class Trackers:
    """All trackers of a run. A context manager: its end closes them, as failed where the run was.

    They open where the run trains, which may be another process, and again for the summary where that was closed. Once
    training is under way, a tracker that fails is left out with a warning, and the run goes on.

    Args:
        chosen: What `names` returned.
        folder: The run's folder.
        config: Arguments and the like, possibly nested.
        quiet: Print nothing.
    """

    def __init__(self, chosen: Sequence[str], folder: Path, config: Mapping[str, Any], quiet: bool = False):
        self.names = (*(n for n in chosen if n != "csv"), "csv")  # last: it says which epochs all the others have
        self.folder, self.config, self.quiet = folder, flat(config), quiet
        self._opened: dict[str, Tracker] | None = None
        self._began = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # what is open stays in its process

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        for name in list(self._opened or ()):
            with self._spared(name):
                self._opened[name].close(failed=kind is not None)  # type: ignore[index]
        self._opened = None

    def open(self, done: int) -> None:
        """Begin, or go on after `done` epochs: what was logged of later ones is replaced, or not logged again.

        Raises:
            ConfigError: A tracker cannot be opened.
        """
        self._opened, self._began = {}, time.perf_counter()
        for name in self.names:
            try:
                self._opened[name] = TRACKERS[name](self, done)
            except Exception as error:  # the libraries raise all kinds
                said = " ".join(str(error).split())[:200] or type(error).__name__
                raise ConfigError(f"trackers='{name}' cannot be opened ({said}); correct this, or leave it out") from error

    def log(self, record: Mapping[str, float | None], lr: float, memory: int | None) -> None:
        """Log an epoch.

        Args:
            record: "epoch", from 1; losses as "train/...", and metrics.
            lr: The head's learning rate at its end.
            memory: Bytes that stand for what training takes, see `Meter.memory`.
        """
        now = time.perf_counter()
        values = {"epoch": record["epoch"], "seconds": now - self._began, "lr": lr, **record, "memory": memory}
        self._began = now
        row = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        for name in list(self._opened or ()):
            with self._spared(name):
                self._opened[name].log(row)  # type: ignore[index]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log what the run came to, and close all."""
        if self._opened is None:
            try:
                self.open(_ALL)
            except ConfigError as error:  # all is trained: not worth losing
                log.warning(str(error))
        said = {k: v for k, v in flat(summary).items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in list(self._opened or ()):
            with self._spared(name):
                self._opened[name].summarise(said)  # type: ignore[index]
        self.__exit__(None)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Let a run go on where one of its trackers fails."""
        try:
            yield
        except Exception as error:
            if name == "csv":  # the folder cannot be written: nothing else of the run could be, either
                raise
            log.warning(f"{name} failed and is left out from here on ({' '.join(str(error).split())[:200]})")
            (self._opened or {}).pop(name, None)


class Tracker:
    """One place that numbers go to. It opens when it is made: of a run, after so many epochs."""

    package: ClassVar[str] = ""  # what must be installed

    def __init__(self, run: Trackers, done: int):
        raise NotImplementedError

    def log(self, row: Row) -> None:
        """Log an epoch."""
        raise NotImplementedError

    def summarise(self, summary: Row) -> None:
        """Log what the run came to."""

    def close(self, failed: bool) -> None:
        """Write what is left to write."""


class Csv(Tracker):
    """``metrics.csv`` in the run's folder: a row per epoch, written anew as a whole with each."""

    def __init__(self, run: Trackers, done: int):
        self._file = run.folder / _CSV
        self._rows: list[dict[str, Any]] = [row for row in read(run.folder) if int(row["epoch"]) <= done]

    def log(self, row: Row) -> None:
        self._rows.append({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})
        text = io.StringIO()
        columns = dict.fromkeys(k for each in self._rows for k in each)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        files.write(self._file, text.getvalue())


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's ``metrics.csv``; none where there is no such file."""
    file = folder / _CSV
    return list(csv.DictReader(io.StringIO(file.read_text()))) if file.is_file() else []


class TensorBoard(Tracker):
    """Event files in the run's folder, so that ``tensorboard --logdir runs`` names runs by their folders."""

    package = "tensorboard"

    def __init__(self, run: Trackers, done: int):
        from torch.utils.tensorboard import SummaryWriter

        again = any(run.folder.glob(_EVENTS)) and done < _ALL
        self._writer = SummaryWriter(str(run.folder), purge_step=done + 1 if again else None)
        self._config = run.config
        if not done:
            self._writer.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```")

    def log(self, row: Row) -> None:
        for key, value in row.items():
            if key != "epoch":
                self._writer.add_scalar(key, value, int(row["epoch"]))
        self._writer.flush()

    def summarise(self, summary: Row) -> None:
        config = {k: "" if v is None else v for k, v in self._config.items()}
        self._writer.add_hparams(config, dict(summary), run_name=".")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Remote(Tracker):
    """A run elsewhere. It goes on under the id that is kept in its folder, and no epoch is logged again."""

    def __init__(self, run: Trackers, done: int):
        kept = _ids(run.folder)
        self._last = max((int(row["epoch"]) for row in read(run.folder)), default=0)
        key = self._begin(run, kept.get(self.package))
        if self.package not in kept:
            files.write(run.folder / _IDS, json.dumps({**kept, self.package: key}) + "\n")

    def _begin(self, run: Trackers, known: str | None) -> str:
        """Go on with the run that is known by an id, or begin one with its configuration; returns the id."""
        raise NotImplementedError

    def log(self, row: Row) -> None:
        if row["epoch"] > self._last:
            self._log(row, int(row["epoch"]))

    def _log(self, row: Row, epoch: int) -> None:
        raise NotImplementedError


class WandB(_Remote):
    """Weights & Biases. WANDB_PROJECT names the project ("visionpeft"), WANDB_MODE=offline keeps it on this machine."""

    package = "wandb"

    def _begin(self, run: Trackers, known: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "visionpeft"),
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            name=run.folder.name,
            dir=str(run.folder),
            config=None if known else run.config,
            settings={"silent": run.quiet},
        )
        return self._run.id

    def _log(self, row: Row, epoch: int) -> None:
        self._run.log(row, step=epoch)

    def summarise(self, summary: Row) -> None:
        self._run.summary.update(summary)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(_Remote):
    """MLflow. MLFLOW_TRACKING_URI names the store, MLFLOW_EXPERIMENT_NAME the experiment ("visionpeft")."""

    package = "mlflow"

    def _begin(self, run: Trackers, known: str | None) -> str:
        import mlflow
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        self._mlflow = mlflow
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "visionpeft")
        found = mlflow.get_experiment_by_name(name)
        experiment = found.experiment_id if found else mlflow.create_experiment(name)
        nested = os.environ.get("MLFLOW_NESTED_RUN", "").lower() in ("1", "true", "t", "yes", "y", "on")
        tags = json.loads(os.environ.get("MLFLOW_TAGS", "null"))
        begun = mlflow.start_run(known, experiment, run_name=run.folder.name, nested=nested, tags=tags)
        if not known:
            fits = [(k, v) for k, v in run.config.items() if len(str(v)) <= MAX_PARAM_VAL_LENGTH]
            for start in range(0, len(fits), MAX_PARAMS_TAGS_PER_BATCH):
                mlflow.log_params(dict(fits[start : start + MAX_PARAMS_TAGS_PER_BATCH]))
        return begun.info.run_id

    def _log(self, row: Row, epoch: int | None) -> None:
        self._mlflow.log_metrics(row, step=epoch)

    def summarise(self, summary: Row) -> None:
        self._log(summary, None)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {"csv": Csv, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def _ids(folder: Path) -> dict[str, str]:
    file = folder / _IDS
    return json.loads(file.read_text()) if file.is_file() else {}


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested mappings as one, "outer/inner"; what is no number, text, truth or None becomes text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}/")
        else:
            found[f"{above}{key}"] = value if value is None or isinstance(value, bool | int | float | str) else str(value)
    return found
