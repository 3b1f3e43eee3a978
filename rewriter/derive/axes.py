"""Names for the axes of a chain, so that what can share a loop does.

Output and bound axes are only names: each may be given any name of the same extent that its value does not use
otherwise. Two are taken for the same where they index the same dimension of a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from rewriter.ir import Axis, Index, Load, Node, Output, fresh_axis, index, substitute, walk

Place = tuple[str, int]  # a dimension of a tensor


class Axes:
    """The axes named so far, in order, with the places each indexes."""

    def __init__(self) -> None:
        self.places: dict[Axis, set[Place]] = {}

    @property
    def order(self) -> tuple[Axis, ...]:
        return tuple(self.places)

    def sorted(self, axes: frozenset[Axis]) -> tuple[Axis, ...]:
        return tuple(a for a in self.places if a in axes)

    def named(
        self,
        axis: Axis,
        nodes: tuple[Node, ...],
        taken: frozenset[Axis],
        hint: str,
        streams: frozenset[Axis] = frozenset(),
    ) -> Axis:
        """The axis that stands for `axis` in `nodes`: a known one, one of `streams` rather than none, else a new one."""
        places = places_of(axis, nodes)
        fitting = [a for a in self.places if a.extent is axis.extent and a not in taken]
        best = max(fitting, key=lambda a: (len(places & self.places[a]), a in streams), default=None)
        if best is None or not (places & self.places[best] or best in streams):
            best = fresh_axis(axis.extent, hint)
        self.places.setdefault(best, set()).update(places)
        return best

    def of_outputs(self, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        """The outputs over shared axes; the longest one's come first."""
        ordered = sorted(range(len(outputs)), key=lambda k: -len(outputs[k].axes))
        renamed = {k: self._renamed(outputs[k]) for k in ordered}
        return tuple(renamed[k] for k in range(len(outputs)))

    def _renamed(self, output: Output) -> Output:
        taken: list[Axis] = []
        for axis in output.axes:
            hint = axis.name.split("%")[0]
            taken.append(self.named(axis, (output.body,), frozenset(taken), hint))
        by = {a: index(b) for a, b in zip(output.axes, taken)}
        return replace(output, axes=tuple(taken), body=substitute(output.body, by))


def places_of(axis: Axis, nodes: tuple[Node, ...]) -> set[Place]:
    """The dimensions that an axis indexes, alone or in an expression."""
    loads = (n for n in walk(*nodes) if isinstance(n, Load) and axis in n.free)
    return {(n.tensor.name, k) for n in loads for k, entry in enumerate(n.index) if Index(axis) in walk(entry)}
