"""What deriving gives: reductions in sweeps over their streams, each with the form that lets its sweep compute it
online.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rewriter.ir import Axis, Const, Load, Node, Origin, Output, Reduce, Ref, Tensor, index, walk
from rewriter.ir.printer import show


@dataclass(frozen=True)
class Shift:
    """The part Φ of an exponent that depends on running reductions.

    The body is `exp(exponent − phi) · rest`; when the state moves from old to new, what is accumulated is multiplied by
    T(old → new) = exp(phi(old) − phi(new)). T composes, and merging with an empty state is the identity.

    A moment's body has the factor (exponent − phi) too; `mass` is the same sum without it. Its T is affine: where phi
    moves by δ, the moment loses δ · mass before it is multiplied.
    """

    phi: Node
    exponent: Node
    settled: bool = False  # the program itself replaces an infinite phi by 0
    mass: Ref | None = None

    @property
    def state(self) -> Ref:
        """The running reduction that phi reads."""
        return next(n for n in walk(self.phi) if isinstance(n, Ref) and not n.final)


@dataclass(frozen=True)
class Centre:
    """The running mean or extremum that a moment is about, and the weight of what it is the moment of.

    Where the mean falls by δ, a first moment gains δ · mass, a second one δ · (2 · first + δ · mass). The `first`
    beside a second moment is what rounding leaves of it: without it a variance is as wrong as its mean is beside the
    deviation.
    """

    mean: Node
    mass: Ref
    first: Ref | None = None


@dataclass(frozen=True)
class Definition:
    """`name[axes] = ⊕_stream | predicate: weight`, where weight = exp(shift.exponent − shift.phi) · rest or just rest.

    Where the predicate selects what has an `extremum` of the same sweep, what is accumulated starts again when that
    moves.

    `rest` is a tuple of factors; earlier definitions are read through `Ref`: those of the same sweep as they run,
    those of earlier sweeps as they ended (`Ref.final`).
    """

    name: str
    op: str
    axes: tuple[Axis, ...]
    stream: Axis
    sweep: int
    predicate: Node
    rest: tuple[Node, ...]
    shift: Shift | None
    body: Node
    extremum: Ref | None = None
    centre: Centre | None = None

    @property
    def ref(self) -> Ref:
        return Ref(self.name, tuple(index(a) for a in self.axes), self.body.dtype)

    @property
    def roots(self) -> tuple[Node, ...]:
        """Every node it is computed from."""
        shifted = (self.shift.exponent, self.shift.phi) if self.shift else ()
        return (self.predicate, self.body, *self.rest, *shifted)

    def show(self, names: dict[Axis, str]) -> str:
        axes = ", ".join(names.get(a, a.name) for a in self.axes)
        bound = names.get(self.stream, self.stream.name)
        where = "" if self.predicate.free == frozenset() else f" | {show(self.predicate, names)}"
        op = f"{self.op}_{bound}" if not where else f"{self.op}_{{{bound}{where}}}"
        shown = f"{self.name}[{axes}]" if axes else self.name
        return f"{shown} = {op} {show(self.body, names)}"


@dataclass(frozen=True)
class Chain:
    """Definitions in the order they depend on each other, and the outputs computed from their final values.

    `axes` are all that occur, streams too, in one order. An output may have the axis of a stream: it is written
    position by position, after the sweeps that it reads.
    """

    name: str
    axes: tuple[Axis, ...]
    definitions: tuple[Definition, ...]
    outputs: tuple[Output, ...]
    derivation: tuple[str, ...]
    origins: dict[Node, Origin] = field(default_factory=dict, compare=False, hash=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor read, in order of first use."""
        loads = (n for n in walk(*self.roots) if isinstance(n, Load))
        return tuple(dict.fromkeys(n.tensor for n in loads))

    @property
    def roots(self) -> list[Node]:
        """Every node that is computed: of definitions and outputs."""
        return [n for d in self.definitions for n in d.roots] + [o.body for o in self.outputs]

    @property
    def is_dependent(self) -> bool:
        """Whether a reduction reads another: what eager cannot do in one sweep."""
        return any(isinstance(n, Ref) for d in self.definitions for n in walk(*d.roots))

    @property
    def beats_dense(self) -> bool:
        """Whether a chain that begins with a dense layer is better than the layer by itself.

        Along positions of the input, as attention by learned queries is, it is where reductions depend on each other.
        Along the layer's own outputs it gives numbers a row, or needs the layer once: a norm between two layers would
        compute one again.
        """
        layers = [(d, n) for d in self.definitions for n in walk(*d.roots) if isinstance(n, Reduce)]
        streams = {d.stream for d, _ in layers}
        if not all(isinstance(s.extent, Const) for s in streams):
            return self.is_dependent
        if any(streams & set(o.axes) for o in self.outputs):
            return False
        narrows = bool(layers) and all(set(d.axes) <= n.free for d, n in layers)
        return narrows or (self.is_dependent and not any(d.sweep for d, _ in layers))

    def definition(self, name: str) -> Definition:
        return next(d for d in self.definitions if d.name == name)


def moments_first(definitions: tuple[Definition, ...]) -> list[Definition]:
    """A moment moves with the lower ones as they were: it is updated before them."""
    out = list(definitions)
    for moment in definitions:
        lower = moment.shift and moment.shift.mass or moment.centre and moment.centre.first
        if lower:
            out.remove(moment)
            out.insert(next(k for k, d in enumerate(out) if d.name == lower.name), moment)
    return out
