"""The numeric proof of a derivation: the chain, run as its kernel would run it, gives what the program means.

Sizes are drawn from 2 to 9. Constants are met at their own scale: where a comparison (a window of 256, say) has only one value
at such sizes, two more cases draw the sizes it depends on just above the constant. Only some rows are looked at, so that this
costs little. A proof is deterministic.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Iterator

import torch

from rewriter.derive.chain import Chain
from rewriter.derive.factors import as_terms, without_cast
from rewriter.derive.online import Online
from rewriter.derive.sampled import Sampled, Values, is_comparison
from rewriter.ir import Apply, Axis, Const, Index, Load, Node, Output, Param, Program, Reduce, walk
from rewriter.ir.build import is_int
from rewriter.ir.evaluate import Evaluator, TooLarge

TOLERANCE = 1e-9
LONGEST = 1 << 13  # the largest constant that sizes are raised to
BUDGET = 1_000_000  # elements of one value
TRIES = 200


@dataclass(frozen=True)
class Proof:
    """`cases` random cases agreed. Where not `ok`, or where there was nothing to run, `reason` says why."""

    ok: bool
    cases: int
    reason: str = ""

    def __str__(self) -> str:
        if not self.cases:
            return self.reason
        return f"proved on {self.cases} random cases, stream in blocks and in halves"


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


def prove(program: Program, chain: Chain, seed: int = 0) -> Proof:
    """Compares program and chain on a case of each kind, and on two at the scale of the program's constants."""
    prover = _Prover(program, chain, random.Random(seed))
    done = 0
    try:
        for kind, floors in prover.cases():
            failure = prover.failure(kind, floors)
            if failure:
                return Proof(False, done, f"{failure} ({kind.name} values, sizes {prover.sizes})")
            done += 1
    except TooLarge as error:
        return Proof(True, done, f"not run on random values: {error}")
    except _NoSizes:
        return Proof(True, done, "not run on random values: no sizes from 2 to 64 suit every axis")
    if not prover.finite:
        return Proof(False, done, "every random case gives nothing but NaN")
    return Proof(True, done)


class _NoSizes(Exception):
    """Some axis has no elements at any sizes drawn."""


class _Prover:
    def __init__(self, program: Program, chain: Chain, rng: random.Random):
        self.program, self.chain, self.rng = program, chain, rng
        self.roots = _roots(chain)
        self.extents = _extents(program, chain)
        self.comparisons = [n for n in walk(*self.roots) if is_comparison(n)]
        self.seen: dict[Node, set[bool]] = {n: set() for n in self.comparisons}
        self.sizes: dict[str, int | float] = {}
        self.finite = False
        self.opened: dict = {}

    def cases(self) -> Iterator[tuple[Kind, dict[str, int]]]:
        """(kind, least sizes by name); the last ones follow from what the first have seen."""
        for kind in KINDS:
            if not kind.masks or self._masks():
                yield kind, {}
        floors = self._floors()
        if floors:
            yield PLAIN, floors
            yield LARGE, floors

    def failure(self, kind: Kind, floors: dict[str, int]) -> str:
        """Why program and chain differ; empty where they agree."""
        self.sizes = self._sizes(floors)
        values = Values(
            self.rng.getrandbits(30),
            kind.low,
            kind.high,
            self._pool(),
            self._masks() if kind.masks else frozenset(),
        )
        rows = max((o.axes for o in self.chain.outputs), key=len)
        at = self._positions(rows)
        evaluator = Sampled(values, self.sizes, at, rows, self.opened)
        online = Online(self.chain, evaluator)
        whole, halves = self._states(online)
        self._note(evaluator)
        for meant, output in zip(self.program.outputs, self.chain.outputs):
            want = self._meant(meant, output, values, at)
            if (
                kind.extreme
            ):  # what overflows at values a little larger may do so here in another order
                larger = replace(values, low=1.1 * values.low, high=1.1 * values.high)
                want = torch.where(
                    self._meant(meant, output, larger, at).isfinite(), want, math.nan
                )
            for how, state in (("in blocks", whole), ("in halves", halves)):
                if not self._agree(want, online.output(output, state), kind):
                    return f"{output.name} differs with the stream {how}"
        return ""

    def _meant(
        self, output: Output, aligned: Output, values: Values, at: dict[Axis, torch.Tensor]
    ) -> torch.Tensor:
        """What the program itself gives at the same positions."""
        positions = {a: at[b] for a, b in zip(output.axes, aligned.axes)}
        evaluator = Sampled(values, self.sizes, positions, output.axes, self.opened)
        return evaluator.output(output).to(torch.float64)

    def _agree(self, want: torch.Tensor, got: torch.Tensor, kind: Kind) -> bool:
        """Equal to a relative 1e-9, NaN and inf in the same places; of extreme cases only what is finite counts."""
        got, finite = got.to(torch.float64), torch.isfinite(want)
        self.finite = self.finite or bool(finite.any())
        if kind.extreme:
            want, got = want[finite], got[finite]
        scale = want[want.isfinite()].abs().max().item() if finite.any() else 0.0
        return torch.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)

    # -- the stream -----------------------------------------------------------------------------------------------

    def _states(self, online: Online):
        """(state after all blocks, state of two halves merged); a half may be empty.

        Short blocks at either end see what is masked throughout there."""
        extent = online.evaluator.extent(self.chain.stream.extent)
        cuts = {
            1,
            self.rng.randint(1, 4),
            extent - 1,
            *(self.rng.randrange(extent) for _ in range(2)),
        }
        cuts = sorted(c for c in cuts if 0 < c < extent)
        blocks = [torch.arange(a, b) for a, b in zip([0, *cuts], [*cuts, extent])]
        middle = self.rng.randint(0, len(blocks))
        first, second = online.empty(), online.empty()
        for block in blocks[:middle]:
            first = online.advanced(first, block)
        whole = first
        for block in blocks[middle:]:
            whole = online.advanced(whole, block)
            second = online.advanced(second, block)
        return whole, online.merged(first, second)

    def _note(self, evaluator: Sampled) -> None:
        for node, truth in evaluator.seen.items():
            if node in self.seen:
                self.seen[node] |= truth

    # -- what is drawn --------------------------------------------------------------------------------------------

    def _sizes(self, floors: dict[str, int]) -> dict[str, int | float]:
        """Every `Param` by name, each axis having an element at least; `floors` says where sizes must be larger."""
        params = sorted(
            {n for e in (*self.extents, *self.roots) for n in walk(e) if isinstance(n, Param)},
            key=repr,
        )
        for k in range(TRIES):
            most = 9 if k < TRIES // 2 else 64
            sizes = {
                p.name: (
                    self.rng.uniform(0.3, 1.5)
                    if p.dtype.is_floating_point
                    else self.rng.randint(2, most) + floors.get(p.name, 0)
                )
                for p in params
            }
            evaluator = Evaluator({}, sizes)
            if all(evaluator.extent(e) > 0 for e in self.extents):
                return sizes
        raise _NoSizes

    def _positions(self, rows: tuple[Axis, ...]) -> dict[Axis, torch.Tensor]:
        """Some positions of every row axis; of those that masks read, the first and the last too."""
        evaluator = Evaluator({}, self.sizes)
        compared = frozenset().union(*(n.free for n in self.comparisons))
        cost = max(_cost(o.body, evaluator, {}) for o in self.program.outputs)
        cost *= 3 ** len(compared & set(rows))
        others = len(set(rows) - compared)
        few = next((k for k in (4, 3, 2) if cost * k**others <= BUDGET), 1)
        return {
            a: self._chosen(evaluator.extent(a.extent), 3 if a in compared else few, a in compared)
            for a in rows
        }

    def _chosen(self, extent: int, count: int, with_ends: bool) -> torch.Tensor:
        ends = {0, extent - 1} if with_ends else set()
        rest = [i for i in self.rng.sample(range(extent), min(extent, count)) if i not in ends]
        return torch.tensor(sorted([*ends, *rest[: count - len(ends)]]))

    def _pool(self) -> tuple[int, ...]:
        """Integers that tensors hold: small ones, some within the sizes, and those the program compares with."""
        near = {
            c + d for n in self.comparisons for c in _constants(n) for d in (-1, 0, 1) if c + d >= 0
        }
        largest = max((v for v in self.sizes.values() if isinstance(v, int)), default=9)
        return tuple(
            sorted({-1, 0, 1, 2} | near | {self.rng.randint(0, largest) for _ in range(9)})
        )

    def _masks(self) -> frozenset[str]:
        """Tensors that are added to a score as they are: eager masks with -inf come this way."""
        exponents = [
            d.shift.exponent if d.shift else d.body
            for d in self.chain.definitions
            if d.shift or d.op == "max"
        ]
        terms = [without_cast(t.node) for e in exponents for t in as_terms(e) if t.sign > 0]
        return frozenset(t.tensor.name for t in terms if isinstance(t, Load))

    def _floors(self) -> dict[str, int]:
        """For sizes on which a comparison depends that had one value only: the largest constant in it."""
        out: dict[str, int] = {}
        for node in (n for n, truth in self.seen.items() if len(truth) == 1):
            largest = max((c for c in _constants(node) if c <= LONGEST), default=0)
            for param in {
                p
                for e in (node, *(a.extent for a in node.free))
                for p in walk(e)
                if isinstance(p, Param)
            }:
                if largest and not param.dtype.is_floating_point:
                    out[param.name] = max(out.get(param.name, 0), largest)
        return out


def _constants(node: Node) -> list[int]:
    return [
        abs(int(n.value))
        for n in walk(node)
        if isinstance(n, Const) and not n.dtype.is_floating_point
    ]


def _roots(chain: Chain) -> list[Node]:
    inner = [n for d in chain.definitions for n in (d.predicate, d.body, *d.rest)]
    shifts = [n for d in chain.definitions if d.shift for n in (d.shift.exponent, d.shift.phi)]
    return [*inner, *shifts, *(o.body for o in chain.outputs)]


def _extents(program: Program, chain: Chain) -> list[Node]:
    """What must be at least 1: the extents of every axis of the program and of the chain, and sizes they divide by."""
    nodes = list(walk(*(o.body for o in program.outputs), *_roots(chain)))
    axes = [a for n in nodes if isinstance(n, Reduce) for a in n.axes] + [
        n.axis for n in nodes if isinstance(n, Index)
    ]
    axes += [a for o in (*program.outputs, *chain.outputs) for a in o.axes]
    divisors = [
        n.args[1] for n in nodes if isinstance(n, Apply) and n.op in ("floordiv", "mod", "truncdiv")
    ]
    sizes = [
        d
        for d in divisors
        if is_int(d) and all(isinstance(n, (Const, Param, Apply)) for n in walk(d))
    ]
    return list(dict.fromkeys([*(a.extent for a in axes), *sizes]))


def _cost(node: Node, evaluator: Evaluator, memo: dict[Node, int]) -> int:
    """The elements of the largest value that evaluating a node makes, per row."""
    if node not in memo:
        inside = max((_cost(c, evaluator, memo) for c in node.children), default=1)
        for axis in node.axes if isinstance(node, Reduce) else ():
            inside *= evaluator.extent(axis.extent)
        memo[node] = inside
    return memo[node]
