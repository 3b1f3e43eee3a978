"""What deriving gives: a chain of reductions over one stream, each with the form that lets it run in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewriter.ir import Axis, Load, Node, Origin, Output, Ref, Tensor, index, walk
from rewriter.ir.printer import show


@dataclass(frozen=True)
class Shift:
    """The part Φ of an exponent that depends on running reductions.

    The body is `exp(exponent − phi) · rest`; when the state moves from old to new, what is accumulated is multiplied by
    T(old → new) = exp(phi(old) − phi(new)). T composes, and merging with an empty state is the identity.
    """

    phi: Node
    exponent: Node
    settled: bool = False  # the program itself replaces an infinite phi by 0

    @property
    def state(self) -> Ref:
        """The running reduction that phi reads."""
        return next(n for n in walk(self.phi) if isinstance(n, Ref))


@dataclass(frozen=True)
class Definition:
    """`name[axes] = ⊕_stream | predicate: weight`, where weight = exp(shift.exponent − shift.phi) · rest or just rest.

    `rest` is a tuple of factors; earlier definitions are read through `Ref`.
    """

    name: str
    op: str
    axes: tuple[Axis, ...]
    predicate: Node
    rest: tuple[Node, ...]
    shift: Shift | None
    body: Node

    @property
    def ref(self) -> Ref:
        return Ref(self.name, tuple(index(a) for a in self.axes), self.body.dtype)

    def show(self, stream: Axis, names: dict[Axis, str]) -> str:
        axes = ", ".join(names.get(a, a.name) for a in self.axes)
        bound = names.get(stream, stream.name)
        where = "" if self.predicate.free == frozenset() else f" | {show(self.predicate, names)}"
        op = f"{self.op}_{bound}" if not where else f"{self.op}_{{{bound}{where}}}"
        return f"{self.name}[{axes}] = {op} {show(self.body, names)}"


@dataclass(frozen=True)
class Chain:
    """Definitions in the order they depend on each other, and the outputs computed from their final values."""

    name: str
    stream: Axis
    definitions: tuple[Definition, ...]
    outputs: tuple[Output, ...]
    derivation: tuple[str, ...]
    origins: dict[Node, Origin] = field(default_factory=dict, compare=False, hash=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor read, in order of first use."""
        roots = [n for d in self.definitions for n in (d.predicate, d.body)] + [o.body for o in self.outputs]
        return tuple(dict.fromkeys(n.tensor for n in walk(*roots) if isinstance(n, Load)))

    @property
    def is_dependent(self) -> bool:
        """Whether a reduction reads another: what eager cannot do in one sweep."""
        return any(d.shift for d in self.definitions)

    def definition(self, name: str) -> Definition:
        return next(d for d in self.definitions if d.name == name)
