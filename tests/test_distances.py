"""Contractions with what depends on distances: products of a tile's rows with all of its distances."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from integers import value_of
from whole_path import assert_right, fused

from rewriter import rewrite
from rewriter.ir import Index, Param, apply, const, fresh_axis, index

CLIP = 6


def ahead(q, k):
    return torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None]


def of_keys(q, k, v, table, _):
    """A clipped distance: q[m] · table[min(max(n - m, -6), 6) + 6]"""
    rows = table[ahead(q, k).clamp(-CLIP, CLIP) + CLIP]
    return (q @ k.mT + torch.einsum("bmd,mnd->bmn", q, rows)).softmax(-1) @ v


def of_queries(q, k, v, table, _):
    """The table meets keys: k[n] · table[...]"""
    rows = table[ahead(q, k).abs().clamp(max=CLIP)]
    return (q @ k.mT + torch.einsum("bnd,mnd->bmn", k, rows)).softmax(-1) @ v


def of_both(q, k, v, table, other):
    at = ahead(q, k).clamp(-CLIP, CLIP) + CLIP
    both = torch.einsum("bmd,mnd->bmn", q, table[at]) + torch.einsum("bnd,mnd->bmn", k, other[2 * CLIP - at])
    return (q @ k.mT + both).softmax(-1) @ v


def gathered(q, k, v, table, _):
    """All products first, then a gather."""
    at = ahead(q, k).clamp(-CLIP, CLIP) + CLIP
    found = torch.gather(torch.einsum("bmd,td->bmt", q, table), 2, at.expand(len(q), -1, -1))
    return torch.sigmoid(q @ k.mT + found) @ v


def windowed(q, k, v, table, _):
    near = ahead(q, k).abs() <= CLIP
    rows = table[ahead(q, k).clamp(-CLIP, CLIP) + CLIP]
    scores = q @ k.mT + torch.einsum("bmd,mnd->bmn", q, rows)
    return scores.masked_fill(~near, -torch.inf).softmax(-1).nan_to_num() @ v


PROGRAMS = [of_keys, of_queries, of_both, gathered, windowed]


def inputs(rows: int, columns: int, dtype=torch.float32, width: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows + columns)
    shapes = (2, rows, width), (2, columns, width), (2, columns, 24), (2 * CLIP + 1, width), (2 * CLIP + 1, width)
    return tuple(torch.randn(shape).mul(0.5).to(dtype) for shape in shapes)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_distances_are_multiplied_as_matrices(program):
    """Rows and positions may be as many or not, and tiles be full or not; nothing is looked up for each pair."""
    result = fused(program, inputs(37, 70))
    for rows, columns in (37, 70), (70, 37), (130, 129), (3, 200):
        assert_right(result, program, inputs(rows, columns))
    half = fused(program, inputs(37, 70, torch.float16))
    assert_right(half, program, inputs(65, 150, torch.float16))
    (text,) = (t for name, t in half.sources.items() if re.fullmatch(r"kernels/(?!__init__).*\.py", name))
    assert "tl.gather(qt" in text and "static_range" not in text


def embedded(x, w, first, last):
    """What distances are multiplied with, from first to last: one row for each."""
    at = torch.arange(first, last, -1)[:, None] / 2 ** torch.arange(x.shape[-1])
    return at.sin().to(x.dtype) @ w


def shifted(found):
    """A column of zeros, a view with rows one longer, without the first."""
    *batch, rows, columns = found.shape
    return F.pad(found, (1, 0)).view(*batch, columns + 1, rows)[..., 1:, :].reshape(found.shape)


def seen(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def transformer_xl(x, w):
    found = shifted(torch.einsum("bmd,td->bmt", x, embedded(x, w, x.shape[1] - 1, -1)))
    return (x @ x.flip(-1).mT + found).masked_fill(~seen(x), -torch.inf).softmax(-1) @ x


def music_transformer(x, w):
    """The same by a slice of all that is flat."""
    found = torch.einsum("bmd,td->bmt", x, embedded(x, w, x.shape[1] - 1, -1))
    flat = F.pad(found, (1, 0)).flatten(1)[:, x.shape[1] :].view(found.shape)
    return (x @ x.flip(-1).mT + flat).masked_fill(~seen(x), -torch.inf).softmax(-1) @ x


def conformer(x, w):
    """Twice as many distances, of which half are read in each row."""
    found = shifted(torch.einsum("bmd,td->bmt", x, embedded(x, w, x.shape[1] - 1, -x.shape[1])))
    return (x @ x.flip(-1).mT + found[..., : x.shape[1]]).softmax(-1) @ x


@pytest.mark.parametrize("program", [transformer_xl, music_transformer, conformer], ids=lambda p: p.__name__)
def test_shifts_are_distances(program):
    """Where a mask hides what a shift brings from other rows, too."""

    def of(length: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(length)
        return torch.randn(2, length, 16) / 2, torch.randn(16, 16) / 4

    result = fused(program, of(37))
    for length in (37, 70, 130):
        assert_right(result, program, of(length))
    (text,) = (t for name, t in result.sources.items() if re.fullmatch(r"kernels/(?!__init__).*\.py", name))
    assert "tl.gather(qt" in text and " // (" not in text and "static_range" not in text


def test_distances_of_few_rows():
    """Each part of a stream has distances of its own."""
    result = fused(of_keys, inputs(1, 600, torch.float16))
    (text,) = (t for name, t in result.sources.items() if name == "kernels/of_keys.py")
    assert "tl.gather(qt" in text.partition("def of_keys_part_kernel(")[2].partition("@triton.jit")[0]
    for rows, columns in (1, 600), (2, 1000), (70, 150):
        assert_right(result, of_keys, inputs(rows, columns, torch.float16), dtype=torch.float16)


def padded_to_distances(table, length):
    """Of nine distances those that are more than 4 have zeros."""
    return F.pad(table, (0, 0, length - 5, length - 5))


def of_weights(x, table, keep):
    """VITS: embeddings of distances meet rows, and weights by distance: a view with rows one longer, and the other way."""
    length = x.shape[-2]
    found = F.pad(x @ padded_to_distances(table, length).mT, (0, 1)).flatten(-2)
    found = F.pad(found, (0, length - 1)).view(*x.shape[:-2], length + 1, 2 * length - 1)[..., :length, length - 1 :]
    weights = (x @ x.flip(-1).mT + found).masked_fill(keep == 0, -1e4).softmax(-1)
    flat = F.pad(F.pad(weights, (0, length - 1)).flatten(-2), (length, 0))
    by_distance = flat.view(*x.shape[:-1], 2 * length)[..., 1:]
    return weights @ x + by_distance @ padded_to_distances(table, length)


def test_a_row_is_not_reduced_again_for_each_pair():
    """A softmax of which each pair would find the row by a quotient takes as long as rows are many, for each pair."""
    args = torch.randn(2, 2, 37, 16), torch.randn(9, 16), torch.ones(2, 1, 37, 37)
    result = rewrite(of_weights, args)
    assert not result.report["chains"]
    assert any("reduce a row of another value again" in u["reason"] for u in result.report["unfused"])
    torch.testing.assert_close(result.module(*args), of_weights(*args))


def test_quotients_below_an_end_that_depends_on_a_row():
    """n < m + 1: (m · (M + 1) + M + n - m) // (M + 1) is m; in normal form all are what Python says."""
    many, one = Param("M"), const(1, torch.int64)
    m = fresh_axis(many, "m")
    n = fresh_axis(apply("add", index(m), one), "n")
    rows, columns = index(m), index(n)
    above = apply("add", many, one)
    top = apply("sub", apply("add", apply("add", apply("mul", rows, above), many), columns), rows)
    assert apply("floordiv", top, above) is Index(m)
    for divisor, far in itertools.product((above, many, apply("mul", many, const(2, torch.int64))), range(-3, 4)):
        moved = apply("add", top, const(far, torch.int64))
        for op in ("floordiv", "mod"):
            made = apply(op, moved, divisor)
            for size in range(1, 5):
                for row, column in ((r, c) for r in range(size) for c in range(r + 1)):
                    at, sizes = {m: row, n: column}, {"M": size}
                    whole, over = value_of(moved, sizes, at), value_of(divisor, sizes, at)
                    assert value_of(made, sizes, at) == (whole // over if op == "floordiv" else whole % over)
