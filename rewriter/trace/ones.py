"""Example inputs of size 1: which of those sizes may vary?

A traced size of 1 says nothing: it may be a batch of one or a dimension that broadcasts. So they are enlarged on fake tensors,
all that stand at the same position together, then one by one, and what the program still runs with is free to vary.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.trace.effects import unchanged

Dimension = tuple[int, int]  # (which leaf of the arguments, which of its dimensions)
CANDIDATES = (7, 5, 3, 2)
LARGE = 1 << 22  # elements from which inputs are enlarged by as little as possible


def enlarge(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict, frozenset[Dimension]]:
    """(args, kwargs) with the sizes of 1 that may vary enlarged, and the dimensions that must stay 1."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ones = frozenset(
        (k, d) for k, t in enumerate(leaves) if torch.is_tensor(t) for d, n in enumerate(t.shape) if n == 1
    )
    if not ones:
        return args, kwargs, ones
    size = _size(leaves)

    def runs(dims: frozenset[Dimension]) -> bool:
        return _runs(module, *pytree.tree_unflatten(_grown(leaves, dims, size), spec))

    free = _free(ones, runs)
    grown = pytree.tree_unflatten(_grown(leaves, free, size), spec)
    return *grown, ones - free


def _free(ones: frozenset[Dimension], runs: Callable[[frozenset[Dimension]], bool]) -> frozenset[Dimension]:
    free: frozenset[Dimension] = frozenset()
    for position in sorted({d for _, d in ones}):
        group = frozenset(o for o in ones if o[1] == position)
        if runs(free | group):
            free |= group
            continue
        for one in sorted(group):
            if runs(free | {one}):
                free |= {one}
    return free


def _size(leaves: list) -> int:
    """A size that no input has, so that it is not taken for another one."""
    used = {n for t in leaves if torch.is_tensor(t) for n in t.shape}
    total = sum(t.numel() for t in leaves if torch.is_tensor(t))
    order = CANDIDATES[::-1] if total > LARGE else CANDIDATES
    return next((c for c in order if c not in used), 11)


def _grown(leaves: list, dims: frozenset[Dimension], size: int) -> list:
    out = []
    for k, leaf in enumerate(leaves):
        own = [d for j, d in dims if j == k]
        shape = [size if d in own else n for d, n in enumerate(leaf.shape)] if own else None
        out.append(leaf.expand(shape).contiguous() if own else leaf)
    return out


def _runs(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # fake tensors log every failure at length
    try:
        with unchanged(module), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = pytree.tree_map(lambda t: mode.from_tensor(t) if torch.is_tensor(t) else t, (args, kwargs))
            module(*fake[0], **fake[1])
        return True
    except Exception:
        return False
    finally:
        logging.disable(level)
