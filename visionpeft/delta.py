"""The delta file: every tensor of an adapted model that differs from its base, with where it came from.

One safetensors file with one metadata key, ``visionpeft``, that holds JSON: the resolved plan, the base's fingerprint,
class names, input, training arguments, versions, metrics, and a checksum of all of it. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from . import files
from .attach import attached, is_added
from .errors import DeltaError, MismatchError, ModelError
from .plan import Plan

FORMAT = 1
KEY = "visionpeft"
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """A delta in memory.

    Attributes:
        plan: The resolved plan; loading never makes it again.
        tensors: The tensors that differ from the base, by state-dict key, in their stored types.
        header: Everything else that the file says of itself.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        """Size of the tensors in bytes, as "body", "head" and "statistics"."""
        return self.header["bytes"]


# --------------------------------------------------------------------------------------------------- making and applying
def fingerprint(state: State) -> str:
    """Return the sha256 of a state dict: names, types, shapes and bytes in sorted order, floats as fp32."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        _feed(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


def collect(model: nn.Module, base: State, header: Mapping[str, Any], dtype: str = "fp16") -> Delta:
    """Gather what differs between an attached model and its base.

    Args:
        model: The model, a plan attached (usually its moving average).
        base: The base's state dict, floats as fp32.
        header: What the file shall say besides.
        dtype: "fp16" stores trained floating-point parameters in half precision where their values allow it, "exact" where
            it changes nothing, "fp32" as they are. Statistics always keep their own type.
    """
    plan = attached(model)
    if plan is None:
        raise ModelError("nothing is attached to this model, so there is no delta to save; train or attach first")
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        stored = _half(value) if dtype != "fp32" and key in parameters else value
        stored = value if dtype == "exact" and not _equal(stored, value) else stored
        same = key in base and base[key].shape == value.shape
        if not (same and (_equal(value, base[key]) or _equal(stored, base[key]))):
            tensors[key] = stored.contiguous().clone()
    heads = tuple(f"{h}." for h in plan.heads)
    sizes = {"body": 0, "head": 0, "statistics": 0}
    for key, value in tensors.items():
        moves = key not in parameters and not is_added(key)
        kind = "statistics" if moves else "head" if key.startswith(heads) else "body"
        sizes[kind] += value.numel() * value.element_size()
    return Delta(plan, tensors, {**header, "plan": plan.to_dict(), "bytes": sizes})


def apply(model: nn.Module, delta: Delta, base: State) -> nn.Module:
    """Fill a model to which the delta's plan is attached: stored tensors from the delta, all others from the base.

    Raises:
        MismatchError: A tensor is missing, unexpected or of another shape; the model is unchanged.
    """
    own = model.state_dict(keep_vars=True)
    source = {**{k: v for k, v in base.items() if not is_added(k)}, **delta.tensors}
    missing = [k for k, v in own.items() if k not in source or source[k].shape != v.shape]
    unexpected = [k for k in delta.tensors if k not in own]
    if missing or unexpected:
        parts = [f"{len(x)} {what} (first: {x[0]})" for what, x in (("missing", missing), ("unexpected", unexpected)) if x]
        raise MismatchError(f"this delta does not fit the model: {' and '.join(parts)}; give the base it was trained on")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(source[key])
    return model


def _half(tensor: Tensor) -> Tensor:
    """Return `tensor` in half precision, or as it is where that would overflow."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if torch.isfinite(half).all() or not torch.isfinite(tensor).all() else tensor


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float() if a.is_floating_point() else a, b.float() if b.is_floating_point() else b)


# --------------------------------------------------------------------------------------------------------------- the file
def write(path: str | Path, delta: Delta) -> Path:
    """Write a delta file, whole or not at all; the same delta always gives the same bytes."""
    header = {**delta.header, "format": FORMAT}
    header["checksum"] = _checksum(header, delta.tensors)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return files.write(path, save_tensors(dict(delta.tensors), {KEY: text}))


def read(path: str | Path) -> Delta:
    """Read a delta file and check it against its own checksum.

    Raises:
        DeltaError: It is not there, not a delta, damaged, altered, or of a newer format.
    """
    header = inspect(path)
    try:
        tensors = load_tensors(Path(path).read_bytes())
    except SafetensorError as error:
        raise DeltaError(f"{path} is damaged ({error}); get the file again") from error
    if header.get("checksum") != _checksum(header, tensors):
        raise MismatchError(f"{path} does not match its checksum: it was altered or damaged; get the file again")
    return Delta(Plan.from_dict(header["plan"]), tensors, header)


def inspect(path: str | Path) -> dict[str, Any]:
    """Return the header of a delta file without reading its tensors.

    Raises:
        DeltaError: It is not there, not a delta, damaged, or of a newer format.
    """
    if not Path(path).is_file():
        raise DeltaError(f"there is no delta file {path}; give the path of a .safetensors file that visionpeft wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise DeltaError(f"{path} is no delta file, or is damaged ({error}); get the file again") from error
    if text is None:
        raise DeltaError(f"{path} is a safetensors file, but no delta of visionpeft; give one that visionpeft wrote")
    try:
        header = json.loads(text)
        newest = int(header["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise DeltaError(f"the header of {path} cannot be read ({error}); get the file again") from error
    if newest > FORMAT:
        raise DeltaError(f"{path} has format {newest}, this visionpeft reads up to {FORMAT}; upgrade visionpeft")
    return header


def verify(delta: Delta, base: State) -> None:
    """Check that `base` is the base that the delta was trained on.

    Raises:
        MismatchError: It is another one.
    """
    verify_base(delta.header["base"], base)


def verify_base(said: Mapping[str, Any], base: State) -> None:
    """Check that `base` is the one that a delta's header says.

    Raises:
        MismatchError: It is another one.
    """
    wanted, given = said["sha256"], fingerprint(base)
    if wanted != given:
        raise MismatchError(
            f"wrong base: this delta was trained on {said['model']} with tensors {wanted[:12]}…, "
            f"the model given has {given[:12]}…; give the original with model=..."
        )


def _checksum(header: Mapping[str, Any], tensors: State) -> str:
    rest = json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True)
    digest = hashlib.sha256(rest.encode())
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a digest."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
