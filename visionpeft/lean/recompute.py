"""Recipes: how backward rebuilds a tensor from tensors that are kept anyway, instead of keeping it too.

A recipe is a `Leaf` (a tensor at hand) or `Derived` (a cheap function of recipes). A tensor carries its recipe as an
attribute, with the version of its memory for which the recipe holds: a change in place makes the recipe void. So does a
change of a leaf, and the tensor is then kept itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch_private import storage_id, version


class Leaf:
    """A tensor at hand. Once `kept` is set, it is kept for backward anyway, so to use it costs nothing."""

    __slots__ = ("tensor", "version", "kept")
    passes = 0.0

    def __init__(self, tensor: Tensor, kept: bool = True):
        self.tensor, self.kept = tensor.detach(), kept and not tensor.is_inference()  # those cannot be kept for backward
        self.version = version(self.tensor)

    def unchanged(self) -> bool:
        """Return whether the tensor is still as it was."""
        return version(self.tensor) == self.version


class Derived:
    """A function of recipes. Rebuilding its result costs `passes`, in passes over a tensor of the result's size."""

    __slots__ = ("function", "parts", "passes")

    def __init__(self, function: Callable[..., Tensor], parts: Sequence[Recipe], passes: float):
        self.function, self.parts = function, tuple(parts)
        self.passes = passes


Recipe = Leaf | Derived
Steps = tuple[tuple[Callable[..., Tensor], tuple[int, ...]], ...]  # functions, and the indices of their arguments


class Kept(NamedTuple):
    """The tensors that are kept in place of one, and the steps that lead from them to it.

    A Function gives the tensors to autograd, which frees them once they were used, and holds only the steps.
    """

    tensors: tuple[Tensor, ...]
    steps: Steps

    @property
    def itself(self) -> bool:
        """Whether the tensor itself is kept."""
        return not self.steps


def rebuild(steps: Steps, tensors: Sequence[Tensor]) -> Tensor:
    """Return a tensor, rebuilt by its steps from the tensors kept in its place."""
    values = list(tensors)
    for function, parts in steps:
        values.append(function(*(values[i] for i in parts)))
    return values[-1]


def attach_recipe(tensor: Tensor, recipe: Recipe | None) -> Tensor:
    """Let `tensor` carry `recipe`; returns it."""
    if recipe is not None:
        tensor._lean = recipe, version(tensor)  # type: ignore[attr-defined]
        _carriers.refs.append(weakref.ref(tensor))
    return tensor


class _Carriers(threading.local):
    """The tensors that carry a recipe in this thread."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[Tensor]] = []


_carriers = _Carriers()


def detach_recipes() -> None:
    """Remove the recipes of all tensors: those that outlive the forward would keep their recipes' leaves alive."""
    for ref in _carriers.refs:
        if (tensor := ref()) is not None:
            tensor.__dict__.pop("_lean", None)
    _carriers.refs.clear()


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return the recipe that `tensor` carries, unless it was changed since."""
    recipe, when = getattr(tensor, "_lean", (None, -1))
    return recipe if when == version(tensor) else None


def keep(tensor: Tensor, max_passes: float) -> Kept:
    """Keep a tensor by its recipe, if that holds and costs no more than `max_passes`; else keep it itself."""
    recipe = recipe_of(tensor)
    if recipe is not None and recipe.passes <= max_passes and (kept := _gather(recipe)):
        return kept
    return Kept((keep_itself(tensor).tensor,), ())


def keep_itself(tensor: Tensor) -> Leaf:
    """Keep a tensor itself, and let it be a leaf of other recipes."""
    # a small part of a large tensor would keep the whole
    part = tensor.untyped_storage().nbytes() > 4 * tensor.nbytes
    leaf = Leaf(tensor.detach().clone() if part else tensor)
    attach_recipe(tensor, leaf)
    return leaf


def survives_change_of(recipe: Recipe, tensor: Tensor) -> bool:
    """Return whether a recipe still holds after a change of `tensor` in place."""
    if isinstance(recipe, Derived):
        return all(survives_change_of(part, tensor) for part in recipe.parts)
    return storage_id(recipe.tensor.untyped_storage()) != storage_id(tensor.untyped_storage())


def derive(function: Callable[..., Tensor], *parts: Recipe | None, passes: float = 1.0) -> Recipe | None:
    """Return the recipe of `function(*parts)`, or None where a part has none."""
    known = [p for p in parts if p is not None]
    return Derived(function, known, passes + sum(p.passes for p in known)) if len(known) == len(parts) else None


def _gather(recipe: Recipe) -> Kept | None:
    """Return the leaves and steps of a recipe, or None where a leaf has changed."""
    leaves: list[Leaf] = []
    nodes: list[Derived] = []
    _visit(recipe, leaves, nodes, set())
    if not all(leaf.unchanged() for leaf in leaves):
        return None
    for leaf in leaves:
        if not leaf.kept:  # its owner may still change it in place, which nothing forbids: keep a copy
            leaf.tensor, leaf.kept = leaf.tensor.clone(), True
            leaf.version = version(leaf.tensor)
    places = {id(node): i for i, node in enumerate((*leaves, *nodes))}
    for node in nodes:
        if isinstance(node.function, SharedRecompute):
            node.function.users += 1
    steps = tuple((node.function, tuple(places[id(p)] for p in node.parts)) for node in nodes)
    return Kept(tuple(leaf.tensor for leaf in leaves), steps)


def _visit(node: Recipe, leaves: list[Leaf], nodes: list[Derived], seen: set[int]) -> None:
    """List the leaves and nodes of a recipe, parts first. (A function inside another, calling itself, would be a cycle
    that holds the tensors until Python collects its garbage.)"""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, Leaf):
        leaves.append(node)
        return
    for part in node.parts:
        _visit(part, leaves, nodes, seen)
    nodes.append(node)


class SharedRecompute:
    """A costly function whose users in backward share the result: computed for the first of them, dropped by the last."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.users = function, 0
        self.value: Tensor | None = None

    def __call__(self, *args: Tensor) -> Tensor:
        value = self.function(*args) if self.value is None else self.value
        self.users -= 1
        self.value = value if self.users > 0 else None
        return value


# ------------------------------------------------------------------------------- functions that pass recipes on
def of_one(function: Callable, args: tuple, kwargs: dict, passes: float) -> object:
    """Call a function of one tensor; its result (a tensor, or a tuple of them) carries a recipe where the tensor does."""
    out, (x, *rest) = function(*args, **kwargs), args or (None,)  # a tensor given by keyword gets no recipe
    if isinstance(x, Tensor) and (recipe := recipe_of(x)) is not None:
        if isinstance(out, Tensor):
            attach_recipe(out, derive(lambda t: function(t, *rest, **kwargs), recipe, passes=passes))
        else:
            for i, part in enumerate(out):
                attach_recipe(part, derive(lambda t, i=i: function(t, *rest, **kwargs)[i], recipe, passes=passes))
    return out


def add(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Add two tensors; the sum carries a recipe where both do."""
    out, parts = function(*args, **kwargs), [recipe_of(t) if isinstance(t, Tensor) else None for t in args]
    return attach_recipe(out, derive(torch.add, *parts)) if len(parts) == 2 and not kwargs else out


def cat(function: Callable, tensors: Sequence[Tensor], dim: int = 0, **kwargs: object) -> Tensor:
    """Concatenate; the result carries a recipe where those of at least half of it do (the rest is kept, then)."""
    dim = kwargs.pop("axis", dim)  # type: ignore[assignment]
    out = function(tensors, dim, **kwargs)
    recipes = [recipe_of(t) for t in tensors]
    bare = sum(t.numel() for t, r in zip(tensors, recipes, strict=True) if r is None)
    if 2 * bare <= out.numel() and out.numel() and not kwargs:
        for i, t in enumerate(tensors):
            if recipes[i] is None:
                recipes[i] = recipe_of(attach_recipe(t, Leaf(t, kept=False)))
        most = 1 + max(r.passes for r in recipes)  # type: ignore[union-attr]
        attach_recipe(out, Derived(lambda *parts: torch.cat(parts, dim), recipes, most))  # type: ignore[arg-type, call-overload]
    return out
