"""YOLO models in formats of others: Ultralytics' exporter, and Python that makes one without visionpeft."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine.exporter import Exporter

from ... import files
from ...core.base_model import Base
from ..base import Arguments
from ..capabilities import SupportsExport
from .arguments import usable
from .loading import for_inference
from .output import quiet
from .sources import check_download
from .tasks import TASKS


class Export(SupportsExport):
    """Ultralytics' own exports."""

    def export(self, model: nn.Module, format: str, out: Path, **options: Any) -> Path:
        network = for_inference(model)
        network.args = {**DEFAULT_CFG_DICT, "task": network.task}
        args = {"batch": 1, **options, "mode": "export", "format": format}
        check_download(str(args.get("data")), args.get("split", "val"))

        def write(temporary: Path) -> None:
            with tempfile.TemporaryDirectory() as folder, usable(args), quiet():
                network.pt_path = str(Path(folder) / "model.pt")  # Ultralytics writes beside this, under its name
                shutil.copyfile(str(Exporter(overrides=args)(model=network)), temporary)

        return files.replace(out, write)

    def loading_snippet(self, base: Base, header: Arguments) -> str:
        cls, design = TASKS[base.task].model.__name__, {"nc": len(header["names"])}
        design |= {k: v for k, v in header.get("outputs", {}).items() if k == "kpt_shape"}
        lines = ["from ultralytics import YOLO", f"from ultralytics.nn.tasks import {cls}"]
        fill = "model.load(base, verbose=False)"
        if header["head"] == "rebuild" or not TASKS[base.task].labels:
            lines.append("from ultralytics.utils.torch_utils import intersect_dicts")
            fill = "model.load_state_dict(intersect_dicts(base.state_dict(), model.state_dict()), strict=False)"
        channels = f", ch={base.facts['channels']}" if base.facts["channels"] != 3 else ""
        lines.append(f"base = YOLO({base.source!r}).model.float()")
        if "channels" in header["base"]["model_args"]:
            lines += ["from torch.nn import Parameter", "first = base.model[0].conv"]
            lines.append("first.weight = Parameter(first.weight.sum(1, keepdim=True))  # of grey images")
        lines += [
            f"model = {cls}({{**base.yaml, {str(design)[1:-1]}}}{channels}, verbose=False).eval()",
            f"{fill}  # the head's values come with the adapter",
        ]
        return "\n".join(lines)
