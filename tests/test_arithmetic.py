"""What arithmetic costs less than it says, and gives the same."""

from __future__ import annotations

import math

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
