"""What lifting an FX node gives: a function from one axis per dimension to a scalar."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.ir import Axis, Const, Index, Node, apply, fresh_axis, index, substitute, where
from rewriter.ir.integer import proves


class NotLiftable(Exception):
    """An op, or a use of one, that index notation does not express; the text says which. It stays eager."""


@dataclass(frozen=True)
class Lifted:
    """`axes[k]` is dimension k; `body` mentions no other free axis."""

    axes: tuple[Axis, ...]
    body: Node

    @property
    def shape(self) -> tuple[Node, ...]:
        return tuple(a.extent for a in self.axes)

    def at(self, indices: tuple[Node, ...]) -> Node:
        """The value at `indices`."""
        return substitute(self.body, dict(zip(self.axes, indices)))


def fresh_axes(shape: tuple[Node, ...]) -> tuple[Axis, ...]:
    return tuple(fresh_axis(extent) for extent in shape)


def positions(axes: tuple[Axis, ...]) -> tuple[Node, ...]:
    return tuple(index(a) for a in axes)


def broadcast_at(value: Lifted, indices: tuple[Node, ...]) -> Node:
    """The value at `indices`, torch's broadcasting applied: trailing dimensions align, extent 1 repeats.

    A symbolic extent never broadcasts: tracing keeps a size that does so at 1."""
    tail = indices[len(indices) - len(value.axes) :]
    return value.at(tuple(Const(0) if a.extent is Const(1) else i for a, i in zip(value.axes, tail)))


def remap(value: Lifted, shape: tuple[Node, ...], mapping) -> Lifted:
    """A view: the value over fresh axes of `shape`, read at `mapping(positions)`."""
    axes = fresh_axes(shape)
    return Lifted(axes, value.at(tuple(mapping(positions(axes)))))


def first_of(start: Node, extent: Node) -> Node:
    """Where a slice begins: a start counted from the end is clamped to the first element."""
    place = position_of(start, extent)
    return place if place is start else apply("maximum", Const(0), place)


def position_of(at: Node, extent: Node) -> Node:
    """One position, counted from the end where it is a negative number."""
    return apply("add", at, extent) if proves("lt", at, Const(0)) else wrapped(at, extent)


def wrapped(i: Node, extent: Node) -> Node:
    """An index from a tensor, or of a sign that sizes decide: torch counts negative ones from the end."""
    if proves("le", Const(0), i):
        return i
    return where(apply("lt", i, Const(0)), apply("add", i, extent), i)


__all__ = [
    "Index",
    "Lifted",
    "NotLiftable",
    "broadcast_at",
    "first_of",
    "fresh_axes",
    "position_of",
    "positions",
    "remap",
    "wrapped",
]
