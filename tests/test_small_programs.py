"""Small programs through the whole path, each for one thing that no program of the zoo shows."""

from __future__ import annotations

import pytest
import torch
from whole_path import assert_right, fused


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(m: int, n: int) -> tuple[torch.Tensor, ...]:
    return r(2, m, 8), r(2, n, 8), r(2, n, 8)


def grouped(m: int, n: int) -> tuple[torch.Tensor, ...]:
    return r(2, 4, m, 8), r(2, 2, n, 8), r(2, 2, n, 8)


def divided_late_over_groups(q, k, v):
    """Heads are counted by an expression of sizes, 2 * (H // 2)."""
    s = torch.einsum("bgrmd,bgnd->bgrmn", q.unflatten(1, (-1, 2)), k).flatten(1, 2)
    p = torch.exp(s / 4)
    out = torch.einsum("bgrmn,bgne->bgrme", p.unflatten(1, (-1, 2)), v).flatten(1, 2)
    return out / p.sum(-1, keepdim=True)


def filled_by_a_product(q, k, v):
    """(1 - keep) * -10000 added to scores: written out as -10000 + keep * 10000, it would round them."""
    ahead = torch.arange(k.shape[1]) > torch.arange(q.shape[1])[:, None]
    return torch.softmax(q @ k.mT + (1.0 - (~ahead).float()) * -10000.0, -1) @ v


PROGRAMS = {divided_late_over_groups: grouped, filled_by_a_product: qkv}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_small_program(program):
    inputs = PROGRAMS[program]
    result = fused(program, inputs(7, 9))
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, program, inputs(*sizes))
