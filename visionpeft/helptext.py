"""The help of commands, taken from the functions that they call, so that it is written once."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

C = TypeVar("C", bound=Callable[..., object])


def arguments_of(module: str, function: str) -> Callable[[C], C]:
    """Return a decorator that describes a command's options as a function describes its arguments of the same names.

    The function is read, not imported: help must not wait for torch.

    Args:
        module: The function's module, with dots.
        function: Its name.
    """
    tree = ast.parse(find_spec(module).loader.get_source(module))  # type: ignore[union-attr]
    [node] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    _, heading, rest = (ast.get_docstring(node) or "").partition("\n\nArgs:\n")
    arguments = rest.partition("\n\n")[0].replace("\n        ", " ")  # an argument a line

    def describe(command: C) -> C:
        command.__doc__ = inspect.cleandoc(command.__doc__ or "") + heading + arguments
        return command

    return describe
