"""What a kernel computes for one tile, step by step and in the order it is written: what estimates are read off.

A value is known by its node, so that what two definitions share is computed once, as in the emitted text.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch

from rewriter.derive import Definition
from rewriter.derive.factors import is_float_cast, is_running, without_cast
from rewriter.ir import TRUE, Axis, Const, Index, Load, Node, Output, Param, Reduce, Ref
from rewriter.plan.kernel import Dot, KernelPlan, Loop, Skew, Sweep
from rewriter.plan.products import Weighed, operand_dtype, weighed

Key = Hashable
Inner = tuple[tuple[Axis, int], ...]  # axes of the loops around a step inside a tile, with what one turn of each covers


@dataclass(frozen=True)
class Step:
    """One operation on tiles.

    Attributes:
        key: the value that it makes.
        kind: "load", "op" (pointwise), "product" (of matrices), "fold" (a reduction inside the tile) or "store".
        op: which pointwise operation.
        axes: tile axes of the result.
        over: tile axes of all that is worked through: of a product the contracted one too.
        reads: the values it needs; of a product its left and its right operand.
        bytes: of one element of the result; of a product of one element of its operands.
        moves: whether it is done again for every tile of the stream.
        inner: the loops around it inside a tile.
    """

    key: Key
    kind: str
    op: str
    axes: frozenset[Axis]
    over: frozenset[Axis]
    reads: tuple[Key, ...]
    bytes: int
    moves: bool
    inner: Inner = ()


@dataclass
class Tape:
    """The steps of one sweep, or, where `sweep` is None, of what follows the last. `states` are held in registers."""

    sweep: Sweep | None
    steps: list[Step] = field(default_factory=list)
    states: tuple[Definition, ...] = ()


def tapes_of(plan: KernelPlan) -> list[Tape]:
    """A tape per sweep and one for the outputs after them."""
    recorder = _Recorder(plan)
    tapes = [recorder.sweep(s) for s in plan.sweeps]
    return [*tapes, recorder.epilogue()]


class _Recorder:
    """Goes through definitions as the emitter does, and writes steps instead of statements."""

    def __init__(self, plan: KernelPlan):
        self.plan = plan
        self.dots = {d.node: d for d in plan.dots}
        self.loops = {r.node: r for r in plan.loops}
        self.tiles = frozenset(plan.tile_axes)
        self.before: set[Key] = set()  # computed once, ahead of every loop
        self.stream: Axis | None = None
        self.inner: Inner = ()
        self.again = False  # whether what the loops inside a tile load is loaded again for every tile
        self.tape = Tape(None)
        self.known: set[Key] = set()

    def sweep(self, sweep: Sweep) -> Tape:
        self._start(sweep)
        for definition in sweep.definitions:
            self._accumulate(definition)
        for output in sweep.outputs:
            self._store(output)
        return self.tape

    def epilogue(self) -> Tape:
        self._start(None)
        for output in self.plan.outputs:
            self._store(output)
        return self.tape

    def _start(self, sweep: Sweep | None) -> None:
        self.stream, self.known = sweep.stream if sweep else None, set(self.before)
        done = [d for s in self.plan.sweeps[: self._index(sweep)] for d in s.definitions]
        self.tape = Tape(sweep, [], (*done, *(sweep.definitions if sweep else ())))

    def _index(self, sweep: Sweep | None) -> int:
        return self.plan.sweeps.index(sweep) if sweep else len(self.plan.sweeps)

    def _write(
        self,
        key: Key,
        kind: str,
        free: Iterable[Axis],
        reads: Iterable[Key] = (),
        op: str = "",
        over: Iterable[Axis] = (),
        size: int = 4,
        moves: bool | None = None,
    ) -> Key:
        """A step; unless told, it moves where the stream is among its axes."""
        axes = self.tiles & frozenset(free)
        moves = self.again or (self.stream is not None and self.stream in free) if moves is None else moves
        inner = tuple((a, turn) for a, turn in self.inner if a in free or kind == "product")
        step = Step(key, kind, op, axes, axes | (self.tiles & frozenset(over)), tuple(reads), size, moves, inner)
        self.tape.steps.append(step)
        self.known.add(key)
        if not moves and not inner:
            self.before.add(key)
        return key

    # -- values ---------------------------------------------------------------------------------------------------

    def _value(self, node: Node) -> Key | None:
        """The key of a value, None for what costs nothing: sizes, constants, positions."""
        if isinstance(node, (Const, Param, Index)):
            return None
        if is_float_cast(node):
            return self._value(without_cast(node))
        if isinstance(node, Ref):
            return ("state", node.name)
        if node in self.known:
            return node
        match node:
            case Load():
                reads = self._values(*node.index)
                return self._write(node, "load", node.free, reads, size=node.dtype.itemsize)
            case Reduce():
                return self._product(self.dots[node]) if node in self.dots else self._loop(self.loops[node])
        reads = self._values(*node.children)
        op = getattr(node, "op", "where")
        op = "mul" if op == "div" and isinstance(node.args[1], Const) else op
        size = node.dtype.itemsize if node.dtype is torch.bool else 4
        return self._write(node, "op", node.free, reads, op, size=size, moves=self._moves(node))

    def _values(self, *nodes: Node) -> list[Key]:
        return [key for key in map(self._value, nodes) if key is not None]

    def _moves(self, *nodes: Node) -> bool:
        return self.stream is not None and any(self.stream in n.free or is_running(n) for n in nodes)

    def _product(self, dot: Dot) -> Key:
        if dot.skew:
            return self._skewed(dot, dot.skew)
        size = operand_dtype(self.plan, dot.left, dot.right).itemsize
        around = self.inner
        if dot.long:
            self.inner = (*around, (dot.axis, self.plan.sizes[dot.axis]))
            self.again = self._moves(dot.node)
        operands = self._values(dot.left, dot.right)
        self.again = False
        tile = frozenset([dot.rows, dot.columns])
        key = ("product", dot.node) if dot.scale else dot.node
        moves = self._moves(dot.node)
        self._write(key, "product", dot.node.free | tile, operands, over=[*tile, dot.axis], size=size, moves=moves)
        self.inner = around
        if not dot.scale:
            return key
        reads = [key, *self._values(*dot.scale)]
        return self._write(dot.node, "op", dot.node.free, reads, "mul", moves=moves)

    def _skewed(self, dot: Dot, skew: Skew) -> Key:
        """Of all distances of a tile, then of each pair its own."""
        size = operand_dtype(self.plan, dot.left, dot.right).itemsize
        self.again = True
        operands = self._values(dot.left, dot.right)
        self.again = False
        tile, key = frozenset([dot.rows, dot.columns]), ("product", dot.node)
        free = dot.node.free - {skew.rows, skew.stream} | tile
        self._write(key, "product", free, operands, over=[*tile, dot.axis], size=size, moves=True)
        reads = [key, *self._values(*dot.scale)]
        return self._write(dot.node, "op", dot.node.free, reads, "gather", moves=True)

    def _loop(self, loop: Loop) -> Key:
        if loop.whole:
            reads, over = self._values(loop.predicate, loop.body), loop.node.free | {loop.axis}
            return self._write(loop.node, "fold", loop.node.free, reads, over=over, moves=self._moves(loop.node))
        around = self.inner
        self.inner = (*around, (loop.axis, 1))
        reads = self._values(loop.predicate, loop.body)
        free = loop.node.free | {loop.axis}
        turn = ("turn", loop.node)
        self._write(turn, "op", free, reads, "add", moves=self._moves(loop.node))
        self.inner = around
        return self._write(loop.node, "op", loop.node.free, [turn], "result", moves=self._moves(loop.node))

    # -- running reductions -----------------------------------------------------------------------------------------

    def _accumulate(self, definition: Definition) -> None:
        product = weighed(self.plan, definition)
        if product and product.inside:
            self._weigh_inside(definition, product)
            return
        values = product and product.values
        factors = [f for f in definition.rest if f is not values]
        summed = definition.op == "sum"
        weight = self._weight(definition, factors) if summed else self._masked(definition, definition.body)
        state = ("state", definition.name)
        if values is None:
            lanes = frozenset(definition.axes) | ({self.stream} if not self.plan.steps else set())
            self._write(("fold", definition.name), "fold", definition.axes, [weight, state], over=lanes, moves=True)
            return
        size = operand_dtype(self.plan, values).itemsize
        reads = [weight, *self._values(values)]
        key = ("sum", definition.name)
        self._write(key, "product", definition.axes, reads, over=[self.stream], size=size, moves=True)
        if definition.shift:
            self._write(("moved", definition.name), "op", definition.axes, [state], "mul", moves=True)

    def _weigh_inside(self, definition: Definition, product: Weighed) -> None:
        """A product for every position of a loop, onto the same state."""
        has_outer = definition.shift or product.weights
        outer = [self._weight(definition, list(product.weights))] if has_outer else []
        around, self.inner = self.inner, (*self.inner, (product.inside.axis, 1))
        own = self._values(product.own, product.predicate, definition.predicate)
        free = frozenset(definition.axes) & set(self.plan.rows) | {self.stream}
        weight = self._write(("weight", definition.name), "op", free, [*outer, *own], "mul", moves=True)
        reads = [weight, *self._values(product.values)]
        size = operand_dtype(self.plan, product.values).itemsize
        self._write(("sum", definition.name), "product", definition.axes, reads, "", [self.stream], size, True)
        self.inner = around
        if definition.shift:
            state = ("state", definition.name)
            self._write(("moved", definition.name), "op", definition.axes, [state], "mul", moves=True)

    def _masked(self, definition: Definition, node: Node) -> Key:
        """What takes part of a value: it has the stream among its axes."""
        node = without_cast(node)
        key = ("masked", node, definition.predicate)
        if key in self.known:
            return key
        reads = self._values(node, definition.predicate)
        if definition.predicate is TRUE and isinstance(node, (Reduce, Load)):
            return reads[0]
        free = node.free | definition.predicate.free | {self.stream}
        return self._write(key, "op", free, reads, "where", moves=True)

    def _weight(self, definition: Definition, factors: list[Node]) -> Key:
        if definition.shift is None:
            return self._times(definition, [self._masked(definition, f) for f in factors], factors)
        shift = definition.shift
        score = self._masked(definition, shift.exponent)
        key = ("exp", shift.exponent, shift.phi, definition.predicate)
        free = shift.exponent.free | shift.phi.free | definition.predicate.free | {self.stream}
        if key not in self.known:
            reads = [score, *self._values(shift.phi)]
            scaled = self._write(("shifted", key), "op", free, reads, "sub", moves=True)
            self._write(key, "op", free, [scaled], "exp2", moves=True)
        terms = [key]
        if shift.mass:
            reads = [score, *self._values(shift.phi)]
            terms.append(self._write(("lever", definition.name), "op", free, reads, "sub", moves=True))
        return self._times(definition, [*terms, *self._values(*factors)], factors, free)

    def _times(self, definition: Definition, keys: list[Key], factors: list[Node], free=frozenset()) -> Key:
        """The product of factors, element by element."""
        if not keys:
            return self._write(("ones", definition.name), "op", free | {self.stream}, [], "where", moves=True)
        if len(keys) == 1:
            return keys[0]
        free = frozenset(free).union({self.stream}, *(f.free for f in factors))
        return self._write(("weight", definition.name), "op", free, keys, "mul", moves=True)

    def _store(self, output: Output) -> None:
        reads = self._values(output.body)
        moves = self.stream is not None and self.stream in output.over
        self._write(("store", output.name), "store", output.over, reads, size=output.dtype.itemsize, moves=moves)
