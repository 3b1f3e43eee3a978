"""Where statements of a kernel stand: straight-line code, the body of a loop over a stream, or of one inside it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewriter.derive.factors import is_running
from rewriter.emit.expr import Text
from rewriter.ir import Axis, Node


@dataclass(frozen=True)
class Line:
    """One statement with the shape of what it assigns and the user's line above it (both may be empty)."""

    code: str
    shape: str = ""
    source: str = ""


@dataclass
class Scope:
    """Statements in order, and the values that are known in it. `axis` is that of the loop whose body it is.

    A `tail` has the last tile of a stream, which the stream may not fill. In `whole` tiles every predicate holds. A
    sweep's tile starts at `start`. Loops that follow assign the names `assigned_after`: what is named here has others.
    """

    parent: Scope | None = None
    axis: Axis | None = None
    tail: bool = False
    is_sweep: bool = False
    whole: bool = False
    start: str = "start"
    lines: list[Line] = field(default_factory=list)
    known: dict[Node, Text] = field(default_factory=dict)
    assigned_after: set[str] = field(default_factory=set)

    def find(self, node: Node) -> Text | None:
        """The value of a node here, if it has been computed here or around."""
        scope: Scope | None = self
        while scope is not None:
            if node in scope.known:
                return scope.known[node]
            scope = scope.parent
        return None

    def assign_after(self, names: set[str]) -> None:
        """Here and around."""
        self.assigned_after |= names
        if self.parent is not None:
            self.parent.assign_after(names)

    def home(self, node: Node) -> Scope:
        """The outermost scope in which a node can be computed: before each loop in which nothing of it moves."""
        scope = self
        while scope.axis is not None and not scope._moves(node):
            scope = scope.parent
        return scope

    def _moves(self, node: Node) -> bool:
        return self.axis in node.free or (self.is_sweep and is_running(node))

    def is_tail_of(self, axis: Axis) -> bool:
        """Whether the loop around that goes along `axis` is at its last tile."""
        scope: Scope | None = self
        while scope is not None:
            if scope.axis == axis:
                return scope.tail
            scope = scope.parent
        return True

    def start_of(self, axis: Axis) -> str:
        """Where the tile starts of the loop around that goes along `axis`."""
        return self.start if self.axis == axis or self.parent is None else self.parent.start_of(axis)

    @property
    def text(self) -> list[str]:
        return [line.code for line in self.lines]
