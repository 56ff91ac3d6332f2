"""What a GPU alone can tell, in one command: is everything right there, what does it save, how far is the forecast off?

    python benchmarks/gpu.py --out RESULTS                              # tests and tables, about four minutes
    python benchmarks/gpu.py --out RESULTS --part train --data FOLDER   # six methods side by side, about five minutes
    python benchmarks/gpu.py --out RESULTS --device cpu --small         # does it run? The numbers mean nothing

FOLDER holds yolov8n.pt and aerial_airport/data.yaml. Nothing is downloaded. Each line of a table stands alone: where one
fails, that is printed, its traceback is in the JSON, and the rest goes on; the exit code is then 1. The JSON is written
after every line, so that a run that is cut leaves what it had. What does not fit into `--minutes` is left out, and named.

tests      those marked "cuda": gradients, precisions, methods and runs, on the device
lean       the README's table at a batch of 16 in half precision, and larger nets, beside peft, Ultralytics and PyTorch
forecast   `visionpeft.forecast` beside CUDA's allocator and the driver, and the allowance that covers all of its rows
overhead   the same table for one image, where launching takes longer than computing: what lean's own Python costs
choices    what lean chose on CPUs: LoRA's two backward passes, and what stands in for an input that backward does not read
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forecast as forecasting
import lean as table  # also lets torch use one thread, which CPU times are of
import numpy
import torch

import visionpeft
from visionpeft import files, scenes
from visionpeft.families.capabilities import Step
from visionpeft.memory.forecast import memory_model

HERE = Path(__file__).resolve()
MB = 1e6
BATCH, PIXELS = 16, {"timm": 224, "yolo": 640}
TESTS = 0.5  # the most of the time that they may take
TRIED = "bottleneck or (test_methods and lora-resnet18) or (test_runs and timm and gradual) or tells_times"  # if small
FORECASTS = (  # net, plan, lean
    ("yolo11n.yaml", "full", "off"),
    ("yolo11n.yaml", "lora", "memory"),
    ("yolov8n.yaml", "head", "auto"),
    ("yolo26n.yaml", "lora", "auto"),
    ("yolo11n-seg.yaml", "full, freeze 10", "auto"),
    ("yolo11x.yaml", "full", "off"),
    ("yolo11x.yaml", "full, freeze 10", "auto"),
    ("yolo11x.yaml", "lora", "memory"),
    ("timm/resnet50", "bitfit", "memory"),
    ("timm/vit_base_patch16_224", "lora", "memory"),
    ("timm/convnext_tiny", "full", "auto"),
)
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze 10": {"method": "full", "freeze": 10},
    **{name: {"method": name} for name in ("head", "lora", "dora", "conv_adapter")},
}


class Results:
    """What was found so far, on disk after every line; and how long there is to go on."""

    def __init__(self, file: Path, minutes: float, device: torch.device):
        self.file, self.device, self.end = file, device, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"machine": table.machine(device), "failed": {}, "left_out": []}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def line(self, section: str, name: str, run: Callable[[], tuple[dict[str, Any], str]]) -> dict[str, Any] | None:
        """Find out something, and print what it says; return what it found, None where it could not."""
        found = None
        if self.left <= 0:
            self.found["left_out"].append(f"{section}: {name}")
            print(f"left out for want of time: {name}", flush=True)
        else:
            try:
                found, said = run()
                print(said, flush=True)
                self.found.setdefault(section, {})[name] = found
            except Exception as error:  # the device's time is scarce: the rest is worth having, whatever this was
                self.found["failed"][f"{section}: {name}"] = traceback.format_exc()
                print(f"FAILED {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
        files.write(self.file, json.dumps(self.found, indent=1).encode())
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def head(title: str, cells: Sequence[str] = ()) -> None:
    print(f"\n## {title}\n" + (table.markdown((), cells) if cells else ""), flush=True)


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# -------------------------------------------------------------------------------------------------------------- the check
def check(results: Results, small: bool) -> None:
    """The first part: tests and tables."""
    device = results.device
    head("tests")
    results.line("tests", "pytest -m cuda", lambda: tests(results, small))

    fixed = [dataclasses.replace(r, batch=BATCH, pixels=PIXELS[_kind(r.net)], amp=True) for r in table.ROWS]
    rows = [*fixed, *table.ON_CUDA]
    if small:
        shrunk = [dataclasses.replace(r, batch=1, pixels=64 if _kind(r.net) == "yolo" else 224) for r in rows]
        rows = [shrunk[0], shrunk[2], shrunk[7]]
    head("lean: MiB and milliseconds of the peer, and ratios to it", (*table.SHORT[:4], "ms", *table.SHORT[4:]))
    for one in rows:
        results.line("lean", one.name, lambda one=one: measured(one, device, 1 if small else 7))

    head(
        "forecast: MB",
        ("net", "plan", "lean", "forecast", "allocated", "error", "reserved", "beside", "allowance", "needed"),
    )
    found = []
    for case in FORECASTS[:2] if small else FORECASTS:
        made = results.line("forecast", " ".join(case), lambda case=case: forecast(*case, device, small))
        found += [made] if made else []
    results.line("forecast", "the allowance that covers all", lambda: allowance(found))

    head("overhead: one image", (*table.SHORT[:4], "ms", *table.SHORT[4:]))
    for one in (table.ROWS[0], table.ROWS[7]):
        one = dataclasses.replace(one, batch=1, pixels=64 if small and _kind(one.net) == "yolo" else one.pixels)
        results.line("overhead", one.name, lambda one=one: measured(one, device, 1 if small else 25))

    head("choices")
    for name, run in (("LoRA's two backward passes", layers), ("input stand-ins", stand_ins)):
        results.line("choices", name, lambda run=run: run(device, 1 if small else 9))


def _kind(net: str) -> str:
    return "timm" if net.startswith("timm/") else "yolo"


def tests(results: Results, small: bool) -> tuple[dict[str, Any], str]:
    """Run what is marked "cuda", on this device."""
    folder = HERE.parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "--tb=short", "-p", "no:cacheprovider"]
    command += [str(folder / name) for name in ("test_cuda.py", "test_measure.py")]
    command += ["-k", TRIED] if small else ["-n", "8"] if importlib.util.find_spec("xdist") else []
    log = results.file.parent / "tests.log"
    with open(log, "w") as file:
        environment = {**os.environ, "VISIONPEFT_TEST_DEVICE": results.device.type}
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code: int | str = running.wait(results.left * TESTS)
        except subprocess.TimeoutExpired:
            running.kill()
            code = "not done in time"
    lines = log.read_text().splitlines()
    if code:
        print(*[line for line in lines if line.startswith("FAILED") or " FAILED " in line or "ERROR " in line], sep="\n")
        raise RuntimeError(f"{code}: {lines[-1:]}; see {log}")
    return {"said": lines[-1]}, lines[-1].strip("= ")


def measured(of: table.Row, device: torch.device, rounds: int) -> tuple[dict[str, Any], str]:
    """Measure a row of the README's table."""
    costs = table.measure((table.cached_sides if of.cached else table.sides)(of, device), rounds, device)
    found = {name: {**dataclasses.asdict(cost), "ms": 1e3 * statistics.median(cost.times)} for name, cost in costs.items()}
    cells = table.line(of, costs)
    return found, row(*cells[:4], f"{found[of.peer]['ms']:.1f}", *cells[4:])


def forecast(net: str, plan: str, lean: str, device: torch.device, small: bool) -> tuple[dict[str, Any], str]:
    """Compare the forecast of training steps with what they take."""
    gpu = device.type == "cuda"
    batch, imgsz, objects = (2, 64, 3) if small else (BATCH, PIXELS[_kind(net)], 10)
    of = forecasting.case(net, plan, lean, objects, 0.02, imgsz, gpu)
    said, step = memory_model(of).at(batch), Step(batch, imgsz, "AdamW", gpu, objects, 0.02)
    expected = said.weights + said.average + said.optimizer + said.step
    allocated, reserved, beside = on_gpu(of, step, device) if gpu else (forecasting.measured(of, step, False), 0, 0)
    needed = reserved + beside - expected
    found = {"forecast": expected, "allocated": allocated, "reserved": reserved, "beside": beside, "needed": needed}
    cells = [f"{n / MB:.0f}" for n in (expected, allocated, reserved, beside, said.allowance, needed)]
    name = net.removesuffix(".yaml").removeprefix("timm/")
    return found, row(name, plan, lean, *cells[:2], f"{expected / allocated - 1:+.1%}", *cells[2:])


def on_gpu(of: Any, step: Step, device: torch.device) -> tuple[int, int, int]:
    """Return the peaks of three training steps: allocated, reserved, and what the driver counts beside."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model, rehearsal = forecasting.rehearsed(of, step, device)
    for _ in range(3):
        with torch.device(device):
            given = forecasting.filled(rehearsal.batch(), step)
        with torch.autocast(device.type, torch.bfloat16):
            loss = rehearsal.loss(given)
        loss.backward()
        rehearsal.optimizer.step()
        rehearsal.optimizer.zero_grad()
        del loss, given
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)  # CUDA's context; of other programs, too
    average = rehearsal.average  # of which there is none here
    peaks = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    return peaks[0] + average, peaks[1] + average, beside


def allowance(found: Sequence[dict[str, int]]) -> tuple[dict[str, Any], str]:
    """Return what `visionpeft.forecast` would have to assume (CONTEXT, WORKSPACE, ROUNDING) to cover all of these rows."""
    context = max(f["beside"] for f in found)
    tensors = numpy.array([f["forecast"] for f in found], float)
    slack = numpy.array([f["reserved"] - f["forecast"] for f in found], float)
    share = max(float(numpy.polyfit(tensors, slack, 1)[0]), 0.0) if len(found) > 1 else 0.0
    most = max(float((slack - share * tensors).max()), 0.0)
    said = f"CONTEXT {context / MB:.0f} MB, WORKSPACE {most / MB:.0f} MB, ROUNDING {share:.1%}"
    return {"CONTEXT": context, "WORKSPACE": most, "ROUNDING": share}, f"\nThe allowance that covers all: {said}"


def layers(device: torch.device, rounds: int) -> tuple[dict[str, Any], str]:
    said = table.time_layers(rounds, device)
    return {"table": said.splitlines()}, said


def stand_ins(device: torch.device, rounds: int) -> tuple[dict[str, Any], str]:
    """Time the gradient of a convolution's input, in half precision with channels last: what stands in for the input, which
    is not read, may have no layout (one number, expanded) or the gradient's (memory that is not written)."""
    found = {}
    for channels, pixels in ((64, 160), (128, 80), (256, 40)):
        x = torch.randn(BATCH if device.type == "cuda" else 1, channels, pixels, pixels, device=device, dtype=torch.bfloat16)
        g = x.to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=torch.bfloat16)

        def run(empty: bool, g: Any = g, weight: Any = weight) -> None:
            x = torch.empty_like(g) if empty else g.new_empty(1).expand(g.shape)
            op = (g, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False))
            torch.ops.aten.convolution_backward(*op)

        for empty in (False, True):
            run(empty)
            times = [table.clock(lambda empty=empty, run=run: run(empty), device) for _ in range(rounds)]
            found[f"{channels} channels, {pixels}², {'memory' if empty else 'expanded'}"] = 1e3 * statistics.median(times)
    return found, "\n" + "\n".join(f"{name}: {ms:.2f} ms" for name, ms in found.items())


# ------------------------------------------------------------------------------------------------------------ the training
def train(results: Results, data: Path, small: bool, epochs: int) -> None:
    """The second part: methods side by side on one device, a process each."""
    with tempfile.TemporaryDirectory() as folder:
        root, imgsz = Path(folder), 640
        model, source = data / "yolov8n.pt", data / "aerial_airport"
        if small:
            imgsz, epochs, model = 64, 1, Path(scenes.find(scenes.EMBEDDED["model"]))
            source = scenes.write("satellite", root / "scenes", train=4, val=2).parent
        running = {}
        for name, settings in RUNS.items():
            shutil.copytree(source, root / name / "data")  # Ultralytics writes what it found beside the labels
            device = "0" if results.device.type == "cuda" else "cpu"
            more = {"epochs": epochs, "imgsz": imgsz, "device": device, "workers": 2, "quiet": True, "name": "run"}
            file = next((root / name / "data").glob("*.yaml"))
            given = {"data": str(file), "model": str(model), "project": str(root / name), **more, **settings}
            log = open(root / name / "log", "w")  # noqa: SIM115
            command = [sys.executable, str(HERE), "--one", json.dumps(given)]
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        head(f"{source.name} at {imgsz} pixels, {epochs} epochs, {len(RUNS)} at a time",
             ("method", "mAP50", "mAP50-95", "ms a step", "peak MB", "seconds"))  # fmt: skip
        for name, process in running.items():
            results.line("train", name, lambda name=name, process=process: ended(root / name, name, process, results))


def ended(folder: Path, name: str, process: subprocess.Popen, results: Results) -> tuple[dict[str, Any], str]:
    """Wait for a run; return what it found."""
    try:
        code = process.wait(max(results.left, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        lines = (folder / "run" / "metrics.csv").read_text().splitlines()
        raise RuntimeError(f"cut after {len(lines) - 1} epochs: {lines[-1]}") from None
    if code:
        raise RuntimeError((folder / "log").read_text().splitlines()[-1])
    said = json.loads((folder / "run" / "run.json").read_text())
    score, took = said["after"], said["measured"]
    step = sum(v or 0 for k, v in took["seconds_by_part"].items() if k != "data")
    cells = (f"{score['mAP50']:.3f}", f"{score['mAP50-95']:.3f}", f"{1e3 * step:.1f}", f"{took['peak_bytes'] / MB:.0f}")
    curve = (folder / "run" / "metrics.csv").read_text().splitlines()
    return {**said, "curve": curve}, row(name, *cells, f"{said['seconds']:.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and the tests' log")
    parser.add_argument(
        "--data", type=Path, default=Path(), help="folder with yolov8n.pt and aerial_airport/, for --part train"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part", default="check", choices=("check", "train"))
    parser.add_argument("--minutes", type=float, help="after which nothing more is begun; 4, of training 5.5")
    parser.add_argument("--epochs", type=int, default=40, help="of training")
    parser.add_argument("--small", action="store_true", help="a few lines at tiny sizes: does it run?")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        visionpeft.train(**json.loads(args.one))
        return 0
    if not args.out:
        parser.error("--out names the folder to write to")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu --small shows whether the script runs")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    minutes = args.minutes or (60 if args.small else 5.5 if args.part == "train" else 4)
    results = Results(args.out / f"gpu-{args.part}.json", minutes, device)
    print(results.found["machine"], flush=True)
    if args.part == "train":
        train(results, args.data, args.small, args.epochs)
    else:
        check(results, args.small)
    failed, left = results.found["failed"], results.found["left_out"]
    print(f"\n{len(failed)} failed, {len(left)} left out", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
