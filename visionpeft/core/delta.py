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
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .. import files, schema
from .._torch_private import FakeTensorMode
from ..errors import DeltaError, MismatchError, ModelError, VisionpeftError
from ..schema import Json, Malformed
from .anatomy import inside
from .attach import attached, copy_into, is_added
from .method import Edit, Settings
from .plan import Plan

FORMAT = 1
KEY = "visionpeft"
State = Mapping[str, Tensor]
_DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int64)  # the last: of counters
MOST_CLASSES, _PIXELS = 100_000, 16_384


# -------------------------------------------------------------------------------------------------------------- the header
@dataclass(frozen=True)
class NamedBase:
    """The base that a delta was trained on, by name."""

    model: str
    sha256: str
    model_args: Mapping[str, Any]


@dataclass(frozen=True)
class Use:
    """Size and number of the images that the model is given; further arguments are for people, and for the library."""

    imgsz: int
    batch: int | float = 1

    def __post_init__(self) -> None:
        if not 1 <= self.imgsz <= _PIXELS:
            raise Malformed(f"it has imgsz={self.imgsz}, but images are of 1 to {_PIXELS:,} pixels")


@dataclass(frozen=True)
class Facts:
    """The facts of a delta beside its plan; an adapter for HF peft that was written from it repeats them."""

    base: NamedBase
    names: Mapping[str, str]  # of the classes, by number
    head: Literal["keep", "rebuild"]
    input: Mapping[str, Any]
    train_args: Mapping[str, Any]
    family: str = ""
    task: str = ""
    outputs: Mapping[str, Any] = field(default_factory=dict)  # arguments of the head beside the classes: keypoints, ...
    seed: int | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    imported: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.names) > MOST_CLASSES or self.names.keys() != {str(i) for i in range(len(self.names))}:
            most = f"at most {MOST_CLASSES:,} of them"
            raise Malformed(f"its names are not those of classes numbered from 0 on, each once, and {most}")
        if bad := next((i for i, name in self.names.items() if not schema.writable(name)), None):
            raise Malformed(f"its name of class {bad} is no text that can be written as UTF-8")
        for part in (self.input, self.train_args):
            schema.check(Use, part, newer=False)


@dataclass(frozen=True)
class _Sized:
    plan: Plan
    bytes: Mapping[Literal["body", "head", "statistics"], int]
    format: int
    checksum: str


@dataclass(frozen=True)
class Header(Facts, _Sized):
    """The header of a delta file."""


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
    header: Json = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        """Size of the tensors in bytes, as "body", "head" and "statistics"."""
        return self.header["bytes"]

    @property
    def names(self) -> dict[int, str]:
        """The classes, by index."""
        return {int(index): name for index, name in self.header["names"].items()}


# --------------------------------------------------------------------------------------------------- making and applying
def fingerprint(state: State) -> str:
    """Return the sha256 of a state dict: names, types, shapes and bytes in sorted order, floats as fp32."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        _feed(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


def collect(model: nn.Module, base: State, header: Mapping[str, Any], dtype: str = "fp16") -> Delta:
    """Return the delta of an attached model: its tensors that differ from the base.

    Args:
        model: The model, a plan attached (usually its moving average).
        base: The base's state dict, floats as fp32.
        header: Further fields of the header.
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
    sizes = {"body": 0, "head": 0, "statistics": 0}
    for key, value in tensors.items():
        moves = key not in parameters and not is_added(key)
        kind = "statistics" if moves else "head" if inside(key, plan.heads) else "body"
        sizes[kind] += value.numel() * value.element_size()
    return Delta(plan, tensors, {**header, "plan": plan.to_dict(), "bytes": sizes})


def apply(model: nn.Module, delta: Delta, base: State) -> nn.Module:
    """Fill a model to which the delta's plan is attached: stored tensors from the delta, all others from the base.

    Raises:
        MismatchError: A tensor is missing, unexpected or of another shape; the model is unchanged.
    """
    own = model.state_dict(keep_vars=True)
    source = {**{k: v for k, v in base.items() if not is_added(k)}, **delta.tensors}
    _compare(delta, own, source)
    copy_into(own, source)
    return model


def check(delta: Delta, model: nn.Module, base: State) -> None:
    """Check a delta's plan against its tensors and the model it is for. Parts are made without memory for their values.

    Args:
        delta: The delta.
        model: The base with the delta's head, nothing attached.
        base: The base's state dict.

    Raises:
        MismatchError: The file holds other tensors than its plan trains, moves and adds, or names modules that are absent.
        DeltaError: A part cannot be made from its settings.
    """
    plan, modules, own = delta.plan, dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    named = {"heads": plan.heads, "still": plan.still, "edits": [e.module for e in plan.edits]}
    for what, names in {**named, "train": [n for n in plan.train if not isinstance(own.get(n), nn.Parameter)]}.items():
        if (absent := next((n for n in names if n not in modules or what == "train"), None)) is not None:
            raise MismatchError(f"this delta does not fit the model: its plan's {what} names {absent}, which is not there")
    trained = sum(own[name].numel() for name in set(plan.train))
    for edit in plan.edits:
        part = _part(edit, modules[edit.module])
        trained += sum(p.numel() for p in part.parameters())
        own |= {f"{edit.prefix}.{name}": value for name, value in part.state_dict(keep_vars=True).items()}
    if trained != (listed := sum(row.trained + row.added for row in plan.rows)):
        raise MismatchError(
            f"this delta contradicts itself: by its table {listed:,} parameters train, by its plan {trained:,}"
        )
    _compare(delta, own, {**{k: v for k, v in base.items() if not is_added(k)}, **delta.tensors})


def _part(edit: Edit, module: nn.Module) -> nn.Module:
    """Return an edit's part, its tensors without memory.

    Raises:
        DeltaError: It cannot be made, or does not fit the module.
    """
    where = f"this delta's edit of {edit.module or 'the model'} by '{edit.method}'"
    try:
        # meta tensors know no autocast, which updates of weights turn off; fake ones cannot be drawn from every distribution
        with FakeTensorMode() if edit.point == "weight" else torch.device("meta"):
            part = edit.build()
            schema.check_settings(type(part), edit.settings)
            weight: Any = module.weight if edit.point == "weight" else None
            if weight is not None and (shape := part(torch.empty(weight.shape)).shape) != weight.shape:
                raise Malformed(f"it makes a weight of {tuple(shape)} from one of {tuple(weight.shape)}")
    except (Malformed, VisionpeftError) as error:
        raise DeltaError(f"{where} cannot be made: {error}") from error
    except Exception as error:  # whatever torch says to sizes and types that make no sense
        reason = " ".join(str(error).split())[:150]
        if isinstance(error, TypeError) and "unexpected keyword argument" in reason:
            name = reason.rpartition("argument ")[2].strip("'")
            raise DeltaError(f"{where}: {schema.unknown('its settings', name, ())}") from error
        raise DeltaError(f"{where} cannot be made from {_shown(edit.settings)} ({reason}); get the file again") from error
    return part


def _shown(settings: Settings) -> str:
    text = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    return text if len(text) < 150 else f"{text[:150]}..."


def _compare(delta: Delta, own: State, source: State) -> None:
    """Refuse tensors that are missing, do not fit the model, or are outside the plan.

    Args:
        delta: The delta.
        own: The model's state dict, with the parts.
        source: The tensors to fill it from.

    Raises:
        MismatchError: There are such.
        DeltaError: A tensor of whole numbers stands for one of floats, or the reverse.
    """
    train, still = set(delta.plan.train), set(delta.plan.still)

    def planned(key: str) -> bool:
        if is_added(key) or key in train:
            return True
        module, _, name = key.rpartition(".")
        moves = name in ("running_mean", "running_var", "num_batches_tracked") and module not in still
        return not isinstance(own[key], nn.Parameter) and (moves or inside(key, delta.plan.heads))

    wrong = {
        "missing": [k for k, v in own.items() if k not in source or source[k].shape != v.shape],
        "unexpected": [k for k in delta.tensors if k not in own],
        "outside its plan": [k for k in delta.tensors if k in own and not planned(k)],
    }
    if parts := [f"{len(x)} {what} (first: {x[0]})" for what, x in wrong.items() if x]:
        raise MismatchError(f"this delta does not fit the model: {' and '.join(parts)}; give the base it was trained on")
    if bad := next((k for k, v in delta.tensors.items() if v.is_floating_point() != own[k].is_floating_point()), None):
        raise DeltaError(f"this delta's {bad} is of {delta.tensors[bad].dtype}, the model's of {own[bad].dtype}")


def fits_half(model: nn.Module) -> bool:
    """Return whether a model may be stored in half precision, as the checkpoints are that libraries release.

    No finite value may become infinite, and the divisor of a normalisation, variance + eps, may change by a thousandth at
    most: half precision rounds by half of that, but loses variances that are smaller than it can hold.
    """
    for value in model.state_dict().values():
        if value.is_floating_point() and not torch.equal(torch.isfinite(value.half()), torch.isfinite(value)):
            return False
    norms: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    return all(((m.running_var.half() - m.running_var).abs() <= 1e-3 * (m.running_var + m.eps)).all() for m in norms)


def _half(tensor: Tensor) -> Tensor:
    """Return `tensor` in half precision, or as it is where a finite value would overflow."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if torch.equal(torch.isfinite(half), torch.isfinite(tensor)) else tensor


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
    header = _header(path)
    try:
        tensors = load_tensors(Path(path).read_bytes())
    except SafetensorError as error:
        raise DeltaError(f"{path} is damaged ({error}); get the file again") from error
    if header.get("checksum") != _checksum(header, tensors):
        raise MismatchError(f"{path} does not match its checksum: it was altered or damaged; get the file again")
    plan = _read(path, header).plan
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise DeltaError(f"{path} has {name} as {tensor.dtype}, but a delta's tensors are {allowed}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaError(f"{path} has values in {name} that are no finite numbers; train anew, with a lower lr0")
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if sizes != (listed := sum(header["bytes"].values())):
        raise MismatchError(
            f"{path} says that its tensors take {listed:,} bytes, but they take {sizes:,}; get the file again"
        )
    return Delta(plan, tensors, header)


def inspect(path: str | Path) -> Json:
    """Return the header of a delta file without reading its tensors.

    Raises:
        DeltaError: It is not there, not a delta, damaged, or of a newer format.
    """
    header = _header(path)
    _read(path, header)
    return header


def _header(path: str | Path) -> Json:
    """Return the unchecked header of a file, of a known format.

    Raises:
        DeltaError: There is none.
    """
    if not Path(path).is_file():
        raise DeltaError(f"there is no delta file {path}; give the path of a .safetensors file that visionpeft wrote")
    try:
        metadata = read_metadata(path)
    except SafetensorError as error:
        raise DeltaError(f"{path} is no delta file, or is damaged ({error}); get the file again") from error
    if KEY not in metadata:
        raise DeltaError(f"{path} is a safetensors file, but no delta of visionpeft; give one that visionpeft wrote")
    if strange := next((k for k in metadata if k != KEY), None):
        raise DeltaError(
            f"{path} has metadata beside visionpeft's ({strange!r}), which no checksum covers; get the file again"
        )
    try:
        header = schema.check(Json, schema.parse(metadata[KEY]))
        newest = schema.check(int, header.get("format"), "its format")
    except Malformed as error:
        raise DeltaError(f"the header of {path} cannot be read: {error}; get the file again") from error
    if newest > FORMAT:
        raise DeltaError(f"{path} has format {newest}, this visionpeft reads up to {FORMAT}; upgrade visionpeft")
    return header


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        SafetensorError: It is none, is damaged, or names a tensor twice.
    """
    with safe_open(str(path), framework="pt") as file:  # checks sizes and places
        metadata = file.metadata() or {}
    with open(path, "rb") as raw:
        text = raw.read(int.from_bytes(raw.read(8), "little"))
    try:
        schema.parse(text)
    except Malformed as error:
        raise SafetensorError(f"its list of tensors: {error}") from error
    return metadata


def _read(path: str | Path, header: Json) -> Header:
    try:
        return schema.check(Header, header)
    except Malformed as error:
        raise DeltaError(f"the header of {path} cannot be used: {error}") from error


def verify(delta: Delta, base: State) -> None:
    """Check that `base` is the base that the delta was trained on.

    Raises:
        MismatchError: It is another one.
    """
    verify_base(delta.header["base"], base)


def verify_base(named: Mapping[str, Any], base: State) -> None:
    """Check that `base` is the one that a delta's header names.

    Raises:
        MismatchError: It is another one.
    """
    wanted, actual = named["sha256"], fingerprint(base)
    if wanted != actual:
        raise MismatchError(
            f"wrong base: this delta was trained on {named['model']} with tensors {wanted[:12]}…, "
            f"the model given has {actual[:12]}…; give the original with model=..."
        )


def _checksum(header: Json, tensors: State) -> str:
    rest = json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True)
    digest = hashlib.sha256(rest.encode())
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a digest."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
