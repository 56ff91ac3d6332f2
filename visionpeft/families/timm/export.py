"""Classifiers of timm in formats of others: torch's exporters, and Python that makes one without visionpeft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import files
from ...core.base_model import Base
from ..base import Arguments
from ..capabilities import SupportsExport
from .anatomy import input_size
from .arguments import ExportOptions, read_options
from .data import transform
from .loading import from_file, merged_copy


class Export(SupportsExport):
    """Exports by torch."""

    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        use = read_options(ExportOptions, options)
        merged = merged_copy(model)
        transform(merged, use.imgsz)  # refuses a size that the model cannot read
        _, *size = input_size(merged)
        x = torch.zeros(2, 3, *([use.imgsz] * 2 if use.imgsz else size))

        def write(path: Path) -> None:
            if format == "torchscript":
                torch.jit.save(torch.jit.trace(merged, x, check_trace=False), str(path))
                return
            axes = {"images": {0: "batch"}, "logits": {0: "batch"}} if use.dynamic else None
            names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
            torch.onnx.export(merged, (x,), str(path), dynamo=False, dynamic_axes=axes, **names)

        with torch.no_grad():
            return files.replace(out, write)

    def loading_snippet(self, base: Base, header: Arguments) -> str:
        name, model_args = base.source.removeprefix("timm/"), header["base"]["model_args"]
        arguments = {**model_args, "num_classes": len(base.names)}
        if path := model_args.get("checkpoint_path"):
            arguments = {k: v for k, v in {**arguments, **from_file(name, path, model_args)}.items() if v is not None}
        if not path or "img_size" in model_args:
            arguments = {"pretrained": base.pretrained, **arguments}
        lines = ["import timm", f"model = timm.create_model({name!r}, {_written(arguments)})"]
        if len(header["names"]) != len(base.names):
            lines.append(f"model.reset_classifier({len(header['names'])})")
        return "\n".join(lines)


def _written(arguments: Arguments) -> str:
    """Return arguments as Python, whatever they are called."""
    return ", ".join(f"{k}={v!r}" if k.isidentifier() else f"**{ {k: v}!r}" for k, v in arguments.items())
