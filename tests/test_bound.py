"""Static bounds in place of running maxima: where they are legal, and that they are right."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import load

from rewriter.api import rewrite
from rewriter.derive.bound import MIXED, _degree
from rewriter.derive.ranges import range_of
from rewriter.ir import Axis, Const, Index, Ref, apply, const, where

L, ACC = Ref("l", (), torch.float32), Ref("acc", (), torch.float32)
X = load("x", Index(Axis("n", Const(8))))


def scores(q, k):
    return q @ k.mT / math.sqrt(q.shape[-1])


def capped(q, k, v):
    return (30 * torch.tanh(scores(q, k) / 30)).softmax(-1) @ v


def capped_causal(q, k, v):
    n = torch.arange(q.shape[-2])
    return (8 * torch.tanh(scores(q, k) / 8)).masked_fill(n[:, None] < n, -math.inf).softmax(-1) @ v


def gated(q, k, v):
    return (4 * torch.sigmoid(scores(q, k)) + 3).softmax(-1) @ v


def clamped(q, k, v):
    return scores(q, k).clamp(-5, 5).softmax(-1) @ v


def two(q, k, v):
    return (5 * torch.sin(scores(q, k))).softmax(-1) @ v - 0.2 * torch.cos(scores(k, q)).softmax(-1) @ v


def plain(q, k, v):
    return scores(q, k).softmax(-1) @ v


def wide(q, k, v):
    return (300 * torch.tanh(scores(q, k))).softmax(-1) @ v


def normaliser(q, k, v):
    return torch.logsumexp(5 * torch.tanh(scores(q, k)), -1)


def shifted_by_hand(q, k, v):
    s = 5 * torch.tanh(scores(q, k))
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return p @ v / (p.sum(-1, keepdim=True) + 0.1)


def kernels(result) -> str:
    return "\n".join(text for name, text in result.sources.items() if name.startswith("kernels/"))


def assert_near(program, result, args):
    """At most twice as far from float64 as eager is."""
    exact = program(*(a.double() for a in args))
    off, eager = ((out.double() - exact).norm() for out in (result.module(*args), program(*args)))
    assert off <= 2 * eager + 2e-6 * exact.norm()


@pytest.mark.parametrize("program", [capped, capped_causal, gated, clamped, two])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bounded_exponents_need_no_maximum(program, dtype):
    args = [torch.randn(2, 70, 16, dtype=dtype) for _ in range(3)]
    result = rewrite(program, args)
    if program is capped and dtype is torch.float16:  # exp(60) has no place in fp16
        assert "m_new" in kernels(result)
    else:
        assert "m_new" not in kernels(result)
    assert not result.report["unfused"]
    for rows in (1, 70, 129):
        args = [3 * torch.randn(3, rows, 16, dtype=dtype) for _ in range(3)]
        assert_near(program, result, args)


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_weights_of_fp16_have_a_maximum_beside_factors_of_any_size(size):
    def program(q, k, v, weight):
        return ((8.9 * torch.tanh(scores(q, k))).softmax(-1) * weight) @ v

    args = [torch.randn(2, 40, 16, dtype=torch.float16) for _ in range(3)]
    args += [size * torch.rand(40, dtype=torch.float16)]
    args[0], args[1] = args[0] * 0 - 4, args[1] * 0 + 4 * (1 if size < 1 else -1)
    result = rewrite(program, args)
    assert "m_new" in kernels(result)
    assert_near(program, result, args)


@pytest.mark.parametrize("program", [plain, wide, normaliser, shifted_by_hand])
def test_a_maximum_stays_where_it_is_needed(program):
    args = [torch.randn(2, 40, 16) for _ in range(3)]
    result = rewrite(program, args)
    assert "m_new" in kernels(result)
    assert_near(program, result, args)


def test_rows_masked_throughout_are_what_they_were():
    def program(q, k, v, keep):
        return (5 * torch.tanh(scores(q, k))).masked_fill(~keep, -math.inf).softmax(-1) @ v

    args = [*(torch.randn(2, 40, 16) for _ in range(3)), torch.rand(40, 40) < 0.5]
    args[3][7] = False
    result = rewrite(program, args)
    assert "m_new" not in kernels(result)
    out = result.module(*args)
    assert out[:, 7].isnan().all()
    torch.testing.assert_close(out, program(*args), equal_nan=True, rtol=1e-5, atol=1e-5)
    zeros = rewrite(program, args, masked_rows="zero")
    assert (zeros.module(*args)[:, 7] == 0).all()


@pytest.mark.parametrize(
    ("node", "degree"),
    [
        (apply("div", ACC, L), 0),
        (apply("mul", ACC, L), 2),
        (apply("div", ACC, apply("add", L, const(1e-6))), MIXED),
        (apply("div", ACC, apply("maximum", L, const(1e-6))), MIXED),
        (apply("add", ACC, L), 1),
        (where(apply("eq", L, const(0.0)), const(0.0), apply("div", ACC, L)), 0),
        (where(apply("lt", L, const(1.0)), const(0.0), apply("div", ACC, L)), MIXED),
        (apply("exp", apply("div", ACC, L)), 0),
        (apply("exp", ACC), MIXED),
        (apply("log", L), MIXED),
    ],
)
def test_by_which_power_results_change(node, degree):
    assert _degree(node, {"l", "acc"}) == degree


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (apply("mul", apply("tanh", X), const(-30.0)), (-30, 30)),
        (apply("add", apply("mul", apply("sigmoid", X), const(4.0)), const(3.0)), (3, 7)),
        (apply("maximum", apply("minimum", X, const(5.0)), const(-5.0)), (-5, 5)),
        (apply("sub", apply("sin", X), apply("div", apply("cos", X), const(2.0))), (-1.5, 1.5)),
        (apply("mul", X, const(0.0)), (0, 0)),
        (apply("minimum", X, const(1.0)), (-math.inf, 1)),
        (apply("div", apply("tanh", X), X), (-math.inf, math.inf)),
        (X, (-math.inf, math.inf)),
    ],
)
def test_ranges(node, found):
    assert range_of(node) == found
