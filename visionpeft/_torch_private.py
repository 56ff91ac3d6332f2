"""All names of torch that are used here though they are private: where a new torch fails, look here. Checked with 2.14.

The formats of `pickles.py`, and the frames that `measure.SavedSplit` reads, depend on torch's inner names, too.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook  # noqa: F401

as_plain_tensors: Any = torch._C.DisableTorchFunctionSubclass  # a context in which subclasses count as tensors


def saved_tensors_hook() -> Any:
    """Return the hook that packs tensors saved for backward here, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def transforming() -> bool:
    """Return whether a transform of functorch, or forward-mode differentiation, is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def version(tensor: Tensor) -> int:
    """Return how often a tensor's memory was changed; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that no other living storage has."""
    return storage._cdata


def pickle_of(checkpoint: BinaryIO) -> io.BytesIO:
    """Return the pickle inside a zipped checkpoint."""
    return io.BytesIO(torch._C.PyTorchFileReader(checkpoint).get_record("data.pkl"))
