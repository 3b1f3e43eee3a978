"""Each derivation where it could go wrong: offsets, large logits, equal maxima, empty rows, what fp16 can't hold.

A derivation is right over the reals; these inputs are where floats are not. As everywhere, an output may be twice as
far from a float64 run as eager's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from whole_path import assert_right, fused

HALF, FLOAT = torch.float16, torch.float32


class Case(NamedTuple):
    """`inputs` are made by what is named there, at (rows, stream)."""

    program: Callable
    inputs: Callable
    dtype: torch.dtype = FLOAT


def r(*shape: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale + offset


def qkv(scale: float = 1.0, offset: float = 0.0, values: float = 1.0, away: float = 0.0) -> Callable:
    """q, k of a scale and an offset, v of others."""

    def make(m: int, n: int):
        k = r(2, n, 8, scale=scale, offset=offset)
        return r(2, m, 8, scale=scale, offset=offset), k, r(2, n, 4, scale=values, offset=away)

    return make


def scores_and_values(scale: float = 1.0, values: float = 1.0, away: float = 0.0) -> Callable:
    """As `qkv`, with another pair of queries and keys after."""

    def make(m: int, n: int):
        return (*qkv(scale, 0.0, values, away)(m, n), r(2, m + 1, 8)[:, :m], r(2, n + 1, 8)[:, :n])

    return make


def equal(m: int, n: int):
    """All scores are the same."""
    return torch.ones(2, m, 8), torch.ones(2, n, 8), r(2, n, 4)


def few_levels(m: int, n: int):
    """Scores are small integers: most maxima are met several times."""
    q, k, v = qkv()(m, n)
    return q.sign(), k.sign(), v


# The shift: exp(x - max), the maximum running.


def softmax(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def by_hand(q, k, v):
    s = q @ k.mT
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def base_two(q, k, v):
    s = q @ k.mT
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def sink(q, k, v):
    s = q @ k.mT
    s = torch.cat([s, torch.full((*s.shape[:-1], 1), 1e4)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


def log_sum(q, k, v):
    return torch.logsumexp(q @ k.mT, -1)


def negated(q, k, v):
    """The least score gets the most."""
    return torch.softmax(-3 * (q @ k.mT), -1) @ v


def over_rows(q, k, v):
    w = torch.softmax(q @ k.mT, -2)
    return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


# The hoist: a division that waits for the end.


def divided_first(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1, keepdim=True)) @ v


def of_absolutes(q, k, v):
    return F.normalize(q @ k.mT, p=1, dim=-1) @ v


def of_squares(q, k, v):
    return F.normalize(q @ k.mT, dim=-1) @ v


def clamped(q, k, v):
    s = (q @ k.mT).relu()
    return (s / s.sum(-1, keepdim=True).clamp(min=1e-3)) @ v


# Sums written out as several.


def differential(q, k, v, x, y):
    return (torch.softmax(q @ k.mT, -1) - 0.9 * torch.softmax(x @ y.mT, -1)) @ v


def of_differences(q, k, v):
    """Weights less their mean: what is common to all values falls out."""
    w = torch.softmax(q @ k.mT, -1)
    return (w - w.mean(-1, keepdim=True)) @ v


# Moments, about running means and maxima.


def entropy(q, k, v):
    s = torch.log_softmax(q @ k.mT, -1)
    return -(s.exp() * s).sum(-1)


def centred(q, k, v):
    w, x = torch.softmax(q @ k.mT, -1), v[..., 0].unsqueeze(1)
    gap = x - (w * x).sum(-1, keepdim=True)
    return (w * gap * gap).sum(-1)


def standardised(q, k, v):
    s = q @ k.mT
    s = (s - s.mean(-1, keepdim=True)) / torch.sqrt(s.var(-1, keepdim=True, unbiased=False) + 1e-6)
    return torch.softmax(s, -1) @ v


def standardised_by_std(q, k, v):
    s = q @ k.mT
    return torch.softmax((s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1e-6), -1) @ v


def mean_log_probability(q, k, v):
    """What smoothed labels lose."""
    return torch.log_softmax(q @ k.mT, -1).mean(-1)


def less_the_best(q, k, v):
    s = q @ k.mT
    return (s.amax(-1, keepdim=True) - s) @ v


def less_the_best_under_a_softmax(q, k, v):
    s = q @ k.mT
    return torch.softmax(s, -1) * (s - s.amin(-1, keepdim=True)) @ v


def divergence(q, k, v, x, y):
    p, other = torch.log_softmax(q @ k.mT, -1), torch.log_softmax(x @ y.mT, -1)
    return (p.exp() * (p - other)).sum(-1)


# Distances, and what has an extremum.


def distances(q, k, v):
    return torch.softmax(-(q[:, :, None] - k[:, None]).square().sum(-1), -1) @ v


def best(q, k, v):
    s = q @ k.mT
    return s.amax(-1), s.argmax(-1), s.argmin(-1)


def best_value(q, k, v):
    """The value of the best key."""
    s = q @ k.mT
    chosen = (s == s.amax(-1, keepdim=True)).to(v.dtype)
    return (chosen / chosen.sum(-1, keepdim=True)) @ v


# Masks.


def kept(q, k):
    """Every third row sees nothing."""
    return (torch.arange(q.shape[1]) % 3 > 0)[:, None] & (torch.arange(k.shape[1]) % 2 == 0)


def masked(q, k, v):
    return (q @ k.mT).masked_fill(~kept(q, k), -math.inf), v


def masked_softmax(q, k, v):
    s, v = masked(q, k, v)
    return torch.softmax(s, -1) @ v


def masked_by_hand(q, k, v):
    s, v = masked(q, k, v)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def masked_entropy(q, k, v):
    p = torch.softmax(masked(q, k, v)[0], -1)
    return -(p * torch.log(p + 1e-6)).sum(-1)


def masked_log_sum(q, k, v):
    return torch.logsumexp(masked(q, k, v)[0], -1), masked(q, k, v)[0].amax(-1)


def masked_centred(q, k, v):
    w, x = torch.softmax(masked(q, k, v)[0], -1), v[..., 0].unsqueeze(1)
    return (w * (x - (w * x).sum(-1, keepdim=True)).square()).sum(-1)


def filled(fill: Callable) -> Callable:
    def program(q, k, v):
        s, v = masked(q, k, v)
        return torch.softmax(s.clamp(min=fill(s.dtype)), -1) @ v

    program.__name__ = f"filled_{fill(FLOAT):.0e}"
    return program


def added(q, k, v):
    """The fill is added: fp16 has nothing below."""
    return torch.softmax(q @ k.mT + (~kept(q, k)).to(q.dtype) * torch.finfo(q.dtype).min, -1) @ v


def masked_mean_log(q, k, v):
    return torch.log_softmax(masked(q, k, v)[0], -1).clamp(min=-50.0).mean(-1)


def masked_by_the_log_of_a_sum(q, k, v):
    """Beside the smallest float a logarithm is lost: rows that see nothing give sums, not means."""
    s, v = masked(q, k, v)
    s = s.clamp(min=torch.finfo(s.dtype).min)
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


CASES = {
    "large logits": Case(softmax, qkv(scale=60.0)),
    "large logits by hand": Case(by_hand, qkv(scale=60.0)),
    "large logits, base 2": Case(base_two, qkv(scale=60.0)),
    "large logits, fp16": Case(softmax, qkv(scale=60.0), HALF),
    "large logits, over rows": Case(over_rows, qkv(scale=10.0)),
    "large logits, logsumexp": Case(log_sum, qkv(scale=60.0)),
    "logits far from zero": Case(softmax, qkv(scale=1.0, offset=30.0)),
    "logits far below zero": Case(negated, qkv(scale=1.0, offset=30.0)),
    "a sink above all": Case(sink, qkv(scale=10.0)),
    "a sink below some": Case(sink, qkv(scale=60.0)),
    "equal scores": Case(softmax, equal),
    "equal scores, standardised": Case(standardised, equal),
    "few levels": Case(softmax, few_levels),
    "sums that fp16 can't hold": Case(by_hand, qkv(values=9e3), HALF),
    "weights that fp16 can't hold": Case(divided_first, qkv(scale=1.6), HALF),
    "absolutes that fp16 can't hold": Case(of_absolutes, qkv(scale=60.0), HALF),
    "squares that fp16 can't hold": Case(of_squares, qkv(scale=10.0), HALF),
    "squares that vanish": Case(of_squares, qkv(scale=1e-11)),
    "nothing to divide by": Case(clamped, qkv(scale=1e-3)),
    "large exponentials": Case(divided_first, qkv(scale=4.0)),
    "values far from zero, differential": Case(differential, scores_and_values(away=100.0)),
    "large logits, differential": Case(differential, scores_and_values(scale=30.0)),
    "values far from zero, less their mean": Case(of_differences, qkv(away=100.0)),
    "large logits, entropy": Case(entropy, qkv(scale=30.0)),
    "equal scores, entropy": Case(entropy, equal),
    "logits far from zero, mean log": Case(mean_log_probability, qkv(offset=30.0)),
    "large logits, mean log": Case(mean_log_probability, qkv(scale=60.0)),
    "logits far from zero, less the best": Case(less_the_best, qkv(offset=30.0)),
    "logits far from zero, less the least": Case(less_the_best_under_a_softmax, qkv(offset=30.0)),
    "large logits, divergence": Case(divergence, scores_and_values(scale=30.0)),
    "values far from zero, variance": Case(centred, qkv(away=1e4)),
    "values far from zero, variance, fp16": Case(centred, qkv(away=300.0), HALF),
    "large logits, variance": Case(centred, qkv(scale=30.0)),
    "logits far from zero, standardised": Case(standardised, qkv(offset=30.0)),
    "logits far from zero, by std": Case(standardised_by_std, qkv(offset=30.0)),
    "points far from zero": Case(distances, qkv(offset=300.0)),
    "points far from zero, fp16": Case(distances, qkv(offset=100.0), HALF),
    "equal maxima": Case(best, few_levels),
    "all maxima equal": Case(best, equal),
    "maxima that fp16 makes equal": Case(best, qkv(offset=8.0), HALF),
    "equal maxima, values": Case(best_value, few_levels),
    "empty rows": Case(masked_softmax, qkv()),
    "empty rows by hand": Case(masked_by_hand, qkv()),
    "empty rows, entropy": Case(masked_entropy, qkv()),
    "empty rows, maxima": Case(masked_log_sum, qkv()),
    "empty rows, variance": Case(masked_centred, qkv()),
    "empty rows, mean log": Case(masked_mean_log, qkv()),
    "rows of a fill": Case(filled(lambda dtype: -1e4), qkv()),
    "rows of a larger fill": Case(filled(lambda dtype: -1e9), qkv()),
    "rows of the least float": Case(filled(lambda dtype: torch.finfo(dtype).min), qkv(scale=3.0)),
    "rows of the least float, fp16": Case(filled(lambda dtype: torch.finfo(dtype).min), qkv(scale=3.0), HALF),
    "a fill added, fp16": Case(added, qkv(scale=3.0), HALF),
    "a fill added": Case(added, qkv(scale=3.0)),
    "a logarithm beside a fill": Case(masked_by_the_log_of_a_sum, qkv()),
}


@pytest.mark.parametrize("name", CASES)
def test_as_right_as_eager(name):
    case = CASES[name]
    args = tuple(t.to(case.dtype) for t in case.inputs(19, 37))
    assert_right(fused(case.program, args), case.program, args, dtype=case.dtype)
