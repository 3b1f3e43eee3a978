"""Short reductions inside a tile are written out when a kernel is compiled; long ones stay loops."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from compiled_text import compiled, first_loop
from test_zoo_compiles import rewritten
from whole_path import assert_right, fused
from zoo import Program, Sizes

from rewriter.plan.unroll import TURNS_OF_ALL

DTYPES = (torch.float32, torch.float16)


def points(q, k, v, q_points, k_points):
    """Scores less the squared distance of a few points."""
    apart = ((q_points[:, :, None] - k_points[:, None]) ** 2).sum(-1).sum(-1)
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) - 0.1 * apart, -1) @ v


def call(m: int, n: int, few: int = 4, coordinates: int = 3, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(m + n + few)
    shapes = (2, m, 16), (2, n, 16), (2, n, 16), (2, m, few, coordinates), (2, n, few, coordinates)
    return tuple(torch.randn(s, generator=draw).to(dtype) for s in shapes)


def counted(turns: str) -> str:
    """What a loop is counted by whose length the call knows, as a pattern."""
    return re.escape(f"(tl.static_range if {turns} <= {TURNS_OF_ALL} else tl.range)")


def kernel_of(result) -> str:
    return next(text for name, text in result.sources.items() if re.fullmatch(r"kernels/(?!__init__)\w+\.py", name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loops_that_are_short_in_the_example_are_written_out(dtype):
    result = fused(points, call(20, 33, dtype=dtype))
    text = kernel_of(result)
    assert re.search(rf"\n +for r in {counted('R * G')}\(0, R\):\n +for g in {counted('G')}\(0, G\):\n", text)
    constant = set(re.findall(r"\n    (\w+): tl.constexpr,", text))
    assert {"R", "G", "stride_q_points_r", "stride_k_points_r", "stride_k_points_g"} <= constant
    assert not constant & {"M", "N", "stride_q_points_m", "stride_k_points_n"}
    assert len(re.findall(r"s\w* = s\w* \+ x \* x", text)) == 2, "one state of both sums, in full tiles and the last"
    for few, coordinates in ((4, 3), (1, 1), (7, 2), (13, 3)):
        assert_right(result, points, call(70, 40, few, coordinates, dtype), dtype=dtype)


def test_strides_that_grow_with_the_stream_are_no_constants():
    def inputs(m: int, n: int):
        return tuple(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.dim() == 4 else x for x in call(m, n))

    result = fused(points, inputs(20, 33))
    constant = set(re.findall(r"\n    (\w+): tl.constexpr,", kernel_of(result)))
    assert "R" in constant and not any(name.startswith("stride_") for name in constant)
    assert_right(result, points, inputs(30, 20))


def test_loops_that_are_long_in_the_example_stay():
    result = fused(points, call(20, 33, few=40))
    text = kernel_of(result)
    assert "for r in range(0, R):" in text and re.search(rf"for g in {counted('G')}\(0, G\):", text)
    assert_right(result, points, call(30, 20, few=3))


def test_what_does_not_move_is_loaded_before_the_stream(tmp_path):
    program = Program("few_points", "points", lambda: points, lambda sizes, _: call(128, 128), Sizes(2, 128), ())
    half = rewritten(program, points, tmp_path / "few_points", torch.float16)
    (request,) = half.requests("sm_90")
    (kernel,) = half.kernels
    configs = [kernel.plan.kernels[0].config, *kernel.plan.kernels[0].others]
    assert len(configs) > 1, "which tile is the fastest is measured"
    rows = replace(request, constexprs=request.constexprs | {"BLOCK_M": 64, "BLOCK_N": 32})
    loads = [line for line in first_loop(compiled(rows, tmp_path / "triton")["ttgir"]) if "tt.load" in line]
    assert sum("tensor<32x!tt.ptr" in line for line in loads) == 12, "a position of the stream, all its points"
    assert not any("tensor<64x!tt.ptr" in line for line in loads), "rows stay where they are"


def test_many_turns_at_the_call_stay_a_loop(tmp_path):
    """Written out, they would take minutes to compile."""
    program = Program("few_points", "points", lambda: points, lambda sizes, _: call(20, 33), Sizes(2, 33), ())
    (request,) = rewritten(program, points, tmp_path / "few_points", torch.float16).requests("sm_90")
    many = replace(request, constexprs=request.constexprs | {"R": 20})
    few_loops, loops = (compiled(each, tmp_path / "triton")["ttir"].count("scf.for") for each in (request, many))
    assert loops > few_loops
