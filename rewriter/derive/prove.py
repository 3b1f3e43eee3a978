"""The numeric proof of a derivation: the chain, run as its kernel would run it, gives what the program means.

Only some rows are looked at, and no tensor is stored, so that a proof costs little. It is deterministic.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from rewriter.derive.chain import Chain
from rewriter.derive.draws import LARGEST_FILL, Draws, Kind, NoSizes
from rewriter.derive.online import Online
from rewriter.derive.sampled import Sampled, Values
from rewriter.derive.shared import shared_forms
from rewriter.ir import Axis, Const, Node, Output, Program, walk
from rewriter.ir.evaluate import TooLarge

TOLERANCE = 1e-9
NUDGE = 1 + 16 * torch.finfo(torch.float64).eps
MARGIN = 16  # how many times what a nudge to all values makes of it a result may be off


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


def prove(program: Program, chain: Chain, seed: int = 0) -> Proof:
    """Compares program and chain on a case of each kind, and on more at the scale of the program's constants."""
    shared = shared_forms([o.body for o in program.outputs], chain.roots)
    proof = _proved(program, chain, seed, shared)
    return proof if proof.ok or not shared else _proved(program, chain, seed, frozenset())


def _proved(program: Program, chain: Chain, seed: int, shared: frozenset[Node]) -> Proof:
    """The reductions `shared` by both are taken for tensors."""
    prover = _Prover(program, chain, random.Random(seed), shared)
    done = 0
    try:
        for kind, values in prover.cases():
            failure = prover.failure(kind, values)
            if failure:
                where = f"{kind.name} values, sizes {prover.draws.sizes}"
                return Proof(False, done, f"{failure} ({where})")
            done += 1
    except TooLarge as error:
        return Proof(True, done, f"not run on random values: {error}")
    except NoSizes:
        return Proof(True, done, "not run on random values: no sizes from 2 to 64 suit every axis")
    if not prover.finite:
        return Proof(False, done, "every random case gives nothing but NaN")
    return Proof(True, done)


class _Prover:
    """Compares; `finite` once a case has given a number."""

    def __init__(self, program: Program, chain: Chain, rng: random.Random, shared: frozenset[Node]):
        self.program, self.chain, self.rng, self.shared = program, chain, rng, shared
        self.rows = {d.name: d.axes for d in chain.definitions}
        self.draws = Draws(program, chain, rng, shared)
        self.finite = False
        self.opened: dict = {}
        self.tolerance = max(TOLERANCE, 4 * torch.finfo(torch.float64).eps * _largest_constant(program))

    def cases(self) -> Iterator[tuple[Kind, Values]]:
        """Those of every proof, then others until one gives a number."""
        yield from self.draws.cases()
        yield from itertools.takewhile(lambda _: not self.finite, self.draws.further())

    def failure(self, kind: Kind, values: Values) -> str:
        """Why program and chain differ; empty where they agree."""
        at = self.draws.positions()
        evaluator = Sampled(values, self.draws.sizes, dict(at), self.rows, self.opened, self.shared)
        online = Online(self.chain, evaluator)
        cuts = self._cuts(evaluator)
        states = {
            "in blocks": online.in_blocks(cuts),
            "in halves": online.in_halves(cuts, lambda parts: self.rng.randint(0, parts)),
        }
        self.draws.note(evaluator.seen)
        for meant, output in zip(self.program.outputs, self.chain.outputs):
            positions = {a: at[b] for a, b in zip(meant.axes, output.axes)}
            want = self._wanted(kind, meant, values, positions)
            noise = self._noise(want, meant, values, positions) if kind.extreme else 0.0
            for how, state in states.items():
                if not self._agree(want, online.output(output, state), kind, noise):
                    return f"{output.name} differs with the stream {how}"
        return ""

    def _cuts(self, evaluator: Sampled):
        """Each stream's blocks, the same for every state."""
        made: dict[Axis, list[torch.Tensor]] = {}

        def cuts(stream: Axis) -> list[torch.Tensor]:
            if stream not in made:
                made[stream] = self._blocks(evaluator.extent(stream.extent))
            return made[stream]

        return cuts

    def _wanted(self, kind: Kind, output: Output, values: Values, at: dict[Axis, torch.Tensor]) -> torch.Tensor:
        """What the program itself gives, NaN where that says nothing."""
        want = self._meant(output, values, at)
        if not kind.extreme:
            return want
        # What overflows at values a little larger may overflow here when summed in another order.
        larger = replace(values, low=1.1 * values.low, high=1.1 * values.high)
        return torch.where(self._meant(output, larger, at).isfinite(), want, math.nan)

    def _noise(self, want: torch.Tensor, output: Output, values: Values, at: dict[Axis, torch.Tensor]) -> float:
        """By how much the program's own rounding moves it: where one weight is all, E[xy] - E[x] E[y] is that alone."""
        nudged = replace(values, low=NUDGE * values.low, high=NUDGE * values.high)
        moved = (self._meant(output, nudged, at) - want).abs()
        moved = moved[moved.isfinite()]
        return moved.max().item() if moved.numel() else 0.0

    def _meant(self, output: Output, values: Values, at: dict[Axis, torch.Tensor]) -> torch.Tensor:
        evaluator = Sampled(values, self.draws.sizes, at, {}, self.opened, self.shared)
        return evaluator.output(output).to(torch.float64)

    def _agree(self, want: torch.Tensor, got: torch.Tensor, kind: Kind, noise: float) -> bool:
        """Equal to a relative 1e-9, NaN and inf in the same places; of extreme cases only what is finite counts.

        Beside a fill of -1e9 a float64 is exact to 1e-7 only, and the logarithm of a sum is added to it in two orders.
        """
        got, finite = got.to(torch.float64), want.isfinite()
        self.finite = self.finite or bool(finite.any())
        scale = want[finite].abs().max().item() if finite.any() else 0.0
        if kind.extreme:
            want, got = want[finite], got[finite]
        least = max(self.tolerance * scale, MARGIN * noise)
        return torch.allclose(got, want, rtol=self.tolerance, atol=least, equal_nan=True)

    def _blocks(self, extent: int) -> list[torch.Tensor]:
        """Positions in blocks of random widths; short ones at either end see what is masked throughout there."""
        cuts = {
            1,
            self.rng.randint(1, 4),
            self.rng.randrange(extent),
            self.rng.randrange(extent),
            extent - 1,
        }
        inner = sorted(c for c in cuts if 0 < c < extent)
        return [torch.arange(a, b) for a, b in zip([0, *inner], [*inner, extent])]


def _largest_constant(program: Program) -> float:
    """The largest float that a program names, up to LARGEST_FILL."""
    floats = (
        abs(n.value)
        for n in walk(*(o.body for o in program.outputs))
        if isinstance(n, Const) and n.dtype.is_floating_point
    )
    return max((c for c in floats if c <= LARGEST_FILL), default=0.0)
