"""Random integer expressions, as trees that Python can evaluate and that `ir.apply` can build.

A tree is ("add", left, right) over leaves that are Python ints, Params or Index nodes.
"""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from rewriter.ir import Apply, Axis, Const, Index, Node, Param, apply

M, N = Param("M"), Param("N")
POSITIONS = tuple(
    Axis(f"i{k}", extent)
    for k, extent in enumerate([M, N, Const(3), apply("mul", M, Const(2)), apply("add", N, Const(1))])
)
SUMS = ("add", N, 1), ("add", ("mul", N, 3), 3), ("add", ("mul", M, N), M)
DIVISORS = (1, 2, 3, 6, M, N, ("mul", M, 2), ("mul", M, N), *SUMS)


def trees() -> st.SearchStrategy:
    leaves = st.one_of(st.integers(-6, 6), st.sampled_from([M, N]), st.sampled_from([Index(a) for a in POSITIONS]))
    return st.recursive(leaves, _grown, max_leaves=8)


def _grown(inner: st.SearchStrategy) -> st.SearchStrategy:
    divided = st.tuples(st.sampled_from(["floordiv", "mod"]), inner, st.sampled_from(DIVISORS))
    return st.one_of(st.tuples(st.sampled_from(["add", "sub", "mul", "minimum", "maximum"]), inner, inner), divided)


def node_of(tree) -> Node:
    """The tree built by the constructors, so in normal form."""
    if isinstance(tree, int):
        return Const(tree)
    return tree if isinstance(tree, Node) else apply(tree[0], *map(node_of, tree[1:]))


def axes_of(tree) -> frozenset[Axis]:
    if isinstance(tree, tuple):
        return frozenset().union(*map(axes_of, tree[1:]))
    return tree.free if isinstance(tree, Node) else frozenset()


PYTHON = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "minimum": min,
    "maximum": max,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
}


def value_of(tree, sizes: dict, at: dict):
    """A tree or an integer node in Python's own arithmetic."""
    match tree:
        case int():
            return tree
        case Const():
            return tree.value
        case Param():
            return sizes[tree.name]
        case Index():
            return at[tree.axis]
        case Apply(op="not"):
            return not value_of(tree.args[0], sizes, at)
        case Apply():
            return PYTHON[tree.op](*(value_of(a, sizes, at) for a in tree.args))
    return PYTHON[tree[0]](*(value_of(a, sizes, at) for a in tree[1:]))


def environments(*trees, most: int = 3, limit: int = 300):
    """(sizes, positions) for sizes up to `most` and positions of the axes that trees or nodes mention."""
    mentioned = frozenset().union(*map(axes_of, trees))
    axes = [a for a in POSITIONS if a in mentioned]
    every = []
    for m, n in itertools.product(range(1, most + 1), repeat=2):
        held = {"M": m, "N": n}
        ranges = [range(value_of(a.extent, held, {})) for a in axes]
        every += [(held, dict(zip(axes, at))) for at in itertools.product(*ranges)]
    return every[:: len(every) // limit + 1]
