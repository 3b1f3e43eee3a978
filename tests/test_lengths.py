"""Numbers and positions that a program makes from a length: its kernels run at other lengths, and are right."""

from __future__ import annotations

import math
from math import log, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right, fused

from rewriter import rewrite

INF = float("inf")
OTHERS = ((1, 1), (3, 5), (1, 37))  # batch, length


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(b: int, n: int) -> tuple[torch.Tensor, ...]:
    return r(b, n, 16), r(b, n, 16), r(b, n, 16)


def attend(q, k, v, scale=0.25, bias=0.0, keep=None):
    scores = q @ k.mT * scale + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -INF)
    return scores.softmax(-1) @ v


def name_of(program) -> str:
    return getattr(program, "__name__", type(program).__name__)


# Numbers


def counted(q, k, v):
    i = torch.arange(len(q[0]))
    return attend(q, k, v, keep=i[:, None] >= i) / len(q)


def by_log_of_the_length(q, k, v):
    n = k.shape[1]
    return attend(q, k, v, math.log(n + 1) / math.log(512) + log(n + 1, 3) / 9)


def by_root_of_the_length(q, k, v):
    n = k.shape[1]
    return attend(q, k, v, 1 / sqrt(n) + n**-0.5 + math.pow(n, 0.25) / 9)


def by_functions_of_the_length(q, k, v):
    n = k.shape[1]
    return attend(q, k, v, math.exp(-n / 9) + math.log2(n + 1) / 9 + math.tanh(n / 99) + math.log10(n + 1) / 9)


def at_most_and_at_least(q, k, v):
    n = k.shape[1]
    return attend(q, k, v, min(max(0.1, math.log(n + 1) / 9), 0.3, n**-0.5))


def of_tensors(q, k, v):
    n = k.shape[1]
    scale = (
        torch.tensor(float(n)).sqrt() / 9 + torch.as_tensor(n, dtype=q.dtype).rsqrt() + q.new_tensor([n, 1]).log()[0]
    )
    return attend(q, k, v, scale * 0.1, keep=torch.arange(n) < torch.tensor(n))


def asked_of_the_op(q, k, v):
    n = k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=math.log(n + 1) / 4)


def filled_with(q, k, v):
    n = k.shape[1]
    i = torch.arange(n)
    return (q @ k.mT).masked_fill(i[:, None] < i, -math.log(n + 2)).softmax(-1) @ v


class Layer(nn.Module):
    """Before, inside and after the chain; in place, so that the graph is traced twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, q, k, v):
        n = float(q.shape[1])
        scores = (self.inner(q) * math.log(n + 1)) @ k.mT
        scores *= math.exp(-n)
        return torch.cumsum(scores.softmax(-1) @ v, 1) * math.log2(n + 1)


NUMBERS = [counted, by_log_of_the_length, by_root_of_the_length, by_functions_of_the_length, at_most_and_at_least]
NUMBERS += [of_tensors, asked_of_the_op, filled_with, Layer().eval()]


@pytest.mark.parametrize("program", NUMBERS, ids=name_of)
def test_at_other_lengths(program):
    result = fused(program, qkv(2, 7))
    for sizes in ((2, 7), *OTHERS):
        assert_right(result, program, qkv(*sizes))


def test_a_number_is_written_as_people_write_it():
    assert "* (math.log2(1.0 + length))" in rewrite(Layer().eval(), qkv(2, 7)).sources["module.py"]


def sizes_as_operands(q, k, v):
    n = k.shape[1]
    away = torch.ones(n).cumsum(0) - (n - 1)
    return attend(q * away[:, None] / (n + 1) * (2 * n - 1), k - (1 - n), v)


def test_sizes_as_operands():
    test_at_other_lengths(sizes_as_operands)


def rounded(q, k, v):
    i = torch.arange(k.shape[1])
    return attend(q, k, v, keep=(i[:, None] - i).abs() <= round(k.shape[1] / 3))


def test_a_number_that_no_index_has_is_written_too():
    result = rewrite(rounded, qkv(2, 7))
    for sizes in ((2, 7), *OTHERS):
        assert_right(result, rounded, qkv(*sizes))


def by_a_branch(q, k, v):
    return attend(q, k * 2 if math.log(k.shape[1] + 1) > 2.5 else k, v)


def by_a_whole_number(q, k, v):
    return attend(q, k, v, int(math.sqrt(k.shape[1])))


@pytest.mark.parametrize("program", [by_a_branch, by_a_whole_number], ids=name_of)
def test_a_choice_by_a_number_is_guarded(program):
    result = fused(program, qkv(2, 7))
    assert_right(result, program, qkv(3, 6))
    with pytest.warns(UserWarning, match="runs its original code: math.* does not hold"):
        out = result.module(*qkv(2, 37))
    torch.testing.assert_close(out, program(*qkv(2, 37)))


# Positions


def evenly_spaced(q, k, v):
    at = torch.linspace(0, 1, k.shape[1])
    return attend(q, k, v, bias=-(at[:, None] - at).abs() - torch.logspace(-2, -1, k.shape[1]))


def spaced_outside(q, k, v):
    """By an op that stays eager; the last is exact."""
    n = k.shape[1]
    at = torch.linspace(-1, n, steps=n, dtype=q.dtype, device=q.device)
    return attend(q, k, v, bias=torch.flip((at == n) + at.cumsum(0) / 9, (0,)))


def below_the_diagonal(q, k, v):
    n = k.shape[1]
    keep = torch.eye(n, dtype=torch.bool)
    i, j = torch.tril_indices(n, n, -1)
    keep[i, j] = True
    return attend(q, k, v, keep=keep)


def above_the_diagonal(q, k, v):
    n = k.shape[1]
    bias = torch.zeros(n, n)
    bias[tuple(torch.triu_indices(n, n, 2))] = -INF
    return attend(q, k, v, bias=bias)


def blocks_of_two(q, k, v):
    n = k.shape[1]
    blocks = torch.kron(torch.ones(n // 2 + 1, n // 2 + 1).tril(), torch.ones(2, 2))
    return attend(q, k, v, keep=blocks[:n, :n] > 0)


def counted_by_position(q, k, v):
    n = k.shape[1]
    counts = F.one_hot(torch.arange(n) // 2, n).sum(0)
    return attend(q, k, v, bias=-counts.float())


def averaged_windows(q, k, v):
    k, v = (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1) for x in (k, v))
    return attend(q, k, v)


def on_a_grid(q, k, v):
    i, j = torch.meshgrid(torch.arange(q.shape[1]), torch.arange(k.shape[1]), indexing="ij")
    j2, i2 = torch.meshgrid(torch.arange(k.shape[1]), torch.arange(q.shape[1]), indexing="xy")
    return attend(q, k, v, keep=(j <= i) & (j2 * 2 >= i2))


def from_a_position(q, k, v):
    """n - 1 is no start where it is 0, but as good a one as any."""
    last = k.shape[1] - 1
    scores = q @ k.mT
    return (scores - scores[..., last // 2, None]).softmax(-1) @ v + scores[..., last:] * v[:, None, last]


def sliced_around_the_middle(q, k, v):
    """Bounds whose sign depends on two lengths, as a table of distances has them: they are as in the example."""
    n, m = q.shape[1], k.shape[1]
    table = torch.linspace(-1, 1, 200)
    distances = torch.arange(m) - torch.arange(n)[:, None]
    return attend(q, k[:, m - n :], v[:, -n:], bias=table[100 - n : 100 + m][distances + n])


POSITIONS = [evenly_spaced, spaced_outside, blocks_of_two, averaged_windows, on_a_grid, counted_by_position]
POSITIONS += [from_a_position, sliced_around_the_middle]


@pytest.mark.parametrize("program", POSITIONS, ids=name_of)
def test_positions(program):
    test_at_other_lengths(program)


@pytest.mark.parametrize("program", [below_the_diagonal, above_the_diagonal], ids=name_of)
def test_masks_that_are_stored(program):
    result = rewrite(program, qkv(2, 7))
    for sizes in ((2, 7), *OTHERS):
        assert_right(result, program, qkv(*sizes))


# Pooled keys


def interpolated(q, k, v):
    k, v = (F.interpolate(x.mT, scale_factor=0.5).mT for x in (k, v))
    return attend(q, k, v)


def pooled_by_the_largest(q, k, v):
    k, v = (F.max_pool1d(x.mT, 2, ceil_mode=True).mT for x in (k, v))
    return attend(q, k, v)


def pooled_by_the_mean(q, k, v):
    k, v = (F.avg_pool1d(x.mT, 2).mT for x in (k, v))
    return attend(q, k, v)


@pytest.mark.parametrize("program", [interpolated, pooled_by_the_largest, pooled_by_the_mean], ids=name_of)
def test_pooled_keys(program):
    result = fused(program, qkv(2, 12))
    for sizes in ((2, 12), (1, 2), (3, 5), (1, 37)):
        assert_right(result, program, qkv(*sizes))


def landmarks(x: torch.Tensor) -> torch.Tensor:
    """Means of eight equal parts; the features are what is left of the shape."""
    return x.reshape(x.shape[0], 8, x.shape[1] // 8, -1).mean(2)


def landmarks_as_queries(q, k, v):
    return attend(landmarks(q), k, v)


def landmarks_as_keys(q, k, v):
    return attend(q, landmarks(k), landmarks(v))


@pytest.mark.parametrize("program", [landmarks_as_queries, landmarks_as_keys], ids=name_of)
def test_landmarks(program):
    result = fused(program, qkv(2, 24))
    for sizes in ((2, 24), (1, 8), (3, 40)):
        assert_right(result, program, qkv(*sizes))


def halves_of_heads(q, k, v):
    (q0, q1), (k0, k1) = q.chunk(2, 1), k.chunk(2, 1)
    return attend(q0, k0, v) - 0.2 * attend(q1, k1, v)


def thirds_of_heads(q, k, v):
    parts = zip(q.chunk(3, 1), k.chunk(3, 1))
    return sum(attend(a, b, v) for a, b in parts)


@pytest.mark.parametrize(("program", "parts"), [(halves_of_heads, 2), (thirds_of_heads, 3)])
def test_chunks_that_must_be_as_long(program, parts):
    """No load needs a mask: the number of heads is a multiple of theirs."""

    def inputs(b, heads, n):
        return r(b, parts * heads, n, 16), r(b, parts * heads, n, 16), r(b, heads, n, 16)

    result = rewrite(program, inputs(2, 2, 20))
    kernels = [text for name, text in result.sources.items() if name.startswith("kernels/") and "_kernel" in text]
    assert kernels and not any("(h <" in text or "(h >" in text for text in kernels)
    for sizes in ((1, 1, 5), (3, 3, 37), (2, 4, 1)):
        assert_right(result, program, inputs(*sizes))


def test_a_length_that_is_divided_by_its_eighth():
    """Below eight it has none: a proof draws longer ones."""

    def in_parts(q, k, v):
        q, k, v = (x.reshape(x.shape[0], x.shape[1] // 8, -1, 16) for x in (q, k, v))
        return attend(q, k, v)

    result = fused(in_parts, qkv(2, 24))
    for sizes in ((2, 24), (3, 40)):
        assert_right(result, in_parts, qkv(*sizes))
