"""Several processes for one run, started by accelerate's launcher; also how a process tells the one that started it what
went wrong. Registers nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from .. import errors, files
from ..errors import ConfigError, TrainingError, VisionpeftError

_ERROR = "error.json"


def devices(device: str | None) -> list[str]:
    """Return the single devices of "0", "0,1" (a process each), or "cpu,cpu" (two processes on the CPU).

    Raises:
        ConfigError: CPU and GPU are mixed, or one GPU is named twice.
    """
    names = [name.strip() for name in str(device or "").split(",")]
    mixed = "cpu" in names and set(names) != {"cpu"}
    if mixed or ("cpu" not in names and len(set(names)) < len(names)):
        raise ConfigError(f"device='{device}' is not understood; give different GPUs, e.g. '0,1', or only 'cpu'")
    return names


def launch(run: Callable[..., object], *args: Any, device: str, folder: Path) -> None:
    """Call ``run(*args)`` in one process per device.

    Args:
        run: A function; in its processes, accelerate finds the others.
        *args: What it is called with; it travels by cloudpickle.
        device: Several, see `devices`.
        folder: Of the run; processes leave their error there.

    Raises:
        VisionpeftError: The one that a process raised.
        TrainingError: One failed otherwise; what it said is on stderr.
    """
    names = devices(device)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "call.pkl"
        file.write_bytes(cloudpickle.dumps((run, args, folder)))
        module = ["-m", "visionpeft.families.launch", str(file)]
        count = str(len(names))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if names[0] == "cpu":  # for these, accelerate's own command wants MPI
            command = ["torch.distributed.run", "--standalone", "--nproc_per_node", count, *module]
            environment |= {"ACCELERATE_USE_CPU": "true"}
        else:
            command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", count, "--num_machines", "1"]
            command += ["--gpu_ids", ",".join(names), "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", "0", *module]
        done = subprocess.run([sys.executable, "-m", *command], env=environment)
    if done.returncode or (folder / _ERROR).is_file():
        raise failure(folder)


def leave(error: VisionpeftError, folder: Path) -> None:
    """Write an error down for the process that started this one."""
    files.write(folder / _ERROR, json.dumps([type(error).__name__, str(error)]))


def failure(folder: Path) -> VisionpeftError:
    """Return the error that a process left, or one that says that there is none."""
    file = folder / _ERROR
    if not file.is_file():
        return TrainingError("one of the processes failed; what it said stands above")
    name, said = json.loads(file.read_text())
    file.unlink()
    return getattr(errors, name)(said)


if __name__ == "__main__":
    function, given, place = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        function(*given)
    except VisionpeftError as problem:
        leave(problem, place)  # and end well, or else the launcher adds pages of its own
