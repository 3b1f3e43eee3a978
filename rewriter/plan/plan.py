"""From a chain to a kernel plan: roles of axes from who reads what, tile sizes from the features' width."""

from __future__ import annotations

import re

import torch

from rewriter.derive import Chain
from rewriter.derive.factors import as_product, depends_on, multiply
from rewriter.ir import Axis, Const, Load, Node, Param, Reduce, const, open_reduce, walk
from rewriter.plan.kernel import Config, Dot, KernelPlan, padded

MAX_FEATURE = 256


class NotPlannable(Exception):
    """No kernel shape fits the chain; the text says what is missing."""


class NeedsFixed(Exception):
    """Sizes that must be known before a kernel is written: axes it keeps whole."""

    def __init__(self, sizes: frozenset[Param]):
        super().__init__(f"sizes {sorted(s.name for s in sizes)} must be fixed")
        self.sizes = sizes


def plan(chain: Chain, name: str) -> KernelPlan:
    """One kernel for the whole chain. Raises NotPlannable."""
    axes = max((o.axes for o in chain.outputs), key=len)
    contractions = _contractions(chain)
    outputs_features = _features(chain, axes, contractions)
    row = _row(chain, axes, contractions, outputs_features)
    dots = tuple(_dot(node, row, chain.stream) for node in contractions)
    features = (*dict.fromkeys(d.axis for d in dots), *outputs_features)
    free = _to_be_fixed(chain, features)
    if free:
        raise NeedsFixed(free)
    for axis in features:
        if axis.extent.value > MAX_FEATURE:
            raise NotPlannable(f"a feature axis of {axis.extent.value} is wider than {MAX_FEATURE}")
    grid = tuple(a for a in axes if a is not row and a not in outputs_features)
    dtype = _operand_dtype(chain)
    config = _config(max((padded(f) for f in features), default=16), dtype)
    return KernelPlan(name, chain, grid, row, chain.stream, features, dots, config, dtype)


def _to_be_fixed(chain: Chain, features: tuple[Axis, ...]) -> frozenset[Param]:
    """Symbols in the extents of features, and those the program took a float of (`<sqrt(s3)>`)."""
    roots = [n for d in chain.definitions for n in (d.predicate, d.body)] + [o.body for o in chain.outputs]
    floats = [n.name for n in walk(*roots) if isinstance(n, Param) and n.dtype.is_floating_point]
    symbols = {Param(name) for text in floats for name in re.findall(r"\b[a-z]+\d+\b", text)}
    return frozenset(n for a in features for n in walk(a.extent) if isinstance(n, Param)) | symbols


def _contractions(chain: Chain) -> list[Reduce]:
    """Reductions inside the definitions' bodies; each becomes a matrix product of tiles."""
    roots = [n for d in chain.definitions for n in (d.predicate, d.body)]
    found = [n for n in walk(*roots) if isinstance(n, Reduce)]
    if any(isinstance(m, Reduce) for n in found for m in walk(n.body)):
        raise NotPlannable("a reduction inside another that is no plain contraction")
    return found


def _features(chain: Chain, axes: tuple[Axis, ...], contractions: list[Reduce]) -> tuple[Axis, ...]:
    """Output axes that only the last operand (the values) and the epilogue carry."""
    scored = frozenset().union(
        *(c.free for c in contractions), *(d.predicate.free for d in chain.definitions)
    )
    for definition in chain.definitions:
        scored |= frozenset().union(
            *(f.free for f in definition.rest if not _is_operand(f, chain)), frozenset()
        )
        if definition.shift:
            scored |= definition.shift.exponent.free | definition.shift.phi.free
        if definition.op != "sum":
            scored |= definition.body.free
    return tuple(a for a in axes if a not in scored)[-1:]


def _is_operand(factor: Node, chain: Chain) -> bool:
    """A factor read from memory along the stream: the values of a weighted sum."""
    return not any(isinstance(n, Reduce) for n in walk(factor)) and depends_on(factor, chain.stream)


def _row(
    chain: Chain, axes: tuple[Axis, ...], contractions: list[Reduce], features: tuple[Axis, ...]
) -> Axis:
    """The axis of a score tile that the stream's own operands lack: their tile is reused by every row."""
    candidates = [a for a in axes if a not in features]
    for axis in list(candidates):
        if any(
            axis in load.free and depends_on(load, chain.stream) for load in _operands(chain, contractions)
        ):
            candidates.remove(axis)
    if not candidates:
        raise NotPlannable("every row axis is also an axis of the streamed operands: nothing is reused")
    return max(candidates, key=lambda a: (not isinstance(a.extent, Const), _extent(a), axes.index(a)))


def _extent(axis: Axis) -> int:
    return int(axis.extent.value) if isinstance(axis.extent, Const) else 0


def _operands(chain: Chain, contractions: list[Reduce]) -> list[Load]:
    """Loads inside contractions, and those of the weighted sums' values."""
    out = [n for c in contractions for n in walk(c.body) if isinstance(n, Load)]
    for definition in chain.definitions:
        for factor in definition.rest:
            if _is_operand(factor, chain) and not (factor.free & _score_only(chain, contractions)):
                out += [n for n in walk(factor) if isinstance(n, Load)]
    return out


def _score_only(chain: Chain, contractions: list[Reduce]) -> frozenset[Axis]:
    """Axes of the scores that only the left operands of contractions carry."""
    out: set[Axis] = set()
    for contraction in contractions:
        loads = [n for n in walk(contraction.body) if isinstance(n, Load)]
        streamed = frozenset().union(frozenset(), *(n.free for n in loads if depends_on(n, chain.stream)))
        out |= contraction.free - streamed
    return frozenset(out)


def _dot(node: Reduce, row: Axis, stream: Axis) -> Dot:
    if node.op != "sum" or len(node.axes) != 1:
        raise NotPlannable(f"an inner {node.op} over {len(node.axes)} axes")
    (axis,), _, body = open_reduce(node)
    product = as_product(body)
    if product.under:
        raise NotPlannable("a contraction with a division inside")
    left = [f for f in product.over if axis in f.free and not depends_on(f, stream)]
    right = [f for f in product.over if axis in f.free and depends_on(f, stream)]
    scale = tuple(f for f in product.over if axis not in f.free)
    if not right or any(row in f.free for f in right) or any(depends_on(f, stream) for f in scale):
        raise NotPlannable("a contraction that is no product of a row operand and a stream operand")
    return Dot(node, axis, multiply(left) or const(1.0), multiply(right), scale)


def _operand_dtype(chain: Chain) -> torch.dtype:
    """The widest floating type among what is loaded along features."""
    floats = [t.dtype for t in chain.tensors if t.dtype.is_floating_point]
    return max(floats, key=lambda d: d.itemsize) if floats else torch.float32


def _config(width: int, dtype: torch.dtype) -> Config:
    """Tiles that fit registers and shared memory of an sm_80 or newer at this feature width; 16-bit ones as swept on an H200."""
    if dtype is torch.float32:
        return Config(64, 32, 4, 2) if width <= 64 else Config(32, 32, 4, 1)
    if width <= 64:
        return Config(128, 64, 8, 3)
    if width <= 128:
        return Config(128, 64, 4, 2)
    return Config(64, 32, 4, 2)
