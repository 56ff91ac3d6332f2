"""Files that torch or NumPy unpickle, looked through before they are opened.

``torch.load(weights_only=True)`` calls whatever any library of this process has declared safe, with the arguments that the
file gives. Ultralytics declares its networks, and making one from arguments can fetch files and evaluate text.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._torch_private import pickle_of

_PICKLES = 5  # that a checkpoint of the format before torch 1.6 begins with
_NETWORKS = ("torch.nn.modules.", "ultralytics.")
_NUMPY = re.compile(r"numpy\.(dtype|ndarray|_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer)")
_PLAIN = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode|argparse\.Namespace|"
    r"pathlib\.\w*Path|torch\.(Size|device|Tensor|\w*Storage|q?u?int\d+|b?float\w*|complex\d+|bool|per_\w+|strided|sparse_\w+)|"
    r"torch\.(storage\.\w+Storage|serialization\._get_layout|nn\.parameter\.Parameter)"
)
_REBUILT = re.compile(r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?|qtensor|sparse_tensor)")


class _Inert:
    """Stands for anything that a pickle names, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _Inert:
        return self

    append = add = extend = __setstate__


class _Rebuilt(_Inert):
    """Stands for a tensor."""


class _Typed(_Inert):
    """Stands for a tensor with attributes, for which torch calls any function that the file names."""

    def __init__(self, made_by: Any = None, *rest: Any):
        if made_by is not _Rebuilt:
            raise pickle.UnpicklingError("it has something else than a tensor made, which can run code")


class _Network(_Inert):
    """Stands for a class whose objects a checkpoint may restore from their state, but not make from arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        if args or kwargs:
            raise pickle.UnpicklingError(f"it makes a {type(self).__name__} from arguments, which can run code")


class _Sized(_Inert):
    """Stands for an object that takes as much memory as its first argument says."""

    def __init__(self, size: Any = b"", *rest: Any):
        if not isinstance(size, bytes | str | _Inert) or (isinstance(size, str) and not re.fullmatch(r"\D*\d{0,4}", size)):
            raise pickle.UnpicklingError("it asks for memory without saying what for")


class _Inspector(pickle.Unpickler):
    def __init__(self, file: BinaryIO, networks: bool):
        super().__init__(file)
        self._networks = networks

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole == "torch._tensor._rebuild_from_type_v2":
            return _Typed
        if whole in ("numpy.dtype", "builtins.bytearray", "__builtin__.bytearray"):
            return _Sized
        if _REBUILT.fullmatch(whole):
            return _Rebuilt
        if _PLAIN.fullmatch(whole) or _NUMPY.fullmatch(whole):
            return _Inert
        if not self._networks:
            raise pickle.UnpicklingError(f"it holds {whole}, which is neither a tensor nor a plain value")
        if whole.startswith(("torchvision.transforms.", "builtins.getattr", "__builtin__.getattr")):
            return _Inert
        if whole.startswith(_NETWORKS) and ".distill_model." not in whole:  # which opens checkpoints of its own
            return type(name, (_Network,), {})
        raise pickle.UnpicklingError(f"it holds {whole}, which is no part of a network")

    def persistent_load(self, kept: Any) -> Any:
        if not (isinstance(kept, tuple) and kept[:1] in (("storage",), (b"storage",))):
            raise pickle.UnpicklingError("it holds something else than tensors beside its pickle")
        return _Inert()


def objection(source: str | Path | bytes, networks: bool = False) -> str:
    """Return why ``torch.load(weights_only=True)`` must not open a checkpoint; "" where it may.

    Args:
        source: The file, or its content.
        networks: Whether it may hold networks of Ultralytics beside tensors and plain values.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as torch tells the two formats apart
            file.seek(0)
            if zipped:
                _Inspector(pickle_of(file), networks).load()
                return ""
            for _ in range(_PICKLES):
                _Inspector(file, networks).load()
    except Exception as error:  # of a file that may hold anything
        return _reason(error, "it is no checkpoint of torch, or is damaged")
    return ""


def objection_to_array(file: Path) -> str:
    """Return why ``numpy.load(allow_pickle=True)`` must not open a file; "" where it may, for it is one array of numbers,
    words and lists of them."""
    try:
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            if read(opened)[2].hasobject:
                _Inspector(opened, networks=False).load()
    except Exception as error:
        return _reason(error, "it is no array of NumPy, or is damaged")
    return ""


def _reason(error: Exception, otherwise: str) -> str:
    return str(error) if isinstance(error, pickle.UnpicklingError) and str(error).startswith("it ") else otherwise
