"""Exponentials of 16-bit programs: the instruction by itself, whatever is added to scores."""

from __future__ import annotations

import re

import pytest
import torch
from compiled_text import compiled
from test_zoo_compiles import rewritten
from whole_path import assert_right, fused
from zoo import Program, Sizes


def two_biases(q, k, v, mask_bias, pair_bias):
    return torch.softmax(q @ k.mT * 0.25 + mask_bias[:, None] + pair_bias, -1) @ v


def call(m: int, n: int, dtype: torch.dtype, fill: float = 0.0):
    """Of the columns that are filled the last sees nothing else: a whole row is."""
    draw = torch.Generator().manual_seed(m + n)
    q, k, v, mask_bias, pair_bias = (
        torch.randn(s, generator=draw).to(dtype) for s in ((2, m, 16), (2, n, 16), (2, n, 16), (2, n), (m, n))
    )
    pair_bias[:, ::3] += fill
    pair_bias[-1] += fill
    return q, k, v, mask_bias, pair_bias


@pytest.mark.parametrize("fill", (0.0, -1e3, -65504.0))
def test_scores_less_their_maximum_in_base_2(fill):
    result = fused(two_biases, call(20, 33, torch.float16))
    (text,) = (t for name, t in result.sources.items() if re.fullmatch(r"kernels/(?!__init__)\w+\.py", name))
    assert "p = tl.exp2((x - m_new[:, None]) * LOG2E)" in text and "tl.exp(" not in text
    for sizes in ((20, 33), (70, 90)):
        assert_right(result, two_biases, call(*sizes, torch.float16, fill), dtype=torch.float16)


def weights(q, k):
    return torch.softmax(q @ k.mT * 0.25, -1)


def test_weights_that_are_written_take_one_fused_operation_and_one_product():
    """What is the same for a row is divided by, and multiplied with, once."""
    result = fused(weights, call(20, 33, torch.float16)[:2])
    (text,) = (t for name, t in result.sources.items() if re.fullmatch(r"kernels/(?!__init__)\w+\.py", name))
    written = "tl.exp2(qk * (0.25 * LOG2E) - (m_i * LOG2E)[:, None]) * inverse[:, None]"
    assert text.count(written) == 2 and text.count("inverse = 1.0 / x") == 1
    for m, n in ((20, 33), (70, 90)):
        assert_right(result, weights, call(m, n, torch.float16)[:2], dtype=torch.float16)


def test_single_precision_keeps_small_weights():
    result = fused(two_biases, call(20, 33, torch.float32))
    (text,) = (t for name, t in result.sources.items() if re.fullmatch(r"kernels/(?!__init__)\w+\.py", name))
    assert "p = tl.exp(x - m_new[:, None])" in text and "tl.exp2(" not in text
    assert_right(result, two_biases, call(40, 50, torch.float32, -1e9))


def test_nothing_is_done_for_results_that_are_denormal(tmp_path):
    def inputs(sizes, _):
        return call(sizes.q, sizes.keys, torch.bfloat16)

    program = Program("two_biases", "biases", lambda: two_biases, inputs, Sizes(2, 128), ())
    (request,) = rewritten(program, two_biases, tmp_path / "two_biases", torch.bfloat16).requests("sm_90")
    ptx = compiled(request, tmp_path / "triton")["ptx"]
    assert "ex2.approx.ftz.f32" in ptx and "ex2.approx.f32" not in ptx
