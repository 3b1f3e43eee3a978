"""The text of values in one kernel: what is loaded or computed, in the scope where it belongs, named where a reader
wants a name.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import torch

from rewriter.derive.factors import without_cast
from rewriter.emit.expr import (
    ATOM,
    INFIX,
    ROUNDED,
    NotEmittable,
    Text,
    apply_text,
    constant,
    operand,
    spread,
    spread_argument,
    widened,
)
from rewriter.emit.names import Names, stride_name
from rewriter.emit.origins import Origins
from rewriter.emit.scale import without_scale
from rewriter.emit.scope import Line, Scope
from rewriter.ir import Apply, Axis, Const, Index, Load, Node, Reduce, Ref, Where, const, substitute, walk
from rewriter.ir.integer import proves
from rewriter.lift.rounding import has_fill
from rewriter.plan import KernelPlan
from rewriter.plan.boxes import Box, box_of, offset_in
from rewriter.plan.kernel import LONG_BLOCK

MOST_DIMENSIONS = 3  # of a tile
STEPS = {"floor", "ceil", "round", "floordiv", "truncdiv", "mod", "fmod"}  # a last digit may decide what these give


@dataclass(frozen=True)
class Descriptor:
    """What a kernel loads boxes by: its name, the tensor as it is seen, in the order of its dimensions their extents,
    strides and the positions that one box has. `flag` says whether it is a box at this call, where that is not sure.
    """

    name: str
    seen: str
    dtype: torch.dtype
    extents: tuple[str, ...]
    strides: tuple[str, ...]
    sizes: tuple[str, ...]
    flag: str = ""


class Values:
    """Writes expressions; what a subclass adds are reductions."""

    def __init__(self, plan: KernelPlan, names: Names, origins: Origins):
        self.plan, self.names, self.origins = plan, names, origins
        names.taken -= set(names.tensors.values())  # inside the kernel a tensor's name is its tile's
        self.prologue = Scope()
        self.helpers: set[str] = set()
        self.strides: dict[str, str] = {}
        self.aligned: set[str] = set()
        self.unrolled: set[str] = set()  # strides that loops go along which are written out
        self.boxes: dict[Box, tuple[str, tuple[Node, ...]]] = {}  # its name, and where it is read
        self.flags: dict[Box, str] = {}  # of boxes of pairs
        self.pointed: set[str] = set()  # tensors that are read through pointers
        self.half = plan.dtype is not torch.float32
        self.decisive = _decisive(plan)
        self.uses = self._use_counts()
        self.dots = {d.node: d for d in plan.dots}
        self.loops = {r.node: r for r in plan.loops}
        self.needs_offsets: set[Axis] = set()
        self.stepped = {r.axis for r in plan.loops if not r.whole} | (set(plan.streams) if plan.steps else set())
        self.holders: dict[str, tuple[Node, Scope]] = {}

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, node: Node, scope: Scope) -> Text:
        """The text of a node; statements it needs are written into the scope where they vary."""
        simple = self._simple(node)
        if simple:
            return simple
        home = scope.home(node)
        known = home.find(node)
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

    def _compute(self, node: Node, scope: Scope) -> Text:
        match node:
            case Load():
                return self._load(node, scope)
            case Reduce():
                return self._reduction(node, scope)
            case Ref():
                return self._reference(node)
            case Where():
                return self._where(node, scope)
        folded = self._scaled_once(node, scope) or self._in_base_two(node, scope)
        if folded:
            return folded
        args = [self.value(a, scope) for a in node.args]
        if node.op == "div" and self.is_rough(node) and (inverse := self._inverse(node.args[1], args[0], scope)):
            (over,) = widened(args[:1], calls=True)
            return Text(f"{over.tight(6)} * {spread(inverse, over.axes)}", over.axes, 6)
        if node.op != "cast":
            numbers = [t for t, a in zip(args, node.args) if not isinstance(a, Const)]
            if any(t.narrow for t in numbers):
                calls = node.op not in INFIX or node.op in ROUNDED and node in self.decisive
                args = widened(args, calls or all(t.narrow for t in numbers))
        axes = self._joined(args)
        return apply_text(node, args, axes, self.helpers, self.is_rough(node), node in self.decisive)

    def is_rough(self, node: Node) -> bool:
        """Whether arithmetic may be as inexact as 16 bits are: of such operands, and no comparison reads the result."""
        return self.half and node not in self.decisive

    def _inverse(self, divisor: Node, over: Text, scope: Scope) -> Text | None:
        """1 / divisor, where that is one for several elements of a loop's tile: a division costs eight multiplications."""
        below = self.value(divisor, scope)
        if scope.axis is None or not below.axes or not set(below.axes) < set(over.axes):
            return None
        home, inverse = scope.home(divisor), Apply("div", (const(1.0), divisor), torch.float32)
        if not home.find(inverse):
            (below,) = widened([below], calls=True)
            name = self.names.unique("inverse", home.assigned_after)
            home.lines.append(Line(f"{name} = 1.0 / {below.tight(7)}", self.shape(below.axes)))
            home.known[inverse] = Text(name, below.axes)
        return home.find(inverse)

    def _scaled_once(self, node: Node, scope: Scope) -> Text | None:
        """x * a * b → x * (a * b), one multiplication an element, of 16-bit operands where nothing else reads x * a"""
        inner, scale, between = without_scale(node)
        if not self.is_rough(node) or len(between) < 2 or any(self.uses[n] > 1 for n in between[1:]):
            return None
        (text,) = widened([self.value(inner, scope)], calls=True)
        return Text(f"{text.tight(6)} * ({scale})", text.axes, 6) if text.axes else None

    def _in_base_two(self, node: Node, scope: Scope) -> Text | None:
        """exp(x * c - k) → exp2(x * (c * LOG2E) - k * LOG2E), one multiplication less, of 16-bit operands, for a number k or
        one for several elements
        """
        if not (isinstance(node, Apply) and node.op == "exp" and self.is_rough(node)) or has_fill(node, 1e3):
            return None
        exponent, less = without_cast(node.args[0]), ""
        match exponent:
            case Apply(op="sub", args=(x, Const() as k)):
                exponent, less = x, f" - {constant(k)} * LOG2E"
            case Apply(op="sub", args=(x, y)) if set() < set(self.tile(y.free)) < set(self.tile(x.free)):
                (by,) = widened([self.value(y, scope)], calls=True)
                in_base = Text(f"{by.tight(6)} * LOG2E", by.axes, 6)
                exponent, less = x, f" - {spread(in_base, self.tile(x.free))}"
        inner, scale, _ = without_scale(exponent)
        text = self.value(inner, scope)
        if not text.axes:
            return None
        if self.origins.of(inner) and not text.code.isidentifier():
            text = self._named(inner, text, scope)  # under the user's line
        (text,) = widened([text], calls=True)
        factor = f"({scale} * LOG2E)" if scale else "LOG2E"
        return Text(f"tl.exp2({text.tight(6)} * {factor}{less})", text.axes)

    def _reduction(self, node: Reduce, scope: Scope) -> Text:
        raise NotImplementedError

    def _joined(self, texts: list[Text]) -> tuple[Axis, ...]:
        found = {a for t in texts for a in t.axes}
        axes = tuple(a for a in self.plan.tile_axes if a in found)
        if len(axes) > MOST_DIMENSIONS:
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
        inner = [n for r in self.plan.loops for n in (r.predicate, r.body)]
        written = [o.body for o in chain.outputs]
        distinct = list(dict.fromkeys([*roots, *inner, *written]))
        counts = Counter(c for n in walk(*distinct) for c in n.children)
        counts.update([*roots, *written])
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
        home.lines.append(Line(f"{name} = {text.code}", self.shape(text.axes), origin.source if origin else ""))
        self.holders[name] = (node, home)
        return Text(name, text.axes, narrow=text.narrow)

    def _name_for(self, node: Node, home: Scope) -> str:
        """The user's variable where there is one; it is assigned again where its last value has no other reader."""
        origin = self.origins.of(node)
        wanted = origin.name if origin and origin.name else self._default_name(node)
        holder, scope = self.holders.get(wanted, (None, None))
        if scope is home and self.uses[holder] == 1 and holder is not node and holder in set(walk(node)):
            return wanted
        return self.names.unique(wanted, home.assigned_after)

    def _default_name(self, node: Node) -> str:
        if isinstance(node, Load):
            return self.names.tensors[node.tensor]
        if node.dtype is torch.bool:
            return "mask"
        if isinstance(node, Reduce):
            return "qk" if node in self.dots else "s"
        if isinstance(node, Apply) and node.op == "exp":
            return "p"
        return "x" if node.dtype.is_floating_point else "i"

    def shape(self, axes: tuple[Axis, ...]) -> str:
        return f"[{', '.join(self.block(a) for a in axes)}]" if axes else ""

    def block(self, axis: Axis) -> str:
        return f"BLOCK_{self.names.axes[axis].upper()}"

    # -- memory ---------------------------------------------------------------------------------------------------

    def _load(self, node: Load, scope: Scope) -> Text:
        if same := self._loaded_as(node, scope):
            return same
        box = box_of(self.plan, node) if self._takes_boxes(scope) else None
        if box is None:
            self.pointed.add(self.names.tensors[node.tensor])
            return self._pointed(node, scope)
        boxed = self._boxed(node, box, scope)
        if not box.of_pairs:
            return boxed
        pointed = self._pointed(node, scope, self.boxes[box][0])
        return Text(f"{boxed.code} if {self._flag(box)} else {pointed.code}", boxed.axes, 0, narrow=True)

    def _loaded_as(self, node: Load, scope: Scope) -> Text | None:
        """The tile of another load here, of the same elements along a feature axis of another name: latents of which keys
        and values are made.
        """
        for other, text in scope.known.items():
            apart = [(other.free - node.free), (node.free - other.free)] if isinstance(other, Load) else []
            if not (apart and other.tensor == node.tensor and all(len(a) == 1 for a in apart)):
                continue
            (its,), (own,) = apart
            axes = tuple(own if a == its else a for a in text.axes)
            are_features = {its, own} <= set(self.plan.features) and axes == self.tile(axes)
            if are_features and its.extent is own.extent and substitute(other, {its: Index(own)}) is node:
                return replace(text, axes=axes)
        return None

    def _flag(self, box: Box) -> str:
        """What says whether boxes of pairs are such at the call: names of tensors may differ by case alone."""
        if box not in self.flags:
            wanted = f"BOXED_{self.boxes[box][0].removesuffix('_boxes').upper()}"
            self.flags[box] = self.names.unique(wanted, set(self.flags.values()))
        return self.flags[box]

    def _takes_boxes(self, scope: Scope) -> bool:
        """Whether what is loaded there is worth a box."""
        return True

    def _pointed(self, node: Load, scope: Scope, boxes: str = "") -> Text:
        """A load through pointers, of a tensor or of what else would be loaded as boxes."""
        name = self.names.tensors[node.tensor]
        axes = self._joined([self.value(i, scope) for i in node.index])
        checks = self._unproved(node, axes, scope)
        pointer = self._pointer(boxes or f"{name}_ptr", name, node.index, axes, scope, boxes, self._unrolled_in(node))
        mask = " & ".join(filter(None, [self.bounds(node.free, axes, scope), *checks]))
        extra = f", mask={mask}, other=0" if mask else ""
        code = f"tl.load({pointer}{extra})"
        if node.tensor.dtype is torch.bool:
            code = f"{code} != 0"
        narrow = node.tensor.dtype in (torch.float16, torch.bfloat16)
        return Text(code, axes, 2 if node.tensor.dtype is torch.bool else ATOM, narrow)

    def _boxed(self, node: Load, box: Box, scope: Scope) -> Text:
        """A load through a descriptor: by where the box starts, in each dimension."""
        index = tuple(node.index[k] for k in box.order)
        if box not in self.boxes:
            others = {name for name, _ in self.boxes.values()}  # of other loops, whose names are free again
            self.boxes[box] = self.names.unique(f"{self.names.tensors[box.tensor]}_boxes", others), index
        starts = [self._start(entry, axis, scope) for entry, axis in zip(index, box.axes)]
        axes = tuple(a for a in box.axes if a)
        flat = "" if len(axes) == len(starts) else f".reshape({self.shape(axes)})"
        return Text(f"{self.boxes[box][0]}.load([{', '.join(starts)}]){flat}", axes, narrow=True)

    def _start(self, entry: Node, axis: Axis | None, scope: Scope) -> str:
        if axis is None:
            return self.value(entry, scope).code
        if axis in self.plan.features:
            return self.value(offset_in(entry, axis), scope).code
        if axis in self.plan.rows:
            return f"start_{self.names.axes[axis]}"
        return scope.start_of(axis)

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
        home = scope.home(entry)
        name = self.names.unique("index")
        home.lines.append(Line(f"{name} = {text.code}", self.shape(text.axes)))
        home.known[entry] = Text(name, text.axes)
        return home.known[entry]

    def _unrolled_in(self, node: Load) -> frozenset[int]:
        """The dimensions along which loops go that are written out, where one of them is the dense one: strides along
        them are products of their own lengths, the same at most calls.
        """
        turns, lanes = self.plan.unrolled_axes, node.tensor.lanes
        found = frozenset(k for k, entry in enumerate(node.index) if entry.free and entry.free <= turns)
        return found if lanes in found else frozenset()

    def _pointer(
        self,
        base: str,
        name: str,
        index: tuple[Node, ...],
        axes: tuple[Axis, ...],
        scope: Scope,
        passed: str = "",
        fixed_along: frozenset[int] = frozenset(),
    ) -> str:
        """Where elements lie. `passed`: what the tensor is called at the launch, if not by its name. `fixed_along`:
        dimensions whose strides the kernel is compiled for.
        """
        letters = self._letters(index)
        fixed, moving = [base], []
        for k, entry in enumerate(index):
            if entry is Const(0):
                continue
            text = self.value(entry, scope)
            part = self._wide(entry, text, axes)
            lanes = text.axes and set(text.axes) <= set(self.plan.features)
            unit = "" if lanes or not self.plan.aligns else " * ALIGN"
            stride = self._stride(name, k, letters, in_units=bool(unit), meant=f"{passed or name}.stride({k})")
            if k in fixed_along:
                self.unrolled.add(stride)
            (moving if text.axes else fixed).append(f"{part} * {stride}{unit}")
        return " + ".join(fixed + moving)

    def described(self, box: Box) -> Descriptor:
        """What describes a tensor to the load of its boxes."""
        (name, index), called = self.boxes[box], self.names.tensors[box.tensor]
        sizes = tuple(self.block(a) if a else "1" for a in box.axes)
        if box.of_pairs:
            return Descriptor(name, called, box.tensor.dtype, (), (), sizes, self.flags[box])
        letters, unit = self._letters(index), " * ALIGN" if self.plan.aligns else ""
        strides = [
            self._stride(called, k, letters, in_units=bool(unit), meant=f"{name}.stride({k})") + unit
            for k in range(len(index) - 1)
        ]
        extents = tuple(self.value(box.tensor.shape[k], self.prologue).code for k in box.order)
        seen = called if box.order == tuple(sorted(box.order)) else f"{called}.permute{box.order}"
        return Descriptor(name, seen, box.tensor.dtype, extents, (*strides, "1"), sizes)

    def _stride(self, name: str, k: int, letters: tuple[str, ...], *, in_units: bool, meant: str = "") -> str:
        """The parameter that holds a stride: named by the axis that moves it, unless another dimension of a tensor
        that is read transposed as well has the name.
        """
        meant = meant or f"{name}.stride({k})"
        known = [stride for stride, text in self.strides.items() if text == meant]
        numbered = (f"stride_{name}_{n}" for n in itertools.count(k))
        for stride in itertools.chain([stride_name(name, k, letters), *known], numbered):
            is_new = stride not in self.strides
            if is_new or (self.strides[stride] == meant and (stride in self.aligned) == in_units):
                break
        self.strides[stride] = meant
        if in_units:
            self.aligned.add(stride)
        return stride

    def _wide(self, entry: Node, text: Text, axes: tuple[Axis, ...]) -> str:
        """Positions that a stride may carry past 2³¹ are 64-bit; lanes of a feature are not, where no head is before them."""
        narrow = not text.axes and isinstance(entry, Const)
        if narrow or (text.axes and entry.free <= frozenset(self.plan.features)):
            return operand(text, axes, 7)
        if not text.axes and entry.free & self.stepped:
            return f"tl.cast({text.code}, tl.int64)"  # a number of Python's where Triton is interpreted
        cast = f"{text.tight(ATOM)}.to(tl.int64)"
        return spread(Text(cast, text.axes), axes) if text.axes else cast

    def _letters(self, index: tuple[Node, ...]) -> tuple[str, ...]:
        letters: list[str] = []
        for k, entry in enumerate(index):
            own = [self.names.axes[n.axis] for n in walk(entry) if isinstance(n, Index) and n.axis in self.names.axes]
            letter = own[0] if own else str(k)
            letters.append(letter if letter not in letters else f"{letter}{k}")
        return tuple(letters)

    def bounds(self, free: frozenset[Axis], axes: tuple[Axis, ...], scope: Scope) -> str:
        """The mask of a load or store: which lanes are inside the tensor."""
        parts = []
        distances = {s.axis for s in self.plan.skews}
        for axis in self.plan.tile_axes:
            if axis in free and not self._fills(axis, scope):
                limit = self.value(axis.extent, self.prologue)
                inside = spread(self._position(axis), axes)
                parts += [f"({inside} >= 0)"] if axis in distances else []
                parts.append(f"({inside} < {limit.tight(5)})")
        return " & ".join(parts)

    def _fills(self, axis: Axis, scope: Scope) -> bool:
        """True where every lane of a tile is inside: whole tiles of a stream, features without padding."""
        if axis in self.plan.streams:
            return not scope.is_tail_of(axis)
        if axis in self.plan.long_axes:
            return axis.extent.value % LONG_BLOCK == 0
        return axis in self.plan.features and self.plan.padded(axis) == axis.extent.value


def _decisive(plan: KernelPlan) -> frozenset[Node]:
    """Values that decide something: what comparisons, indices, steps and whole numbers are made of is computed as eager
    does.
    """
    nodes = walk(*plan.chain.roots)
    deciding = (n for n in nodes if not n.dtype.is_floating_point or isinstance(n, Apply) and n.op in STEPS)
    return frozenset(walk(*deciding))
