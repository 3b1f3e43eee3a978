"""Reference evaluator: what a program means, in plain torch. For tests and proofs, never for speed."""

from __future__ import annotations

import math

import torch

from rewriter.ir.nodes import (
    TRUE,
    Apply,
    Axis,
    Const,
    Index,
    Load,
    Node,
    Output,
    Param,
    Program,
    Reduce,
    Ref,
    Where,
    open_reduce,
)
from rewriter.ir.ops import MONOIDS, OPS, neutral_of

LIMIT = 10_000_000


class TooLarge(ValueError):
    """The evaluator would make a tensor of more than `LIMIT` elements."""


class Evaluator:
    """Evaluates nodes over a fixed order of axes: every value is a tensor with one dimension per axis (size 1 where
    unused).

    `tensors` maps tensor names to values, `sizes` size names to ints, `refs` definitions to (axes, value). Floating
    arithmetic is done in `dtype` (float64: the reference; float32: what the kernel holds in registers).
    """

    def __init__(
        self,
        tensors: dict,
        sizes: dict[str, int],
        dtype: torch.dtype = torch.float64,
        refs: dict | None = None,
    ):
        self.tensors, self.sizes, self.dtype, self.refs = tensors, sizes, dtype, refs or {}
        self.opened: dict[Reduce, tuple] = {}

    def extent(self, node: Node) -> int:
        """The value of an integer node without free axes."""
        return int(self.value(node, ()).item())

    def output(self, output: Output) -> torch.Tensor:
        """The whole result, one dimension per axis of the output."""
        value = self.value(output.body, output.axes)
        return value.expand(tuple(self.extent(a.extent) for a in output.axes))

    def value(self, node: Node, axes: tuple[Axis, ...]) -> torch.Tensor:
        return self._value(node, axes, {})

    def _value(self, node: Node, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        if node not in memo:
            memo[node] = self._compute(node, axes, memo)
        return memo[node]

    def _fitting(self, node: Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """The operands of a node, once it is known that its value will not be too large."""
        elements = math.prod(map(max, zip(*(v.shape for v in values))))
        if elements > LIMIT:
            raise TooLarge(f"{node!r} has {elements} elements")
        return values

    def _compute(self, node: Node, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        match node:
            case Const():
                return torch.tensor(node.value, dtype=self._held(node.dtype)).reshape((1,) * len(axes))
            case Param():
                return torch.tensor(self.sizes[node.name]).reshape((1,) * len(axes))
            case Index():
                shape = [-1 if a == node.axis else 1 for a in axes]
                return torch.arange(self.extent(node.axis.extent)).reshape(shape)
            case Load():
                return self._gather(self.tensors[node.tensor.name], node, axes, memo)
            case Ref():
                return self._gather(self.refs[node.name], node, axes, memo)
            case Where():
                return torch.where(*self._operands(node, axes, memo))
            case Reduce():
                return self._reduce(node, axes)
        return self._apply(node, self._operands(node, axes, memo))

    def _operands(self, node: Node, axes: tuple[Axis, ...], memo: dict) -> list[torch.Tensor]:
        return self._fitting(node, [self._value(c, axes, memo) for c in node.children])

    def _held(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype.is_floating_point else dtype

    def _gather(self, tensor: torch.Tensor, node: Node, axes: tuple[Axis, ...], memo: dict) -> torch.Tensor:
        tensor = tensor.to(self._held(tensor.dtype))
        if not node.index:
            return tensor.reshape((1,) * len(axes))
        where = self._operands(node, axes, memo)
        where = [torch.where(w < 0, w + n, w).clamp(0, n - 1) for w, n in zip(where, tensor.shape)]
        return tensor[tuple(torch.broadcast_tensors(*where))]

    def _apply(self, node: Apply, args: list[torch.Tensor]) -> torch.Tensor:
        if node.dtype.is_floating_point and node.op != "cast":
            args = [a.to(self.dtype) for a in args]
        return OPS[node.op].torch(*args).to(self._held(node.dtype))

    def _reduce(self, node: Reduce, axes: tuple[Axis, ...]) -> torch.Tensor:
        if node not in self.opened:  # once, or every evaluation would intern new nodes
            self.opened[node] = open_reduce(node)
        bound, predicate, body = self.opened[node]
        inner = axes + bound
        memo: dict = {}
        monoid = MONOIDS[node.op]
        value = self._value(body, inner, memo)
        shape = list(value.shape[: len(axes)]) + [self.extent(a.extent) for a in bound]
        (value,) = self._fitting(node, [value.expand(shape)])
        if predicate is not TRUE:
            neutral = torch.tensor(neutral_of(node.op, value.dtype), dtype=value.dtype)
            value = torch.where(self._value(predicate, inner, memo), value, neutral)
        for _ in bound:
            value = monoid.torch(value, -1)
        return value


def evaluate(program: Program, tensors: dict, sizes: dict[str, int], dtype: torch.dtype = torch.float64) -> dict:
    """Every output by name. Raises TooLarge rather than filling the memory."""
    evaluator = Evaluator(tensors, sizes, dtype)
    return {o.name: evaluator.output(o) for o in program.outputs}
