"""Choosing among the ways to compute a chain: the preferred one, unless estimates tell another to be faster.

A structure says which kernel computes what; each of its kernels has options, roles of axes and tiles, the preferred first.
Kernels run one after the other, so each is chosen by itself, and structures by the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rewriter.ir import Tensor
from rewriter.plan.estimates import KernelCost
from rewriter.plan.kernel import Candidate, KernelPlan

MARGIN = 0.15  # of its time another must save: estimates of candidates closer than that don't tell them apart


@dataclass(frozen=True)
class Option:
    """One kernel as it may be, and what it costs."""

    kernel: KernelPlan
    cost: KernelCost


@dataclass(frozen=True)
class Options:
    """For each kernel of a structure what it may be; `results` are what one writes for those after it."""

    kernels: Sequence[Sequence[Option]]
    results: tuple[Tensor, ...]


def choose(structures: Sequence[Options]) -> list[Candidate]:
    """The chosen candidate, then the others, best first. Of structures, as of options, the first is preferred."""
    picks = [[_pick(options) for options in s.kernels] for s in structures]
    whole = [_candidate(s, pick) for s, pick in zip(structures, picks)]
    winner = whole[_best([(c.excess, c.seconds) for c in whole])]
    others = [
        _candidate(s, [*pick[:k], option, *pick[k + 1 :]])
        for s, pick in zip(structures, picks)
        for k, options in enumerate(s.kernels)
        for option in options
    ]
    rest = [c for c in dict.fromkeys([*whole, *others]) if c != winner]
    ranked = sorted(rest, key=lambda c: (c.excess, c.seconds))
    firsts = [_candidate(s, [options[0] for options in s.kernels]) for s in structures]
    preferred = firsts[whole.index(winner)]
    reasons = [*_why_structure(winner, whole[0]), *_why_tiles(winner, preferred)]
    reason = "; ".join(reasons) or f"preferred, and no other saves {MARGIN:.0%}"
    return [replace(winner, reason=reason), *(replace(c, reason=_why_not(c, winner)) for c in ranked)]


def _candidate(structure: Options, options: Sequence[Option]) -> Candidate:
    return Candidate(tuple(o.kernel for o in options), tuple(o.cost for o in options), structure.results)


def _pick(options: Sequence[Option]) -> Option:
    return options[_best([(o.cost.excess, o.cost.seconds) for o in options])]


def _best(costs: Sequence[tuple[float, float]]) -> int:
    """Of (excess, seconds) the first, unless it does not fit as well as another, or another saves more than MARGIN."""
    best = min(range(len(costs)), key=costs.__getitem__)
    (excess, seconds), (least, fastest) = costs[0], costs[best]
    return 0 if excess == least and fastest >= seconds * (1 - MARGIN) else best


def _why_structure(winner: Candidate, plain: Candidate) -> list[str]:
    """What speaks for kernels apart."""
    if len(winner.kernels) == len(plain.kernels):
        return []
    how = f"takes {plain.seconds / winner.seconds:.2f} times as long" if not plain.excess else _unfit(plain)
    return [f"{_count(plain)} {how}"]


def _count(candidate: Candidate) -> str:
    return "one kernel" if len(candidate.kernels) == 1 else f"the fewest kernels, {len(candidate.kernels)},"


def _why_tiles(winner: Candidate, preferred: Candidate) -> list[str]:
    """What speaks against the preferred roles and tile of each kernel."""
    out = []
    for k, (kernel, cost) in enumerate(zip(winner.kernels, winner.costs)):
        if kernel == preferred.kernels[k]:
            continue
        other = preferred.costs[k]
        how = other.unfit or f"takes {other.seconds / cost.seconds:.2f} times as long"
        config = preferred.kernels[k].config
        out.append(f"{config.block_m} x {config.block_n} in {config.num_warps} warps {how}")
    return out


def _why_not(candidate: Candidate, winner: Candidate) -> str:
    if candidate.excess:
        return _unfit(candidate)
    ratio = candidate.seconds / winner.seconds
    return f"{ratio:.2f} times as long" if ratio >= 1.005 else f"{ratio:.2f} times as long: too near to tell"


def _unfit(candidate: Candidate) -> str:
    return next(c.unfit for c in candidate.costs if c.excess)
