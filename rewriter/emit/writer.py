"""Writes the statements of one kernel: what is loaded, computed and accumulated, in the scope where it belongs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from rewriter.derive import Definition
from rewriter.derive.factors import multiply, without_cast
from rewriter.emit.expr import (
    ATOM,
    TRITON_DTYPES,
    NotEmittable,
    Text,
    apply_text,
    constant,
    operand,
    spread,
    spread_argument,
)
from rewriter.emit.names import Names, stride_name
from rewriter.emit.origins import Origins
from rewriter.ir import (
    TRUE,
    Apply,
    Axis,
    Const,
    Index,
    Load,
    Node,
    Output,
    Reduce,
    Ref,
    Where,
    walk,
)
from rewriter.ir.integer import proves
from rewriter.lift.rounding import has_fill
from rewriter.plan import Dot, KernelPlan


@dataclass(frozen=True)
class Line:
    """One statement with the shape of what it assigns and the user's line above it (both may be empty)."""

    code: str
    shape: str = ""
    source: str = ""


@dataclass
class Scope:
    """Statements in order, and the values that are known in this scope or an outer one."""

    lines: list[Line] = field(default_factory=list)
    known: dict[Node, Text] = field(default_factory=dict)


class Writer:
    """Fills `prologue`, the `segments` of the loop and `epilogue`; the templates only lay them out.

    Full tiles of the stream need no bounds; only the last one, where the stream does not fill it, has them.
    """

    def __init__(self, plan: KernelPlan, names: Names, origins: Origins):
        self.plan, self.names, self.origins = plan, names, origins
        names.taken -= set(names.tensors.values())  # inside the kernel a tensor's name is its tile's
        self.prologue, self.loop, self.epilogue = Scope(), Scope(), Scope()
        self.segments: dict[str, list[Line]] = {}
        self.in_tail = False
        self.helpers: set[str] = set()
        self.strides: dict[str, str] = {}
        self.aligned: set[str] = set()
        self.half = plan.dtype is not torch.float32
        self.uses = self._use_counts()
        self.dots = {d.node: d for d in plan.dots}
        self.needs_offsets: set[Axis] = set()
        self.holders: dict[str, tuple[Node, Scope]] = {}

    def write(self) -> None:
        for name in self.plan.segments:
            self._write_segment(name)
        for output, name in zip(self.plan.chain.outputs, self.names.outputs):
            self._store(output, name)

    def _write_segment(self, name: str) -> None:
        """One form of the loop's body. Both use the same names, so that a reader sees what differs."""
        taken, holders = set(self.names.taken), dict(self.holders)
        known = set(self.prologue.known)
        self.loop, self.in_tail = Scope(), name == "tail"
        for definition in self.plan.chain.definitions:
            self._accumulate(definition)
        for definition in self.plan.chain.definitions:
            self._advance(definition)
        self.segments[name] = self.loop.lines
        hoisted = {t.code for n, t in self.prologue.known.items() if n not in known}
        self.names.taken = taken | {c for c in hoisted if c.isidentifier()}
        self.holders = holders | {k: v for k, v in self.holders.items() if v[1] is self.prologue}

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, node: Node, scope: Scope) -> Text:
        """The text of a node; statements it needs are written into the scope where they vary."""
        simple = self._simple(node)
        if simple:
            return simple
        home = self._home(node, scope)
        known = home.known.get(node) or self.prologue.known.get(node)
        if known:
            return known
        text = self._compute(node, home)
        if self._deserves_name(node, text, home, scope):
            text = self._named(node, text, home)
        home.known[node] = text
        return text

    def _simple(self, node: Node) -> Text | None:
        if node in self.names.sizes:
            return Text(self.names.sizes[node])
        match node:
            case Const():
                return Text(constant(node), (), 7 if str(node.value).startswith("-") else ATOM)
            case Index():
                return self._position(node.axis)
        return None

    def _position(self, axis: Axis) -> Text:
        if axis in self.plan.tile_axes:
            self.needs_offsets.add(axis)
            return Text(f"offs_{self.names.axes[axis]}", (axis,))
        return Text(self.names.axes[axis])

    def _home(self, node: Node, scope: Scope) -> Scope:
        """Where a node is computed: before the loop if nothing in it moves along the stream."""
        if (
            scope is self.loop
            and self.plan.stream not in node.free
            and not any(isinstance(n, Ref) for n in walk(node))
        ):
            return self.prologue
        return scope

    def _compute(self, node: Node, scope: Scope) -> Text:
        match node:
            case Load():
                return self._load(node, scope)
            case Reduce():
                return self._dot(self.dots[node], scope)
            case Ref():
                return self._reference(node)
            case Where():
                return self._where(node, scope)
        args = [self.value(a, scope) for a in node.args]
        axes = self._joined(args)
        return apply_text(node, args, axes, self.helpers, self.half)

    def _joined(self, texts: list[Text]) -> tuple[Axis, ...]:
        found = {a for t in texts for a in t.axes}
        axes = tuple(a for a in self.plan.tile_axes if a in found)
        if len(axes) > 2:
            raise NotEmittable(f"a tile over {len(axes)} axes")
        return axes

    def _where(self, node: Where, scope: Scope) -> Text:
        args = [self.value(c, scope) for c in node.children]
        axes = self._joined(args)
        return Text(f"tl.where({', '.join(spread_argument(a, axes) for a in args)})", axes)

    def _reference(self, node: Ref) -> Text:
        definition = self.plan.chain.definition(node.name)
        return Text(self.names.state[node.name], self.tile(definition.axes))

    def tile(self, axes) -> tuple[Axis, ...]:
        return tuple(a for a in self.plan.tile_axes if a in axes)

    # -- names ----------------------------------------------------------------------------------------------------

    def _use_counts(self) -> Counter:
        chain = self.plan.chain
        roots: list[Node] = []
        for d in chain.definitions:
            roots += [d.predicate, *d.rest] + ([d.shift.exponent, d.shift.phi] if d.shift else [])
        distinct = list(dict.fromkeys([*roots, *(o.body for o in chain.outputs)]))
        counts = Counter(c for n in walk(*distinct) for c in n.children)
        counts.update(roots)
        return counts

    def _deserves_name(self, node: Node, text: Text, home: Scope, scope: Scope) -> bool:
        if text.code.isidentifier():
            return False
        if isinstance(node, (Load, Reduce)):
            return True
        origin = self.origins.of(node)
        return self.uses[node] > 1 or home is not scope or bool(origin and origin.name) or len(text.code) > 90

    def _named(self, node: Node, text: Text, home: Scope) -> Text:
        name = self._name_for(node, home)
        origin = self.origins.of(node)
        home.lines.append(
            Line(f"{name} = {text.code}", self.shape(text.axes), origin.source if origin else "")
        )
        self.holders[name] = (node, home)
        return Text(name, text.axes)

    def _name_for(self, node: Node, home: Scope) -> str:
        """The user's variable where there is one; it is assigned again where its last value has no other reader."""
        origin = self.origins.of(node)
        wanted = origin.name if origin and origin.name else self._default_name(node)
        holder, scope = self.holders.get(wanted, (None, None))
        if scope is home and self.uses[holder] == 1 and holder is not node and holder in set(walk(node)):
            return wanted
        return self.names.unique(wanted) if wanted in self.names.taken else self._take(wanted)

    def _take(self, name: str) -> str:
        self.names.taken.add(name)
        return name

    def _default_name(self, node: Node) -> str:
        if isinstance(node, Load):
            return self.names.tensors[node.tensor]
        if node.dtype is torch.bool:
            return "mask"
        if isinstance(node, Reduce):
            return "qk"
        return "x" if node.dtype.is_floating_point else "i"

    def shape(self, axes: tuple[Axis, ...]) -> str:
        return f"[{', '.join(self.block(a) for a in axes)}]" if axes else ""

    def block(self, axis: Axis) -> str:
        return f"BLOCK_{self.names.axes[axis].upper()}"

    # -- memory ---------------------------------------------------------------------------------------------------

    def _load(self, node: Load, scope: Scope) -> Text:
        name = self.names.tensors[node.tensor]
        axes = self._joined([self.value(i, scope) for i in node.index])
        checks = self._unproved(node, axes, scope)
        pointer = self._pointer(f"{name}_ptr", name, node.index, axes, scope)
        mask = " & ".join(filter(None, [self._bounds(node.free, axes), *checks]))
        extra = f", mask={mask}, other=0" if mask else ""
        code = f"tl.load({pointer}{extra})"
        if node.tensor.dtype is torch.bool:
            code = f"{code} != 0"
        return Text(code, axes, 2 if node.tensor.dtype is torch.bool else ATOM)

    def _unproved(self, node: Load, axes: tuple[Axis, ...], scope: Scope) -> list[str]:
        """Bounds of index entries that are not proved to be inside: gathers, and branches of a choice not taken."""
        out = []
        for entry, extent in zip(node.index, node.tensor.shape):
            low, high = proves("le", Const(0), entry), proves("lt", entry, extent)
            if low and high:
                continue
            position = spread_argument(self._indexed(entry, scope), axes)
            limit = self.value(extent, self.prologue)
            out += [] if low else [f"({position} >= 0)"]
            out += [] if high else [f"({position} < {limit.tight(5)})"]
        return out

    def _indexed(self, entry: Node, scope: Scope) -> Text:
        """A computed position, as a variable."""
        text = self.value(entry, scope)
        if text.code.isidentifier() or isinstance(entry, Const):
            return text
        home = self._home(entry, scope)
        name = self.names.unique("index")
        home.lines.append(Line(f"{name} = {text.code}", self.shape(text.axes)))
        home.known[entry] = Text(name, text.axes)
        return home.known[entry]

    def _pointer(
        self, base: str, name: str, index: tuple[Node, ...], axes: tuple[Axis, ...], scope: Scope
    ) -> str:
        letters = self._letters(index)
        fixed, moving = [base], []
        for k, entry in enumerate(index):
            if entry is Const(0):
                continue
            stride = stride_name(name, k, letters)
            self.strides[stride] = f"{name}.stride({k})"
            text = self.value(entry, scope)
            part = self._wide(entry, text, axes)
            lanes = text.axes and set(text.axes) <= set(self.plan.features)
            unit = "" if lanes or not self.plan.aligns else " * ALIGN"
            if unit:
                self.aligned.add(stride)
            (moving if text.axes else fixed).append(f"{part} * {stride}{unit}")
        return " + ".join(fixed + moving)

    def _wide(self, entry: Node, text: Text, axes: tuple[Axis, ...]) -> str:
        """Positions that a stride may carry past 2³¹ are 64-bit; lanes of a feature are not."""
        narrow = not text.axes and isinstance(entry, Const)
        if narrow or (text.axes and set(text.axes) <= set(self.plan.features)):
            return operand(text, axes, 7)
        cast = f"{text.tight(ATOM)}.to(tl.int64)"
        return spread(Text(cast, text.axes), axes) if text.axes else cast

    def _letters(self, index: tuple[Node, ...]) -> tuple[str, ...]:
        letters: list[str] = []
        for k, entry in enumerate(index):
            own = [
                self.names.axes[n.axis]
                for n in walk(entry)
                if isinstance(n, Index) and n.axis in self.names.axes
            ]
            letter = own[0] if own else str(k)
            letters.append(letter if letter not in letters else f"{letter}{k}")
        return tuple(letters)

    def _bounds(self, free: frozenset[Axis], axes: tuple[Axis, ...]) -> str:
        """The mask of a load or store: which lanes are inside the tensor."""
        parts = []
        for axis in self.plan.tile_axes:
            if axis in free and not self._fills(axis):
                limit = self.value(axis.extent, self.prologue)
                inside = spread(self._position(axis), axes)
                parts.append(f"({inside} < {limit.tight(5)})")
        return " & ".join(parts)

    def _fills(self, axis: Axis) -> bool:
        """True where a padded feature axis has no padding."""
        if axis is self.plan.stream:
            return not self.in_tail
        return axis in self.plan.features and self.plan.padded(axis) == axis.extent.value

    # -- arithmetic that is not pointwise -------------------------------------------------------------------------

    def _dot(self, dot: Dot, scope: Scope) -> Text:
        stored = self._operand_dtype(dot.left, dot.right)
        left = self._tile_operand(dot.left, (self.plan.row, dot.axis), scope, stored)
        right = self._tile_operand(dot.right, (self.plan.stream, dot.axis), scope, stored)
        code = f"tl.dot({left}, tl.trans({right}){_precision(stored)})"
        if not dot.scale:
            return Text(code, (self.plan.row, self.plan.stream))
        factors = " * ".join(operand(self.value(f, scope), (), 6) for f in dot.scale)
        return Text(f"{code} * {factors}", (self.plan.row, self.plan.stream), 6)

    def _tile_operand(self, node: Node, axes: tuple[Axis, ...], scope: Scope, stored: torch.dtype) -> str:
        """A two-dimensional operand of `tl.dot`, in the type the tensors are stored in."""
        text = self.value(node, scope)
        if text.axes != axes:
            raise NotEmittable("a contraction whose operand is no tile of two dimensions")
        if isinstance(node, Load) and node.dtype is stored:
            return text.code
        return f"{text.tight(ATOM)}.to({TRITON_DTYPES[stored]})"

    def _operand_dtype(self, *operands: Node) -> torch.dtype:
        """The widest floating type that the operands of one product are stored in."""
        floats = [n.dtype for n in walk(*operands) if isinstance(n, Load) and n.dtype.is_floating_point]
        return max(floats, key=lambda d: d.itemsize, default=self.plan.dtype)

    # -- the chain ------------------------------------------------------------------------------------------------

    def _keep(self, definition: Definition, axes: tuple[Axis, ...]) -> str:
        """Which positions of a tile take part: the stream's tail and the definition's predicate."""
        stream = self.plan.stream
        position, limit = self._position(stream), self.value(stream.extent, self.prologue)
        inside = f"{spread(position, axes)} < {limit.tight(5)}"
        if definition.predicate is TRUE:
            return inside
        predicate = self.value(definition.predicate, self.loop)
        if not self.in_tail:
            return spread_argument(predicate, axes)
        return f"({inside}) & {operand(predicate, axes, 5)}"

    def _masked(self, node: Node, definition: Definition, neutral: str) -> Text:
        """`where(keep, node, neutral)`, written once for a node and a predicate."""
        node = without_cast(node)  # registers are fp32 either way
        key = Where(
            Apply("eq", (definition.predicate, TRUE), torch.bool),
            node,
            Const(neutral == "NEG_INF", torch.bool),
        )
        if definition.predicate is TRUE and not self.in_tail:
            self.loop.known.setdefault(key, self._whole(node))
        if key not in self.loop.known:
            value = self.value(node, self.loop)
            predicate = (
                self.value(definition.predicate, self.loop) if definition.predicate is not TRUE else Text("")
            )
            axes = self._joined([value, predicate, Text("", (self.plan.stream,))])
            keep = self._keep(definition, axes)
            name = self._name_for(node, self.loop) if not isinstance(node, Const) else self.names.unique("w")
            origin = self.origins.of(node)
            full = spread_argument(value, axes)
            code = f"{name} = tl.where({keep}, {full}, {neutral})"
            self.loop.lines.append(Line(code, self.shape(axes), origin.source if origin else ""))
            self.holders[name] = (node, self.loop)
            self.loop.known[key] = Text(name, axes)
        return self.loop.known[key]

    def _whole(self, node: Node) -> Text:
        """A value that moves along the stream, as a variable or over the whole tile."""
        text = self.value(node, self.loop)
        if self.plan.stream in text.axes:
            return text if text.code.isidentifier() else self._named(node, text, self.loop)
        axes = self._joined([text, Text("", (self.plan.row,)), Text("", (self.plan.stream,))])
        shape = self.shape(axes)
        return Text(
            (
                f"tl.broadcast_to({spread_argument(text, axes)}, {shape})"
                if text.axes
                else f"tl.full({shape}, {text.code}, tl.float32)"
            ),
            axes,
        )

    def _accumulate(self, definition: Definition) -> None:
        if definition.op == "max":
            self._running_max(definition)
        elif definition.op == "sum":
            self._running_sum(definition)
        else:
            raise NotEmittable(f"a running {definition.op}")

    def _running_max(self, definition: Definition) -> None:
        score = self._masked(definition.body, definition, "NEG_INF")
        state, new = self.names.state[definition.name], self._new(definition)
        axes = self.tile(definition.axes)
        reduced = f"tl.max({score.code}, {score.axes.index(self.plan.stream)})"
        self.loop.lines.append(Line(f"{new} = tl.maximum({state}, {reduced})", self.shape(axes)))

    def _new(self, definition: Definition) -> str:
        return self.names.state[definition.name].replace("_i", "_new", 1)

    def _running_sum(self, definition: Definition) -> None:
        state = self.names.state[definition.name]
        rescale = self._rescaled(definition)
        operands = [f for f in definition.rest if self._is_operand(f)]
        weights = [f for f in definition.rest if f not in operands]
        weight = self._weight(definition, weights)
        if operands:
            self._matrix_sum(definition, state, rescale, weight, operands)
            return
        axes = self.tile(definition.axes)
        total = f"tl.sum({weight.code}, {weight.axes.index(self.plan.stream)})"
        self.loop.lines.append(Line(f"{state} = {rescale} + {total}", self.shape(axes)))

    def _is_operand(self, factor: Node) -> bool:
        return any(a in self.plan.features for a in factor.free)

    def _matrix_sum(
        self, definition: Definition, state: str, rescale: str, weight: Text, operands: list[Node]
    ) -> None:
        if len(operands) != 1 or len(weight.axes) != 2:
            raise NotEmittable("a weighted sum that is no product of a score tile and a value tile")
        axes = self.tile(definition.axes)
        (value_axes,) = [tuple(a for a in self.plan.tile_axes if a in operands[0].free)]
        stored = self._operand_dtype(operands[0])
        value = self._tile_operand(operands[0], value_axes, self.loop, stored)
        if value_axes[0] is not self.plan.stream or len(value_axes) != 2:
            raise NotEmittable("values that depend on the row as well as the stream")
        code = f"{state} = tl.dot({weight.code}.to({TRITON_DTYPES[stored]}), {value}, {rescale}{_precision(stored)})"
        self.loop.lines.append(Line(code, self.shape(axes)))

    def _weight(self, definition: Definition, factors: list[Node]) -> Text:
        """The tile that is summed, zero where the predicate fails."""
        if definition.shift is None:
            return self._masked(multiply(factors) or Const(1.0, torch.float32), definition, "0.0")
        return self._shifted(definition, factors)

    def _shifted(self, definition: Definition, factors: list[Node]) -> Text:
        """p = exp(exponent − phi), with 0 for what is masked (its exponent is −inf) and for rows still all −inf."""
        shift = definition.shift
        key = Apply("exp", (shift.exponent, shift.phi, definition.predicate), torch.float32)
        if key not in self.loop.known:
            score = self._masked(shift.exponent, definition, "NEG_INF")
            name = self.names.unique("p")
            code = f"{name} = {self._exp(definition, score)}"
            self.loop.lines.append(Line(code, self.shape(score.axes)))
            self.loop.known[key] = Text(name, score.axes)
        weight = self.loop.known[key]
        if not factors:
            return weight
        texts = [self.value(f, self.loop) for f in factors]
        axes = self._joined([weight, *texts])
        code = " * ".join([spread(weight, axes), *(operand(t, axes, 6) for t in texts)])
        name = self.names.unique("w")
        self.loop.lines.append(Line(f"{name} = {code}", self.shape(axes)))
        return Text(name, axes)

    def _exp(self, definition: Definition, exponent: Text) -> str:
        """exp(exponent − shift); in base 2 the difference is one fused multiply-add an element."""
        shift = Text(self._settled(definition), self._phi_axes(definition))
        if not self._in_base_2(definition):
            return f"tl.exp({exponent.code} - {spread(shift, exponent.axes)})"
        scaled = spread(Text(f"({shift.code} * LOG2E)", shift.axes), exponent.axes)
        return f"tl.exp2({exponent.code} * LOG2E - {scaled})"

    def _in_base_2(self, definition: Definition) -> bool:
        """16-bit programs without large fills: there the scaled shift's own rounding would show."""
        return self.half and not has_fill(definition.shift.exponent, 1e3)

    def _phi_axes(self, definition: Definition) -> tuple[Axis, ...]:
        return self.tile(definition.shift.phi.free)

    def _phi_text(self, definition: Definition, new: bool) -> Text:
        """phi over the running state, before or after this tile."""
        state = self.plan.chain.definition(definition.shift.state.name)
        scope = Scope(
            known={
                state.ref: Text(
                    self._new(state) if new else self.names.state[state.name], self.tile(state.axes)
                )
            }
        )
        text = self.value(definition.shift.phi, scope)
        if not scope.lines:
            return text
        self.loop.lines += scope.lines
        return text

    def _settled(self, definition: Definition) -> str:
        """The name of phi after this tile, with 0 for rows whose maximum is still −inf: exp(−inf − 0) is 0, not NaN."""
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
            return state
        key = Apply("exp2", (definition.shift.phi,), torch.float32)
        if key not in self.loop.known:
            settled = self._settled(definition)
            old = self._phi_text(definition, new=False)
            name = self.names.unique("alpha")
            self.loop.lines.append(
                Line(f"{name} = tl.exp({old.tight(5)} - {settled})", self.shape(old.axes))
            )
            self.loop.known[key] = Text(name, old.axes)
        alpha = self.loop.known[key]
        return f"{state} * {spread(alpha, self.tile(definition.axes))}"

    def _advance(self, definition: Definition) -> None:
        if definition.op == "max":
            self.loop.lines.append(Line(f"{self.names.state[definition.name]} = {self._new(definition)}"))

    def initial(self) -> list[Line]:
        """The empty state: the neutral element of every reduction."""
        out = []
        for definition in self.plan.chain.definitions:
            axes = self.tile(definition.axes)
            shape = ", ".join(self.block(a) for a in axes)
            neutral = "NEG_INF" if definition.op == "max" else "0.0"
            code = f"{self.names.state[definition.name]} = tl.full([{shape}], {neutral}, tl.float32)"
            out.append(Line(code, self.shape(axes)))
        return out

    # -- results --------------------------------------------------------------------------------------------------

    def _store(self, output: Output, name: str) -> None:
        text = self.value(output.body, self.epilogue)
        axes = self.tile(output.axes)
        index = tuple(Const(0) if a.extent is Const(1) else Index(a) for a in output.axes)
        pointer = self._pointer(f"{name}_ptr", name, index, axes, self.epilogue)
        mask = self._bounds(frozenset(output.axes), axes)
        value = (
            text.code if text.axes == axes else f"tl.broadcast_to({spread(text, axes)}, {self.shape(axes)})"
        )
        if text.axes == axes and text.level < ATOM:
            value = f"({value})"
        cast = f"{value}.to({name}_ptr.dtype.element_ty)"
        self.epilogue.lines.append(Line(f"tl.store({pointer}, {cast}{f', mask={mask}' if mask else ''})"))


def _precision(stored: torch.dtype) -> str:
    """fp32 products are never rounded to tf32."""
    return ', input_precision="ieee"' if stored is torch.float32 else ""
