"""Weights that are 0 where scores are masked: tiles in which nothing is kept are left out."""

from __future__ import annotations

import math

import pytest
import torch
from whole_path import assert_right, fused


def softpick(x):
    top = x.amax(-1, keepdim=True)
    e = torch.exp(x - top) - torch.exp(-top)
    return torch.relu(e) / (torch.where(x.isfinite(), e.abs(), 0).sum(-1, keepdim=True) + 1e-8)


WEIGHTS = {
    "sigmoid": (torch.sigmoid, 1),
    "squared_relu": (lambda x: torch.relu(x) ** 2, 1),
    "threshold": (lambda x: torch.relu(x.softmax(-1) - 0.05), 2),
    "entropy": (lambda x: x.softmax(-1) * torch.log(x.softmax(-1) + 1e-9), 2),
    "shares": (lambda x: torch.relu(torch.relu(x) / torch.relu(x).sum(-1, keepdim=True) - 0.05), 2),
    "softpick": (softpick, 2),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_a_fill_makes_zero_is_not_read(name):
    weigh, sweeps = WEIGHTS[name]

    def causal(q, k, v):
        keep = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        return weigh((q @ k.mT).masked_fill(~keep, -math.inf)) @ v

    def kept(q, k, v, keep):
        return weigh((q @ k.mT).masked_fill(~keep, -math.inf)) @ v

    result = fused(causal, tuple(torch.randn(2, 9, 8) for _ in range(3)))
    text = next(t for n, t in result.sources.items() if n.endswith("/causal.py"))
    loops = [line for line in text.splitlines() if line.strip().startswith("for start in")]
    assert len(loops) >= sweeps and all("last" in line or "cut" in line for line in loops)
    assert_right(result, causal, tuple(torch.randn(2, 70, 8) for _ in range(3)))
    keep = torch.rand(2, 40, 40) < 0.6
    keep[0, 3] = False  # a row that sees nothing
    args = (*(torch.randn(2, 40, 8) for _ in range(3)), keep)
    assert_right(fused(kept, args), kept, args)


@pytest.mark.parametrize("weigh, fill", [(torch.nn.functional.silu, -math.inf), (torch.sigmoid, -10.0)])
def test_a_number_that_weighs_is_kept(weigh, fill):
    """silu(-inf) is NaN, sigmoid(-10) is not 0."""

    def program(q, k, v):
        keep = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        return weigh((q @ k.mT).masked_fill(~keep, fill)) @ v

    args = tuple(torch.randn(2, 40, 8) for _ in range(3))
    assert_right(fused(program, args), program, args)


@pytest.mark.parametrize("number", [lambda p: p, lambda p: p.float(), lambda p: p.long()])
def test_truth_values_that_multiply_leave_tiles_out(number):
    def window(q, k, v):
        ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
        return (torch.sigmoid(q @ k.mT) * number(ahead <= 0) * number(ahead > -9)) @ v

    def kept(q, k, v, keep):
        return (torch.softmax(q @ k.mT, -1) / (q @ k.mT).relu().sum(-1, keepdim=True) * number(keep)) @ v

    result = fused(window, tuple(torch.randn(2, 9, 8) for _ in range(3)))
    text = next(t for n, t in result.sources.items() if n.endswith("/window.py"))
    assert "range(first," in text and "range(0, full" not in text
    assert_right(result, window, tuple(torch.randn(2, 70, 8) for _ in range(3)))
    keep = torch.rand(2, 40, 40) < 0.6
    keep[0, 3] = False
    args = (*(torch.randn(2, 40, 8) for _ in range(3)), keep)
    assert_right(fused(kept, args), kept, args)
