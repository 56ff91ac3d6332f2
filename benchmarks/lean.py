"""What `lean` saves and what it costs, beside the peers: Hugging Face peft, Ultralytics, plain PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/lean.py                        # every row, on a GPU where there is one
    OMP_NUM_THREADS=1 python benchmarks/lean.py --only "yolo11n.*LoRA" --rounds 5 --markdown table.md
    OMP_NUM_THREADS=1 python benchmarks/lean.py --layers               # which backward suits which layer
    OMP_NUM_THREADS=1 python benchmarks/lean.py --report               # what of seven nets lean takes over

Every row trains the same parameters of the same network, with the same BatchNorm mode, on both sides: the peer's, and ours
at lean="auto" and lean="memory". Weights are random, statistics too, the batch is generated; nothing is downloaded.

saved   bytes that autograd keeps for backward, parameters, buffers and the batch apart (`visionpeft.measure.SavedBytes`)
peak    the most bytes that live at once during forward, loss and backward, gradients included, less what lived before: on a
        CPU the tensors (`visionpeft.measure.PeakBytes`, which also sees what Functions keep on their contexts), on a GPU
        `torch.cuda.max_memory_allocated`
time    of forward, loss and backward: on a CPU the process's CPU time with one thread, on a GPU between CUDA events; the
        median over rounds, in each of which every side takes one step, in random order; ratios are medians of the rounds'
        ratios, with their quartiles
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("YOLO_OFFLINE", "True")
os.environ.setdefault("YOLO_VERBOSE", "False")

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from ultralytics.cfg import get_cfg

from visionpeft import api, files, lean
from visionpeft.core.attach import attach, train_mode
from visionpeft.core.method import Edit, Method, make_method
from visionpeft.core.plan import Plan, make_plan
from visionpeft.lean import products
from visionpeft.measure import PeakBytes, SavedBytes
from visionpeft.methods.lora import LoraConfig

MIB = 2**20
RANK = 8
BLOCKS = r"blocks\..*"  # the linear layers of a ViT, less those of its ends
SAVED, PEAK, TIME = "saved", "peak", "time"


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work, done by a peer and by us."""

    net: str  # as the families know it
    batch: int
    pixels: int
    method: str  # "lora": rank 8 on every layer that is not grouped; else one of ours
    peer: str  # "peft", or who trains the same parameters without lean
    peer_method: str = ""  # what the peer trains, where that is not the same
    freeze: int = 0
    bn: str | None = None
    goals: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)  # {(level, column): ratio}
    amp: bool = False
    layers: str = ""  # those of LoRA, by regular expression
    cached: bool = False  # the frozen stages' outputs are computed once

    @property
    def name(self) -> str:
        names = {"lora": f"LoRA r={RANK}", "lora by default": "lora, our defaults", "bitfit": "BitFit"}
        method = names.get(self.method, self.method)
        freeze = f", freeze {self.freeze}" * (self.freeze > 0 and self.method != "head")
        mode = {"frozen": ", BN frozen", "train": ", BN training", None: ""}[self.bn]
        more = ", AMP" * self.amp + ", cached" * self.cached
        net = self.net.removeprefix("timm/").removesuffix(".yaml")
        return f"{net} {self.batch}×{self.pixels}, {method}{freeze}{mode}{more}"


def goals(saved: float | None = None, peak: float | None = None, auto: float | None = None, memory: float | None = None,
          **more: float) -> dict[tuple[str, str], float]:  # fmt: skip
    """Return goals by level and column: of bytes at "memory", of time at either; `more` is saved_auto and the like."""
    found = {("memory", SAVED): saved, ("memory", PEAK): peak, ("auto", TIME): auto, ("memory", TIME): memory}
    for name, value in more.items():
        column, level = name.split("_")
        found[level, column] = value
    return {k: v for k, v in found.items() if v is not None}


# fmt: off
ROWS = (
    Row("yolo11n.yaml", 4, 320, "lora", "peft", bn="frozen", goals=goals(0.32, 0.32, 0.85, 0.92)),
    Row("yolo11n.yaml", 4, 320, "full", "Ultralytics' step", freeze=10, bn="train", goals=goals(0.40, None, 1.0, 1.12)),
    Row("yolo11n.yaml", 4, 320, "head", "Ultralytics' step", freeze=23, cached=True, goals=goals(0.46, 0.46, 0.60, 0.60)),
    Row("yolo11n.yaml", 4, 320, "full", "PyTorch", bn="train", goals=goals(0.36, 0.36, 1.20, 1.20)),
    Row("yolov8n.yaml", 4, 320, "lora", "peft", bn="frozen", goals=goals(0.32, 0.32, 0.90, 0.90)),
    Row("timm/resnet50", 4, 224, "bitfit", "PyTorch", bn="frozen", goals=goals(0.02, None, 1.06, 1.06)),
    Row("timm/resnet50", 4, 224, "lora", "peft", bn="frozen", goals=goals(0.45, 0.45, 0.92, 0.92)),
    Row("timm/vit_small_patch16_224", 8, 224, "lora", "peft", layers=BLOCKS,
        goals=goals(0.39, 0.39, 0.90, 1.0, saved_auto=0.63, peak_auto=0.63)),
    # for information
    Row("yolo11n.yaml", 4, 320, "lora by default", "PyTorch, full", "full", bn="train"),
    Row("yolo26n.yaml", 4, 320, "lora", "peft", bn="frozen"),
    Row("timm/mobilenetv2_100", 4, 224, "lora", "peft", bn="frozen"),
    Row("timm/convnext_tiny", 4, 224, "lora", "peft"),
)
# fmt: on
ON_CUDA = (
    Row("yolo11x.yaml", 16, 640, "lora", "peft", bn="frozen", amp=True),
    Row("yolo11x.yaml", 16, 640, "full", "Ultralytics' step", freeze=10, bn="train", amp=True),
    Row("yolo11x.yaml", 16, 640, "full", "PyTorch", bn="train", amp=True),
    Row("timm/vit_base_patch16_224", 16, 224, "lora", "peft", layers=BLOCKS, amp=True),
)


# ----------------------------------------------------------------------------------------------------------- the networks
@dataclasses.dataclass
class Side:
    """A network ready to train, and its loss on the batch."""

    model: nn.Module
    loss: Callable[[], Tensor]
    given: Sequence[Tensor]  # the batch

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self) -> None:
        """Forward, loss and backward; gradients start from none."""
        self.clear()
        self.loss().backward()

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def network(row: Row) -> tuple[Any, Any]:
    """Return the row's family and its base, with random weights and statistics that are not trivial."""
    family = api.find_family(row.net)
    base = family.load(row.net, **({"pretrained": False, "num_classes": 100} if row.net.startswith("timm/") else {}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in base.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(n, generator=generator) * 0.5 + 0.5)
                module.bias.copy_(torch.randn(n, generator=generator) * 0.1)
    return family, base


def planned(row: Row, family: Any, model: nn.Module) -> Plan:
    """Return our plan for the row: what trains, which layers carry LoRA, whose statistics stay still."""
    anatomy = family.anatomy(model, row.net)
    method: Method
    if row.method == "lora":
        whole = [x.name for x in anatomy.layers if x.groups == 1 and re.fullmatch(row.layers or ".*", x.name)]
        method = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=tuple(whole), small_layers=0, train_norms=False, oversize="skip"
        )
    else:
        method = make_method(row.method.split()[0])
    return make_plan(method, anatomy, row.freeze, row.bn)


def with_peft(model: nn.Module, plan: Plan) -> None:
    """Put Hugging Face's LoRA on the layers that our plan edits, and let the same other parameters train.

    The head trains as it is, not as the copy that peft's `modules_to_save` would make and keep beside it.
    """
    names = [edit.module for edit in plan.edits]
    trained = dict(model.named_parameters())
    peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for name in plan.train:
        trained[name].requires_grad_(True)


def sides(row: Row, device: torch.device) -> dict[str, Side]:
    """Return the peer and ours at both levels, ready to train."""
    family, base = network(row)
    model = base.model
    plan = planned(row, family, model)
    theirs = planned(dataclasses.replace(row, method=row.peer_method), family, model) if row.peer_method else plan
    levels = {row.peer: (None, theirs), "auto": ("auto", plan), "memory": ("memory", plan)}
    return {name: prepare(row, level, model, its_plan, device) for name, (level, its_plan) in levels.items()}


def cached_sides(row: Row, device: torch.device) -> dict[str, Side]:
    """Return the same for a row whose frozen stages' outputs are computed once, and in our steps read from the disk."""
    try:
        from visionpeft.lean.frozen_stages import FrozenStages
    except ImportError:
        raise Skip("this version of visionpeft cannot keep the frozen stages' outputs") from None
    family, base = network(row)
    leading = family.leading_stages(base, row.freeze, row.pixels)
    plan = planned(row, family, base.model)
    found = {row.peer: prepare(row, None, base.model, plan, device)}
    images = found[row.peer].given[0].cpu()
    prefix = FrozenStages(base.model, leading.modules, images, leading.read, stored=torch.bfloat16)
    vectors = prefix.flatten(prefix(images))
    with tempfile.NamedTemporaryFile() as file:  # mapped, it lives on until the table is done
        files.write(file.name, vectors.contiguous().view(torch.uint8).numpy().tobytes())
        stored = torch.from_file(file.name, shared=False, size=vectors.numel(), dtype=vectors.dtype).view(vectors.shape)
    for level in ("auto", "memory"):
        model = prefix.install(train_mode(attach(copy.deepcopy(base.model), plan), plan)).to(device)
        batch = detection_batch(row, model, device)

        def loss(model: Any = model, batch: dict[str, Tensor] = batch) -> Tensor:
            vectors = torch.stack(list(stored)).to(device)
            with precision(row, device):
                return model({**batch, "img": vectors})[0].sum()

        found[level] = Side(lean.apply(model, level), loss, list(batch.values()))
    return found


class Skip(Exception):
    """Says why a row cannot be measured here."""


def prepare(row: Row, level: str | None, network: nn.Module, plan: Plan, device: torch.device) -> Side:
    """Return one side: ours at a level of lean, or for None the peer's, always on a copy of the network."""
    model = copy.deepcopy(network)
    if level is None and row.peer == "peft":
        with_peft(model, plan)
    else:
        attach(model, plan)
    train_mode(model, plan)
    model.to(device)
    loss, given = (detection if hasattr(model, "stride") else classification)(row, model, device)
    if level is not None:
        lean.apply(model, level)
    return Side(model, loss, given)


def detection(row: Row, model: Any, device: torch.device) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return Ultralytics' own loss on a batch, and the batch."""
    batch = detection_batch(row, model, device)

    def loss() -> Tensor:
        with precision(row, device):
            return model(batch)[0].sum()

    return loss, list(batch.values())


def detection_batch(row: Row, model: Any, device: torch.device) -> dict[str, Tensor]:
    """Return generated images with five boxes each, and let the model know Ultralytics' arguments."""
    generator, boxes, n = torch.Generator().manual_seed(3), 5, row.batch

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    images = uniform(n, 3, row.pixels, row.pixels)
    batch = {
        "img": images,
        "batch_idx": torch.arange(n).repeat_interleave(boxes).float(),
        "cls": torch.randint(0, int(model.yaml["nc"]), (n * boxes, 1), generator=generator).float(),
        "bboxes": torch.cat([uniform(n * boxes, 2) * 0.6 + 0.2, uniform(n * boxes, 2) * 0.2 + 0.1], 1),
    }
    model.args = get_cfg()
    return {k: v.to(device) for k, v in batch.items()}


def classification(row: Row, model: nn.Module, device: torch.device) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the cross-entropy on generated images."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(row.batch, 3, row.pixels, row.pixels, generator=generator).to(device)
    y = torch.randint(0, 100, (row.batch,), generator=generator).to(device)

    def loss() -> Tensor:
        with precision(row, device):
            return functional.cross_entropy(model(x), y)

    return loss, [x, y]


def precision(row: Row, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.float16) if row.amp else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------- what it costs
@dataclasses.dataclass
class Cost:
    """What one side takes."""

    saved: int = 0  # bytes
    peak: int = 0  # bytes
    times: list[float] = dataclasses.field(default_factory=list)  # seconds of each round's step


def measure(found: Mapping[str, Side], rounds: int, device: torch.device) -> dict[str, Cost]:
    """Return every side's cost; the first of `found` is the peer."""
    costs = {}
    for name, side in found.items():
        for _ in range(2):  # what is decided or allocated once
            side.step()
        costs[name] = Cost(saved_bytes(side), peak_bytes(side, device))
        side.clear()
    shuffled, order = random.Random(0), list(found)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            costs[name].times.append(seconds(found[name], device))
            found[name].clear()
    return costs


def saved_bytes(side: Side) -> int:
    side.clear()
    gc.collect()
    with SavedBytes(side.model, *side.given) as saved:
        loss = side.loss()
    del loss
    return saved.bytes


def peak_bytes(side: Side, device: torch.device) -> int:
    side.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        side.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakBytes() as peak:
        side.step()
    return peak.bytes


def seconds(side: Side, device: torch.device) -> float:
    """Return what one step takes."""
    gc.collect()
    return clock(side.step, device)


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Return what something takes: of the CPU's time, or of a GPU's."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.process_time()
    run()
    return time.process_time() - began


# -------------------------------------------------------------------------------------------------------------- the table
HEADER = ("work", "by", "saved MiB", "×", "peak MiB", "×", "ms a step", "× (quartiles)", "goals")


def lines(row: Row, costs: Mapping[str, Cost]) -> list[tuple[str, ...]]:
    """Return the table's lines of one row: the peer's, then ours with their ratios to it."""
    peer = costs[row.peer]
    found = []
    for name, cost in costs.items():
        milliseconds = f"{statistics.median(cost.times) * 1e3:.0f}"
        if cost is peer:
            found.append((row.name, name, f"{cost.saved / MIB:.1f}", "", f"{cost.peak / MIB:.1f}", "", milliseconds, "", ""))
            continue
        low, middle, high = quartiles([ours / theirs for ours, theirs in zip(cost.times, peer.times, strict=True)])
        ratios = {SAVED: cost.saved / peer.saved, PEAK: cost.peak / peer.peak, TIME: middle}
        times = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        said = [verdict(column, ratios[column], goal) for (level, column), goal in row.goals.items() if level == name]
        found.append((
            "", f"`{name}`", f"{cost.saved / MIB:.1f}", f"{ratios[SAVED]:.3f}", f"{cost.peak / MIB:.1f}",
            f"{ratios[PEAK]:.3f}", milliseconds, times, ", ".join(said),
        ))  # fmt: skip
    return found


SHORT = ("work", "peer", "saved", "peak", "`auto`: saved", "peak", "time", "`memory`: saved", "peak", "time")


def line(row: Row, costs: Mapping[str, Cost]) -> tuple[str, ...]:
    """Return a row in one line: the peer's MiB, then at each level our ratios to it."""
    peer = costs[row.peer]
    found = [row.name, row.peer, f"{peer.saved / MIB:.0f}", f"{peer.peak / MIB:.0f}"]
    for level in lean.LEVELS:
        cost = costs[level]
        times = statistics.median(ours / theirs for ours, theirs in zip(cost.times, peer.times, strict=True))
        found += [f"{cost.saved / peer.saved:.2f}×", f"{cost.peak / peer.peak:.2f}×", f"{times:.2f}×"]
    return tuple(found)


def verdict(column: str, ratio: float, goal: float) -> str:
    return f"{column} ≤ {goal:.2f} {'reached' if ratio <= goal else 'missed'}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def markdown(rows: Iterable[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


# ------------------------------------------------------------------------------------------------------ layers by themselves
SHAPES = ((16, 160), (32, 80), (64, 80), (64, 40), (128, 40), (128, 20), (256, 20), (512, 14))  # channels, pixels


def time_layers(rounds: int, device: torch.device) -> str:
    """Return what backward takes of convolutions with LoRA: through the whole weight's gradient, and through r channels.

    `visionpeft.lean.products` chooses between the two by shape.
    """
    rows = []
    for channels, pixels in SHAPES:
        for size in (1, 3):
            layer = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
            settings = {"shape": list(layer.weight.shape), "r": RANK, "scaling": 1.0}
            edit = Edit("", "weight", "lora", settings)
            attach(layer.to(device), Plan("none", "layer", "lora", {}, 0, "frozen", (), (), {}, (edit,), (), ()))
            lean.apply(layer)
            x = torch.randn(4, channels, pixels, pixels, device=device, requires_grad=True)
            chosen = products._factored(products.Conv((1, 1), (0, 0), (1, 1), 1), layer.weight.shape, RANK)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds + 1):
                for factored, found in times.items():
                    with mock.patch.object(products, "_factored", lambda *_, factored=factored: factored):
                        y = layer(x).sum()
                        found.append(clock(y.backward, device))
            whole, thin = (statistics.median(t[1:]) for t in times.values())
            ratio = statistics.median(b / a for a, b in zip(times[False][1:], times[True][1:], strict=True))
            name = f"{channels} channels, {size}×{size}, 4×{pixels}²"
            rows.append(
                (name, f"{whole * 1e3:.1f}", f"{thin * 1e3:.1f}", f"{ratio:.2f}", "r channels" if chosen else "whole")
            )
    return markdown(rows, ("convolution", "whole ms", "r channels ms", "×", "chosen"))


REPORTED = ("yolo11n.yaml", "yolov8n.yaml", "yolo26n.yaml", "timm/resnet50", "timm/mobilenetv2_100")
REPORTED += ("timm/vit_small_patch16_224", "timm/convnext_tiny")


def report(device: torch.device) -> None:
    """Print `lean.report` of seven nets, with LoRA and BatchNorm frozen."""
    for name in REPORTED:
        row = Row(name, 2, 320 if name.endswith(".yaml") else 224, "lora", "peft", bn="frozen")
        side = sides(row, device)["memory"]
        print(f"{row.name}\n{lean.report(side.model, next(t for t in side.given if t.dim() == 4))}\n")


def machine(device: torch.device) -> str:
    """Return on what and with which versions the table was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, one thread"
    return f"{name}; torch {torch.__version__}, peft {peft.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression, searched for in a row's name")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each side that are timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", type=Path, help="file to write a short table to, a line per row")
    parser.add_argument("--quick", action="store_true", help="one picture of 64 pixels, one round: does it run?")
    parser.add_argument("--layers", action="store_true", help="time LoRA's two backward passes, layer by layer, instead")
    parser.add_argument("--report", action="store_true", help="say what lean takes over in seven nets, instead")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    if args.layers:
        print(machine(device), time_layers(1 if args.quick else args.rounds, device), sep="\n")
        return
    if args.report:
        return report(device)
    rows = [row for row in ROWS + (ON_CUDA if device.type == "cuda" else ()) if re.search(args.only, row.name)]
    if not rows or args.rounds < 1:
        parser.error(f"--only {args.only!r} names no row" if not rows else f"--rounds {args.rounds} must be at least 1")
    table: list[tuple[str, ...]] = []
    print(machine(device))
    print(markdown(()), flush=True)
    for row in rows:
        if args.quick:
            fixed = row.net.startswith("timm/vit")  # reads one size only
            row = dataclasses.replace(row, batch=1, pixels=row.pixels if fixed else 64)
        try:
            found = (cached_sides if row.cached else sides)(row, device)
        except Skip as reason:
            print(f"left out: {row.name}: {reason}", file=sys.stderr)
            continue
        costs = measure(found, 1 if args.quick else args.rounds, device)
        table.append(line(row, costs))
        print("\n".join(markdown(lines(row, costs)).splitlines()[2:]), flush=True)
        del found
        gc.collect()
    if args.markdown:
        files.write(
            args.markdown, f"{markdown(table, SHORT)}\n\nMiB of the peer, and ratios to it. {machine(device)}.\n".encode()
        )


if __name__ == "__main__":
    main()
