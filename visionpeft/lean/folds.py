"""Pairs of a convolution and a BatchNorm that may be folded into it: proved to be its only reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import fx, nn

from .._torch_private import has_any_global_hook
from ..core.class_swap import plain

Fold = tuple[nn.Module, str, str]  # a module, and its paths to a convolution and to the BatchNorm that reads it
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """Return the folds of a model; and the convolutions beside a BatchNorm that have none, with the reason.

    The forward of each module that holds both is traced with its children as black boxes; a fold is a convolution whose
    only reader is one BatchNorm that reads nothing else.
    """
    result: list[Fold] = []
    refused: dict[str, str] = {}
    children = [x for m in model.modules() for x in (*m._modules.values(), *m._parameters.values())]
    owners = Counter(map(id, children))
    done: set[int] = set()  # convolutions that a module further out calls itself, past the container they are in
    for name, module in model.named_modules():
        convs = {path: conv for path, conv in _children_of(module, nn.Conv2d) if id(conv) not in done}
        if not convs or not any(_children_of(module, nn.BatchNorm2d)):
            continue
        whole = f"{name}." if name else ""
        try:
            calls, pairs = _fold_pairs(module)
        except Exception as error:  # fx gives up in many ways on a forward that depends on data
            refused |= {whole + k: f"its module cannot be traced ({type(error).__name__})" for k in convs if "." not in k}
            continue
        for path, conv in convs.items():
            if path not in calls and "." in path:
                continue  # its container calls it
            done.add(id(conv))
            if path not in pairs:
                refused[whole + path] = "what reads it is not one BatchNorm"
            elif owners[id(conv)] > 1 or owners[id(conv._parameters.get("weight"))] > 1:
                refused[whole + path] = "it, or its weight, is used elsewhere, too"
            elif not _is_plain_conv(conv):
                refused[whole + path] = "its class has a forward of its own"
            else:
                result.append((module, path, pairs[path]))
    return result, refused


def _children_of(module: nn.Module, kind: type, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a kind, by path, that are children of `module` or of its containers."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            yield path + name, child
        elif isinstance(child, _CONTAINERS):
            yield from _children_of(child, kind, f"{path}{name}.")


class _Tracer(fx.Tracer):
    """Records the calls of a module's children in its forward. The children are black boxes.

    `trace` of fx would patch `nn.Module` meanwhile, for all threads; here a copy's children record their own calls.
    """

    def record(self, module: nn.Module, training: bool) -> list[fx.Node]:
        """Return the calls of children in a module's forward. Its attributes are set on a copy, `root`."""
        copies: dict[Any, Any] = {None: None}  # for children that are left out
        for path, original in module.named_modules():
            copies[original] = copied = object.__new__(type(original))
            vars(copied).update(vars(original), _compiled_call_impl=None, **{name: {} for name in _HOOKS})
            if path:
                vars(copied)["forward"] = partial(self._call, path)
        for original, copied in copies.items():
            if original is not None:
                vars(copied)["_modules"] = {name: copies[child] for name, child in original._modules.items()}
        self.root = copies[module]
        self.root.training = training
        self.graph, self.tensor_attrs = fx.Graph(), {}
        forward, arguments = self.create_args_for_root(type(module).forward, True)
        self.create_node("output", "output", (self.create_arg(forward(*arguments)),), {})
        return [node for node in self.graph.nodes if node.op == "call_module"]

    def _call(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_module", path, args, kwargs)


def _fold_pairs(module: nn.Module) -> tuple[set[str], dict[str, str]]:
    """Return the children that a module calls, and the pairs of a convolution and the one BatchNorm that reads it."""
    called: set[str] = set()
    both: list[set[tuple[str, str]]] = []
    for training in (True, False):
        calls = (tracer := _Tracer()).record(module, training)
        if any(isinstance(value, fx.Proxy) for value in vars(tracer.root).values()):
            raise ValueError("an attribute that it sets may be read elsewhere")
        called |= {str(n.target) for n in calls}
        times = Counter(n.target for n in calls)
        pairs = [(n, reader) for n in calls if len(n.users) == 1 and (reader := next(iter(n.users))) in calls]
        once = [(a, b) for a, b in pairs if times[a.target] == times[b.target] == 1 and b.args == (a,)]
        both.append({(str(a.target), str(b.target)) for a, b in once if _is_plain_norm(module, str(b.target))})
    return called, dict(both[0] & both[1])


def _is_plain_conv(conv: Any) -> bool:
    """Return whether a convolution returns exactly ``F.conv2d`` of its input and its weight."""
    kind: Any = plain(type(conv))
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


def _is_plain_norm(module: nn.Module, name: str) -> bool:
    """Return whether this is a BatchNorm whose forward begins with ``F.batch_norm`` of its input and its own tensors."""
    bn: Any = module.get_submodule(name)
    if not isinstance(bn, nn.BatchNorm2d) or not bn.track_running_stats or bn.running_mean is None:
        return False
    kind: Any = plain(type(bn))
    return kind.forward is nn.BatchNorm2d.forward or {"act", "drop"} <= set(dict(bn.named_children()))  # goes on with these


def current(folds: list[Fold]) -> dict[int, nn.Module]:
    """Return the BatchNorms that may be folded now, by the id of the convolution's own weight.

    They are those with frozen statistics and weight. A hook between the two, or a module put in since, undoes a fold.
    """
    if has_any_global_hook():
        return {}
    valid: dict[int, nn.Module] = {}
    shared: set[int] = set()
    for parent, conv_name, bn_name in folds:
        conv, bn = _child(parent, conv_name), _child(parent, bn_name)
        if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is None:
            continue
        if any("forward" in vars(m) for m in (parent, conv, bn)):
            continue  # an instance's own forward hides the class's
        weight = conv._parameters.get("weight")
        if weight is None or bn.training or (bn.weight is not None and bn.weight.requires_grad):
            continue
        if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
            continue
        if bn._forward_pre_hooks or bn._forward_hooks or bn._backward_hooks or bn._backward_pre_hooks:
            continue  # a forward hook sees the input, too
        if id(weight) in valid:
            shared.add(id(weight))
        valid[id(weight)] = bn
    return {k: v for k, v in valid.items() if k not in shared}


def _child(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
