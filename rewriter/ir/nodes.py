"""The language: eight kinds of frozen, hash-consed nodes, each a function from named axes to a scalar.

    Load(tensor, index)      q[b, h, m, d]           index entries are integer nodes
    Const(value)             0.125, -inf, True
    Param(name)              a size known when the kernel is called: s77
    Index(axis)              the position along an axis, as an integer
    Apply(op, args)          add, mul, exp, lt, cast ...
    Where(p, a, b)           lazy choice
    Reduce(op, axes, p, x)   ⊕ over the axes where p holds
    Ref(name, index)         the value of an earlier definition of a chain

Two nodes are equal exactly when they are the same object: the constructors intern. Bound axes are renamed canonically
when a `Reduce` is made, so equality is alpha-equivalence and common subexpressions merge by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

_interned: dict[tuple, Node] = {}
_fresh = itertools.count()


class _Interning(type):
    """Returns the one object for equal fields, so that `is` decides equality and hashes are cheap."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return _interned.setdefault(made.key, made)


@dataclass(frozen=True, eq=False)
class Node(metaclass=_Interning):
    """A value that depends on its free axes. `dtype` is what the eager program holds it in."""

    @cached_property
    def key(self) -> tuple:
        """What makes two nodes the same; floats by their representation, so that NaN and -0.0 are themselves."""
        fields = [v for k, v in vars(self).items() if not k.startswith("_")]
        return (
            type(self).__name__,
            *(repr(v) if isinstance(v, float) else (type(v).__name__, v) for v in fields),
        )

    @property
    def children(self) -> tuple[Node, ...]:
        return ()

    @cached_property
    def free(self) -> frozenset[Axis]:
        """Axes this value depends on that no `Reduce` inside binds."""
        return frozenset().union(*(c.free for c in self.children)) if self.children else frozenset()

    @cached_property
    def depth(self) -> int:
        """How many `Reduce` are nested inside: the number that names the next bound axis."""
        return max((c.depth for c in self.children), default=0)

    def __repr__(self) -> str:
        from rewriter.ir.printer import show

        return show(self)


@dataclass(frozen=True)
class Axis:
    """A named range 0 ≤ i < extent."""

    name: str
    extent: Node

    def __repr__(self) -> str:
        return self.name


def fresh_axis(extent: Node, hint: str = "i") -> Axis:
    """An axis that no other value mentions."""
    return Axis(f"{hint}%{next(_fresh)}", extent)


@dataclass(frozen=True)
class Tensor:
    """A strided tensor the kernel reads: what crosses the frontier of a region.

    Where it is read in another shape than it has, `given` is the one it has. `lanes` is the dimension along which it
    is dense in memory, if there is one. `masks` is the number by which it masks what it is added to, if it held one
    when it was traced: -inf, or the lowest of its dtype.
    """

    name: str
    shape: tuple[Node, ...]
    dtype: torch.dtype
    given: tuple[Node, ...] = ()
    lanes: int | None = None
    masks: float | None = None

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, repr=False)
class Load(Node):
    tensor: Tensor
    index: tuple[Node, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def children(self) -> tuple[Node, ...]:
        return self.index


@dataclass(frozen=True, eq=False, repr=False)
class Const(Node):
    value: int | float | bool
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, eq=False, repr=False)
class Param(Node):
    name: str
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, eq=False, repr=False)
class Index(Node):
    axis: Axis
    dtype: torch.dtype = torch.int64

    @cached_property
    def free(self) -> frozenset[Axis]:
        return frozenset([self.axis])


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Node):
    op: str
    args: tuple[Node, ...]
    dtype: torch.dtype

    @property
    def children(self) -> tuple[Node, ...]:
        return self.args


@dataclass(frozen=True, eq=False, repr=False)
class Where(Node):
    predicate: Node
    then: Node
    other: Node

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.then.dtype, self.other.dtype)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.predicate, self.then, self.other)


@dataclass(frozen=True, eq=False, repr=False)
class Reduce(Node):
    """⊕ of `body` over `axes` where `predicate` holds. Build with `reduce_over`, look inside with `open_reduce`."""

    op: str
    axes: tuple[Axis, ...]
    predicate: Node
    body: Node

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.predicate, self.body)

    @cached_property
    def free(self) -> frozenset[Axis]:
        return (self.predicate.free | self.body.free) - frozenset(self.axes)

    @cached_property
    def depth(self) -> int:
        return 1 + max(self.predicate.depth, self.body.depth)


@dataclass(frozen=True, eq=False, repr=False)
class Ref(Node):
    """The value of a chain's definition `name` at `index`: as it runs, or, where `final`, as its sweep ended."""

    name: str
    index: tuple[Node, ...]
    dtype: torch.dtype
    final: bool = False

    @property
    def children(self) -> tuple[Node, ...]:
        return self.index


TRUE = Const(True, torch.bool)
FALSE = Const(False, torch.bool)


@dataclass(frozen=True)
class Output:
    """One result of a program: `name[axes] = body`; where the result has another shape than its axes, `shape`.

    Where the body is over other axes than the result's dimensions, `at` says which position of each is meant:
    `name[at] = body`.
    """

    name: str
    axes: tuple[Axis, ...]
    body: Node
    dtype: torch.dtype
    shape: tuple[Node, ...] = ()
    at: tuple[Node, ...] = ()

    @property
    def position(self) -> tuple[Node, ...]:
        """The position that is written, one index per dimension."""
        return self.at or tuple(Const(0) if a.extent is Const(1) else Index(a) for a in self.axes)

    @property
    def over(self) -> tuple[Axis, ...]:
        """The axes of the body."""
        if not self.at:
            return self.axes
        return tuple(dict.fromkeys(a for p in self.at for a in sorted(p.free, key=lambda a: a.name)))


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the user's file, line, source text and variable name (empty where unknown)."""

    file: str = ""
    line: int = 0
    text: str = ""
    name: str = ""


@dataclass(frozen=True)
class Program:
    """A wide region as index notation. `origins` is a side table from nodes to the user's lines. What is summed along
    `lengths` is longer than its sums.
    """

    name: str
    outputs: tuple[Output, ...]
    origins: dict[Node, Origin] = field(default_factory=dict, compare=False, hash=False)
    lengths: frozenset[Node] = frozenset()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor read, in order of first use."""
        loads = (n for o in self.outputs for n in walk(o.body) if isinstance(n, Load))
        return tuple(dict.fromkeys(n.tensor for n in loads))


def walk(*roots: Node) -> Iterator[Node]:
    """Every node below the roots once, children first. Extents of bound axes are not visited."""
    seen: set[Node] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.children) if child not in seen)


def reduce_over(op: str, axes: tuple[Axis, ...], body: Node, predicate: Node = TRUE) -> Node:
    """`Reduce` with canonical bound axes: the k-th axis of a reduction that nests d others is named `r<d>_<k>`."""
    depth = max(predicate.depth, body.depth)
    bound = tuple(Axis(f"r{depth}_{k}", axis.extent) for k, axis in enumerate(axes))
    renaming = {axis: Index(b) for axis, b in zip(axes, bound)}
    return Reduce(op, bound, substitute(predicate, renaming), substitute(body, renaming))


def open_reduce(node: Reduce, axes: tuple[Axis, ...] | None = None) -> tuple[tuple[Axis, ...], Node, Node]:
    """(axes, predicate, body) with the bound axes replaced by `axes`, or by fresh ones."""
    axes = axes or tuple(fresh_axis(a.extent) for a in node.axes)
    renaming = {old: Index(new) for old, new in zip(node.axes, axes)}
    return axes, substitute(node.predicate, renaming), substitute(node.body, renaming)


def substitute(node: Node, by: dict[Axis, Node]) -> Node:
    """Replaces free axes by integer nodes. The values must not mention canonical bound axes (use `open_reduce`)."""
    memo: dict[Node, Node] = {}
    wanted = frozenset(by)

    def go(n: Node) -> Node:
        if not (n.free & wanted):
            return n
        if n not in memo:
            memo[n] = by[n.axis] if isinstance(n, Index) else rebuild(n, tuple(map(go, n.children)))
        return memo[n]

    return go(node)


def rebuild(node: Node, children: tuple[Node, ...]) -> Node:
    """`node` with other children. A `Reduce` keeps its bound axes, so callers must not change what they mean."""
    from rewriter.ir import build

    if children == node.children:
        return node
    match node:
        case Load():
            return Load(node.tensor, children)
        case Apply():
            return build.apply(node.op, *children, dtype=node.dtype)
        case Where():
            return build.where(*children)
        case Reduce():
            return Reduce(node.op, node.axes, *children)
        case Ref():
            return Ref(node.name, children, node.dtype, node.final)
    raise TypeError(f"{type(node).__name__} has no children")


def transform(node: Node, rule: Callable[[Node], Node], memo: dict[Node, Node] | None = None) -> Node:
    """Applies `rule` to every node bottom-up. Bound axes are opened first, so a rule sees ordinary free axes."""
    memo = {} if memo is None else memo

    def go(n: Node) -> Node:
        if n not in memo:
            if isinstance(n, Reduce):
                axes, predicate, body = open_reduce(n)
                memo[n] = rule(reduce_over(n.op, axes, go(body), go(predicate)))
            else:
                memo[n] = rule(rebuild(n, tuple(map(go, n.children))) if n.children else n)
        return memo[n]

    return go(node)
