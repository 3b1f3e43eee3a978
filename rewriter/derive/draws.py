"""What the random cases of a proof are made of: sizes, positions, and the values of tensors.

Sizes are drawn from 2 to 9. Constants are met at their own scale: where a comparison (a window of 256, say) has only
one value at such sizes, more cases draw the sizes it depends on just above the constant.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from rewriter.derive.chain import Chain
from rewriter.derive.factors import as_terms, without_cast
from rewriter.derive.sampled import Values, is_comparison
from rewriter.derive.shared import form_of
from rewriter.ir import Apply, Axis, Const, Index, Load, Node, Param, Program, Reduce, Ref, index, walk
from rewriter.ir.build import is_int
from rewriter.ir.evaluate import Evaluator

LONGEST = 1 << 13  # the largest constant that sizes are raised to
LARGEST_FILL = 1e10  # a larger one absorbs what is added to it
BUDGET = 1_000_000  # elements of one value
TRIES = 200
FURTHER = 40  # cases drawn where no other has given a number
_DIVIDING = ("floordiv", "mod", "truncdiv")


@dataclass(frozen=True)
class Kind:
    """How the floats of a case are drawn. Extreme ones overflow an exponential that is not shifted enough."""

    name: str
    low: float
    high: float
    masks: bool = False
    extreme: bool = False


PLAIN = Kind("plain", -1.25, 1.25)
LARGE = Kind("large", -40.0, 40.0, extreme=True)
KINDS = (
    PLAIN,
    Kind("positive", 0.05, 1.25),
    Kind("-inf in additive masks", -1.25, 1.25, masks=True),
    LARGE,
)


class NoSizes(Exception):
    """Some axis has no elements at any sizes drawn."""


class Draws:
    """Draws one case after another. `seen` holds the truth values that integer comparisons have had so far."""

    def __init__(self, program: Program, chain: Chain, rng: random.Random, shared: frozenset[Node] = frozenset()):
        self.program, self.chain, self.rng, self.shared = program, chain, rng, shared
        roots = chain.roots
        self.extents = _extents(program, chain)
        self.params = _params(*self.extents, *roots)
        self.comparisons = [n for n in walk(*roots) if is_comparison(n)]
        self.seen: dict[Node, set[bool]] = {n: set() for n in self.comparisons}
        self.sizes: dict[str, int | float] = {}

    def cases(self) -> Iterator[tuple[Kind, Values]]:
        """Draws `sizes` and the values of tensors; the last cases follow from what the first have seen."""
        for kind in KINDS:
            if not kind.masks or self._masks():
                yield kind, self._case(kind, {})
        floors = self._floors()
        for kind in (PLAIN, LARGE) if floors else ():
            yield kind, self._case(kind, floors)
        for truth in (False, True) if self._loses_logarithms() else ():
            yield PLAIN, replace(self._case(PLAIN, {}), truth=truth)

    def further(self) -> Iterator[tuple[Kind, Values]]:
        """More plain cases, every other one with few integers: that ids are equal, say, is rare otherwise."""
        for k in range(FURTHER):
            values = self._case(PLAIN, {})
            yield PLAIN, values if k % 2 else replace(values, pool=(0, 1), numbered=self._numbered())

    def _numbered(self) -> frozenset[str]:
        """Tensors of floats that are compared for equality: ids, and no two floats drawn at random are equal."""
        equalities = [n for n in walk(*self.chain.roots) if isinstance(n, Apply) and n.op in ("eq", "ne")]
        sides = [without_cast(a) for n in equalities for a in n.args]
        return frozenset(a.tensor.name for a in sides if isinstance(a, Load) and a.dtype.is_floating_point)

    def note(self, seen: dict[Node, set[bool]]) -> None:
        for node, truth in seen.items():
            if node in self.seen:
                self.seen[node] |= truth

    def _case(self, kind: Kind, floors: dict[str, int]) -> Values:
        self.sizes = self._sizes(floors)
        masks = self._masks() if kind.masks else frozenset()
        return Values(self.rng.getrandbits(30), kind.low, kind.high, self._pool(), masks)

    def _sizes(self, floors: dict[str, int]) -> dict[str, int | float]:
        """Every `Param` by name, each axis having an element at least; `floors` says where sizes must be larger."""
        for k in range(TRIES):
            most = 9 if k < TRIES // 2 else 64
            sizes = {p.name: self._size(p, most, floors) for p in self.params}
            with suppress(RuntimeError):  # n // (n // 8) of n below 8
                evaluator = Evaluator({}, sizes)
                if all(evaluator.extent(e) > 0 for e in self.extents):
                    return sizes
        raise NoSizes

    def _size(self, param: Param, most: int, floors: dict[str, int]) -> int | float:
        if param.dtype.is_floating_point:
            return self.rng.uniform(0.3, 1.5)
        return self.rng.randint(2, most) + floors.get(param.name, 0)

    def positions(self) -> dict[Axis, torch.Tensor]:
        """Some positions of every axis, in order; of those that masks read, the first and the last too; all where a
        sweep reads what another computed there.
        """
        evaluator = Evaluator({}, self.sizes)
        whole = self._read_whole()
        compared = frozenset().union(*(n.free for n in self.comparisons)) - whole
        others = [a for a in self.chain.axes if a not in whole | compared]
        bodies = [o.body for o in self.program.outputs]
        drawn = {n: 1 for n in walk(*bodies) if isinstance(n, Reduce) and form_of(n)[0] in self.shared}
        cost = max(_cost(body, evaluator, dict(drawn)) for body in bodies)
        cost *= 3 ** len(compared & set(self.chain.axes))
        cost *= math.prod(evaluator.extent(a.extent) for a in whole)
        few = next((k for k in (4, 3, 2) if cost * k ** len(others) <= BUDGET), 1)
        chosen = {a: 3 if a in compared else few for a in self.chain.axes}
        return {
            a: torch.arange(n) if a in whole else self._chosen(n, chosen[a], a in compared)
            for a in self.chain.axes
            for n in [evaluator.extent(a.extent)]
        }

    def _read_whole(self) -> frozenset[Axis]:
        """Axes of definitions that others read at more than the same position: along a stream, or inside a reduction."""
        by_name = {d.name: d for d in self.chain.definitions}
        streams = {d.stream for d in self.chain.definitions}
        refs = {n for n in walk(*self.chain.roots) if isinstance(n, Ref)}
        moved = {a for r in refs for a, i in zip(by_name[r.name].axes, r.index) if a in streams or i is not index(a)}
        return frozenset(moved)

    def _chosen(self, extent: int, count: int, with_ends: bool) -> torch.Tensor:
        ends = {0, extent - 1} if with_ends else set()
        rest = [i for i in self.rng.sample(range(extent), min(extent, count)) if i not in ends]
        return torch.tensor(sorted([*ends, *rest[: count - len(ends)]]))

    def _pool(self) -> tuple[int, ...]:
        """Integers that tensors hold: small ones, some within the sizes, and those the program compares with."""
        constants = {c for n in self.comparisons for c in _constants(n)}
        near = {c + d for c in constants for d in (-1, 0, 1)}
        largest = max((v for v in self.sizes.values() if isinstance(v, int)), default=9)
        within = {self.rng.randint(0, largest) for _ in range(9)}
        return tuple(sorted({-1, 0, 1, 2} | near | within))

    def _masks(self) -> frozenset[str]:
        """Tensors that are added to a score as they are: eager masks with -inf come this way."""
        exponents = [
            d.shift.exponent if d.shift else d.body for d in self.chain.definitions if d.shift or d.op == "max"
        ]
        terms = [without_cast(t.node) for e in exponents for t in as_terms(e) if t.sign > 0]
        return frozenset(t.tensor.name for t in terms if isinstance(t, Load))

    def _loses_logarithms(self) -> bool:
        """Whether a logarithm may be added to a fill that absorbs it: in rows that see nothing else, of which few are
        met by chance. s - logsumexp(s) is 0 there, and not -log n.
        """
        nodes = list(walk(*(o.body for o in self.program.outputs)))
        fills = (n.value for n in nodes if isinstance(n, Const) and n.dtype.is_floating_point)
        return any(isinstance(n, Apply) and n.op == "log" for n in nodes) and any(
            LARGEST_FILL < abs(v) < math.inf for v in fills
        )

    def _floors(self) -> dict[str, int]:
        """For sizes on which a comparison depends that had one value only: the largest constant in it."""
        out: dict[str, int] = {}
        for node in (n for n, truth in self.seen.items() if len(truth) == 1):
            largest = max((c for c in _constants(node) if c <= LONGEST), default=0)
            for param in _params(node, *(a.extent for a in node.free)):
                if largest and not param.dtype.is_floating_point:
                    out[param.name] = max(out.get(param.name, 0), largest)
        return out


def _params(*nodes: Node) -> list[Param]:
    return sorted({n for n in walk(*nodes) if isinstance(n, Param)}, key=repr)


def _constants(node: Node) -> list[int]:
    return [abs(int(n.value)) for n in walk(node) if isinstance(n, Const) and not n.dtype.is_floating_point]


def _extents(program: Program, chain: Chain) -> list[Node]:
    """What must be at least 1: the extents of every axis of the program and of the chain, and sizes they divide by."""
    nodes = list(walk(*(o.body for o in program.outputs), *chain.roots))
    axes = [*chain.axes, *(a for o in program.outputs for a in o.axes)]
    axes += [a for n in nodes if isinstance(n, Reduce) for a in n.axes]
    axes += [n.axis for n in nodes if isinstance(n, Index)]
    divisors = [n.args[1] for n in nodes if isinstance(n, Apply) and n.op in _DIVIDING]
    sizes = [d for d in divisors if is_int(d) and _is_size(d)]
    return list(dict.fromkeys([*(a.extent for a in axes), *sizes]))


def _is_size(node: Node) -> bool:
    return all(isinstance(n, (Const, Param, Apply)) for n in walk(node))


def _cost(node: Node, evaluator: Evaluator, memo: dict[Node, int]) -> int:
    """The elements of the largest value that evaluating a node makes, per row."""
    if node not in memo:
        inside = max((_cost(c, evaluator, memo) for c in node.children), default=1)
        for axis in node.axes if isinstance(node, Reduce) else ():
            inside *= evaluator.extent(axis.extent)
        memo[node] = inside
    return memo[node]
