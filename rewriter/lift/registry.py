"""Lifting rules by ATen name. A rule takes (ctx, *args, **kwargs) as the op does, with tensors as `Lifted`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.ir import Node, const
from rewriter.lift.values import Lifted, NotLiftable
from rewriter.trace.sizes import number_node, shape_of, size_node

RULES: dict[str, Callable] = {}
REFUSED: dict[str, str] = {}


def lifts(*names: str) -> Callable[[Callable], Callable]:
    """Registers a rule for ATen ops: 'add' (every overload) or 'max.dim' (that one)."""

    def register(rule: Callable) -> Callable:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def refuses(reason: str, *names: str) -> None:
    """Registers what index notation does not express, with the reason."""

    def rule(ctx: Context, *args: Any, **kwargs: Any) -> Lifted:
        raise NotLiftable(reason)

    REFUSED.update(dict.fromkeys(names, reason))
    lifts(*names)(rule)


def rule_for(node: fx.Node) -> Callable | None:
    """The rule for a call, the overload's own first; in-place ops use their functional twin's."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    packet, overload = node.target._schema.name.split("::")[1], node.target._overloadname
    packet = packet.removesuffix("_") if not packet.startswith("_") else packet
    return RULES.get(f"{packet}.{overload}", RULES.get(packet))


@dataclass(frozen=True)
class Context:
    """What a rule may ask beyond its arguments: the traced result."""

    node: fx.Node

    @property
    def value(self) -> torch.Tensor:
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[Node, ...]:
        return shape_of(self.value)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype


def scalar(value: Any, like: torch.dtype | None = None) -> Node:
    """A Python number (or symbolic size) among an op's arguments, as a node."""
    if isinstance(value, torch.SymInt):
        return size_node(value)
    if isinstance(value, torch.SymFloat):
        return number_node(value)
    if isinstance(value, Node):
        return value
    if isinstance(value, float) and (like is None or not like.is_floating_point):
        return const(value)
    if isinstance(value, (bool, int, float)):
        return const(value, like if like is not None and like.is_floating_point else None)
    raise NotLiftable(f"an argument of type {type(value).__name__}")


def operand(value: Any, like: torch.dtype | None = None) -> Lifted:
    """A tensor or a number as a `Lifted` (a number has no axes)."""
    return value if isinstance(value, Lifted) else Lifted((), scalar(value, like))
