"""What files of methods share: which layers are meant, what of HF peft is the same here. `Method` is in core/method.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.anatomy import Anatomy, Layer, Unfit
from ..core.class_twins import plain
from ..core.method import Method, fields_of, make_method
from ..errors import ConfigError, nearest

__all__ = [
    "GROUPS",
    "Method",
    "check_tokens",
    "choose_layers",
    "computes_plainly",
    "fields_of",
    "make_method",
    "matches",
    "peft_targets",
]

GROUPS: dict[str, Callable[[Layer], bool]] = {
    "all": lambda layer: True,
    "attention": lambda layer: layer.attention,
    "conv": lambda layer: layer.kind != "linear",
}


def choose_layers(anatomy: Anatomy, wanted: str | Sequence[str]) -> list[Layer]:
    """Return the layers that `target_modules` means.

    Args:
        anatomy: Where to choose.
        wanted: A group ("all", "attention", "conv"), a regular expression for whole names, or names or their endings.

    Raises:
        Unfit: None is meant.
    """
    if isinstance(wanted, str) and wanted in GROUPS:
        found = [layer for layer in anatomy.layers if GROUPS[wanted](layer)]
        if not found:
            raise Unfit(f"it has no {'' if wanted == 'all' else wanted + ' '}layers outside the head")
        return found
    if isinstance(wanted, str):
        found = [layer for layer in anatomy.layers if matches(wanted, layer.name)]
    else:
        found = [layer for layer in anatomy.layers if f".{layer.name}".endswith(tuple(f".{w}" for w in wanted))]
    if not found:
        names = [layer.name for layer in anatomy.layers]
        hint = nearest(wanted, names) if isinstance(wanted, str) else ""
        raise Unfit(f"target_modules={wanted!r} matches none of its {len(names)} layers, e.g. {', '.join(names[:3])}{hint}")
    return found


def check_tokens(method: str, count: int, own: int, what: str) -> None:
    """Refuse to add more than twice as many tokens as there are. (Of 197, the paper on VPT added up to 200.)"""
    if count > 2 * own:
        raise ConfigError(
            f"{method}: num_virtual_tokens={count} is more than twice the {own} {what} of its own; give at most {2 * own}"
        )


def matches(pattern: str, name: str) -> bool:
    """Say whether a regular expression matches a whole name."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"'{pattern}' is not a regular expression ({error}); it is matched against whole names") from None


def peft_targets(fields: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Return what HF peft's `target_modules` says; names, endings and regular expressions mean the same here."""
    given = fields.get("target_modules") or "all"
    return given if isinstance(given, str) else tuple(given)


def computes_plainly(layer: nn.Module) -> bool:
    """Say whether a layer is torch's own, so that HF peft's copy of its arithmetic is right: no subclass, zeros as padding."""
    own = plain(type(layer)) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    return own and getattr(layer, "padding_mode", "zeros") == "zeros"
