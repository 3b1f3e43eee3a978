"""What arithmetic costs less than it says, and gives the same."""

from __future__ import annotations

import math

import pytest
import torch
from test_sparsity import at
from whole_path import assert_right, fused


def every_fourth(q, k, v):
    """Positions before and after a row's own."""
    rows, columns = at(q)
    scores = (q @ k.mT / 8.0 - (rows - columns).abs() / 3.0).masked_fill((rows - columns) % 4 != 0, -math.inf)
    return scores.softmax(-1) @ v


def tensors(length: int) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, 2, length, 16) for _ in range(3)]


def test_powers_of_two_are_divided_by_as_exactly_without_a_division():
    result = fused(every_fourth, tensors(150))
    (text,) = (t for name, t in result.sources.items() if name.startswith("kernels/every"))
    assert "* (1.0 / 8.0)" in text and "/ 3.0" in text and "& 3" in text and "floor_mod" not in text
    for length in (150, 37, 1):
        assert_right(result, every_fourth, tensors(length))


def in_steps(q, k, v):
    """Of the scores of a row in parts of the largest, that is a whole one."""
    scores = q @ k.mT
    return torch.relu(torch.floor(scores / scores.amax(-1, keepdim=True))) @ v


def test_what_is_cut_into_steps_is_divided_by_as_eager_does():
    """The largest times its inverse may be less than 1. Inputs are whole numbers, so that scores are the same in fp16."""
    args = [x.mul(2).round().half() for x in tensors(150)]
    result = fused(in_steps, args)
    (text,) = (t for name, t in result.sources.items() if name.startswith("kernels/in_steps"))
    assert "inverse" not in text
    torch.testing.assert_close(result.module(*args), in_steps(*args), rtol=2e-3, atol=2e-3)


def gated(q, k, v, gate):
    """Each head's part of one gate."""
    out = (q @ k.mT / 4.0).softmax(-1) @ v
    return out.transpose(1, 2) * gate.view(*gate.shape[:2], q.shape[1], q.shape[3])


def test_where_a_head_s_features_start_is_counted_in_64_bits():
    """Channels first, a stride is the length: times all channels it may be past 2 ** 31."""
    args = (*tensors(40), torch.randn(2, 40, 32))
    result = fused(gated, args)
    (text,) = (t for name, t in result.sources.items() if name.startswith("kernels/gated"))
    assert "index = h * 16 + offs_e" in text and "index.to(tl.int64)[None, :] * stride_gate_h" in text
    assert_right(result, gated, args)


def of_the_largest(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights * (weights / weights.amax(-1, keepdim=True) >= 1)) @ v


def within_a_distance(q, k, v):
    distances = (q[:, :, None] - k[:, None]).square().sum(-1).sqrt()
    return torch.where(distances / 3 < 1.5, (-distances).exp(), 0) @ v


@pytest.mark.parametrize("program", [of_the_largest, within_a_distance], ids=lambda p: p.__name__)
def test_what_decides_is_divided_to_the_nearest(program):
    """Triton's own division and root may be off in the last place: of the largest x, x / x has to be 1."""
    args = tuple(torch.randn(2, 37, 16) for _ in range(3))
    result = fused(program, args)
    assert_right(result, program, args)
    (text,) = (t for name, t in result.sources.items() if name == f"kernels/{program.__name__}.py")
    assert "tl.div_rn(" in text and ("tl.sqrt_rn(" in text or program is of_the_largest)
