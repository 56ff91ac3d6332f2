"""Which BatchNorm may be folded into which convolution: where it is proved to be all that reads the convolution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..twins import plain

Fold = tuple[nn.Module, str, str]  # a module, and its names for a convolution and for the BatchNorm that reads it


def find(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """Return the folds of a model, and for convolutions beside a BatchNorm that have none, why.

    The forward of each module that holds both is traced with its children as black boxes; a fold is a convolution whose
    only reader is one BatchNorm that reads nothing else.
    """
    found: list[Fold] = []
    refused: dict[str, str] = {}
    owned = [x for m in model.modules() for x in (*m._modules.values(), *m._parameters.values())]
    owners = Counter(map(id, owned))
    for name, module in model.named_modules():
        children = dict(module.named_children())
        convs = {k for k, m in children.items() if isinstance(m, nn.Conv2d)}
        if not convs or not any(isinstance(m, nn.BatchNorm2d) for m in children.values()):
            continue
        path = f"{name}." if name else ""
        try:
            pairs = dict(_pairs(module))
        except Exception as error:  # fx gives up in many ways on a forward that depends on data
            refused |= {path + k: f"its module cannot be traced ({type(error).__name__})" for k in convs}
            continue
        shared = {k for k in pairs if owners[id(children[k])] > 1 or owners[id(children[k]._parameters.get("weight"))] > 1}
        found += [(module, conv, bn) for conv, bn in pairs.items() if conv not in shared]
        refused |= {path + k: "what reads it is not one BatchNorm" for k in convs - set(pairs)}
        refused |= {path + k: "it, or its weight, is used elsewhere, too" for k in shared}
    return found, refused


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return True


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    graph = _Tracer().trace(module)
    calls = [n for n in graph.nodes if n.op == "call_module"]
    for node in calls:
        readers = list(node.users)
        if not isinstance(module.get_submodule(str(node.target)), nn.Conv2d) or len(readers) != 1:
            continue
        reader = readers[0]
        once = all(sum(n.target == x.target for n in calls) == 1 for x in (node, reader))
        if once and reader.op == "call_module" and reader.args == (node,) and _known(module, str(reader.target)):
            yield str(node.target), str(reader.target)


def _known(module: nn.Module, name: str) -> bool:
    """Say whether this is a BatchNorm whose forward begins with ``F.batch_norm`` of its input and its own tensors."""
    bn: Any = module.get_submodule(name)
    if not isinstance(bn, nn.BatchNorm2d) or not bn.track_running_stats or bn.running_mean is None:
        return False
    kind: Any = plain(type(bn))
    return kind.forward is nn.BatchNorm2d.forward or {"act", "drop"} <= set(dict(bn.named_children()))  # timm's with act


def current(folds: list[Fold]) -> dict[int, nn.Module]:
    """Return the BatchNorms that may be folded now, by the id of the convolution's own weight.

    They are those with frozen statistics and weight. A hook between the two, or a module put in since, undoes a fold.
    """
    if _has_any_global_hook():
        return {}
    valid: dict[int, nn.Module] = {}
    shared: set[int] = set()
    for parent, conv_name, bn_name in folds:
        conv: Any = parent._modules.get(conv_name)
        bn: Any = parent._modules.get(bn_name)
        if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is None:
            continue
        weight = conv._parameters.get("weight")
        if weight is None or bn.training or (bn.weight is not None and bn.weight.requires_grad):
            continue
        if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
            continue
        if bn._forward_pre_hooks or bn._forward_hooks or bn._backward_hooks or bn._backward_pre_hooks:
            continue  # one behind is shown the input, too
        if id(weight) in valid:
            shared.add(id(weight))
        valid[id(weight)] = bn
    return {k: v for k, v in valid.items() if k not in shared}
