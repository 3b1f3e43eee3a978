"""einx's operations while tracing: what they give is what their descriptions say."""

from __future__ import annotations

import pytest
import torch

from rewriter.trace.named_axes import _aligned


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "description, shapes, einsum",
    [
        ("b n h, b h n d -> b h n d", ((2, 5, 3), (2, 3, 5, 4)), "bnh,bhnd->bhnd"),
        ("i, j -> 1 1 i j", ((4,), (5,)), "i,j->ij"),
        ("... j, ... i -> ... i j", ((2, 4), (2, 5)), "bj,bi->bij"),
        ("b i, b 1 j -> b i j", ((2, 4), (2, 1, 5)), "bi,bxj->bij"),
        ("b n, b n d", ((2, 5), (2, 5, 3)), "bn,bnd->bnd"),
    ],
)
def test_operands_are_aligned(description, shapes, einsum):
    operands = [r(*shape) for shape in shapes]
    want = torch.einsum(einsum, *operands)
    a, b = _aligned(description, operands)
    assert torch.equal((a * b).reshape(want.shape), want)
    assert (a * b).dim() == len(description.partition("->")[2].replace("...", "b").split() or "bnd")


@pytest.mark.parametrize("description", ["(b h) n, n -> (b h) n", "[b] n, n -> b n", "n n, n -> n", "a b -> a b"])
def test_what_says_more_is_left(description):
    assert _aligned(description, [r(6, 5), r(5)]) is None


def test_numbers_are_operands():
    mask, x = r(2, 5) > 0, r(2, 5, 3)
    aligned = _aligned("b n, b n d, -> b n d", [mask, x, 0.0])
    assert torch.equal(torch.where(*aligned), x.masked_fill(~mask[..., None], 0.0))
