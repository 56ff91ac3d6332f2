"""Several processes for one run, started by accelerate's launcher; and the way of an error from one of them to the
process that started them."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import errors, files
from ..errors import TrainingError, VisionpeftError, out_of_memory
from .devices import devices

_ERROR = "error.json"


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
    import cloudpickle  # for several processes alone

    names = devices(device)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "call.pkl"
        file.write_bytes(cloudpickle.dumps((run, args, folder)))
        module = ["-m", "visionpeft.training.distributed", str(file)]
        count = str(len(names))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if names[0] == "cpu":  # for these, accelerate's own command wants MPI
            command = ["torch.distributed.run", "--standalone", "--nproc_per_node", count, *module]
            environment |= {"ACCELERATE_USE_CPU": "true"}
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the numbers are of these, but accelerate takes the machine's
            ids = [visible.split(",")[int(name)] for name in names] if visible else names
            command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", count, "--num_machines", "1"]
            command += ["--gpu_ids", ",".join(ids), "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", "0", *module]
        with raise_worker_error(folder):
            done = subprocess.run([sys.executable, "-m", *command], env=environment)
            if done.returncode:
                raise read_worker_error(folder)


@contextmanager
def raise_worker_error(folder: Path) -> Iterator[None]:
    """Raise the error that a process which is started here leaves in `folder`.

    Raises:
        VisionpeftError: The one that a process left.
    """
    (folder / _ERROR).unlink(missing_ok=True)  # an earlier run's
    yield
    if (folder / _ERROR).is_file():
        raise read_worker_error(folder)


@contextmanager
def report_error_to_parent(folder: Path) -> Iterator[None]:
    """Leave the error of a process that was started for the one that started it, and end well, or else the launcher adds
    pages of its own. Where the starter is gone, end, too."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except (VisionpeftError, torch.OutOfMemoryError) as error:
        known = out_of_memory(error) if isinstance(error, torch.OutOfMemoryError) else error
        files.write(folder / _ERROR, json.dumps([type(known).__name__, str(known)]))
        sys.exit(0)
    finally:
        if dist.is_initialized():  # left to the interpreter's end, its threads may abort the process
            dist.destroy_process_group()


def _end_with(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1)
    os._exit(1)


def read_worker_error(folder: Path) -> VisionpeftError:
    """Return the error that a process left, or one that says that there is none."""
    file = folder / _ERROR
    if not file.is_file():
        return TrainingError("one of the processes failed; what it said stands above")
    name, sentence = json.loads(file.read_text())
    file.unlink()
    return getattr(errors, name)(sentence)


if __name__ == "__main__":
    import cloudpickle

    function, given, place = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
    with suppress(SystemExit), report_error_to_parent(place):
        function(*given)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; at the interpreter's own end, threads of torch's that still run abort the process
