"""Example inputs of size 1: which of those sizes may vary?

A traced size of 1 says nothing: it may be a batch of one or a dimension that broadcasts. So they are enlarged on fake
tensors, all that stand at the same position together, then one by one, and what the program still runs with is free
to vary. A free one may still be 1 while its like are not, where the program makes the same calls then: a mask that
all of a batch shares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rewriter.trace.contexts import fake_tensors

Dimension = tuple[int, int]  # (which leaf of the arguments, which of its dimensions)
CANDIDATES = (7, 5, 3, 2)
LARGE = 1 << 22  # elements from which inputs are enlarged by as little as possible
RESHAPES = ("view", "reshape", "expand", "unflatten")


@dataclass(frozen=True)
class Enlarged:
    """Arguments with the sizes of 1 that may vary enlarged: `grown`; those `kept` must stay 1."""

    args: tuple
    kwargs: dict[str, Any]
    grown: frozenset[Dimension]
    kept: frozenset[Dimension]


def enlarge(module: Callable, args: tuple, kwargs: dict[str, Any], bound: Collection[Dimension] = ()) -> Enlarged:
    """Enlarges every size of 1 with which the program still runs, but those that are `bound` to what they are."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ones = frozenset(
        (k, d) for k, t in enumerate(leaves) if torch.is_tensor(t) for d, n in enumerate(t.shape) if n == 1
    ).difference(bound)
    if not ones:
        return Enlarged(args, kwargs, ones, ones)
    size = _size(leaves)

    def runs(dims: frozenset[Dimension]) -> bool:
        return _run(module, *pytree.tree_unflatten(_grown(leaves, dims, size), spec)) is not None

    free = _free(ones, runs)
    grown = pytree.tree_unflatten(_grown(leaves, free, size), spec)
    return Enlarged(*grown, free, ones - free)


def _free(ones: frozenset[Dimension], runs: Callable[[frozenset[Dimension]], bool]) -> frozenset[Dimension]:
    """Each position together where that runs; then one by one as long as that frees more: one may wait for another."""
    free: frozenset[Dimension] = frozenset()
    for position in sorted({d for _, d in ones}):
        group = frozenset(o for o in ones if o[1] == position)
        free |= group if runs(free | group) else frozenset()
    while more := next((o for o in sorted(ones - free) if runs(free | {o})), None):
        free |= {more}
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


def loose(module: Callable, args: tuple, kwargs: dict, dims: frozenset[Dimension]) -> frozenset[Dimension]:
    """Those of `dims` which alone may be 1: the program makes the same calls then, and results of the same shape."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    usual = _run(module, args, kwargs) if dims else None

    def is_loose(dim: Dimension) -> bool:
        narrowed = [t.narrow(dim[1], 0, 1) if k == dim[0] else t for k, t in enumerate(leaves)]
        return _same(usual, _run(module, *pytree.tree_unflatten(narrowed, spec)))

    return frozenset(filter(is_loose, dims)) if usual else frozenset()


@dataclass(frozen=True)
class _Call:
    """A call of a torch function: its numbers, and the shapes of the tensors it is given."""

    function: Callable
    numbers: tuple
    shapes: tuple

    def is_like(self, other: _Call) -> bool:
        """The same numbers, too, but where one shape is changed into another."""
        reshapes = getattr(self.function, "__name__", "") in RESHAPES and self.shapes != other.shapes
        return self.function == other.function and (reshapes or self.numbers == other.numbers)


class _Recorder(TorchFunctionMode):
    """Notes every call of a torch function."""

    def __init__(self):
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        shapes = tuple(tuple(t.shape) for t in leaves if torch.is_tensor(t))
        self.calls.append(_Call(function, tuple(x for x in leaves if not torch.is_tensor(x)), shapes))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Run:
    """What a program called, and the shapes of what it returned."""

    calls: tuple[_Call, ...]
    results: tuple


def _same(usual: _Run, other: _Run | None) -> bool:
    if other is None or usual.results != other.results or len(usual.calls) != len(other.calls):
        return False
    return all(a.is_like(b) for a, b in zip(usual.calls, other.calls))


def _run(module: Callable, args: tuple, kwargs: dict) -> _Run | None:
    """What happens with fake tensors; None where that fails."""
    try:
        with fake_tensors() as mode:
            fake = pytree.tree_map(lambda t: mode.from_tensor(t) if torch.is_tensor(t) else t, (args, kwargs))
            with _Recorder() as recorder:
                out = module(*fake[0], **fake[1])
        shapes = (tuple(x.shape) if torch.is_tensor(x) else x for x in pytree.tree_leaves(out))
        return _Run(tuple(recorder.calls), tuple(shapes))
    except Exception:
        return None
