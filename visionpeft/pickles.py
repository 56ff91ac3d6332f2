"""Checkpoints of torch, looked through before torch opens them.

``torch.load(weights_only=True)`` calls whatever any library of this process has declared safe, with the arguments that the
file gives. Ultralytics declares its networks, and making one from arguments can fetch files and evaluate text.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

# of what is in these, torch itself allows little
_VALUES = ("torch", "collections", "numpy", "builtins", "__builtin__", "_codecs", "argparse", "pathlib")
_NETWORKS = "torch.nn.modules"
_PICKLES = 5  # that a checkpoint of the format before torch 1.6 begins with


class _Inert:
    """Stands for whatever a pickle names, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _Inert:
        return self

    append = add = extend = __setstate__


class _Network(_Inert):
    """Stands for a class whose objects a checkpoint may hold as they were, but not make anew."""

    def __init__(self, *args: Any, **kwargs: Any):
        if args or kwargs:
            raise pickle.UnpicklingError(f"it makes a {type(self).__name__} from arguments, which can run code")


class _Look(pickle.Unpickler):
    def __init__(self, file: Any, plain: bool):
        super().__init__(file)
        self._plain = plain

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in _VALUES and not module.startswith(_NETWORKS):
            return _Inert
        if self._plain:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither a tensor nor a plain value")
        return _Inert if module.startswith("torchvision.transforms") else type(name, (_Network,), {})

    def persistent_load(self, _: Any) -> Any:
        return _Inert()


def objection(path: str | Path, plain: bool = True) -> str:
    """Say why a checkpoint is not to be opened; nothing where ``torch.load(weights_only=True)`` may.

    Args:
        path: The file.
        plain: Whether it has to hold tensors and plain values alone, or may hold networks of Ultralytics, too.
    """
    try:
        if zipfile.is_zipfile(path):
            _Look(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), plain).load()
            return ""
        with open(path, "rb") as file:
            for _ in range(_PICKLES):
                _Look(file, plain).load()
    except Exception as error:  # of a file that may hold anything
        said = isinstance(error, pickle.UnpicklingError) and str(error).startswith("it ")
        return str(error) if said else "it is no checkpoint of torch, or is damaged"
    return ""
