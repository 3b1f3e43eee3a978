"""Programs evaluated at a few positions, with tensors that are never stored.

A proof needs no data, only values that differ: every `Load` is a pseudo-random function of its tensor's name and its
index, so that long and wide programs cost no more than the positions asked for.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from rewriter.derive.shared import form_of
from rewriter.ir import Apply, Axis, Index, Load, Node, Output, Param, Reduce, Ref
from rewriter.ir.evaluate import Evaluator

_ODD = 0x2545F4914F6CDD1D
_BITS = 1 << 40


@dataclass(frozen=True)
class Values:
    """What loads give: floats in [low, high), integers from `pool`, and -inf now and then in the tensors `masks`.

    truth: what all booleans are, where they are one: rows that see nothing.
    numbered: tensors of floats that are integers from `pool` too."""

    seed: int
    low: float
    high: float
    pool: tuple[int, ...]
    masks: frozenset[str] = frozenset()
    truth: bool | None = None
    numbered: frozenset[str] = frozenset()

    def of(self, name: str, own: torch.dtype, index: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The values of a tensor at broadcast integer positions."""
        return _values_at(self, name, own, dtype, tuple(map(_Positions, index)))


class _Positions:
    """An index as a key: equal where shapes and values are."""

    def __init__(self, index: torch.Tensor):
        self.index = index
        self.key = tuple(index.shape), index.numpy().tobytes()

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: _Positions) -> bool:
        return self.key == other.key


@lru_cache(maxsize=32)
def _values_at(
    values: Values, name: str, own: torch.dtype, dtype: torch.dtype, index: tuple[_Positions, ...]
) -> torch.Tensor:
    """Kept, since every reduction of a sweep asks for those of its block."""
    bits = _bits_at(zlib.crc32(name.encode()) + (values.seed << 32), index)
    if own is torch.bool:
        return bits % 2 == 0 if values.truth is None else torch.full_like(bits, values.truth, dtype=torch.bool)
    if not own.is_floating_point:
        return torch.tensor(values.pool)[bits % len(values.pool)]
    if name in values.numbered:
        return torch.tensor(values.pool, dtype=dtype)[bits % len(values.pool)]
    value = values.low + (values.high - values.low) * (bits & (_BITS - 1)).to(dtype) / _BITS
    if name in values.masks:
        value = torch.where((bits >> 41) % 3 == 0, -math.inf, value)
    return value


@lru_cache(maxsize=32)
def _bits_at(start: int, index: tuple[_Positions, ...]) -> torch.Tensor:
    """62 well-mixed bits per position (64-bit products wrap around)."""
    mixed = torch.tensor(start)
    for k, position in enumerate(index):
        mixed = (mixed + position.index * (2 * k + 1)) * _ODD
        mixed = mixed ^ (mixed >> 29)
    mixed = mixed * _ODD
    return (mixed ^ (mixed >> 32)) & ((1 << 62) - 1)


class Sampled(Evaluator):
    """An evaluator that sees only the positions `at` of an axis, and notes the truth values of integer comparisons.

    `state` holds values of a chain's definitions: over the axes in `rows[name]`, at the positions that `at` had when
    the evaluator was made. Evaluators that share `opened` share the bound axes of reductions. Reductions whose forms
    are in `shared` are tensors, too: of values such as they have at the ends of their axes.
    """

    def __init__(
        self,
        values: Values,
        sizes: dict,
        at: dict[Axis, torch.Tensor],
        rows: dict[str, tuple[Axis, ...]],
        opened: dict,
        shared: frozenset[Node] = frozenset(),
    ):
        super().__init__({}, sizes)
        self.values, self.at, self.held_at, self.rows, self.opened = values, at, dict(at), rows, opened
        self.shared = shared
        self.ends: dict[Node, tuple[float, float] | None] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.seen: dict[Node, set[bool]] = {}

    def length(self, axis: Axis) -> int:
        return len(self.at[axis]) if axis in self.at else self.extent(axis.extent)

    def output(self, output: Output) -> torch.Tensor:
        value = self.value(output.body, output.axes)
        return value.expand(tuple(map(self.length, output.axes)))

    def _compute(self, node: Node, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        match node:
            case Index() if node.axis in self.at:
                return self.at[node.axis].reshape([-1 if a == node.axis else 1 for a in axes])
            case Load():
                index = self._operands(node, axes, memo) if node.index else []
                found = self.values.of(node.tensor.name, node.dtype, index, self._held(node.dtype))
                return found.reshape((1,) * len(axes)) if not index else found
            case Ref():
                return self._of_state(node, axes, memo)
            case Reduce() if self.shared and form_of(node)[0] in self.shared:
                return self._drawn(node, axes, memo)
            case Param() if node.dtype.is_floating_point:
                return torch.tensor(self.sizes[node.name], dtype=self.dtype).reshape((1,) * len(axes))
        return super()._compute(node, axes, memo)

    def _drawn(self, node: Reduce, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        """A reduction's value, were it a tensor indexed by its free axes."""
        form, free = form_of(node)
        if form not in self.ends:
            self.ends[form] = self._range(form)
        low, high = self.ends[form]
        values = replace(self.values, low=low, high=high, masks=frozenset())
        positions = [self._value(Index(a), axes, memo) for a in free]
        found = values.of(repr(form), node.dtype, positions, self.dtype)
        return found if free else found.reshape((1,) * len(axes))

    def _range(self, form: Node) -> tuple[float, float]:
        """The least and the largest of what a reduction gives at the ends of its free axes."""
        axes = form_of(form)[1]
        at = {a: torch.tensor(sorted({0, self.extent(a.extent) - 1})) for a in axes}
        found = Sampled(self.values, self.sizes, at, {}, self.opened).value(form, axes)
        found = found[found.isfinite()]
        low, high = (found.min().item(), found.max().item()) if found.numel() else (self.values.low, self.values.high)
        return (low, high) if low < high else (0.5 * low, low)

    def _of_state(self, node: Ref, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        held = self.state[node.name]
        if not node.index:
            return held.reshape((1,) * len(axes))
        wanted = self._operands(node, axes, memo)
        found = [torch.searchsorted(self.held_at[a], w) for a, w in zip(self.rows[node.name], wanted)]
        return held[tuple(torch.broadcast_tensors(*found))]

    def _apply(self, node: Apply, args: list[torch.Tensor]) -> torch.Tensor:
        if node.op == "round16":  # as a cast: a proof is about exact values, rounding has rules of its own
            return args[0]
        value = super()._apply(node, args)
        if is_comparison(node):
            self.seen.setdefault(node, set()).update(
                value.flatten()[:1].tolist(), {bool(value.all()), bool(value.any())}
            )
        return value


def is_comparison(node: Node) -> bool:
    """An order or equality of integers: what masks are made of."""
    return (
        isinstance(node, Apply)
        and node.op in ("lt", "le", "eq", "ne")
        and not any(a.dtype.is_floating_point or a.dtype is torch.bool for a in node.args)
    )
