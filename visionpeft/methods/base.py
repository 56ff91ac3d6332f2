"""Shared by the files of methods: choice of layers, and equality with HF peft. `Method` itself is in core/method.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from ..core.anatomy import Anatomy, Layer, Unfit
from ..core.class_swap import plain
from ..core.method import Method as Method
from ..core.method import PeftFields
from ..core.method import fields_of as fields_of
from ..core.method import make_method as make_method
from ..errors import ConfigError, nearest

GROUPS: dict[str, Callable[[Layer], bool]] = {
    "all": lambda layer: True,
    "attention": lambda layer: layer.attention,
    "conv": lambda layer: layer.kind != "linear",
}


def choose_layers(anatomy: Anatomy, wanted: str | Sequence[str]) -> list[Layer]:
    """Return the layers that `target_modules` selects.

    Args:
        anatomy: The model's facts.
        wanted: A group ("all", "attention", "conv"), a regular expression for whole names, or names or their endings.

    Raises:
        Unfit: It selects none.
    """
    if isinstance(wanted, str) and wanted in GROUPS:
        chosen = [layer for layer in anatomy.layers if GROUPS[wanted](layer)]
        if not chosen:
            raise Unfit(f"it has no {'' if wanted == 'all' else wanted + ' '}layers outside the head")
        return chosen
    if isinstance(wanted, str):
        chosen = [layer for layer in anatomy.layers if matches(wanted, layer.name)]
    else:
        chosen = [layer for layer in anatomy.layers if f".{layer.name}".endswith(tuple(f".{w}" for w in wanted))]
    if not chosen:
        names = [layer.name for layer in anatomy.layers]
        hint = nearest(wanted, names) if isinstance(wanted, str) else ""
        raise Unfit(f"target_modules={wanted!r} matches none of its {len(names)} layers, e.g. {', '.join(names[:3])}{hint}")
    return chosen


def check_tokens(method: str, count: int, own: int, what: str) -> None:
    """Refuse to add more than twice the tokens that there are. (The paper on VPT added up to 200 to 197.)"""
    if count > 2 * own:
        raise ConfigError(
            f"{method}: num_virtual_tokens={count} is more than twice the {own} {what} of its own; give at most {2 * own}"
        )


def matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches a whole name."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"'{pattern}' is not a regular expression ({error}); it is matched against whole names") from None


def peft_targets(fields: PeftFields) -> str | tuple[str, ...]:
    """Return HF peft's `target_modules`; names, endings and regular expressions mean the same here."""
    targets = fields.get("target_modules") or "all"
    return targets if isinstance(targets, str) else tuple(targets)


def computes_plainly(layer: nn.Module) -> bool:
    """Return whether a layer is torch's own, as HF peft's copy of its arithmetic assumes: no subclass, zeros as padding."""
    return plain(type(layer)) in (nn.Linear, nn.Conv1d, nn.Conv2d) and getattr(layer, "padding_mode", "zeros") == "zeros"
