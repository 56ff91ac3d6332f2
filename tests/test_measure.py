"""What is counted as saved for backward and as living, down to the byte."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visionpeft.measure import PeakBytes, SavedBytes

KB = 1024  # bytes of a tensor of 256 single-precision numbers


class Square(torch.autograd.Function):
    """x², whose input is kept in one of two places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, declared: bool) -> Tensor:
        if declared:
            ctx.save_for_backward(x)
        else:
            ctx.kept = x
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0] if ctx.saved_tensors else ctx.kept
        return 2 * x * gradient, None


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_function_keeps_is_seen(declared: bool) -> None:
    """Saved properly, both see it; kept on the context, the peak still does."""
    weight = nn.Parameter(torch.ones(256))
    with PeakBytes() as peak, SavedBytes(nn.ParameterList([weight])) as saved:
        y = Square.apply(weight * 1.0, declared)
        live = peak.live
    assert saved.bytes == (KB if declared else 0)
    assert live == 2 * KB, "the kept input and the output"
    y.sum().backward()
    assert torch.equal(weight.grad, torch.full((256,), 2.0))


def test_what_is_kept_ends_with_the_loss() -> None:
    """Also where backward is never called, as when a step runs out of memory."""
    x = torch.randn(256, requires_grad=True)
    with PeakBytes() as peak, SavedBytes(nn.ParameterList([x])) as saved:
        loss = x.exp().sigmoid().sum()  # both keep their results
        assert saved.bytes == 2 * KB <= peak.live
        del loss
        gc.collect()
        assert peak.live == 0


def test_saved_bytes_leave_out_parameters_buffers_and_what_is_given() -> None:
    layer, x = nn.BatchNorm1d(16).eval(), torch.randn(16, 16)
    with SavedBytes(layer) as saved:
        layer(x).sum()
    with SavedBytes(layer, x) as less:
        layer(x).sum()
    assert saved.bytes == KB and less.bytes == 0


def test_each_storage_lives_once_from_its_making_to_its_end() -> None:
    old = torch.zeros(256)
    with PeakBytes() as peak:
        old.add_(1), old.view(16, 16)  # older than the mode
        assert peak.live == 0
        x = torch.zeros(256)
        views = [x.view(16, 16), *x.chunk(4), x.detach()]
        x.mul_(2)
        assert peak.live == KB
        y = torch.cat((x, x))
        del x
        assert peak.live == 3 * KB, "a view keeps the storage"
        del views
        assert peak.live == 2 * KB
        y.resize_(1024)
        assert peak.live == 4 * KB
        del y
    assert peak.live == 0 and peak.bytes == 4 * KB


def test_peak_of_a_step() -> None:
    """Three layers without parameters: what is saved, then gradients of the same size, one at a time."""
    x = torch.randn(256, requires_grad=True)
    with PeakBytes() as peak:
        y = x.sigmoid().sigmoid().sigmoid()
        assert peak.live == 3 * KB
        y.backward(torch.ones(256))
    assert 4 * KB <= peak.bytes <= 6 * KB
    del y
    assert peak.live == KB, "the gradient of x"


def test_gradients_made_by_backward_count() -> None:
    layer = nn.Linear(64, 64, bias=False)
    with PeakBytes() as peak:
        layer(torch.ones(1, 64)).sum().backward()
    assert peak.live == layer.weight.grad.nbytes == 16 * KB <= peak.bytes


def test_the_table_of_lean(tmp_path: Path) -> None:
    """The benchmark runs, at sizes at which its numbers mean nothing."""
    script = Path(__file__).parents[1] / "benchmarks" / "lean.py"
    table = tmp_path / "table.md"
    command = [sys.executable, str(script), "--quick", "--only", "yolo11n.*(LoRA|freeze)", "--markdown", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text, first in ((done.stdout, ["peft", "`auto`", "`memory`", "Ultralytics' step", "`auto`", "`memory`"]),
                        (table.read_text(), ["peft", "Ultralytics' step"])):  # fmt: skip
        lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert [line[1] for line in lines[2:]] == first
        assert all(len(line) == len(lines[0]) for line in lines)
    assert "saved ≤ 0.32" in done.stdout
    refused = subprocess.run([*command[:3], "--only", "nothing"], capture_output=True, text=True)
    assert refused.returncode == 2 and "names no row" in refused.stderr
