"""The training checkpoint, from which a run goes on bit for bit: live weights of what trains, moving average, fp32
optimizer, scaler, position and every random state. Plain tensors and values only; loading never unpickles code."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import files
from .errors import TrainingError


def save(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all."""
    return files.replace(path, lambda temporary: torch.save(dict(content), temporary))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        TrainingError: There is none, or it cannot be read.
    """
    if not path.is_file():
        raise TrainingError(f"there is nothing to resume at {path}; a run can be resumed once its first epoch is over")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"the checkpoint {path} cannot be read ({error}); start the run anew") from error


def live(model: nn.Module, copy: bool = True) -> dict[str, Tensor]:
    """Return the tensors that training can change, by state-dict key: what requires a gradient, and all buffers."""
    wanted = {n for n, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    return {k: v.clone() if copy else v for k, v in model.state_dict().items() if k in wanted}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `live` returned."""
    own = model.state_dict(keep_vars=True)
    if missing := [k for k in tensors if k not in own or own[k].shape != tensors[k].shape]:
        raise TrainingError(f"the checkpoint does not fit this model ({missing[0]}); resume with the same arguments")
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
