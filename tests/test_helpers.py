"""The functions that emitted files bring along, on the numbers where they are hard."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).parent.parent / "templates" / "helpers"
KERNEL = """
@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, {call})
"""


def computed(tmp_path: Path, name: str, call: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """`call` of x and y in Triton's interpreter."""
    y = torch.zeros_like(x) if y is None else y
    helper = (HELPERS / f"{name}.py.jinja").read_text()
    file = tmp_path / f"{name}_kernel.py"
    file.write_text(f"import triton\nimport triton.language as tl\n\n\n{helper}\n{KERNEL.format(call=call)}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    size = 1 << (len(x) - 1).bit_length()
    padded = [torch.cat([t, t[:1].expand(size - len(t))]).contiguous() for t in (x, y)]
    out = torch.empty_like(padded[0])
    module.kernel[(1,)](*padded, out, BLOCK=size)
    return out[: len(x)]


def check(got: torch.Tensor, want: torch.Tensor, ulps: float = 4) -> None:
    torch.testing.assert_close(
        got, want.float(), rtol=ulps * torch.finfo(torch.float32).eps, atol=1e-37, equal_nan=True
    )


SPREAD = torch.cat([s * 10.0**e * (1 + torch.rand(20)) for e in range(-9, 4) for s in (1, -1)])
ODD = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0])
NUMBERS = torch.cat([SPREAD, ODD])


@pytest.mark.parametrize("name", ["log1p", "expm1", "tanh", "round"])
def test_functions_of_one_number(name, tmp_path):
    check(computed(tmp_path, name, f"{name}(x)", NUMBERS), getattr(torch, name)(NUMBERS.double()), ulps=8)


def test_rounding_takes_the_even_one_of_two(tmp_path):
    halves = torch.arange(-9, 9) + 0.5
    assert torch.equal(computed(tmp_path, "round", "round(x)", halves), halves.round())


POWERS = (2.5, -1.5, 0.1, 11.0, -12.0, 7.3, 0.0)


@pytest.mark.parametrize("power", POWERS)
def test_powers(power, tmp_path):
    x = NUMBERS[NUMBERS.isnan() | (NUMBERS.double().abs().pow(power).log2().abs() < 120) | (NUMBERS == 0) | NUMBERS.isinf()]
    y = torch.full_like(x, power)
    check(computed(tmp_path, "pow", "pow(x, y)", x, y), x.double().pow(y.double()), ulps=8)


def test_powers_of_one_base(tmp_path):
    y = torch.linspace(-60, 60, 64)
    check(computed(tmp_path, "pow", "pow(x, y)", torch.full_like(y, 0.96875), y), torch.pow(0.96875, y.double()), ulps=8)


DIVIDED = torch.cat([0.25 * torch.arange(-40, 40), 30 * torch.randn(100)])
BY = torch.cat([0.25 * torch.randint(1, 9, (80,)) * (2 * torch.randint(0, 2, (80,)) - 1), torch.randn(100)])


@pytest.mark.parametrize(
    "name,function",
    [
        ("float_mod", torch.remainder),
        ("float_fmod", torch.fmod),
        ("float_floordiv", lambda a, b: torch.div(a, b, rounding_mode="floor")),
    ],
)
def test_division_of_floats(name, function, tmp_path):
    torch.manual_seed(0)
    got = computed(tmp_path, name, f"{name}(x, y)", DIVIDED, BY)
    torch.testing.assert_close(got, function(DIVIDED, BY), rtol=1e-5, atol=1e-5)


WHOLE = torch.randint(-99, 99, (128,), dtype=torch.int64)
WHOLE_BY = torch.randint(1, 9, (128,), dtype=torch.int64) * (2 * torch.randint(0, 2, (128,)) - 1)


@pytest.mark.parametrize(
    "name,function",
    [
        ("floor_mod", torch.remainder),
        ("floor_div", lambda a, b: torch.div(a, b, rounding_mode="floor")),
        ("truncdiv", lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    ],
)
def test_division_of_integers(name, function, tmp_path):
    assert torch.equal(computed(tmp_path, name, f"{name}(x, y)", WHOLE, WHOLE_BY), function(WHOLE, WHOLE_BY))
