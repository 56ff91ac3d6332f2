"""visionpeft: adapt a pretrained YOLO or timm model to your own images on the GPU you already have."""

from . import benchmark, data, report
from .api import (
    Adapted,
    Forgetting,
    detach,
    export,
    forgetting,
    import_peft,
    inspect,
    list_families,
    list_methods,
    load,
    merge,
    predict,
    train,
    val,
    verify,
)
from .errors import VisionpeftError
from .planning import fit, forecast, plan
from .training.result import Run

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Forgetting",
    "Run",
    "VisionpeftError",
    "benchmark",
    "data",
    "detach",
    "export",
    "fit",
    "forecast",
    "forgetting",
    "import_peft",
    "inspect",
    "list_families",
    "list_methods",
    "load",
    "merge",
    "plan",
    "predict",
    "report",
    "train",
    "val",
    "verify",
]
