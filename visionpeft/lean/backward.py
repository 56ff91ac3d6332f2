"""Backward passes that are not differentiated themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..errors import ModelError


def first_order(backward: Callable) -> Callable:
    """Make a Function's backward refuse ``create_graph=True``.

    Torch's own `once_differentiable` refuses only where the incoming gradient itself has a graph; elsewhere a second
    derivative would silently be zero.
    """

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise ModelError("a lean model's gradients cannot be differentiated (create_graph=True); call lean.remove first")
        return backward(ctx, *gradients)

    return refusing
