"""Predicates on intervals: not one position of a tile misjudged, against what the predicate is at each."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from library_programs import said
from strategies import fixed

from rewriter import rewrite
from rewriter.ir import Axis, Const, Load, Node, Param, Tensor, apply, const, index, where
from rewriter.ir.evaluate import Evaluator
from rewriter.sparsity import Interval, Support, support_of

B, M, N = Param("B"), Param("M"), Param("N")
ROWS, STREAM, BATCH = Axis("m", M), Axis("n", N), Axis("b", B)
m, n, b = map(index, (ROWS, STREAM, BATCH))
LENGTHS = Load(Tensor("lengths", (B,), torch.int64), (b,))
STARTS = Load(Tensor("starts", (B, M), torch.int64), (b, m))
IDS = Tensor("ids", (B, N), torch.int64)
DENSE = Load(Tensor("dense", (M, N), torch.bool), (m, n))
LIVE = Load(Tensor("live", (B, M), torch.bool), (b, m))

numbers = st.integers(-4, 9).map(const)
ends = st.one_of(numbers, st.sampled_from([m, LENGTHS, STARTS, apply("sub", M, const(1)), apply("add", m, const(3))]))


@st.composite
def positions(draw) -> Node:
    """Something of n that grows with it, or falls."""
    shifted = apply("add", apply("mul", n, const(draw(st.sampled_from([1, 1, 2, -1, 3])))), draw(ends))
    shape = draw(st.sampled_from(["plain", "plain", "abs", "quotient", "rest"]))
    if shape == "abs":
        return apply("abs", shifted)
    if shape == "plain":
        return shifted
    op = "floordiv" if shape == "quotient" else "mod"
    return apply(op, apply("add", n, const(draw(st.integers(0, 5)))), const(draw(st.integers(1, 6))))


@st.composite
def atoms(draw) -> Node:
    kind = draw(st.sampled_from(["compare"] * 6 + ["ids", "dense", "live"]))
    if kind == "dense":
        return DENSE
    if kind == "live":
        return LIVE
    if kind == "ids":
        return apply(draw(st.sampled_from(["eq", "ne", "le"])), Load(IDS, (b, n)), STARTS)
    op = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
    pair = [draw(positions()), draw(ends)]
    return apply(op, *(pair if draw(st.booleans()) else pair[::-1]))


predicates = st.recursive(
    atoms(),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), inner, inner).map(lambda t: apply(*t)),
        inner.map(lambda p: apply("not", p)),
        st.tuples(inner, inner, inner).map(lambda t: where(*t)),
    ),
    max_leaves=5,
)


def evaluator(sizes: dict[str, int], seed: int) -> Evaluator:
    generator = torch.Generator().manual_seed(seed)
    size = {"B": sizes["B"], "M": sizes["M"], "N": sizes["N"]}
    whole = lambda *shape: torch.randint(-2, sizes["N"] + 3, shape, generator=generator)  # noqa: E731
    tensors = {
        "lengths": whole(size["B"]),
        "starts": whole(size["B"], size["M"]),
        "ids": whole(size["B"], size["N"]),
        "dense": torch.rand(size["M"], size["N"], generator=generator) < 0.5,
        "live": torch.rand(size["B"], size["M"], generator=generator) < 0.7,
    }
    return Evaluator(tensors, size)


def inside(interval: Interval, values: Evaluator) -> torch.Tensor:
    """[B, M, N]: whether a position is in the interval of its row."""
    out = torch.ones(values.sizes["B"], values.sizes["M"], values.sizes["N"], dtype=torch.bool)
    at = torch.arange(values.sizes["N"])
    for end, is_in in ((interval.lower, at.__ge__), (interval.upper, at.__lt__)):
        if end is not None:
            out &= is_in(values.value(end, (BATCH, ROWS, STREAM)).expand(out.shape).long())
    return out


@given(predicates, st.integers(1, 3), st.integers(1, 9), st.integers(1, 11), st.integers(0, 99))
@fixed(400)
def test_a_predicate_holds_within_one_interval_and_throughout_another(predicate, batch, rows, stream, seed):
    values = evaluator({"B": batch, "M": rows, "N": stream}, seed)
    support = support_of(predicate, STREAM)
    holds = values.value(predicate, (BATCH, ROWS, STREAM)).expand(batch, rows, stream).bool()
    assert not (holds & ~inside(support.outer, values)).any(), support
    if support.inner:
        assert not (~holds & inside(support.inner, values)).any(), support
    for end in filter(None, (support.outer.lower, support.outer.upper)):
        assert STREAM not in end.free


EXACT = {
    "causal": apply("le", n, m),
    "from the end": apply("lt", apply("sub", apply("sub", M, const(1)), n), LENGTHS),
    "window": apply("and", apply("le", n, m), apply("lt", apply("sub", m, n), const(4))),
    "both sides": apply("le", apply("abs", apply("sub", n, m)), const(2)),
    "prefix": apply("or", apply("le", n, m), apply("lt", n, LENGTHS)),
    "blocks": apply("eq", apply("floordiv", n, const(4)), apply("floordiv", m, const(4))),
    "not after": apply("not", apply("gt", n, m)),
    "live rows": apply("and", LIVE, apply("lt", n, LENGTHS)),
}


@pytest.mark.parametrize("predicate", EXACT.values(), ids=EXACT)
def test_one_interval_is_told_exactly(predicate):
    support = support_of(predicate, STREAM)
    assert support.outer == support.inner
    values = evaluator({"B": 2, "M": 9, "N": 9}, 0)
    holds = values.value(predicate, (BATCH, ROWS, STREAM)).expand(2, 9, 9).bool()
    assert torch.equal(holds, inside(support.outer, values))


def test_what_loaded_positions_say_leaves_the_rest_of_a_mask():
    """n <= m & ids[n] == starts[m]"""
    support = support_of(apply("and", apply("le", n, m), apply("eq", Load(IDS, (b, n)), STARTS)), STREAM)
    assert support == Support(Interval(None, apply("add", m, Const(1))), None)


# --- kernels


def masked(q, k, v, keep) -> torch.Tensor:
    return (q @ k.mT * 0.3).masked_fill(~keep, -math.inf).softmax(-1) @ v


def at(q) -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(q.shape[-2], device=q.device)
    return i[:, None], i[None, :]


def causal(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, columns <= rows)


def window(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, (columns <= rows) & (rows - columns < 70))


def both_sides(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, (rows - columns).abs() <= 5)


def prefix(q, k, v, lengths):
    rows, columns = at(q)
    return masked(q, k, v, (columns <= rows) | (columns < lengths[:, None, None, None]))


def padded(q, k, v, lengths):
    return masked(q, k, v, at(q)[1] < lengths[:, None, None, None])


def blocks(q, k, v):
    rows, columns = at(q)
    return masked(q, k, v, columns // 50 == rows // 50)


def documents(q, k, v, ids):
    rows, columns = at(q)
    return masked(q, k, v, (ids[:, None, :, None] == ids[:, None, None, :]) & (columns <= rows))


# What the loops of a program run over: tiles that no mask cuts, and others; or all that are not empty.
LOOPS = {
    causal: ("range(0, cut, BLOCK_N)", "tl.range(cut, last, BLOCK_N, num_stages=1)"),
    window: ("range(whole, cut, BLOCK_N)", "range(first, last - (cut - whole), BLOCK_N)"),
    both_sides: ("range(whole, cut, BLOCK_N)", "range(first, last - (cut - whole), BLOCK_N)"),
    prefix: ("range(0, cut, BLOCK_N)", "tl.range(cut, last, BLOCK_N, num_stages=1)"),
    padded: ("range(0, cut, BLOCK_N)", "tl.range(cut, last, BLOCK_N, num_stages=1)"),
    blocks: ("range(whole, cut, BLOCK_N)", "range(first, last - (cut - whole), BLOCK_N)"),
    documents: ("range(1, tl.load(whole_at) + 1)", "range(1, tl.load(cut_at) + 1)"),
}
MORE = {
    prefix: lambda count, length: torch.randint(0, length + 1, (count,)),
    padded: lambda count, length: torch.randint(0, length + 1, (count,)),
    documents: lambda count, length: torch.randint(0, 3, (count, length)).sort(-1)[0],
}


def arguments(program: Callable, count: int, length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    more = (MORE[program](count, length),) if program in MORE else ()
    return (*(torch.randn(count, 2, length, 16) for _ in range(3)), *more)


@pytest.mark.parametrize("program", LOOPS, ids=lambda p: p.__name__)
def test_loops_run_over_what_a_mask_leaves(program):
    result = rewrite(program, arguments(program, 2, 150))
    text = result.sources[f"kernels/{program.__name__}.py"]
    loops = (line.strip() for line in text.splitlines() if line.strip().startswith(("for start", "for turn")))
    found = [line.partition(" in ")[2].rstrip(":") for line in loops]
    assert tuple(found) == LOOPS[program]
    for count, length in ((2, 150), (1, 37), (3, 200), (2, 1)):
        args = arguments(program, count, length)
        with said(kernels=1):
            torch.testing.assert_close(result.module(*args), program(*args), rtol=1e-4, atol=2e-6, equal_nan=True)


def test_full_tiles_have_no_mask():
    text = rewrite(causal, arguments(causal, 2, 150)).sources["kernels/causal.py"]
    full, cut = (part.partition("for start")[0] for part in text.split("    for start in ")[1:3])
    assert "where(offs" not in full and "offs_n[None, :] <" not in full and "offs_n[None, :] <" in cut


def test_tiles_that_a_mask_empties_are_not_read():
    """Eager multiplies what is there by 0, which NaN shows."""
    q, k, v, lengths = arguments(padded, 2, 300)
    lengths[:] = torch.tensor([5, 40])
    result = rewrite(padded, (q, k, v, lengths))
    v[:, :, 128:] = math.nan
    assert padded(q, k, v, lengths).isnan().all()
    torch.testing.assert_close(result.module(q, k, v, lengths), padded(q, k, v.nan_to_num(), lengths))


def test_ends_that_are_loaded_in_64_bits():
    """Loops count in 32 bits, whatever is loaded."""
    q, k, v, _ = arguments(padded, 4, 150)
    lengths = torch.tensor([-(2**40), 2**40, 2**32 + 7, 70])
    result = rewrite(padded, (q, k, v, lengths))
    text = result.sources["kernels/padded.py"]
    assert "last = tl.minimum(tl.maximum(lengths, 0), M).to(tl.int32)" in text and "tl.cast(" not in text
    torch.testing.assert_close(
        result.module(q, k, v, lengths), padded(q, k, v, lengths), rtol=1e-4, atol=2e-6, equal_nan=True
    )


def test_a_finite_fill_weighs_in_rows_that_see_nothing_else():
    """All positions of such a row are alike: none may be left out."""

    def filled(q, k, v):
        rows, columns = at(q)
        return (q @ k.mT).masked_fill(columns < rows - 200, -1e9).masked_fill(rows < 40, -1e9).softmax(-1) @ v

    args = arguments(causal, 2, 150)
    with said(kernels=1):
        torch.testing.assert_close(rewrite(filled, args).module(*args), filled(*args), rtol=1e-4, atol=1e-5)


def shown(q, k, v):
    rows, columns = at(q)
    weights = (q @ k.mT * 0.3).masked_fill(columns > rows, -math.inf).softmax(-1)
    return weights @ v, weights


def test_weights_are_written_where_a_mask_leaves_nothing_too():
    """They are 0 there, which no memory is by itself."""
    args = arguments(causal, 2, 150)
    result = rewrite(shown, args)
    nothing = torch.empty
    with patch.object(torch, "empty", lambda *shape, **how: nothing(*shape, **how).fill_(math.nan)):
        with said(kernels=1):
            found = result.module(*args)
    for got, wanted in zip(found, shown(*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-6)


def apart(q, k, v):
    """A band whose ends lie anywhere in a tile: as far from the rows as the stream is longer than they are."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    return masked(q, k, v, (columns <= rows) & (rows - columns < 70))


def test_ends_are_exact_wherever_in_a_tile_they_lie():
    torch.manual_seed(0)
    result = rewrite(apart, [torch.randn(1, 2, n, 16) for n in (130, 150, 150)])
    for beyond in (0, 1, 5, 6, 7, 31, 32, 33, 63, 64, 65):
        args = [torch.randn(1, 2, n, 16) for n in (130, 130 + beyond, 130 + beyond)]
        with said(kernels=1):
            torch.testing.assert_close(result.module(*args), apart(*args), rtol=1e-4, atol=2e-6)


def filled_values(q, k, v, lengths):
    """What lies past the end of a text may be anything: zeros are in its place."""
    past = at(k)[1].view(1, 1, 1, -1) >= lengths[:, None, None, None]
    return (q @ k.mT).masked_fill(past, -math.inf).softmax(-1) @ v.masked_fill(past.mT, 0.0)


def filled_values_of_weights(q, k, v, lengths):
    past = at(k)[1].view(1, 1, -1, 1) >= lengths[:, None, None, None]
    return torch.relu(q @ k.mT) @ torch.where(past, 0.0, v)


@pytest.mark.parametrize("program", (filled_values, filled_values_of_weights), ids=lambda p: p.__name__)
def test_values_that_are_filled_may_be_nan(program):
    def args(length, *lengths):
        q, k, v = (torch.randn(len(lengths), 2, length, 16) for _ in range(3))
        for values, end in zip(v, lengths):
            values[:, end:] = math.nan
        return q, k, v, torch.tensor(lengths)

    result = rewrite(program, args(150, 100, 150))
    for inputs in (args(150, 100, 150), args(72, 5, 40), args(37, 37)):
        torch.testing.assert_close(result.module(*inputs), program(*inputs), rtol=1e-4, atol=1e-5)
