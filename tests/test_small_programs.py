"""Small programs through the whole path, each for one thing that no program of the zoo shows."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from whole_path import assert_right, fused

from rewriter import rewrite
from rewriter.errors import RewriteError


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


def best_beside_the_mean_size(q, k, v):
    """What a maximum is divided by is positive: it can wait."""
    s = q @ k.mT
    return (s / (1 + s.abs().mean(-1, keepdim=True))).amax(-1)


def masks_compared(q, k, v):
    """Triton text is Python: i < j == k would be i < j and j == k."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    keep = (j <= i) == (j % 2 == 0)
    return torch.softmax((q @ k.mT).masked_fill((keep | (j == 0)) == 0, float("-inf")), -1) @ v


def maximum_with_positions(q, k, v):
    """`max` gives values and positions; no row is left alone for it."""
    s = q @ k.mT
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return (e / e.sum(-1, keepdim=True)) @ v


def same(m, n):
    return r(2, n, 8), r(2, n, 8), r(2, n, n)


def stored_and_read_both_ways(q, k, a):
    """A mask of pairs, symmetric only by its sum with itself transposed."""
    return torch.softmax(q @ k.mT + a + 2 * a.mT, -1) @ k


def squared_scores(q, k, v):
    """Two matrix products, but what is between them is no product that could wait."""
    return (q @ k.mT).square() @ v


def decayed(q, k, v):
    """Scores times a matrix of rows x stream that is no mask."""
    ahead = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    return (q @ k.mT * 0.9 ** ahead.abs().float()) @ v


def to_the_base_2(q, k, v):
    s = q @ k.mT * 0.7
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return (p / p.sum(-1, keepdim=True)) @ v


def to_the_base_10(q, k, v):
    s = q @ k.mT * 0.3
    p = 10.0 ** (s - s.amax(-1, keepdim=True))
    return p @ v / p.sum(-1, keepdim=True)


def graph(m, n):
    return r(n, 8), r(16, 1), r(n, n) > -0.5


def weighed(h, pairs, a, near):
    """Attention over the neighbours in a graph, by a layer of the features of both ends of each edge."""
    n = h.shape[0]
    s = F.leaky_relu((pairs @ a).view(n, n)).masked_fill(~(near | torch.eye(n, dtype=torch.bool)), -9e15)
    return torch.softmax(s, -1) @ h


def pairs_by_repeats(h, a, near):
    n = h.shape[0]
    return weighed(h, torch.cat([h.repeat_interleave(n, 0), h.repeat(n, 1)], 1), a, near)


def pairs_by_a_view_of_repeats(h, a, near):
    n = h.shape[0]
    pairs = torch.cat([h.repeat(1, n).view(n * n, -1), h.repeat(n, 1)], 1)
    return weighed(h, pairs.view(n, n, -1), a, near)


def diagonal_assigned(q, k, v):
    """By positions of rows and of the stream, both of them as many as there are rows."""
    s, i = q @ k.mT, torch.arange(q.shape[1])
    s[:, i, i] = float("-inf")
    return s.softmax(-1) @ v


def next_to_the_diagonal(q, k, v):
    s, i = q @ k.mT, torch.arange(q.shape[1])
    s[:, i, i + 1] = 0.5
    return s.softmax(-1) @ v


def column_assigned(q, k, v):
    s = q @ k.mT
    s[..., :, 0] = 0.5
    return torch.relu(s) @ v


def what_is_finite(q, k, v):
    s = q @ k.mT
    return torch.where(s.isfinite(), torch.relu(s), 0) @ v


def first_that_is_masked(q, k, v):
    """The largest of truth values, and where it is."""
    is_any, at = (q @ k.mT > 1.0).max(-1)
    return is_any, at


def a_slice_of_which_the_shape_is_read(q, k, v):
    s = torch.relu(q @ k.mT)
    return torch.zeros_like(s[..., :1]), s.softmax(-1) @ v


PROGRAMS = {
    what_is_finite: qkv,
    first_that_is_masked: qkv,
    a_slice_of_which_the_shape_is_read: qkv,
    diagonal_assigned: qkv,
    next_to_the_diagonal: qkv,
    column_assigned: qkv,
    squared_scores: qkv,
    decayed: qkv,
    to_the_base_2: qkv,
    to_the_base_10: qkv,
    pairs_by_repeats: graph,
    pairs_by_a_view_of_repeats: graph,
    stored_and_read_both_ways: same,
    divided_late_over_groups: grouped,
    filled_by_a_product: qkv,
    best_beside_the_mean_size: qkv,
    masks_compared: qkv,
    maximum_with_positions: qkv,
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_small_program(program):
    inputs = PROGRAMS[program]
    result = fused(program, inputs(7, 9))
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, program, inputs(*sizes))
    sweeps = 3 if inputs is graph else 1  # weights of a graph are made again for every feature
    assert [chain["passes"] for chain in result.report["chains"]] == [sweeps] and not result.report["unfused"]


def scaled_products(q, k, v, gate):
    """What divides and multiplies here lacks rows or stream: k.mT @ v can be first."""
    return (q @ k.mT * q.shape[-1] ** -0.5 / k.shape[-2] * gate[:, None]) @ v


def test_products_that_can_be_reordered_are_left():
    result = rewrite(scaled_products, (*qkv(7, 9), r(2, 9)))
    assert not result.report["chains"] and not result.report["unfused"]


# Arguments may be called what an emitted file calls its own.


def of_the_state(acc, m_i, l_i):
    start = acc @ m_i.mT
    return (start.softmax(-1) @ l_i) * acc


def of_the_file(triton, launch, OP):
    return (triton @ launch.mT).softmax(-1) @ OP


def of_the_tile(offs_d, BLOCK_M, out_ptr):
    full = offs_d @ BLOCK_M.mT
    return full.softmax(-1) @ out_ptr


def of_sizes(B, M, CONFIG):
    return (B @ M.mT).softmax(-1) @ CONFIG


def of_units(ALIGN, TILES, TMA):
    return (ALIGN @ TILES.mT).softmax(-1) @ TMA


@pytest.mark.parametrize(
    "program", [of_the_state, of_the_file, of_the_tile, of_sizes, of_units], ids=lambda program: program.__name__
)
def test_names_of_arguments(program):
    args = r(2, 7, 8), r(2, 9, 8), r(2, 9, 8)
    assert_right(fused(program, args), program, args)


def of_both_cases(q, k, v, a, A):
    return (q @ k.mT + a - A).softmax(-1) @ v


def test_names_that_differ_by_case():
    args = *(r(2, n, 16).half() for n in (7, 9, 9)), r(7, 9).half(), r(2, 7, 9).half()
    assert_right(fused(of_both_cases, args), of_both_cases, args, dtype=torch.float16)


def prepared(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def lying(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def dense(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def tanh(q, k, v):
    return torch.tanh(q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("program", [prepared, lying, dense, tanh], ids=lambda program: program.__name__)
def test_names_of_functions(program):
    assert_right(fused(program, qkv(7, 9)), program, qkv(7, 9))
    args = [t.half()[..., 1:] for t in (r(2, n, 17) for n in (7, 9, 9))]  # rows that boxes can't be loaded of
    assert_right(fused(program, args), program, args, dtype=torch.float16)


def test_an_argument_that_hides_what_the_new_forward_calls():
    def named(torch, k, v):
        return (torch @ k.mT).softmax(-1) @ v

    def sized(q, k, isinstance):
        return (q @ k.mT).softmax(-1) @ isinstance

    for program in (named, sized):
        with pytest.raises(RewriteError, match="an argument called"):
            rewrite(program, qkv(7, 9))


def test_a_generator_that_forward_makes():
    def noisy(q, k, v):
        noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        return (q @ noise @ k.mT).softmax(-1) @ v

    with pytest.raises(RewriteError, match="forward makes a Generator"):
        rewrite(noisy, qkv(7, 9))


def four_operands(q, k, v):
    """Scores, a mask and values in one einsum: what is summed first makes scores."""
    mask = torch.ones(q.shape[1], k.shape[1]).tril()
    return torch.einsum("bis,bjs,ij,bjp->bip", q, k, mask, v)


def test_one_einsum():
    result = fused(four_operands, qkv(7, 9))
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, four_operands, qkv(*sizes))


# Scores that memory holds: what the caller gives, or what an op that stays eager has made.


def given(s, v):
    """Causal, of the scores of another model."""
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v


def accumulated(q, k, v):
    w = (q @ k.mT).cumsum(-1).relu()
    return (w / (w.sum(-1, keepdim=True) + 1)) @ v


def test_scores_that_memory_holds_are_normalised_in_the_kernel():
    def scores(m: int, n: int):
        return r(2, 3, m, n), r(2, 3, n, 8)

    for program, inputs in ((given, scores), (accumulated, lambda m, n: (r(2, m, 4), r(2, n, 4), r(2, n, 4)))):
        result = rewrite(program, inputs(17, 19))
        assert [chain["passes"] for chain in result.report["chains"]] == [1]
        for sizes in ((17, 19), (5, 37)):
            assert_right(result, program, inputs(*sizes))


def points_weighed(q, k, v):
    """Values of four points each, written points first."""
    return torch.einsum("bmn,bnpc->bpmc", torch.softmax(q @ k.mT, -1), v.unflatten(-1, (4, 2)))


def test_axes_that_only_values_have_are_one():
    result = fused(points_weighed, qkv(7, 9))
    (kernel,) = (text for name, text in result.sources.items() if name.startswith("kernels/points"))
    assert "Fixed: D = 8, E = 8." in kernel  # no program for each point, which would compute weights again
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, points_weighed, qkv(*sizes))


def vectors_weighed(q, k, v):
    return torch.einsum("bmn,bnpc->bmpc", torch.softmax(q @ k.mT, -1), v)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_dimensions_that_only_values_have_are_read_as_one(dtype):
    def inputs(m: int, n: int):
        return tuple(t.to(dtype) for t in (r(2, m, 16), r(2, n, 16), r(2, n, 8, 3)))

    result = fused(vectors_weighed, inputs(7, 9))
    (kernel,) = (text for name, text in result.sources.items() if name.startswith("kernels/vectors"))
    body, launch = kernel.split("def reference")
    assert "v.reshape((B, N, 24))" in launch and "stride_ve4" not in body
    assert ("v_boxes.load([b, start, 0])" in body) == (dtype is torch.float16)
    for sizes in ((7, 9), (20, 37)):
        q, k, v = inputs(*sizes)
        assert_right(result, vectors_weighed, (q, k, v), dtype=dtype)
        assert_right(result, vectors_weighed, (q, k, v.mT.contiguous().mT), dtype=dtype)  # it lies otherwise


def some_vectors_weighed(q, k, v):
    return vectors_weighed(q, k, v[:, :, :3])


def test_dimensions_are_read_as_one_only_where_both_are_whole():
    inputs = r(2, 7, 16), r(2, 9, 16), r(2, 9, 5, 3)
    result = fused(some_vectors_weighed, inputs)
    assert_right(result, some_vectors_weighed, inputs)


def points_of_any_number(q, k, v, points):
    """More points than a tile holds, only the call knows how many: each has a program, and what has none is written by
    one.
    """
    w = torch.softmax(q @ k.mT, -1)
    return w @ v, torch.einsum("bmn,bnpc->bmpc", w, points)


def test_outputs_are_written_once():
    def inputs(m: int, n: int):
        return *qkv(m, n), r(2, n, 90, 3)

    result = fused(points_of_any_number, inputs(7, 9))
    (kernel,) = (text for name, text in result.sources.items() if name.startswith("kernels/points"))
    stores = re.findall(r"tl\.store\(\s*(\w+).*?mask=(.*?),\n", kernel, re.S)
    assert [("== 0" in mask) for _, mask in stores] == [True, False], stores
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, points_of_any_number, inputs(*sizes))


@pytest.mark.parametrize("fill, sweeps", [(-1e9, 1), (torch.finfo(torch.float32).min, 3)])
def test_a_logarithm_beside_a_fill(fill, sweeps):
    """exp(s - logsumexp(s)) is a softmax, but beside the least float, where the logarithm is lost: computed as written."""

    def program(q, k, v, live):
        s = (q @ k.mT).masked_fill(~live, fill)
        return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v

    def inputs(m: int, n: int):
        return *qkv(m, n), (r(m, n) > 0) & (torch.arange(m) % 3 > 0)[:, None]

    result = fused(program, inputs(7, 9))
    assert [chain["passes"] for chain in result.report["chains"]] == [sweeps]
    for sizes in ((7, 9), (20, 37)):
        assert_right(result, program, inputs(*sizes))


# Rows masked throughout, where asked to be zero. `s` are scores, with -inf where nothing is seen.


def called(s, v):
    return s.softmax(-1) @ v


def by_hand(s, v):
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def with_a_finite_maximum(s, v):
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(torch.isinf(top), 0.0, top))
    return (e @ v) / e.sum(-1, keepdim=True)


def without_a_maximum(s, v):
    e = torch.exp(s)
    return (e @ v) * (1 / e.sum(-1, keepdim=True))


def by_logsumexp(s, v):
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


def shared_with_one(s, v):
    e = torch.exp(s)
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


SPELLINGS = (called, by_hand, with_a_finite_maximum, without_a_maximum, by_logsumexp, shared_with_one)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_rows_masked_throughout_are_zero(spelling):
    def attend(q, k, v, lengths):
        keep = torch.arange(k.shape[1]) < lengths[:, :, None]
        return spelling((q @ k.mT).masked_fill(~keep, float("-inf")), v)

    lengths = torch.arange(14).view(2, 7) % 5
    args = (*qkv(7, 9), lengths)
    out, eager = fused(attend, args, masked_rows="zero").module(*args), attend(*args)
    assert (out[lengths == 0] == 0).all()
    torch.testing.assert_close(out[lengths > 0], eager[lengths > 0])


# Axes of no elements give what eager gives: zeros, or 0 / 0.


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def divided_early(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1, keepdim=True)) @ v


def divided_late(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e @ v) / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("program", [sdpa, divided_early, divided_late], ids=lambda p: p.__name__)
def test_axes_of_no_elements(program):
    module = fused(program, qkv(7, 9)).module
    for b, m, n in ((2, 7, 0), (2, 0, 9), (0, 7, 9), (0, 0, 0)):
        args = r(b, m, 8), r(b, n, 8), r(b, n, 8)
        torch.testing.assert_close(module(*args), program(*args), equal_nan=True)


# Weights masked once more after they are divided: a row that sees nothing is 0, not NaN.


def masked_twice(q, k, v, keep):
    p = torch.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), -1)
    return p.masked_fill(~keep, 0.0) @ v


def masked_late(q, k, v, keep):
    p = torch.relu(q @ k.mT)
    p = p / p.sum(-1, keepdim=True)
    return torch.where(keep, p, 0.0) @ v


def masked_by_rows(q, k, v, keep):
    p = torch.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), -1)
    return torch.where(keep.any(-1, keepdim=True), p, 0.0) @ v


def masked_by_a_product(q, k, v, keep):
    """Not so here: NaN times 0 is NaN."""
    p = torch.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), -1)
    return (p * keep) @ v


MASKED = (masked_twice, masked_late, masked_by_rows, masked_by_a_product)


@pytest.mark.parametrize("program", MASKED, ids=lambda p: p.__name__)
def test_rows_that_see_nothing_after_their_division(program):
    args = (*qkv(7, 40), torch.arange(40) < torch.arange(14).view(2, 7, 1) % 5)
    assert_right(fused(program, args), program, args)


def normalised_both_ways(q, k, v):
    """Sinkhorn's first step, in logarithms: what is subtracted along the stream is settled in neither or in both."""
    s = q @ k.mT
    s = s - torch.logsumexp(s, 1, keepdim=True)
    return (s - torch.logsumexp(s, 2, keepdim=True)).exp() @ v


def test_maxima_over_what_an_earlier_pass_has_normalised():
    result = fused(normalised_both_ways, qkv(7, 40))
    assert [c["passes"] for c in result.report["chains"]] == [2]
    assert_right(result, normalised_both_ways, qkv(9, 33), wide=(9, 33))


def of_plain_numbers(x, places, y):
    """Rows without features, and no maximum: they are no features of values without any, either."""
    k = torch.exp(-((x[:, :, None] - places[:, None]) ** 2))
    return (k * y[:, None]).sum(-1) / k.sum(-1)


def test_a_row_is_no_feature_of_the_values():
    result = fused(of_plain_numbers, (r(2, 7), r(2, 40), r(2, 40)))
    for b, m, n in ((2, 7, 40), (3, 9, 33), (1, 1, 1)):
        assert_right(result, of_plain_numbers, (r(b, m), r(b, n), r(b, n)))


def picked_along(q, k, v):
    """Indices broadcast over the batch: the op itself wants its sizes as numbers."""
    i = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    table = torch.tanh(q.cumsum(-1))
    s = q @ k.mT + torch.take_along_dim(table, i.clamp(0, 7)[None].expand(q.shape[0], -1, -1), -1)
    return torch.softmax(s, -1) @ v


def test_indices_along_a_dimension():
    result = fused(picked_along, qkv(7, 40))
    assert_right(result, picked_along, (r(3, 9, 8), r(3, 33, 8), r(3, 33, 8)), wide=(9, 33))


def window_and_prefix(q, k, v, p, width):
    """p is called as the weights are; the first loop does not read it, the second does."""
    seen = torch.arange(k.shape[1])
    gap = torch.arange(q.shape[1])[:, None] - seen
    keep = ((gap >= 0) & (gap < width)) | (seen < p)
    return torch.softmax((q @ k.mT).masked_fill(~keep, -torch.inf), -1) @ v


def test_what_loops_read_is_called_otherwise_than_what_earlier_ones_assign():
    result = fused(window_and_prefix, (*qkv(130, 130), torch.tensor(70), torch.tensor(9)))
    for length in (70, 3, 130):
        assert_right(result, window_and_prefix, (*qkv(130, 130), torch.tensor(length), torch.tensor(9)))


def test_weights_that_are_written_and_weighed_again_have_a_name_of_their_own():
    def again(q, k, v):
        s = -((q[:, :, None] - k[:, None]) ** 2).sum(-1) / 4
        p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))
        return p, torch.softmax(p, -1) @ v

    result = fused(again, qkv(9, 18))
    assert_right(result, again, qkv(9, 18))
