"""Choosing among the ways to compute a chain: the preferred one, unless estimates tell another to be faster.

A structure says which kernel computes what; each of its kernels has options, roles of axes and tiles, the preferred
first. Kernels run one after the other, so each is chosen by itself, and structures by the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rewriter.ir import Tensor
from rewriter.plan.estimates import KernelCost
from rewriter.plan.kernel import Candidate, KernelPlan

T = TypeVar("T")
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
    winner = _best(whole, whole)
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
    apart = _why_apart(winner, whole[0])
    reasons = [*filter(None, [apart]), *_why_tiles(winner, preferred)]
    reason = "; ".join(reasons) or f"preferred, and no other saves {MARGIN:.0%}"
    return [replace(winner, reason=reason, apart=apart), *(replace(c, reason=_why_not(c, winner)) for c in ranked)]


def _candidate(structure: Options, options: Sequence[Option]) -> Candidate:
    return Candidate(tuple(o.kernel for o in options), tuple(o.cost for o in options), structure.results)


def _pick(options: Sequence[Option]) -> Option:
    return _best(options, [o.cost for o in options])


def _best(items: Sequence[T], costs: Sequence[KernelCost | Candidate]) -> T:
    """The first, unless it does not fit as well as another, or another saves more than MARGIN.

    No other is considered that does not fit an AMD GPU where the first does.
    """
    first = costs[0]
    allowed = [k for k, c in enumerate(costs) if c.portable or not first.portable]
    best = min(allowed, key=lambda k: (costs[k].excess, costs[k].seconds))
    stays = first.excess == costs[best].excess and costs[best].seconds >= first.seconds * (1 - MARGIN)
    return items[0 if stays else best]


def _why_apart(winner: Candidate, plain: Candidate) -> str:
    """What speaks for more kernels than the fewest."""
    if len(winner.kernels) == len(plain.kernels):
        return ""
    how = f"takes {plain.seconds / winner.seconds:.2f} times as long" if not plain.excess else _unfit(plain)
    return f"{_count(plain)} {how}"


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
        which = f"in kernel {k + 1} " if len(winner.kernels) > 1 else ""
        out.append(f"{which}{config.block_m} x {config.block_n} in {config.num_warps} warps {how}")
    return out


def _why_not(candidate: Candidate, winner: Candidate) -> str:
    if candidate.excess:
        return _unfit(candidate)
    ratio = candidate.seconds / winner.seconds
    if ratio >= 1:
        return f"{ratio:.2f} times as long"
    lost = winner.portable and not candidate.portable
    return f"{ratio:.2f} times as long: {'fits no AMD GPU' if lost else 'too near to tell'}"


def _unfit(candidate: Candidate) -> str:
    return next(c.unfit for c in candidate.costs if c.excess)
