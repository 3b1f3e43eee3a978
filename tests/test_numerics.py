"""The verdict on an output: what passes, what does not, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rewriter.check.numerics import compare, relative_error, run_float64

NAN, INF = math.nan, math.inf


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def verdict(out, eager, ref64, dtype=torch.float32):
    return compare(out, eager, ref64, dtype)


# relative_error


def test_relative_error_is_of_norms():
    assert relative_error(f64(3.0, 4.5), f64(3.0, 4.0)) == pytest.approx(0.1)


def test_relative_error_leaves_out_what_is_not_finite_in_either():
    assert relative_error(f64(NAN, 2.0, 3.0), f64(1.0, INF, 3.0)) == 0.0
    assert relative_error(f64(NAN), f64(NAN)) == 0.0


def test_relative_error_of_a_zero_reference_is_absolute():
    assert relative_error(f64(3.0, 4.0), f64(0.0, 0.0)) == 5.0
    assert relative_error(f64(), f64()) == 0.0


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_relative_error_of_extreme_sizes(size):
    assert relative_error(f64(1.5 * size), f64(size)) == pytest.approx(0.5)


def test_relative_error_does_not_round_the_reference():
    assert relative_error(f32(1.0), f64(1.0 + 1e-9)) == pytest.approx(1e-9, rel=1e-3)


# the bound


@pytest.mark.parametrize("times, ok", [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_may_be_twice_eagers(dtype, times, ok):
    step = 16 * torch.finfo(dtype).eps
    ref64 = torch.ones(100, dtype=torch.float64)
    eager, out = (ref64 + step).to(dtype), (ref64 + times * step).to(dtype)
    check = verdict(out, eager, ref64, dtype)
    assert check.ok == ok
    assert check.error == pytest.approx(times * step)
    assert check.eager_error == pytest.approx(step)
    assert check.bound == pytest.approx(2 * step)
    assert ok == (check.reason == "")


def test_the_reason_gives_the_numbers():
    check = verdict(f32(1.5), f32(1.125), f64(1.0))
    assert check.reason == "error 0.5, more than 0.25 (eager's own is 0.12)"


def test_float32_has_a_floor_and_float16_has_none():
    exact, ref64 = f32(1.0, 1.0), f64(1.0, 1.0)
    check = verdict(f32(1.0, 1.0 + 2e-6), exact, ref64)
    assert check.ok and check.bound == 2e-6 and check.eager_error == 0.0
    assert not verdict(f32(1.0, 1.0 + 4e-6), exact, ref64).ok
    half = torch.float16
    assert verdict(exact.to(half), exact.to(half), ref64, half).ok
    assert not verdict(f32(1.0, 1.001).to(half), exact.to(half), ref64, half).ok


def test_the_bound_is_of_the_dtype_that_ran():
    """A float16 program may well return float32."""
    assert not verdict(f32(1.0 + 1e-6), f32(1.0), f64(1.0), torch.float16).ok


def test_a_zero_reference():
    assert verdict(f32(0.0, 0.0), f32(0.0, 0.0), f64(0.0, 0.0)).ok
    assert not verdict(f32(0.0, 1e-3), f32(0.0, 0.0), f64(0.0, 0.0)).ok
    assert verdict(f32(0.0, 1.5e-3), f32(0.0, 1e-3), f64(0.0, 0.0)).ok


def test_an_empty_output():
    assert verdict(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double()).ok


# NaN and inf


@pytest.mark.parametrize(
    "out, eager, ref64, ok",
    [
        (NAN, NAN, NAN, True),
        (INF, INF, INF, True),
        (0.0, NAN, NAN, False),
        (0.0, INF, INF, False),
        (-INF, INF, INF, False),
        (NAN, INF, INF, False),
        (NAN, 2.0, 2.0, False),
        (INF, 2.0, 2.0, False),
        # eager and the float64 run disagree: either is right
        (NAN, NAN, 2.0, True),
        (2.0, NAN, 2.0, True),
        (INF, NAN, 2.0, False),
        (2.0, 2.0, INF, True),
        (INF, 2.0, INF, True),
        (NAN, NAN, INF, True),
        (INF, NAN, INF, True),
        (2.0, NAN, INF, False),
    ],
)
def test_what_is_not_finite_is_so_where_it_belongs(out, eager, ref64, ok):
    check = verdict(f32(1.0, out), f32(1.0, eager), f64(1.0, ref64))
    assert check.ok == ok
    assert ok == (check.reason == "")


def test_a_finite_value_is_judged_where_eager_has_none():
    assert not verdict(f32(1.0, 3.0), f32(1.0, NAN), f64(1.0, 2.0)).ok


def test_the_reason_says_what_and_where():
    out, eager = torch.zeros(2, 3), torch.zeros(2, 3)
    out[1, 2] = NAN
    check = compare(out, eager, eager.double(), torch.float32)
    assert check.reason == "1 of 6 values: NaN for a finite value, first at (1, 2)"


# everything else


def test_shape_and_dtype_must_be_the_same():
    ref64 = f64(1.0, 2.0)
    assert "shape (1,), eager has (2,)" in verdict(f32(1.0), f32(1.0, 2.0), ref64).reason
    assert "dtype" in verdict(f32(1.0, 2.0).half(), f32(1.0, 2.0), ref64).reason
    check = verdict(f32(1.0, 2.0), f32(1.0, 2.0), f64(1.0))
    assert not check.ok and "float64 run" in check.reason and math.isnan(check.error)
    assert not verdict(f32(1.0), f32(1.0), None).ok


def test_integers_and_booleans_equal_eagers():
    ones = torch.ones(3, dtype=torch.int64)
    assert verdict(ones, ones.clone(), ones).ok
    check = verdict(torch.tensor([1, 2, 3]), ones, ones)
    assert not check.ok and check.reason == "2 of 3 values differ"
    assert not verdict(~ones.bool(), ones.bool(), ones.bool()).ok


def test_integers_may_be_wrong_twice_as_often_as_eagers():
    """The nearest of two that are as near: what rounding decides."""
    exact = torch.arange(8)
    eager, twice, more = (torch.where(exact < n, -1, exact) for n in (1, 2, 3))
    check = verdict(twice, eager, exact)
    assert check.ok and (check.error, check.bound) == (0.25, 0.25)
    assert not verdict(more, eager, exact).ok
    assert verdict(eager, eager, exact).ok and verdict(exact, eager, exact).ok


def test_what_is_no_tensor_must_be_equal():
    assert verdict(None, None, None).ok and verdict(3, 3, 3).ok
    check = verdict(None, f32(1.0), f64(1.0))
    assert not check.ok and check.reason == "is None, eager has a tensor"
    assert not verdict(1, True, 1).ok


def test_complex_numbers():
    out = torch.complex(f32(1.0), f32(2.0))
    assert verdict(out, out, out.to(torch.complex128)).ok
    assert not verdict(out + 1, out, out.to(torch.complex128)).ok


# run_float64


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("index", torch.arange(4))
        self.scale = torch.full((4, 4), 0.5)
        self.tables = {"a": [torch.ones(4)], "names": ["x"]}
        self.dtype = torch.float32

    def forward(self, x, *, flip=False):
        y = self.linear(x)[..., self.index] @ self.scale + self.shift + self.tables["a"][0]
        return {"y": -y if flip else y, "n": x.shape[0]}


def test_a_module_runs_in_float64_and_is_left_alone():
    module, x = Plain(), torch.randn(2, 4)
    result = run_float64(module, [x], {"flip": True})
    weight, bias = module.linear.weight.double(), module.linear.bias.double()
    expected = -((x.double() @ weight.T + bias) @ module.scale.double() + 2.0)
    assert result["n"] == 2 and not result["y"].requires_grad
    torch.testing.assert_close(result["y"], expected, rtol=1e-14, atol=1e-14)
    assert module.linear.weight.dtype == x.dtype == module.scale.dtype == module.dtype
    assert x.dtype == torch.float32 == torch.get_default_dtype()


def test_inputs_are_not_changed():
    x = torch.ones(3, dtype=torch.float64)
    assert run_float64(lambda x: x.add_(1), [x]).tolist() == [2.0] * 3
    assert x.tolist() == [1.0] * 3


def test_integer_and_boolean_inputs_stay():
    ids, mask = torch.arange(3), torch.tensor([True, False, True])
    result = run_float64(lambda ids, mask: (ids, mask), [ids], {"mask": mask})
    assert result[0].dtype == torch.int64 and result[1].dtype == torch.bool


def test_tensors_made_on_the_way_are_float64():
    x = torch.randn(3, 3)
    result = run_float64(lambda x: torch.ones(3, 3) @ x, [x.half()])
    assert result.dtype == torch.float64


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.float().to(x.dtype),
        lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype),
    ],
    ids=["float", "softmax"],
)
def test_a_program_that_asks_for_float32_gets_it(step):
    x = torch.randn(3, 3, dtype=torch.float64)
    result = run_float64(step, [x])
    assert result.dtype == torch.float64 and torch.equal(result, step(x))


@pytest.mark.parametrize(
    "narrow",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float32),
        lambda x: torch.zeros_like(x, dtype=torch.float32) + x,
    ],
)
def test_a_program_that_mixes_its_dtypes_runs_wide(narrow):
    class Mixed(nn.Linear):
        def forward(self, x):
            return narrow(x) @ self.weight.T

    module, x = Mixed(4, 4), torch.randn(2, 4)
    result = run_float64(module, [x])
    torch.testing.assert_close(result, x.double() @ module.weight.double().T)


def test_what_the_program_raises_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_float64(lambda x: x @ x, [torch.ones(2, 3)])
    with pytest.raises(KeyError):
        run_float64(lambda x: {}["missing"], [torch.ones(1)])


ELSEWHERE = {"weight": torch.rand(3, 3), "bias": torch.rand(3).half()}


def test_tensors_from_elsewhere_are_float64():
    def program(x):
        ELSEWHERE["bias"].mul_(1)
        return x @ ELSEWHERE["weight"] + ELSEWHERE["bias"].exp() + x.float().exp()

    x, weight, bias = torch.rand(3, 3), *(t.double() for t in ELSEWHERE.values())
    out = run_float64(program, [x])
    assert torch.equal(out, x.double() @ weight + bias.exp() + x.exp())
    assert [t.dtype for t in ELSEWHERE.values()] == [torch.float32, torch.float16]
