"""Writes the statements of one kernel: its sweeps over streams, what each accumulates, and what is stored."""

from __future__ import annotations

import torch

from rewriter.derive import Definition
from rewriter.derive.chain import moments_first
from rewriter.derive.factors import multiply, without_cast
from rewriter.emit.bits import decay, in_bits, less, maxima_in_bits, maxima_that_shift
from rewriter.emit.expr import ATOM, TRITON_DTYPES, NotEmittable, Text, operand, spread, spread_argument, widened
from rewriter.emit.fills import left_of, written_low
from rewriter.emit.inner import FOLD, INTO, Inner, as_held, held_dtype, neutral_text
from rewriter.emit.names import Names
from rewriter.emit.origins import Origins
from rewriter.emit.scale import times, without_scale
from rewriter.emit.scope import Line, Scope
from rewriter.emit.span import Span, written_span
from rewriter.emit.weights import fits_half, is_bounded
from rewriter.ir import TRUE, Apply, Axis, Const, Node, Output, Param, Where, const
from rewriter.plan import KernelPlan, Sweep
from rewriter.plan.products import Weighed, operand_dtype, weighed


class Writer(Inner):
    """Fills `prologue`, the segments of every sweep, what stands between them and the epilogue; templates only lay
    them out.

    Full tiles of a stream need no bounds; only the last one, where the stream does not fill it, has them.
    """

    def __init__(self, plan: KernelPlan, names: Names, origins: Origins):
        super().__init__(plan, names, origins)
        self.loop = Scope()
        self.lowest, self.in_bits = maxima_that_shift(plan), maxima_in_bits(plan, self.half)
        self.sweep: Sweep | None = None
        self.means: dict[Node, tuple[Text, Text]] = {}  # means and weights before a tile, by the mean
        self.segments: list[dict[str, list[Line]]] = []
        self.spans: list[Span | None] = []
        self.low: list[str] = []  # whether what fills leave out is needed after all
        self.definitions: tuple[Definition, ...] = ()  # as they are in a segment
        self.before: list[Scope] = []  # straight-line code before each sweep
        self.epilogue = self.prologue

    def write(self) -> None:
        straight = self.prologue
        for sweep in self.plan.sweeps:
            self.sweep = sweep
            self.before.append(straight)
            bounds = (sweep.support or sweep.part) and not sweep.map
            self.spans.append(written_span(self, sweep, straight) if bounds else None)
            self.segments.append({})
            for name in self.plan.segments(sweep):
                self._write_segment(name, straight)
            self.low.append(written_low(self, sweep.fill) if sweep.fill else "")
            straight = Scope(straight)
        self.epilogue = straight
        for output in self.plan.outputs:
            self._store(output, self.epilogue)

    def every_line(self) -> list[Line]:
        """All that was written."""
        loops = [line for segments in self.segments for lines in segments.values() for line in lines]
        empty = [line for sweep in self.plan.sweeps for line in self.initial(sweep)]
        straight = [line for scope in (*self.before, self.epilogue) for line in scope.lines]
        return [*straight, *empty, *loops]

    def initial(self, sweep: Sweep) -> list[Line]:
        """The empty state: the neutral element of every reduction, or what does as well."""
        out = []
        for definition in sweep.definitions:
            axes = self.tile(definition.axes)
            shape = ", ".join(self.block(a) for a in axes)
            empty = "LOWEST" if definition.name in self.lowest else self._neutral(definition)
            code = f"{self.names.state[definition.name]} = tl.full([{shape}], {empty}, {self._held(definition)})"
            out.append(Line(code, self.shape(axes)))
        return out

    def _neutral(self, definition: Definition) -> str:
        return neutral_text(definition.op, held_dtype(definition.body))

    def _held(self, definition: Definition) -> str:
        return TRITON_DTYPES[held_dtype(definition.body)]

    def _write_segment(self, name: str, straight: Scope) -> None:
        """One form of a loop's body. Both use the same names, so that a reader sees what differs."""
        taken, holders, known = set(self.names.taken), dict(self.holders), set(straight.known)
        whole = name == "full" and self.sweep.has_whole_tiles
        start = self._tail_start if name == "tail" else "start"
        self.loop = Scope(straight, self.sweep.stream, tail=name != "full", is_sweep=True, whole=whole, start=start)
        self.definitions = self.sweep.definitions_in(name)
        self.means = {}
        for definition in self.definitions:
            self._note_mean(definition)
        for definition in moments_first(self.definitions):
            self._accumulate(definition)
        for output in self.sweep.outputs:
            self._store(output, self.loop)
        for definition in self.definitions:
            self._advance(definition)
        self.segments[-1][name] = self.loop.lines
        if self.sweep.short:
            return  # straight-line code: its variables stay
        straight.assign_after(self.names.taken - taken)
        hoisted = {t.code for n, t in straight.known.items() if n not in known}
        self.names.taken = taken | {c for c in hoisted if c.isidentifier()}
        self.holders = holders | {k: v for k, v in self.holders.items() if v[1] is straight}

    def _predicate(self, definition: Definition) -> Node:
        return TRUE if self.loop.whole else definition.predicate

    def _keep(self, definition: Definition, axes: tuple[Axis, ...]) -> str:
        """Which positions of a tile take part: the stream's tail and the definition's predicate."""
        stream = self.sweep.stream
        if self.plan.steps:
            return spread_argument(self.value(self._predicate(definition), self.loop), axes)
        position, limit = self._position(stream), self.value(stream.extent, self.prologue)
        inside = f"{spread(position, axes)} < {limit.tight(5)}"
        if self._predicate(definition) is TRUE:
            return inside
        keep = self.value(self._predicate(definition), self.loop)
        if not self.loop.tail:
            return spread_argument(keep, axes)
        return f"({inside}) & {operand(keep, axes, 5)}"

    def _masked(self, node: Node, definition: Definition, neutral: str) -> Text:
        """`where(keep, node, neutral)`, written once for a node and a predicate."""
        node = without_cast(node)  # registers are fp32 either way
        predicate = self._predicate(definition)
        key = Where(
            Apply("eq", (predicate, TRUE), torch.bool),
            node,
            Param(neutral),
        )
        if key not in self.loop.known and predicate is TRUE and not self.loop.tail:
            self.loop.known[key] = self._whole(node, definition)
        if key not in self.loop.known:
            value = self.value(node, self.loop)
            seen = self.value(predicate, self.loop) if predicate is not TRUE else Text("")
            lanes = self.tile(definition.axes) if isinstance(node, Const) and self.sweep.fill else ()
            axes = self._joined([value, seen, Text("", self._lanes), Text("", lanes)])
            keep = self._keep(definition, axes)
            name = self._name_for(node, self.loop) if not isinstance(node, Const) else self.names.unique("w")
            origin = self.origins.of(node)
            full = spread_argument(as_held(value, node), axes)
            full = f"tl.full({self.shape(axes)}, {full}, {self._held(definition)})" if lanes else full
            code = f"{name} = tl.where({keep}, {full}, {neutral})"
            self.loop.lines.append(Line(code, self.shape(axes), origin.source if origin else ""))
            self.holders[name] = (node, self.loop)
            self.loop.known[key] = Text(name, axes, narrow=value.narrow)
        return self.loop.known[key]

    @property
    def _lanes(self) -> tuple[Axis, ...]:
        """The stream as a tile's dimension; none where it goes one position at a time."""
        return () if self.plan.steps else (self.sweep.stream,)

    def _whole(self, node: Node, definition: Definition) -> Text:
        """A value that moves along the stream, as a variable or over the whole tile."""
        text = self.value(node, self.loop)
        if set(self._lanes) <= set(text.axes):
            return text if text.code.isidentifier() else self._named(node, text, self.loop)
        axes = self._joined([text, Text("", self.tile(definition.axes)), Text("", self._lanes)])
        shape = self.shape(axes)
        if text.axes:
            return Text(f"tl.broadcast_to({spread(text, axes)}, {shape})", axes, narrow=text.narrow)
        return Text(f"tl.full({shape}, {text.code}, {self._held(definition)})", axes)

    # -- running reductions -----------------------------------------------------------------------------------------

    def _accumulate(self, definition: Definition) -> None:
        if definition.op == "sum":
            self._running_sum(definition)
        elif definition.op in FOLD:
            self._running_fold(definition)
        else:
            raise NotEmittable(f"a running {definition.op}")

    def _folded(self, op: str, text: Text) -> Text:
        """⊕ over the tile's part of the stream."""
        if self.plan.steps:
            return text
        if op == "prod":
            self.helpers.add("product")
        at = text.axes.index(self.sweep.stream)
        return Text(FOLD[op].format(text.code, at), text.axes[:at] + text.axes[at + 1 :])

    def _running_fold(self, definition: Definition) -> None:
        """An extremum or a product: the state before the tile with what the tile folds to."""
        scores, scale = self._unscaled(definition.body) if definition.op != "prod" else (definition.body, "")
        body = self._masked(scores, definition, self._neutral(definition))
        new = self._new(definition)
        (body,) = widened([body], calls=definition.op == "prod" or bool(scale))
        folded = self._folded(definition.op, body)
        scale = in_bits(scale) if definition.name in self.in_bits else scale
        folded = Text(f"{folded.code} * {scale}", folded.axes, 6) if scale else folded
        axes = self.tile(definition.axes)
        code = INTO[definition.op].format(self._kept_state(definition), operand(folded, axes, 6))
        self.loop.lines.append(Line(f"{new} = {code}", self.shape(axes)))
        self.loop.known[definition.ref] = Text(new, axes)

    def _unscaled(self, node: Node) -> tuple[Node, str]:
        """What a value is a constant multiple of, and of which; fp32 programs keep the order of their operations."""
        return without_scale(node)[:2] if self.is_rough(node) and node.dtype.is_floating_point else (node, "")

    def _kept_state(self, definition: Definition) -> str:
        """The state before this tile; where an extremum has moved, nothing that was selected for it."""
        state = self.names.state[definition.name]
        if definition.extremum is None:
            return state
        extremum = self.plan.chain.definition(definition.extremum.name)
        old, new = self.names.state[extremum.name], self._new(extremum)
        same = Text(f"{old} == {new}", self.tile(extremum.axes), 2)
        return f"tl.where({spread_argument(same, self.tile(definition.axes))}, {state}, {self._neutral(definition)})"

    def _new(self, definition: Definition) -> str:
        return self.names.state[definition.name].replace("_i", "_new", 1)

    def _running_sum(self, definition: Definition) -> None:
        state = self.names.state[definition.name]
        rescale = self._rescaled(definition)
        product = weighed(self.plan, definition)
        if product and product.inside:
            self._weigh_inside(definition, state, rescale, product)
            return
        if product:
            weight = self._weight(definition, list(product.weights))
            values = left_of(product.values, definition) if self.loop.whole else product.values
            self._matrix_sum(definition, state, rescale, weight, values, fits_half(definition, product), self.loop)
            return
        axes = self.tile(definition.axes)
        if self._counts(definition):
            self.loop.lines.append(Line(f"{state} = {rescale} + {self._positions()}", self.shape(axes)))
            return
        (weight,) = widened([self._weight(definition, list(definition.rest))], calls=True)
        if self._narrowed(definition) is torch.float16:
            weight = Text(f"{weight.tight(ATOM)}.to(tl.float16).to(tl.float32)", weight.axes)
        folded = self._folded("sum", weight)
        self.loop.lines.append(Line(f"{state} = {rescale} + {operand(folded, axes, 6)}", self.shape(axes)))

    def _narrowed(self, definition: Definition) -> torch.dtype | None:
        """The 16 bits of weights that the sweep both sums and multiplies. Without a running maximum the largest is not 1:
        what divides the product is the sum of its weights as they are rounded, so that one weight by itself cancels.
        """
        if definition.shift or not self.half:
            return None
        plain = [(d, weighed(self.plan, d)) for d in self.sweep.definitions if d.shift is None and d.op == "sum"]
        summed = {d.rest for d, product in plain if product is None}
        products = [(d, p) for d, p in plain if p and not p.inside and p.weights in summed]
        for other, product in products:
            if definition.rest == product.weights or definition is other:
                stored = operand_dtype(self.plan, product.values)
                wide = stored is torch.float32 or (stored is torch.float16 and not fits_half(other, product))
                return None if wide else stored
        return None

    def _counts(self, definition: Definition) -> bool:
        """Whether each position of the stream adds 1."""
        plain = self._predicate(definition) is TRUE and definition.shift is None and not self.plan.steps
        return plain and definition.body is const(1.0)

    def _positions(self) -> str:
        """How many positions of the stream are in the tile."""
        block = self.block(self.sweep.stream)
        if not self.loop.tail:
            return block
        return f"({self.value(self.sweep.stream.extent, self.prologue).tight(5)} - {self._tail_start})"

    @property
    def _tail_start(self) -> str:
        """Where the tile starts that the stream may not fill; one among others that masks cut starts as they do."""
        if self.sweep.has_whole_tiles:
            return "start"
        return "full" if "full" in self.plan.segments(self.sweep) else "0"

    def _weigh_inside(self, definition: Definition, state: str, rescale: str, product: Weighed) -> None:
        """A product for every position of a loop inside the tile, all added to the same state."""
        if rescale != state:
            self.loop.lines.append(Line(f"{state} = {rescale}", self.shape(self.tile(definition.axes))))
        has_outer = definition.shift or product.weights
        texts = [self._weight(definition, list(product.weights))] if has_outer else []
        inner = Scope(self.loop, product.inside.axis)
        texts.append(self.value(product.own, inner))
        axes = (*self.tile(set(self.plan.rows) & set(definition.axes)), self.sweep.stream)
        code = " * ".join(operand(t, axes, 6) if len(texts) > 1 else spread_argument(t, axes) for t in texts)
        keep = self._kept_inside(definition, product, axes, inner)
        name = self.names.unique("w")
        inner.lines.append(
            Line(f"{name} = tl.where({keep}, {code}, 0.0)" if keep else f"{name} = {code}", self.shape(axes))
        )
        self._matrix_sum(definition, state, state, Text(name, axes), product.values, is_bounded(product.own), inner)
        extent = self.value(product.inside.axis.extent, self.prologue).code
        self._nest(self.loop, f"for {self.names.axes[product.inside.axis]} in range(0, {extent}):", inner)

    def _kept_inside(self, definition: Definition, product: Weighed, axes: tuple[Axis, ...], inner: Scope) -> str:
        """Which positions of a tile take part in one turn of a loop; "" where all do."""
        parts = []
        if self._predicate(definition) is not TRUE or self.loop.tail:
            parts.append(self._keep(definition, axes))
        if product.predicate is not TRUE:
            parts.append(spread_argument(self.value(product.predicate, inner), axes))
        return " & ".join(f"({p})" for p in parts) if len(parts) > 1 else "".join(parts)

    def _matrix_sum(
        self,
        definition: Definition,
        state: str,
        rescale: str,
        weight: Text,
        values: Node,
        bounded: bool,
        scope: Scope,
    ) -> None:
        """state = weight @ values + rescale. bounded: no weight overflows 16 bits."""
        axes = self.tile(definition.axes)
        stored = operand_dtype(self.plan, values)
        value = self._tile_operand(values, self.tile(values.free), scope, stored)
        left, mode = f"{weight.code}.to({TRITON_DTYPES[stored]})", self._precision(stored)
        if "tf32" in mode:
            left, value = self.nearest(left), self.nearest(value)
        if stored is torch.float16 and not bounded:
            # fp16 overflows at 65504; tf32 has as many bits, and the range of fp32.
            left, value, mode = self.nearest(weight.code), f"{value}.to(tl.float32)", ', input_precision="tf32"'
        code = f"{state} = tl.dot({left}, {value}, {rescale}{mode})"
        scope.lines.append(Line(code, self.shape(axes)))

    def _weight(self, definition: Definition, factors: list[Node]) -> Text:
        """The tile that is summed, zero where the predicate fails."""
        if definition.shift is not None:
            return self._shifted(definition, factors)
        weight = multiply(factors) or const(1, definition.body.dtype)
        text = self._masked(weight, definition, self._neutral(definition))
        return self._cut(weight, text) if self._narrowed(definition) is torch.bfloat16 else text

    def _cut(self, weight: Node, text: Text) -> Text:
        """Weights as a product and their sum take them both; rounded to the nearest they cost a conversion back."""
        key = Apply("cut_to_bf16", (weight,), torch.float32)
        if key not in self.loop.known:
            self.helpers.add("cut_to_bf16")
            name = self.names.unique("w")
            self.loop.lines.append(Line(f"{name} = cut_to_bf16({text.code})", self.shape(text.axes)))
            self.loop.known[key] = Text(name, text.axes)
        return self.loop.known[key]

    def _shifted(self, definition: Definition, factors: list[Node]) -> Text:
        """p = exp(exponent − phi), with 0 for what is masked (its exponent is −inf) and for rows still all −inf."""
        shift = definition.shift
        key = Apply("exp", (shift.exponent, shift.phi, self._predicate(definition)), torch.float32)
        exponent, scale = self._unscaled(shift.exponent)
        score = self._masked(exponent, definition, "NEG_INF")
        if key not in self.loop.known:
            name = self.names.unique("p")
            code = f"{name} = {self._exp(definition, score, scale)}"
            self.loop.lines.append(Line(code, self.shape(score.axes)))
            self.loop.known[key] = Text(name, score.axes)
        texts = [self.loop.known[key], *(self.value(f, self.loop) for f in factors)]
        if shift.mass:
            texts.insert(1, self._lever(definition, score, scale))
        if len(texts) == 1:
            return texts[0]
        axes, product = self._joined(texts), Apply("mul", (key, *factors), torch.float32)
        if product not in self.loop.known or shift.mass:
            code = " * ".join([spread(texts[0], axes), *(operand(t, axes, 6) for t in texts[1:])])
            name = self.names.unique("w")
            self.loop.lines.append(Line(f"{name} = {code}", self.shape(axes)))
            self.loop.known[product] = Text(name, axes)
        return self.loop.known[product]

    def _lever(self, definition: Definition, score: Text, scale: str) -> Text:
        """exponent − phi, 0 for what takes no part; an exponent of −inf gives NaN, as 0 · −inf does in eager"""
        name = self.names.unique("x")
        shift = spread(Text(self._settled(definition), self._phi_axes(definition)), score.axes)
        gap = f"{times(score, scale)} - {shift}"
        code = f"{name} = {gap}"
        if self._predicate(definition) is not TRUE or self.loop.tail:
            code = f"{name} = tl.where({self._keep(definition, score.axes)}, {gap}, 0.0)"
        self.loop.lines.append(Line(code, self.shape(score.axes)))
        return Text(name, score.axes)

    def _takes_boxes(self, scope: Scope) -> bool:
        """After loops nothing hides how long a box takes to come."""
        return scope is not self.epilogue or self.epilogue is self.prologue

    def _exp(self, definition: Definition, exponent: Text, scale: str) -> str:
        shift = Text(self._settled(definition), self._phi_axes(definition))
        return less(exponent, scale, shift, definition, self.in_bits, self.lowest, self.half)

    def _phi_axes(self, definition: Definition) -> tuple[Axis, ...]:
        return self.tile(definition.shift.phi.free)

    def _phi_text(self, definition: Definition, new: bool) -> Text:
        """phi over the running state, before or after this tile."""
        state = self.plan.chain.definition(definition.shift.state.name)
        name = self._new(state) if new else self.names.state[state.name]
        scope = Scope(self.loop, self.sweep.stream, self.loop.tail, is_sweep=True)
        scope.known[state.ref] = Text(name, self.tile(state.axes))
        text = self.value(definition.shift.phi, scope)
        self.loop.lines += scope.lines
        return text

    def _settled(self, definition: Definition) -> str:
        """The name of phi after this tile, with 0 for rows whose maximum is still −inf: exp(−inf − 0) is 0, not NaN."""
        if definition.shift.state.name in self.lowest:
            return self._phi_text(definition, new=True).code
        key = Apply("exp", (definition.shift.phi,), torch.float32)
        if key not in self.loop.known:
            text = self._phi_text(definition, new=True)
            name = self.names.unique("shift")
            self.loop.lines.append(
                Line(f"{name} = tl.where({text.code} == NEG_INF, 0.0, {text.code})", self.shape(text.axes))
            )
            self.loop.known[key] = Text(name, text.axes)
        return self.loop.known[key].code

    def _rescaled(self, definition: Definition) -> str:
        """acc · T(old → new)"""
        state = self.names.state[definition.name]
        if definition.shift is None:
            return self._kept_state(definition) + self._gained(definition)
        key = Apply("exp2", (definition.shift.phi,), torch.float32)
        if key not in self.loop.known:
            settled = self._settled(definition)
            old = self._phi_text(definition, new=False)
            name = self.names.unique("alpha")
            code = decay(old, settled, definition, self.in_bits, self.half)
            self.loop.lines.append(Line(f"{name} = {code}", self.shape(old.axes)))
            self.loop.known[key] = Text(name, old.axes)
        alpha = spread(self.loop.known[key], self.tile(definition.axes))
        if definition.centre:
            return f"({state}{self._gained(definition)}) * {alpha}"
        if definition.shift.mass is None:
            return f"{state} * {alpha}"
        mass, moved = self.names.state[definition.shift.mass.name], self._moved(definition)
        return f"({state} + {spread(moved, self.tile(definition.axes))} * {mass}) * {alpha}"

    def _note_mean(self, definition: Definition) -> None:
        """Keeps what a moment is about, and the weight of it, before this tile adds to them."""
        centre = definition.centre
        if centre is None or (centre.mean, centre.mass) in self.means:
            return
        scope = Scope(self.loop, self.sweep.stream, self.loop.tail, is_sweep=True)
        kept = []
        for wanted, node in (("mean", centre.mean), ("seen", centre.mass)):
            text, name = self.value(node, scope), self.names.unique(wanted)
            scope.lines.append(Line(f"{name} = {text.code}", self.shape(text.axes)))
            kept.append(Text(name, text.axes))
        self.loop.lines += scope.lines
        self.means[centre.mean, centre.mass] = tuple(kept)

    def _gained(self, definition: Definition) -> str:
        """+ δ · mass, or + δ · (2 · first + δ · mass), where a mean has fallen by δ"""
        if definition.centre is None:
            return ""
        old, seen = self.means[definition.centre.mean, definition.centre.mass]
        new = self.value(definition.centre.mean, self.loop)
        key = Apply("sub", (definition.centre.mean, definition.centre.mean), torch.float32)
        if key not in self.loop.known:
            name, axes = self.names.unique("delta"), self._joined([old, new])
            self.loop.lines.append(
                Line(f"{name} = {operand(old, axes, 5)} - {operand(new, axes, 6)}", self.shape(axes))
            )
            self.loop.known[key] = Text(name, axes)
        axes = self.tile(definition.axes)
        delta, mass = spread(self.loop.known[key], axes), spread(seen, axes)
        if definition.centre.first is None:
            return f" + {delta} * {mass}"
        return f" + {delta} * (2.0 * {self.names.state[definition.centre.first.name]} + {delta} * {mass})"

    def _moved(self, definition: Definition) -> Text:
        """How far phi has moved: old − new, each 0 while still −inf"""
        new, old = self._settled(definition), self._phi_text(definition, new=False)
        name = self.names.unique("delta")
        code = f"{name} = tl.where({old.code} == NEG_INF, 0.0, {old.code}) - {new}"
        self.loop.lines.append(Line(code, self.shape(old.axes)))
        return Text(name, old.axes)

    def _advance(self, definition: Definition) -> None:
        if definition.op != "sum":
            self.loop.lines.append(Line(f"{self.names.state[definition.name]} = {self._new(definition)}"))

    # -- results ----------------------------------------------------------------------------------------------------

    def _store(self, output: Output, scope: Scope) -> None:
        name = self.names.outputs[output.name]
        text = self.value(output.body, scope)
        axes = self.tile(output.over)
        pointer = self._pointer(f"{name}_ptr", name, output.position, axes, scope)
        mask = " & ".join(filter(None, [self.bounds(frozenset(output.over), axes, scope), self._once(output)]))
        value = text.code if text.level >= ATOM else f"({text.code})"
        if text.axes != axes:
            value = f"tl.broadcast_to({spread(text, axes)}, {self.shape(axes)})"
        cast = f"{value}.to({name}_ptr.dtype.element_ty)"
        origin = None if text.code.isidentifier() else self.origins.of(output.body)
        code = f"tl.store({pointer}, {cast}{f', mask={mask}' if mask else ''})"
        scope.lines.append(Line(code, source=origin.source if origin else ""))

    def _once(self, output: Output) -> str:
        """Of the programs along a grid axis that an output lacks all have its values: the first writes them."""
        others = (a for a in self.plan.grid if a not in output.over and a.extent is not Const(1))
        return " & ".join(f"({self.names.axes[a]} == 0)" for a in others)
