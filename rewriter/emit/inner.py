"""Reductions inside a tile's values: matrix products, whole or block by block, and loops for what is none."""

from __future__ import annotations

import math

import torch

from rewriter.derive.factors import without_cast
from rewriter.emit.expr import ATOM, TRITON_DTYPES, NotEmittable, Text, operand, spread, spread_argument, widened
from rewriter.emit.names import Names
from rewriter.emit.origins import Origins
from rewriter.emit.scope import Line, Scope
from rewriter.emit.values import Values
from rewriter.ir import TRUE, Axis, Const, Index, Load, Node, Reduce, walk
from rewriter.ir.ops import MONOIDS, neutral_of
from rewriter.plan import Dot, KernelPlan, Loop
from rewriter.plan.kernel import Skew
from rewriter.plan.products import operand_dtype
from rewriter.plan.states import held_dtype
from rewriter.plan.unroll import TURNS_OF_ALL

INTO = {
    "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})",
    "any": "{0} | {1}",
    "all": "{0} & {1}",
    "sum": "{0} + {1}",
    "prod": "{0} * {1}",
}
FOLD = {"max": "tl.max({0}, {1})", "min": "tl.min({0}, {1})", "sum": "tl.sum({0}, {1})"}
FOLD["prod"] = "tl.reduce({0}, {1}, product)"


class Inner(Values):
    """Writes contractions."""

    def __init__(self, plan: KernelPlan, names: Names, origins: Origins):
        super().__init__(plan, names, origins)
        self.lanes: dict[Skew, str] = {}

    def _reduction(self, node: Reduce, scope: Scope) -> Text:
        if node in self.dots:
            return self._dot(self.dots[node], scope)
        if node in self.loops:
            return self._loop(self.loops[node], scope)
        raise NotEmittable(f"a {node.op} in the epilogue")

    def _dot(self, dot: Dot, scope: Scope) -> Text:
        tile = (dot.skew.rows, dot.skew.stream) if dot.skew else (dot.rows, dot.columns)
        code = self._written(dot, scope)
        if not dot.scale:
            return Text(code, tile)
        scale = [self.value(f, scope) for f in dot.scale]
        axes = self._joined([Text(code, tile), *scale])
        factors = " * ".join(operand(t, axes, 6) for t in scale)
        return Text(f"{code} * {factors}", axes, 6)

    def _written(self, dot: Dot, scope: Scope) -> str:
        if dot.skew:
            return self._skewed_product(dot, dot.skew, scope)
        return self._long_product(dot, scope) if dot.long else self._product(dot, scope)

    def _skewed_product(self, dot: Dot, skew: Skew, scope: Scope) -> str:
        """A contraction for all distances of a tile, of which each pair of a row and a position takes its own."""
        rows, stream, t = (self.names.axes[a] for a in (skew.rows, skew.stream, skew.axis))
        block, first = self.block(skew.axis), self.value(skew.rows.extent, self.prologue).tight(5)
        inner = Scope(scope, skew.axis)
        start = f"{scope.start_of(skew.stream)} - start_{rows} + {first} - {self.block(skew.rows)}"
        inner.lines.append(Line(f"offs_{t} = {start} + tl.arange(0, {block})", f"[{block}]"))
        product, name = self._product(dot, inner), self.names.unique("qt")
        inner.lines.append(Line(f"{name} = {product}", self.shape((dot.rows, dot.columns))))
        scope.lines += inner.lines
        if dot.rows is skew.rows:
            return f"tl.gather({name}, {self._lanes_of(skew)}, 1)"
        return f"tl.trans(tl.gather({name}, tl.trans({self._lanes_of(skew)}), 1))"

    def _lanes_of(self, skew: Skew) -> str:
        """Where among a tile's distances that of each pair is: the same in every tile."""
        if skew not in self.lanes:
            self.lanes[skew] = self.names.unique("lanes")
            of_rows, of_stream = (f"tl.arange(0, {self.block(a)})" for a in (skew.rows, skew.stream))
            code = f"{of_stream}[None, :] - {of_rows}[:, None] + {self.block(skew.rows)} - 1"
            self.prologue.lines.append(Line(f"{self.lanes[skew]} = {code}", self.shape((skew.rows, skew.stream))))
        return self.lanes[skew]

    def _product(self, dot: Dot, scope: Scope, onto: str = "") -> str:
        stored = operand_dtype(self.plan, dot.left, dot.right)
        left = self._tile_operand(dot.left, (dot.rows, dot.axis), scope, stored)
        right = self._tile_operand(dot.right, (dot.columns, dot.axis), scope, stored)
        mode = self._precision(stored)
        if "tf32" in mode:
            left, right = self.nearest(left), self.nearest(right)
        return f"tl.dot({left}, tl.trans({right}){onto}{mode})"

    def _long_product(self, dot: Dot, scope: Scope) -> str:
        """A contraction too long for one tile, in blocks."""
        name, d = self.names.unique("qk"), self.names.axes[dot.axis]
        shape, extent, block = self.shape((dot.rows, dot.columns)), dot.axis.extent.value, self.block(dot.axis)
        scope.lines.append(Line(f"{name} = tl.zeros({shape}, tl.float32)", shape))
        inner = Scope(scope, dot.axis)
        inner.lines.append(Line(f"offs_{d} = start_{d} + tl.arange(0, {block})", f"[{block}]"))
        product = self._product(dot, inner, f", {name}")
        inner.lines.append(Line(f"{name} = {product}", shape))
        self._nest(scope, f"for start_{d} in range(0, {extent}, {block}):", inner)
        return name

    def _loop(self, loop: Loop, scope: Scope) -> Text:
        """⊕ over one axis, or over several, position by position or over a whole tile."""
        if loop.whole:
            return self._folded_whole(loop, scope)
        loops, scopes = self._nested(loop), [scope]
        for each in loops:
            scopes.append(Scope(scopes[-1], each.axis))
        value = self._kept(loops[-1], scopes[-1])
        name = self.names.unique("s")
        shape = self.shape(value.axes)
        held = held_dtype(loops[-1].body)
        start = f"tl.full({shape or '[]'}, {neutral_text(loop.node.op, held)}, {TRITON_DTYPES[held]})"
        scope.lines.append(Line(f"{name} = {start}", shape))
        scopes[-1].lines.append(Line(f"{name} = {INTO[loop.node.op].format(name, value.tight(6))}", shape))
        for each, around, inner in reversed(list(zip(loops, scopes, scopes[1:]))):
            extent = self.value(each.axis.extent, self.prologue).code
            self._nest(around, f"for {self.names.axes[each.axis]} in {self._counted(each)}(0, {extent}):", inner)
        return Text(name, value.axes)

    def _counted(self, loop: Loop) -> str:
        """What a loop is counted by. One that was short in the example is written out where it is so at the call, too:
        a kernel of hundreds of turns takes minutes to compile.
        """
        if not loop.unrolled:
            return "range"
        loops = [loop, *(self.loops[n] for n in walk(loop.body) if n in self.loops)]
        extents = [axis.extent for axis in dict.fromkeys(each.axis for each in loops if each.unrolled)]
        if all(isinstance(e, Const) for e in extents):
            return "tl.static_range"
        turns = " * ".join(self.value(e, self.prologue).tight(6) for e in extents)
        return f"(tl.static_range if {turns} <= {TURNS_OF_ALL} else tl.range)"

    def _nested(self, loop: Loop) -> list[Loop]:
        """A loop and those inside it that can go on with what it holds: sum_r sum_g x → sum_{r, g} x"""
        body = without_cast(loop.body)
        inner = self.loops.get(body)
        goes_on = inner and inner.node.op == loop.node.op and not inner.whole and loop.predicate is TRUE
        if not goes_on or self.uses[body] > 1 or loop.axis not in body.free:
            return [loop]
        return [loop, *self._nested(inner)]

    def _folded_whole(self, loop: Loop, scope: Scope) -> Text:
        """Lanes past the axis's end, which pad it, take no part."""
        value = self._kept(loop, scope)
        axes = self._joined([value, Text("", (loop.axis,))])
        (value,) = widened([value], calls=True)
        code = spread_argument(value, axes)
        if self.plan.padded(loop.axis) != loop.axis.extent.value:
            neutral = neutral_text(loop.node.op, held_dtype(loop.body))
            inside = spread(self._position(loop.axis), axes)
            code = f"tl.where({inside} < {loop.axis.extent.value}, {code}, {neutral})"
        at = axes.index(loop.axis)
        return Text(FOLD[loop.node.op].format(code, at), axes[:at] + axes[at + 1 :])

    def _kept(self, loop: Loop, inner: Scope) -> Text:
        value = self.value(loop.body, inner)
        if loop.predicate is TRUE:
            return value
        keep = self.value(loop.predicate, inner)
        axes = self._joined([keep, value])
        neutral = neutral_text(loop.node.op, held_dtype(loop.body))
        parts = (spread_argument(keep, axes), spread_argument(as_held(value, loop.body), axes), neutral)
        return Text(f"tl.where({', '.join(parts)})", axes)

    def _precision(self, stored: torch.dtype) -> str:
        """fp32 products of an fp32 program are never rounded to tf32. What earlier kernels of a 16-bit one hand on is:
        eager rounds it at least as much.
        """
        if stored is not torch.float32:
            return ""
        return f', input_precision="{"ieee" if self.plan.dtype is torch.float32 else "tf32"}"'

    def nearest(self, code: str) -> str:
        """An operand of a tf32 product, rounded: a tensor core would cut it off."""
        self.helpers.add("to_tf32")
        return f"to_tf32({code})"

    def _nest(self, scope: Scope, header: str, inner: Scope) -> None:
        scope.lines.append(Line(header))
        scope.lines += [Line(f"    {x.code}", x.shape, x.source) for x in inner.lines]

    def _tile_operand(self, node: Node, axes: tuple[Axis, ...], scope: Scope, stored: torch.dtype) -> str:
        """A two-dimensional operand of `tl.dot`, in the type the tensors are stored in."""
        text = self.value(node, scope)
        if text.axes != axes:
            raise NotEmittable("a contraction whose operand is no tile of two dimensions")
        if isinstance(node, Load) and node.dtype is stored:
            return text.code
        return f"{text.tight(ATOM)}.to({TRITON_DTYPES[stored]})"


def as_held(text: Text, body: Node) -> Text:
    """A whole number as wide as the neutral element it may be replaced by."""
    if body.dtype.is_floating_point or body.dtype is torch.bool or isinstance(body, Index):
        return text
    return Text(f"{text.tight(ATOM)}.to({TRITON_DTYPES[held_dtype(body)]})", text.axes) if text.axes else text


def neutral_text(op: str, dtype: torch.dtype) -> str:
    """The neutral element of ⊕ in a kernel."""
    neutral = neutral_of(op, dtype)
    if dtype.is_floating_point:
        return {-math.inf: "NEG_INF", math.inf: "POS_INF"}.get(neutral, str(float(neutral)))
    return str(neutral)


__all__ = ["FOLD", "INTO", "MONOIDS", "Inner", "as_held", "held_dtype", "neutral_text"]
