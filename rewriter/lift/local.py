"""Lifts every FX node by itself: its operands are Loads of the tensors that feed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.ir import Load, Tensor, const, transform
from rewriter.lift import (  # noqa: F401  (they fill the registry)
    activations,
    contractions,
    generators,
    losses,
    norms,
    pointwise,
    reductions,
    scatters,
    views,
)
from rewriter.lift.registry import Context, rule_for
from rewriter.lift.short import unroll_short
from rewriter.lift.values import Lifted, NotLiftable, fresh_axes, positions
from rewriter.trace.sizes import UnknownSize, shape_of
from rewriter.trace.source import origin_of

_TYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_TYPES |= {torch.float16, torch.bfloat16, torch.float32}


@dataclass(frozen=True)
class LocalLift:
    """`value` where the node is expressible in index notation, else `reason`."""

    value: Lifted | tuple | None
    reason: str = ""


def load_of(node: fx.Node) -> Lifted:
    """The tensor a node holds, read where asked; a constant of one element is that number."""
    value = node.meta["val"]
    axes = fresh_axes(shape_of(value))
    constant = node.meta.get("constant")
    if constant is not None and constant.numel() == 1:
        return Lifted(axes, const(constant.item(), value.dtype))
    masks = node.meta.get("masks")
    tensor = Tensor(node.name, shape_of(value), value.dtype, lanes=_lanes(value), masks=masks)
    return Lifted(axes, Load(tensor, positions(axes)))


def _lanes(value: torch.Tensor) -> int | None:
    """The dimension of a tensor along which it is dense in memory."""
    return next((k for k in reversed(range(value.dim())) if _is_one(value.stride(k))), None)


def _is_one(stride: int | torch.SymInt) -> bool:
    return isinstance(stride, int) and stride == 1


def lift_locally(graph: fx.Graph) -> dict[fx.Node, LocalLift]:
    """A `LocalLift` for every call that returns a tensor (or a tuple of them)."""
    return {n: _lift(n) for n in graph.nodes if n.op == "call_function" and _holds_tensors(n)}


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return torch.is_tensor(value) or (isinstance(value, (tuple, list)) and all(map(torch.is_tensor, value)))


MISFITS = (
    TypeError,
    AttributeError,
    LookupError,
    ValueError,
    ArithmeticError,
)  # arguments that a rule does not foresee


def _lift(node: fx.Node) -> LocalLift:
    try:
        if node.target.__name__ == "getitem":
            return _item(node)
        rule = rule_for(node)
        if rule is None:
            return LocalLift(None, f"{node.target} is not expressed in index notation")
        _refuse_other_types(node)
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _argument)
        return LocalLift(_unrolled(rule(Context(node), *args, **kwargs)))
    except (NotLiftable, UnknownSize, *MISFITS) as error:
        return LocalLift(None, f"{node.target}: {error}")


def _unrolled(value: Lifted | tuple | None) -> Lifted | tuple | None:
    if isinstance(value, tuple):
        return tuple(map(_unrolled, value))
    return value and Lifted(value.axes, transform(value.body, unroll_short))


def _refuse_other_types(node: fx.Node) -> None:
    """Kernels read and compute numbers of the types below; float64 is for eager, and so is the cast from it."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    for value in pytree.tree_leaves(values):
        if torch.is_tensor(value) and value.dtype not in _TYPES:
            raise NotLiftable(f"{value.dtype} arithmetic")


def _item(node: fx.Node) -> LocalLift:
    source = _lift(node.args[0])
    if source.value is None:
        return source
    value = source.value[node.args[1]]
    return LocalLift(value)


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return value
    held = value.meta.get("val")
    return load_of(value) if torch.is_tensor(held) else held


__all__ = ["LocalLift", "lift_locally", "load_of", "origin_of"]
