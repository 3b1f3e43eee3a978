"""Functions of wide scores through the whole path: what a kernel computes of them is what eager computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from whole_path import assert_right, fused

ELEMENTARY = [
    torch.exp2,
    torch.expm1,
    lambda s: s.abs().log1p(),
    lambda s: torch.log10(s.abs() + 0.1),
    torch.sinh,
    torch.cosh,
]
ROUNDED = [
    torch.round,
    torch.trunc,
    torch.frac,
    torch.sign,
    lambda s: s.round().nan_to_num(),
    lambda s: torch.isfinite(s).float(),
]
POWERS = [
    lambda s: s**3,
    lambda s: s.abs() ** 1.5,
    lambda s: (s.abs() + 0.1) ** -0.5,
    lambda s: 2.0**s,
    lambda s: 0.7**s,
    lambda s: s.square(),
]
DIVIDED = [
    lambda s: torch.remainder(s, 0.75),
    lambda s: torch.fmod(s, 0.75),
    lambda s: s // 0.75,
    lambda s: torch.div(s, 0.75, rounding_mode="trunc"),
    lambda s: s.clamp(s * 0 - 0.5, s.abs()),
    lambda s: torch.hypot(s, s - 1),
]
SMOOTH = [F.softplus, F.logsigmoid, F.mish, F.gelu, F.silu, lambda s: F.gelu(s, approximate="tanh")]
BENT = [F.relu6, F.hardswish, F.hardsigmoid, F.selu, F.celu, F.softsign]
CUT = [F.softshrink, F.hardshrink, F.hardtanh, F.leaky_relu, lambda s: F.threshold(s, 0.1, -1.0), F.elu]
SUMS = [
    lambda s: torch.logaddexp(s, -s),
    lambda s: torch.special.entr(s.sigmoid()),
    lambda s: torch.special.xlogy(s.abs(), s.abs() + 1),
    lambda s: torch.logit(s.sigmoid(), eps=1e-3),
    lambda s: torch.lerp(s, 2 * s, 0.3),
    lambda s: torch.addcmul(s, s, s, value=0.5),
]
GROUPS = {
    "elementary": ELEMENTARY,
    "rounded": ROUNDED,
    "powers": POWERS,
    "divided": DIVIDED,
    "smooth": SMOOTH,
    "bent": BENT,
    "cut": CUT,
    "sums": SUMS,
}


def qkv() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8), torch.randn(2, 19, 8), torch.randn(2, 19, 6)


def check(program, inputs: tuple[torch.Tensor, ...]) -> None:
    assert_right(fused(program, inputs), program, inputs)


@pytest.mark.parametrize("group", GROUPS)
def test_functions_of_scores(group):
    def weighted(q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.5
        return tuple(f(scores) @ v for f in GROUPS[group])

    check(weighted, qkv())


def test_bits_of_positions():
    def butterflies(q, k, v):
        i = torch.arange(q.shape[1])[:, None]
        j = torch.arange(k.shape[1])
        away = (i ^ j) & 5
        mask = (away == 0) | ((i | j) >> 1 == 3) | ((j << 2) % 12 == ~i + 5)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e4)
        return torch.softmax(scores, -1) @ v

    check(butterflies, qkv())


# Positions of maxima


def test_the_first_of_equal_maxima():
    def first(q, k):
        scores = (q @ k.transpose(-1, -2)).round().clamp(-2, 2)
        return scores.argmax(-1), scores.argmin(1), *scores.max(-1)

    check(first, qkv()[:2])


def test_the_maximum_of_masked_rows_and_of_rows_of_nan():
    def where_best(q, k, v):
        scores = q @ k.transpose(-1, -2)
        causal = torch.arange(k.shape[1]) < torch.arange(q.shape[1])[:, None]
        masked = scores.masked_fill(~causal, float("-inf"))
        return masked.argmax(-1), torch.softmax(masked, -1).argmax(-1), masked.max(-1).values

    inputs = qkv()
    for got, want in zip(fused(where_best, inputs).module(*inputs), where_best(*inputs)):
        torch.testing.assert_close(got, want)


# What has the maximum: in one sweep, which starts again where a larger one is found


def equal_shares(q, k, v):
    scores = (q @ k.transpose(-1, -2)).round().clamp(-2, 2)
    best = (scores == scores.amax(-1, keepdim=True)).float()
    return best @ v / best.sum(-1, keepdim=True)


def masked_shares(q, k, v):
    """Rows without any key share all of them: -inf equals -inf."""
    scores = (q @ k.transpose(-1, -2)).round()
    causal = torch.arange(k.shape[1]) < torch.arange(q.shape[1])[:, None]
    scores = scores.masked_fill(~causal, float("-inf"))
    best = torch.where(scores >= scores.max(-1, keepdim=True).values, 1.0, 0.0)
    return best @ v, best.sum(-1)


def nearest(q, k, v):
    away = (q[:, :, None] - k[:, None]).abs().sum(-1).round()
    return away.argmin(-1), torch.where(away <= away.amin(-1, keepdim=True), 1.0, 0.0) @ v


@pytest.mark.parametrize("program", [equal_shares, masked_shares, nearest], ids=lambda p: p.__name__)
def test_what_has_the_maximum_is_found_in_one_sweep(program):
    result = fused(program, qkv())
    assert [chain["passes"] for chain in result.report["chains"]] == [1]
    assert_right(result, program, qkv())
