"""Calls that hand on one of the tensors they read, whatever the others hold."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.lift.values import Lifted, positions
from rewriter.trace.calls import value_inputs


def passed_on(memo: dict[fx.Node, Lifted]) -> dict[fx.Node, fx.Node]:
    """where(0 == 0, a, b) → a        a.masked_fill(0 > 1, b) → a

    By the call, what it hands on. The kernel does not read the others, and so they are no inputs of it.
    """
    found = {node: _same_as(node, memo) for node in memo}
    return {node: source for node, source in found.items() if source is not None}


def _same_as(node: fx.Node, memo: dict[fx.Node, Lifted]) -> fx.Node | None:
    reads = [n for n in value_inputs(node) if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(reads) < 2:
        return None
    return next((n for n in reads if n in memo and _is_alike(n, node) and _is_equal(memo[n], memo[node])), None)


def _is_alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta.get("val")
    return isinstance(y, torch.Tensor) and x.dtype == y.dtype and list(map(str, x.shape)) == list(map(str, y.shape))


def _is_equal(a: Lifted, b: Lifted) -> bool:
    return len(a.axes) == len(b.axes) and a.at(positions(b.axes)) is b.body
