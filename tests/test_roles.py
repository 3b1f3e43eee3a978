"""Which axes a kernel keeps whole, which it loops over, and which programs are numbered by."""

from __future__ import annotations

import torch
from whole_path import assert_right, fused

from rewriter import rewrite
from rewriter.ir import Const
from rewriter.pipeline import rewrite_module
from rewriter.plan import KernelPlan
from rewriter.plan.parts import _settled


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float16)


def kernels(function, *inputs: torch.Tensor) -> list[KernelPlan]:
    rewritten = rewrite_module(function, inputs, {})
    return [k for f in rewritten.fused for k in f.plan.kernels]


def two_hops(q, k, v):
    p = torch.softmax(q @ k.mT, -1)
    return p @ (p @ v)


def test_what_an_earlier_kernel_leaves_is_weighed_as_a_matrix():
    """Its features are whole in a tile: no program has one of them for itself, and computes the weights for it."""
    planned = kernels(two_hops, r(2, 3, 33, 16), r(2, 3, 33, 16), r(2, 3, 33, 16))
    assert [len(k.grid) for k in planned] == [2, 2, 2]


def test_what_an_earlier_kernel_leaves_is_multiplied_by_the_matrix_unit():
    """It is handed on in fp32: tf32 rounds no more than eager's 16 bits."""
    half = r(2, 33, 16), r(2, 33, 16), r(2, 33, 16)
    text = rewrite_module(two_hops, half, {}).kernels[0].text
    assert text.count('input_precision="tf32"') == 2
    single = tuple(x.float() for x in half)
    assert "tf32" not in rewrite_module(two_hops, single, {}).kernels[0].text


def groups(q, k, v):
    """Softmax inside groups of four keys, then over all: weights that each group's loop computes."""
    s = (q @ k.mT).unflatten(-1, (-1, 4))
    p = torch.softmax((s.softmax(-1) + s).flatten(-2), -1)
    return torch.einsum("bmng,bnge->bme", p.unflatten(-1, (-1, 4)), v.unflatten(1, (-1, 4)))


def test_what_a_loop_inside_a_tile_weighs_is_a_matrix():
    """Each turn of the loop adds a product; the values' features are no grid axis."""
    inputs = r(2, 33, 16), r(2, 36, 16), r(2, 36, 16)
    (kernel,) = kernels(groups, *inputs)
    assert len(kernel.grid) == 1 and len(kernel.features) == 2
    text = rewrite_module(groups, inputs, {}).kernels[0].text
    assert "acc = tl.dot(" in text
    result = rewrite(groups, inputs)
    wanted, own = groups(*(x.double() for x in inputs)), groups(*inputs)
    assert (result.module(*inputs) - wanted).norm() <= 2 * (own - wanted).norm()


def test_a_moment_keeps_its_exponent_where_an_earlier_kernel_has_the_maximum():
    """sum e^(s - m) (s - m): both factors, once m is read from memory."""

    def peakedness(q, k):
        s = q @ k.mT
        gap = s - s.amax(-1, keepdim=True)
        return (gap.exp() * gap).sum(-1) / gap.exp().sum(-1)

    args = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    (fused,) = rewrite_module(peakedness, args, {}, stop_after="derive").fused
    (moment,) = (d for d in fused.chain.definitions if d.shift and d.shift.mass)
    settled = _settled(moment, set())
    assert settled.shift is None and len(settled.rest) == len(moment.rest) + 2


def attention(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def test_wide_features_are_in_parts():
    """Programs have a part each: of queries and values wider than a tile, and of few rows, too."""
    wide = r(2, 33, 320), r(2, 70, 320), r(2, 70, 512)
    (kernel,) = kernels(attention, *wide)
    assert [int(f.extent.value) for f in kernel.features] == [256]
    assert [int(a.extent.value) for a in kernel.grid if isinstance(a.extent, Const)] == [2]
    result = fused(attention, wide)
    for inputs in wide, (r(3, 1, 320), r(3, 300, 320), r(3, 300, 512)):
        assert_right(result, attention, inputs, dtype=torch.float16)


def test_wide_features_of_one_query_are_in_parts():
    inputs = r(2, 1, 64), r(2, 600, 64), r(2, 600, 384)
    result = fused(attention, inputs)
    assert "_part_kernel" in result.sources["kernels/attention.py"]
    assert_right(result, attention, inputs, dtype=torch.float16)


def beside_all_features(q, k, v):
    out = attention(q, k, v)
    return out * out.square().mean(-1, keepdim=True).rsqrt()


def test_what_reads_all_features_reads_those_of_all_parts():
    inputs = r(2, 33, 16), r(2, 70, 16), r(2, 70, 512)
    result = rewrite(beside_all_features, inputs)
    assert result.report["chains"]
    assert_right(result, beside_all_features, inputs, dtype=torch.float16)


def test_wide_features_without_parts_are_reported():
    report = rewrite(attention, (r(2, 33, 16), r(2, 70, 16), r(2, 70, 257))).report
    assert not report["chains"]
    assert "257" in report["unfused"][0]["reason"]
