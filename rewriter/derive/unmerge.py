"""Rows that one output counts together and another in two axes, counted in two by both: their reductions are the same.

    o[g, m, e] = sum_n p(q[g, m], k[g, n]) · v[g, n, e]
    w[b, h, m, n] = p(q[b * H + h, m], k[b * H + h, n])
        →  o[b, h, m, e] = sum_n p(q[b * H + h, m], ..) · v[b * H + h, n, e], seen as [b * H + h, m, e]

`nn.MultiheadAttention` keeps batch and heads together for the product, and parts them for the weights it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

from rewriter.ir import Axis, Load, Node, Output, apply, fresh_axis, index, substitute, walk


def unmerged(outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """The outputs over as few different counts of rows as they can have."""
    return tuple(_unmerged(o, [p for p in outputs if p is not o]) for o in outputs)


def _unmerged(output: Output, others: list[Output]) -> Output:
    if output.shape:
        return output
    for axis in output.axes:
        for first, second in _pairs(axis, output.body, others):
            return _split(output, axis, first, second)
    return output


def _pairs(axis: Axis, body: Node, others: list[Output]) -> Iterator[tuple[Axis, Axis]]:
    """(x, y) of another output where both read the same dimension of a tensor, this at `axis`, that at x * Y + y; one of
    them may be an axis that is reduced there.
    """
    own = {(n.tensor, d) for n, d, entry in _indices(body) if entry is index(axis)}
    for other in others:
        for entry in (entry for n, d, entry in _indices(other.body) if (n.tensor, d) in own):
            for x, y in permutations(sorted(entry.free, key=lambda a: a.name), 2):
                if entry is _joined(x, y) and apply("mul", x.extent, y.extent) is axis.extent:
                    yield x, y


def _indices(body: Node) -> Iterator[tuple[Load, int, Node]]:
    for node in walk(body):
        if isinstance(node, Load):
            for d, entry in enumerate(node.index):
                yield node, d, entry


def _joined(x: Axis, y: Axis) -> Node:
    return apply("add", apply("mul", index(x), y.extent), index(y))


def _split(output: Output, axis: Axis, first: Axis, second: Axis) -> Output:
    x, y = fresh_axis(first.extent, "b"), fresh_axis(second.extent, "h")
    at = output.axes.index(axis)
    axes = (*output.axes[:at], x, y, *output.axes[at + 1 :])
    shape = tuple(a.extent for a in output.axes)
    return replace(output, axes=axes, body=substitute(output.body, {axis: _joined(x, y)}), shape=shape)
