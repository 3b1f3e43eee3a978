"""One rewritten module, called at other sizes than it was traced with: its kernels run, and are right."""

from __future__ import annotations

import linecache
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right, fused

from rewriter.api import rewrite

INF = float("inf")
OTHERS = ((1, 5, 5), (3, 9, 9), (2, 1, 1), (3, 2, 20))  # batch, queries, keys


@dataclass(frozen=True)
class Case:
    """A program with its inputs at (batch, queries, keys), and the sizes it is traced at."""

    program: Callable
    inputs: Callable
    traced: tuple[int, int, int] = (2, 7, 7)
    others: tuple[tuple[int, int, int], ...] = OTHERS

    def __str__(self) -> str:
        return getattr(self.program, "__name__", type(self.program).__name__)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attend(q, k, v, bias=None, keep=None):
    scores = q @ k.mT / 4
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -INF)
    return scores.softmax(-1) @ v


def cross(b, m, n):
    return r(b, 2, m, 16), r(b, 2, n, 16), r(b, 2, n, 16)


def same(b, m, n):
    return cross(b, m, m)


def tokens(b, m, n):
    return (r(b, m, 32),)


def tokens_and_padding(b, m, n):
    return r(b, m, 32), r(b, m) > -1.5


# Masks that are filled part by part


def last_columns(q, k, v):
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias[:, -3:] = -5.0
    bias[..., -1] = 1.0
    return attend(q, k, v, bias)


def last_rows(q, k, v):
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias[-3:] = torch.arange(k.shape[2]).float()
    return attend(q, k, v, bias)


def with_steps(q, k, v):
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias[:, 1::2] = torch.arange(k.shape[2]).float()[1::2]
    bias[::3] = -2.0
    return attend(q, k, v, bias)


def quarters(q, k, v):
    half = q.shape[2] // 2
    bias = torch.full((q.shape[2], q.shape[2]), -INF)
    bias[:half, :half] = 0
    bias[half:, half:] = 0
    return attend(q, k, v, bias)


def without_the_diagonal(q, k, v):
    away = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool).fill_diagonal_(True)
    return attend(q, k, v, -1e4 * away)


def diagonals(q, k, v):
    bias = torch.diag(torch.ones(q.shape[2]))
    bias.diagonal().add_(1.0)
    return attend(q, k, v, bias)


def first_and_last_position(q, k, v):
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias.index_fill_(1, torch.tensor([0, -1]), 3.0)
    return attend(q, k, v, bias)


def offsets(q, k, v):
    """A loop over something constant."""
    i = torch.arange(q.shape[2])
    keep = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for offset in range(3):
        keep |= i[:, None] - i == offset
    return attend(q, k, v, keep=keep)


def lower_right(q, k, v):
    m, n = q.shape[2], k.shape[2]
    keep = torch.ones(m, n, dtype=torch.bool).tril(diagonal=n - m)
    return attend(q, k, v, keep=keep | (torch.arange(n) == 0))


def first_seen_by_all(q, k, v):
    i = torch.arange(q.shape[2])
    keep = (i[:, None] - i).abs() <= 2
    keep[:, :1] = True
    return attend(q, k, v, keep=keep)


FILLED = [
    *(Case(p, same) for p in (last_columns, last_rows, with_steps, quarters)),
    *(Case(p, same) for p in (without_the_diagonal, diagonals, first_and_last_position)),
    *(Case(p, same) for p in (offsets, first_seen_by_all)),
    Case(lower_right, cross),
]

# The least of several sizes


def a_window_of_the_length(q, k, v):
    i = torch.arange(q.shape[2])
    return attend(q, k, v, keep=(i[:, None] - i).abs() <= max(q.shape[2] // 4, 2))


def at_most_four(q, k, v):
    return attend(q, k[:, :, : min(4, k.shape[2])], v[:, :, :4])


def last_four(q, k, v):
    return attend(q, k[:, :, -4:], v[:, :, -4:])


def every_second(q, k, v):
    return attend(q[:, :, ::2], k[:, :, 1::2], v[:, :, 1::2])


def a_longer_mask(q, k, v, bias):
    return attend(q, k, v, bias[:, :, :, : k.shape[2]])


class Table(nn.Module):
    """A causal mask and positions of a greatest length."""

    def __init__(self, longest=64):
        super().__init__()
        self.register_buffer("causal", torch.ones(longest, longest).tril().view(1, 1, longest, -1))
        self.positions = nn.Parameter(r(longest, 32), requires_grad=False)

    def forward(self, x):
        b, t, c = x.size()
        q = (x + self.positions[:t]).view(b, t, 2, c // 2).transpose(1, 2)
        scores = q @ q.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(self.causal[:, :, :t, :t] == 0, -INF)
        return (scores.softmax(-1) @ q).transpose(1, 2).contiguous().view(b, t, c)


CHOSEN = [
    *(Case(p, cross) for p in (at_most_four, last_four)),
    Case(a_window_of_the_length, same),
    Case(every_second, cross, others=((1, 5, 5), (3, 2, 20), (2, 1, 2))),
    Case(a_longer_mask, lambda b, m, n: (*cross(b, m, n), r(b, 1, m, 30))),
    Case(Table(), tokens),
]

# Heads, pieces and windows


class Turned(nn.Module):
    """Rotary positions as complex numbers."""

    def __init__(self, longest=64):
        super().__init__()
        angles = torch.outer(torch.arange(longest).float(), 10.0 ** -torch.arange(8))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        q = x.view(*x.shape[:-1], 2, 16)
        turned = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
        q = torch.view_as_real(turned * self.turns[: x.shape[1], None]).flatten(3).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Memory(nn.Module):
    """A learned key and value before the others; everyone sees it."""

    def __init__(self, length=1):
        super().__init__()
        self.kv = nn.Parameter(r(2, length, 32), requires_grad=False)

    def forward(self, x, keep):
        k, v = (torch.cat((m.expand(x.shape[0], -1, -1), x), 1) for m in self.kv)
        keep = F.pad(keep, (self.kv.shape[1], 0), value=True)
        return attend(x, k, v, keep=keep[:, None])


def shifted(x):
    k = F.pad(x, (0, 0, 1, 0))
    return attend(x, k, k)


def merged_heads(x):
    b, t, c = x.shape
    q = x.view(b, t, 4, c // 4).transpose(1, 2).reshape(b * 4, t, -1)
    y = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    return y.view(b, 4, t, -1).transpose(1, 2).reshape(b, t, c)


def windows(x):
    """Of eight positions, the last one padded."""
    b, t, c = x.shape
    y = F.pad(x, (0, 0, 0, -t % 8)).unflatten(1, (-1, 8))
    return attend(y, y, y).flatten(1, 2)[:, :t]


def one_after_the_other(x, y):
    z = torch.cat((x, y), 1)
    out = attend(z, z, z)
    return out[:, : x.shape[1]], out[:, x.shape[1] :]


def laid_out_otherwise(q, k, v):
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class Whole(nn.MultiheadAttention):
    """torch's own, batch first."""

    def __init__(self):
        super().__init__(32, 4, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def laid_out_by_numbers(q, k, v):
    """What is left for -1 is known, once the other sizes are."""
    k, v = (t.reshape(t.shape[0], 2, -1, 16) for t in (k, v))
    return attend(q, k, v)


PIECES = [
    Case(laid_out_by_numbers, cross),
    Case(attend, lambda b, m, n: (r(b, 2, m, 1), *(r(b, 2, n, 1),) * 2)),  # a feature of one number
    *(Case(p, tokens) for p in (Turned(), shifted, merged_heads, windows)),
    *(Case(Memory(n), tokens_and_padding) for n in (1, 4)),
    Case(Whole().eval().requires_grad_(False), tokens),
    Case(one_after_the_other, lambda b, m, n: (r(b, m, 32), r(b, n, 32))),
    Case(laid_out_otherwise, lambda b, m, n: (r(b, m, 2, 16), *(r(b, n, 2, 16),) * 2)),
    *(Case(attend, cross, traced) for traced in ((2, 2, 2), (16, 16, 16), (1, 1, 1), (1, 1, 7))),
]


@pytest.mark.parametrize("case", FILLED + CHOSEN + PIECES, ids=str)
def test_at_other_sizes(case):
    result = fused(case.program, case.inputs(*case.traced))
    for sizes in (case.traced, *case.others):
        assert_right(result, case.program, case.inputs(*sizes))


def test_what_stays_in_memory_is_named():
    def given_positions(q, k, v, at):
        bias = torch.zeros(q.shape[2], k.shape[2])
        bias[:, at] = -1.0
        return attend(q, k, v, bias)

    result = rewrite(given_positions, (*cross(2, 7, 7), torch.tensor([0, 3])))
    (unfused,) = result.report["unfused"]
    assert "written to memory" in unfused["reason"] and line_of(unfused) == "bias[:, at] = -1.0"
    for sizes in ((3, 9, 9), (1, 1, 20)):
        assert_right(result, given_positions, (*cross(*sizes), torch.tensor([-1])))


# Sizes of 1 in the example may be those of something that all of a batch shares

SHARED = {
    "one for all": (lambda b, m, n: (1, 1, m, n)),
    "one each": (lambda b, m, n: (b, 1, m, n)),
    "keys": (lambda b, m, n: (b, 1, 1, n)),
}


@pytest.mark.parametrize("length", [7, 1])
def test_a_mask_of_one_batch_may_be_one_for_all(length):
    result = fused(attend, (*cross(1, length, length), r(1, 1, length, length)))
    for kind, shape in SHARED.items():
        if length == 1 or kind != "keys":
            for sizes in OTHERS:
                assert_right(result, attend, (*cross(*sizes), r(*shape(*sizes))))


def masked(qkv, masks):
    return F.scaled_dot_product_attention(*qkv, attn_mask=masks["keep"])


def positioned(x, positions):
    x = x + positions
    return attend(x, x, x)


def positioned_and_masked(positions, x, bias):
    q = (x + positions).view(x.shape[0], -1, 2, 16).transpose(1, 2)
    return attend(q, q, q, bias)


def padded(x, keep):
    """As transformers expands the tokenizer's mask: by the mask's own batch."""
    batch, n = keep.size()
    bias = keep[:, None, None, :].expand(batch, 1, x.shape[1], n).to(x.dtype)
    q = x.view(x.shape[0], -1, 2, 16).transpose(1, 2)
    return attend(q, q, q, (1.0 - bias) * torch.finfo(x.dtype).min)


BROADCAST = [
    Case(masked, lambda b, m, n: (cross(b, m, n), {"keep": r(1, 1, m, n) > -1}), (1, 7, 9)),
    Case(positioned, lambda b, m, n: (r(b, m, 32), r(1, m, 32)), (1, 7, 7)),
    Case(positioned, lambda b, m, n: (r(1, m, 32), r(b, m, 32)), (1, 1, 1)),
    Case(positioned_and_masked, lambda b, m, n: (r(1, m, 32), r(b, m, 32), r(1, 1, m, m)), (1, 7, 7)),
    Case(padded, lambda b, m, n: (r(b, m, 32), r(1, m) > -1), (1, 7, 7)),
    Case(padded, tokens_and_padding, (1, 1, 1)),
]


@pytest.mark.parametrize("case", BROADCAST, ids=str)
def test_what_a_batch_shares(case):
    test_at_other_sizes(case)


def summed(q, k, v, bias):
    return attend(q, k, v, bias.sum(0))


def counted(q, k, v, bias):
    return attend(q, k, v, bias) / bias.shape[0]


def returned(q, k, v, bias):
    return attend(q, k, v, bias), bias + 1


def by_position(q, k, v, bias):
    return attend(q, k, v, bias.triu(1))


@pytest.mark.parametrize("program", [summed, counted, returned, by_position])
def test_what_does_not_broadcast_is_not_expanded(program):
    """Expanded first, these would give something else."""
    result = rewrite(program, (*cross(1, 1, 1), r(1, 1, 1, 1)))
    for b, m, n in OTHERS:
        for shape in ((1, 1, m, n), (b, 1, m, n), (b, 1, 1, n)):
            args = (*cross(b, m, n), r(*shape))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the original code may run
                out = result.module(*args)
            torch.testing.assert_close(out, program(*args), rtol=1e-4, atol=1e-5)


# Sizes that the program itself turns into numbers


def row_by_row(q, k, v):
    bias = torch.full((q.shape[2], q.shape[2]), -INF)
    for i in range(q.shape[2]):
        bias[i, : i + 1] = 0
    return attend(q, k, v, bias)


def a_tensor_of_its_own(q, k, v):
    return attend(q * torch.hann_window(q.shape[2])[:, None], k, v)


def branch(q, k, v):
    if q.shape[2] > 1:
        k = k * 2
    return attend(q, k, v)


def causal_branch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


NUMBERS = {
    row_by_row: "for i in range(q.shape[2]):",
    a_tensor_of_its_own: "return attend(q * torch.hann_window(q.shape[2])[:, None], k, v)",
    branch: "if q.shape[2] > 1:",
    causal_branch: "return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)",
}


def line_of(said: dict[str, str]) -> str:
    file, line = said["where"].rsplit(":", 1)
    assert file.endswith("test_shapes.py")
    return linecache.getline(__file__, int(line)).strip()


@pytest.mark.parametrize("program", NUMBERS)
def test_a_size_that_becomes_a_number_is_reported(program):
    result = fused(program, same(2, 5, 5))
    said = [s for s in result.report["specialised"] if s["reason"].startswith("q.shape[2]")]
    assert [line_of(s) for s in said] == [NUMBERS[program]]
    assert_right(result, program, same(3, 5, 5))
    others = [same(2, 1, 1), same(1, 1, 1)]
    with pytest.warns(UserWarning, match="runs its original code") as warned:
        outs = [result.module(*args) for args in others]
    assert len(warned) == 1
    torch.testing.assert_close(outs, [program(*args) for args in others])


def test_nothing_to_attend_to():
    """Eager's sum over no keys is 0."""
    result = fused(attend, cross(2, 7, 7))
    assert torch.equal(result.module(*cross(2, 7, 0)), torch.zeros(2, 2, 7, 16))
    for args in (cross(0, 7, 7), cross(2, 0, 7)):
        assert result.module(*args).shape == args[0].shape
