"""Where the patched forward reads each size off its arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from rewriter.ir import Const, Node, Param, apply, transform, walk
from rewriter.ir.printer import show
from rewriter.trace import Dimension, TracedModule
from rewriter.trace.sizes import renamed, shape_of


@dataclass(frozen=True)
class Place:
    """One dimension of one argument: its extent, and whether it may be 1 and is then expanded. `shape` is the text of
    the argument's.
    """

    leaf: str
    dim: int
    extent: Node
    broadcasts: bool
    shape: str

    @property
    def text(self) -> str:
        return f"{self.shape}[{self.dim}]"


@dataclass(frozen=True)
class Sizes:
    """`places`: every dimension of every argument, in order."""

    places: tuple[Place, ...]

    @cached_property
    def sources(self) -> dict[Param, str]:
        """Python text for each symbolic size."""
        out: dict[Param, str] = {}
        for place in self.places:
            if isinstance(place.extent, Param) and place.extent not in out:
                out[place.extent] = self._read(place.extent)
        for place in self.places:
            unknown = [n for n in walk(place.extent) if isinstance(n, Param) and n not in out]
            if len(unknown) == 1:
                out |= _solved(place, unknown[0])
        return out

    def _read(self, size: Param) -> str:
        """A dimension that has the size; where each of them may be 1, the longest."""
        having = [p for p in self.places if p.extent is size]
        steady = next((p.text for p in having if not p.broadcasts), None)
        return steady or f"max({', '.join(p.text for p in having)})"

    def bound(self, shapes: dict[str, str]) -> Sizes:
        """The same where a name stands for each argument's shape."""
        return Sizes(tuple(replace(p, shape=shapes[p.leaf]) for p in self.places))

    def text(self, node: Node) -> str:
        return renamed(show(node), {p.name: text for p, text in self.sources.items()})


def sizes_of(traced: TracedModule, leaves: dict[str, str], broadcast: frozenset[Dimension]) -> Sizes:
    """`leaves`: the text of each placeholder that is an argument."""
    places = [
        Place(leaves[name], d, extent, (k, d) in broadcast, f"{leaves[name]}.shape")
        for k, name in enumerate(traced.inputs)
        if name
        for d, extent in enumerate(shape_of(traced.placeholders[name].meta["val"]))
    ]
    return Sizes(tuple(places))


def _solved(place: Place, size: Param) -> dict[Param, str]:
    """2·s + 1 read as x.shape[0]: s is (x.shape[0] - 1) // 2."""
    offset = apply("sub", place.extent, apply("mul", factor := _slope(place.extent, size), size))
    if not (isinstance(factor, Const) and isinstance(offset, Const)):
        return {}
    text = place.text if offset.value == 0 else f"({place.text} - {offset.value})"
    return {size: text if factor.value == 1 else f"({text} // {factor.value})"}


def _slope(extent: Node, size: Param) -> Node:
    """What the extent grows by where the size grows by one."""
    more = transform(extent, lambda n: apply("add", size, Const(1)) if n is size else n)
    return apply("sub", more, extent)
