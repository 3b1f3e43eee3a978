"""Fills: numbers in the place of what is masked. Their tiles are left out where they weigh nothing, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from library_programs import said
from test_block_maps import ids
from test_sparsity import at

from rewriter import rewrite
from rewriter.hosts import rewrite_model
from rewriter.ir import Const
from rewriter.plan import KernelPlan
from rewriter.plan.bounds import by_bounds
from rewriter.plan.show import show_kernel


def attention(q, k, v, keep, fill) -> torch.Tensor:
    return (q @ k.mT * 0.3).masked_fill(~keep, fill).softmax(-1) @ v


def causal(q, k, v):
    rows, columns = at(q)
    return attention(q, k, v, columns <= rows, -1e4)


def window(q, k, v):
    rows, columns = at(q)
    return attention(q, k, v, (columns <= rows) & (rows - columns < 70), torch.finfo(q.dtype).min)


def nothing_first(q, k, v):
    """The first rows see nothing."""
    rows, columns = at(q)
    return (torch.where(columns <= rows - 60, q @ k.mT, -1e4) / 4).softmax(-1) @ v


def twice(q, k, v, keep):
    rows, columns = at(q)
    scores = (q @ k.mT * 0.3).masked_fill(columns > rows, -1e4).masked_fill(~keep[:, None, None, :], -1e4)
    return scores.softmax(-1) @ v


def documents(q, k, v, ids):
    """The tokens of one document are padding, which sees nothing."""
    rows, columns = at(q)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return attention(q, k, v, same & (columns <= rows) & (ids > 0)[:, None, :, None], torch.finfo(q.dtype).min)


def masked_too(q, k, v, lengths):
    """Fills within what a mask leaves."""
    rows, columns = at(q)
    scores = (q @ k.mT * 0.3).masked_fill(columns > rows, -1e4)
    return scores.masked_fill(columns >= lengths[:, None, None, None], -math.inf).softmax(-1) @ v


def low(q, k, v):
    """Scores on both sides of the fill, and so near it that fills weigh."""
    rows, columns = at(q)
    return (q @ k.mT * 300).masked_fill(columns > rows, -1e3).softmax(-1) @ v


def of_two(q, k, v):
    """Two softmaxes under one mask, each with a fill of its own."""
    rows, columns = at(q)
    one = (q @ k.mT * 0.3).masked_fill(columns > rows - 60, -1e4).softmax(-1)
    two = (q.flip(-1) @ k.mT * 0.3).masked_fill(columns > rows - 60, -1e9).softmax(-1)
    return (one - 0.5 * two) @ v


MORE = {
    twice: lambda b, n: ((torch.rand(b, n) < 0.5) & (torch.arange(b)[:, None] > 0),),  # a batch sees nothing
    documents: lambda b, n: (ids(b, n),),
    masked_too: lambda b, n: (torch.randint(1, n + 1, (b,)),),
}
PROGRAMS = (causal, window, nothing_first, twice, documents, masked_too, low, of_two)


def arguments(
    program: Callable, count: int, length: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    return (
        *(torch.randn(count, 2, length, 16, dtype=dtype) for _ in range(3)),
        *(MORE[program](count, length) if program in MORE else ()),
    )


def kernel_of(program: Callable) -> KernelPlan:
    (kernel,) = rewrite_model(program, arguments(program, 2, 150), {}).kernels[0].plan.kernels
    return kernel


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_fills_weigh_where_they_do_in_eager(program):
    result = rewrite(program, arguments(program, 2, 150))
    (text,) = (text for file, text in result.sources.items() if file.startswith("kernels/") and "__" not in file)
    assert "    low = tl.max(" in text
    for count, length in ((2, 150), (1, 37), (2, 260), (2, 1)):
        args = arguments(program, count, length)
        with said(kernels=1):
            torch.testing.assert_close(result.module(*args), program(*args), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("program", (window, documents), ids=lambda p: p.__name__)
def test_in_half_precision(program):
    result = rewrite(program, arguments(program, 2, 150, torch.float16))
    for count, length in ((2, 150), (1, 260)):
        args = arguments(program, count, length, torch.float16)
        wanted = program(*(a.float() if a.is_floating_point() else a for a in args)).half()
        torch.testing.assert_close(result.module(*args), wanted, rtol=4e-3, atol=4e-3)


def padded_in_front(q, k, v):
    """Whole tiles that no fill is in are -inf throughout, and come first."""
    rows, columns = at(q)
    scores = (q @ k.mT * 0.3).masked_fill(columns < 100, -math.inf)
    return scores.masked_fill(columns > rows, -1e4).softmax(-1) @ v


def test_rows_that_have_seen_nothing_but_inf():
    result = rewrite(padded_in_front, arguments(padded_in_front, 1, 150, torch.float16))
    args = arguments(padded_in_front, 2, 260, torch.float16)
    with said(kernels=1):
        torch.testing.assert_close(result.module(*args), padded_in_front(*args), rtol=4e-3, atol=4e-3)


def test_what_weighs_nothing_is_not_read():
    """Eager multiplies what is there by 0, which NaN shows; a row that sees nothing weighs all of it."""
    q, k, v, keep = arguments(twice, 2, 300)
    keep[:] = torch.arange(300) < 100
    result = rewrite(twice, (q, k, v, keep))
    v[:, :, 128:] = math.nan
    torch.testing.assert_close(result.module(q, k, v, keep), twice(q, k, v.nan_to_num(), keep))
    keep[1] = False
    out = result.module(q, k, v, keep)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_tiles_of_fills_take_no_scores():
    """Full tiles have no fill, those of nothing else no keys."""
    text = rewrite(causal, arguments(causal, 2, 150)).sources["kernels/causal.py"]
    full, cut, filled = text.split("    for start in ")[1:4]
    assert "-10000.0" not in full.partition("# The others")[0] and "tl.where(offs_m" in cut
    assert "k_ptr" not in filled.partition("tl.store")[0] and "v_ptr" in filled


def added(q, k, v):
    """A number that is added does not hide what it is added to."""
    rows, columns = at(q)
    return (q @ k.mT * 0.3 + torch.where(columns <= rows, 0.0, -1e4)).softmax(-1) @ v


def small(q, k, v):
    rows, columns = at(q)
    return attention(q, k, v, columns <= rows, -20.0)


def counted(q, k, v):
    """What is filled counts in a sum of another kind."""
    rows, columns = at(q)
    scores = (q @ k.mT * 0.3).masked_fill(columns > rows, -1e4)
    return scores.softmax(-1) @ v / scores.abs().sum(-1, keepdim=True)


@pytest.mark.parametrize("program", (added, small, counted), ids=lambda p: p.__name__)
def test_what_may_weigh_is_no_fill(program):
    kernel = kernel_of(program)
    assert not any(s.fill or s.support or s.map for s in kernel.sweeps)


def test_plans_tell_fills():
    kernel = kernel_of(nothing_first)
    assert show_kernel(kernel, {}).endswith("; fills of -2500 last")
    (sweep,) = kernel.sweeps
    assert [floor for _, floor in sweep.fill.floors] == [Const(-2500.0, torch.float32)] and kernel.grows


def test_by_bounds_alone_fills_count():
    """As where a program has a part of the stream, and does not know of the others."""
    (alone,) = by_bounds(kernel_of(documents)).sweeps
    assert (alone.map, alone.fill, alone.support) == (None, None, None)
    (alone,) = by_bounds(kernel_of(masked_too)).sweeps
    assert alone.support.outer == alone.support.inner and alone.support.outer.lower is None
