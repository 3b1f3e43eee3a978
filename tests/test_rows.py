"""Lone rows, where `rows=True` asks for them: what is cut, that it is right, and what is left, with its reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right
from zoo import programs
from zoo_checks import at_dtype, built, check_at, kernels_of

from rewriter.api import rewrite

PROGRAMS = [p for p in programs(part=2) if p.rows]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name) for p in PROGRAMS])
def test_right_in_as_few_sweeps_and_kernels_as_it_says(program):
    model = built(program, torch.float32)
    args = at_dtype(program.inputs(program.traced, model), torch.float32)
    result = rewrite(model, args, rows=True)
    assert result.report["unfused"] == []
    for sizes in (program.traced, *program.others):
        check_at(program, model, result, sizes, torch.float32)
    sweeps = sum(chain["passes"] for chain in result.report["chains"])
    assert (sweeps, kernels_of(result.sources)) == (program.passes, program.kernels)


HALF = (
    "rows_softmax",
    "rows_log_softmax",
    "rows_layer_norm_by_hand",
    "rows_rms_norm_call",
    "rows_group_norm",
)


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name) for p in PROGRAMS if p.name in HALF])
def test_right_in_half_precision(program):
    """In as few sweeps as in fp32: a row's own maximum or mean is taken off without a rounding between."""
    model = built(program, torch.float16)
    args = at_dtype(program.inputs(program.traced, model), torch.float16)
    result = rewrite(model, args, rows=True)
    assert sum(chain["passes"] for chain in result.report["chains"]) == program.passes
    check_at(program, model, result, program.others[0], torch.float16)


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name) for p in PROGRAMS])
def test_left_alone_unless_asked(program):
    model = built(program, torch.float32)
    result = rewrite(model, at_dtype(program.inputs(program.traced, model), torch.float32))
    assert not result.report["chains"] and not result.sources
    assert any("--rows asks for it" in left["reason"] for left in result.report["unfused"])


def r(*shape: int) -> torch.Tensor:
    return 3 + torch.randn(shape)


def softmax(x):
    return torch.softmax(x, -1)


def normed_by_hand(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def squares_apart(x):
    """The mean of squares and the mean are reductions of the same rows, though neither reads the other."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (x.abs().mean(-1, keepdim=True) + 1).rsqrt()


def unit(x):
    return F.normalize(x, dim=-1)


def rms_in_the_middle(x):
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


def softmax_of_channels(x):
    return torch.softmax(x, 1)


SIZES = {
    softmax: ((2, 37), (3, 1), (1, 5000)),
    normed_by_hand: ((2, 3, 37), (1, 2, 1), (1, 1, 5000)),
    squares_apart: ((2, 37), (3, 5)),
    unit: ((2, 37), (3, 1050)),
    rms_in_the_middle: ((2, 37, 5), (1, 300, 3), (3, 1, 2)),
    softmax_of_channels: ((2, 37, 3, 5), (1, 40, 4, 2)),
}


@pytest.mark.parametrize("function", SIZES, ids=lambda f: f.__name__)
def test_one_kernel_at_any_length(function):
    first, *others = SIZES[function]
    result = rewrite(function, (r(*first),), rows=True)
    assert result.report["unfused"] == [] and kernels_of(result.sources) == 1
    for size in (first, *others):
        assert_right(result, function, (r(*size),))


def test_sums_in_half_precision_are_in_fp32():
    result = rewrite(normed_by_hand, (r(2, 3, 37).half(),), rows=True)
    (text,) = (text for name, text in result.sources.items() if name.endswith("by_hand.py"))
    assert "tl.sum(x.to(tl.float32), 0)" in text and "tl.sum(x, 0)" not in text


def test_strides_are_the_caller_s():
    result = rewrite(normed_by_hand, (r(2, 3, 37),), rows=True)
    for x in (r(2, 37, 3).mT, r(2, 3, 74)[..., ::2], r(3, 1, 37).expand(-1, 4, -1)):
        assert_right(result, normed_by_hand, (x,))


def test_rows_of_several_axes_are_read_in_any_layout():
    def normed(x):
        return F.layer_norm(x, x.shape[2:])

    result = rewrite(normed, (r(2, 3, 5, 7),), rows=True)
    for x in (r(2, 3, 5, 7), r(1, 4, 6, 6), r(2, 5, 7, 3).permute(0, 3, 1, 2)):
        assert_right(result, normed, (x,))


def test_a_group_of_channels_that_no_parameter_counts():
    """Whether groups divide the channels is known once these are fixed."""

    def grouped(x):
        return F.group_norm(x, 3)

    result = rewrite(grouped, (r(2, 12, 7),), rows=True)
    assert kernels_of(result.sources) == 1 and result.report["unfused"] == []
    for size in ((2, 12, 7), (1, 12, 5), (3, 12, 1)):
        assert_right(result, grouped, (r(*size),))


def permuted(x, places):
    """Weights at other places of their row, and beside them."""
    p = torch.softmax(x, -1)
    return p.gather(-1, places) + p


def label_loss(x, places):
    return F.cross_entropy(x, places[:, 0], reduction="none")


def label_log_probability(x, places):
    return torch.log_softmax(x, -1).gather(-1, places[:, :1])


@pytest.mark.parametrize("function, sweeps", [(permuted, 2), (label_loss, 1), (label_log_probability, 1)])
def test_rows_that_are_read_where_something_says(function, sweeps):
    def args(rows: int, length: int) -> tuple[torch.Tensor, ...]:
        return r(rows, length), torch.rand(rows, length).argsort(-1)

    result = rewrite(function, args(3, 37), rows=True)
    assert [chain["passes"] for chain in result.report["chains"]] == [sweeps]
    for size in ((3, 37), (5, 1), (2, 1050)):
        assert_right(result, function, args(*size))


def variance(x):
    return x.var(-1)


def weighted_variance(x, scores):
    weights = torch.softmax(scores, -1)
    centred = x - (weights * x).sum(-1, keepdim=True)
    return (weights * centred**2).sum(-1)


@pytest.mark.parametrize("function", [variance, weighted_variance], ids=lambda f: f.__name__)
def test_a_variance_in_one_sweep_is_right_far_from_zero(function):
    """Where the mean is 3000 deviations, written out it would be lost, and about a rounded mean half of it."""
    args = tuple(5 * r(2, 37) for _ in range(function.__code__.co_argcount))
    result = rewrite(function, args, rows=True)
    assert [chain["passes"] for chain in result.report["chains"]] == [1]
    for length in (37, 2500):
        x, *scores = (5 * r(2, length) for _ in args)
        assert_right(result, function, (15000 + x, *scores))


def masked(x, keep):
    return torch.softmax(x.masked_fill(~keep, -math.inf), -1)


def test_a_row_masked_throughout_is_what_eager_makes_it():
    keep = torch.rand(4, 37) < 0.5
    keep[1] = False
    result = rewrite(masked, (r(4, 37), keep), rows=True)
    assert_right(result, masked, (r(4, 37), keep))
    zeros = rewrite(masked, (r(4, 37), keep), rows=True, masked_rows="zero").module(r(4, 37), keep)
    assert not zeros[1].any() and not zeros.isnan().any()


class Block(nn.Module):
    """A norm with what comes before and after it, beside attention and dense layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, y):
        x = x + torch.softmax(x @ y.mT, -1) @ y
        hidden = self.down(F.gelu(self.up(self.norm(x))))
        return F.silu(F.layer_norm(x + hidden, (16,)) * 2) + x


def test_rows_beside_chains_and_dense_layers():
    """Attention is the chain it is without rows; each norm is a kernel, with what is computed around it."""
    model = Block().eval()
    args = (r(2, 20, 16), r(2, 23, 16))
    result = rewrite(model, args, rows=True)
    assert result.report["unfused"] == [] and len(result.report["chains"]) == 3
    plain = rewrite(model, args)
    assert plain.report["chains"][0] == result.report["chains"][0]
    text = result.sources["module.py"]
    assert "silu" not in text and "gelu" in text
    with torch.no_grad():
        assert_right(result, model, args)


def test_what_is_read_elsewhere_too_is_written_once():
    def both(x):
        p = torch.softmax(x * 2, -1)
        return p, torch.cumsum(p, -1), p.max(-1).values

    result = rewrite(both, (r(3, 37),), rows=True)
    assert kernels_of(result.sources) == 1 and result.report["unfused"] == []
    assert_right(result, both, (r(2, 41),))


LEFT = {
    "whole": (lambda x: x - x.mean(), (r(3, 37),), "all of the tensor is one row"),
    "short": (lambda x: F.layer_norm(x, (3,)), (r(5, 3),), "3 positions are no long row"),
    "apart": (
        lambda x: x - x.mean((0, 2), keepdim=True),
        (r(3, 4, 5),),
        "several axes that do not lie together",
    ),
    "float64": (lambda x: x / x.double().sum(-1, keepdim=True).float(), (r(3, 37),), "float64"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_its_reason(name):
    program, args, why = LEFT[name]
    result = rewrite(program, args, rows=True)
    assert not result.report["chains"] and not result.sources
    reasons = [left["reason"] for left in result.report["unfused"]]
    assert reasons and all(why in reason for reason in reasons), reasons


@pytest.mark.parametrize("program", [lambda x: x.sum(-1), lambda x: torch.relu(x) / 2, lambda x: x @ x.mT])
def test_what_is_no_row_is_left_without_a_word(program):
    result = rewrite(program, (r(4, 8),), rows=True)
    assert result.report["unfused"] == [] and not result.sources
