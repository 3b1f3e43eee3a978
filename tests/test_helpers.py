"""The functions that emitted files bring along, on the numbers where they are hard."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from rewriter.check.compile import CompileRequest, compiler

HELPERS = Path(__file__).parent.parent / "templates" / "helpers"
KERNEL = """
@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, {call})
"""


def written(tmp_path: Path, name: str, call: str) -> Path:
    """A file with a helper and a kernel that stores `call`."""
    helper = (HELPERS / f"{name}.py.jinja").read_text()
    file = tmp_path / f"{name}_kernel.py"
    known = "ON_NVIDIA = tl.constexpr(False)"  # a compiler for Nvidia GPUs sets it
    file.write_text(f"import triton\nimport triton.language as tl\n\n{known}\n\n{helper}\n{KERNEL.format(call=call)}")
    return file


def computed(tmp_path: Path, name: str, call: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """`call` of x and y in Triton's interpreter."""
    y = torch.zeros_like(x) if y is None else y
    file = written(tmp_path, name, call)
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
    x = NUMBERS[
        NUMBERS.isnan() | (NUMBERS.double().abs().pow(power).log2().abs() < 120) | (NUMBERS == 0) | NUMBERS.isinf()
    ]
    y = torch.full_like(x, power)
    check(computed(tmp_path, "pow", "pow(x, y)", x, y), x.double().pow(y.double()), ulps=8)


def test_powers_of_one_base(tmp_path):
    y = torch.linspace(-60, 60, 64)
    check(
        computed(tmp_path, "pow", "pow(x, y)", torch.full_like(y, 0.96875), y), torch.pow(0.96875, y.double()), ulps=8
    )


@pytest.mark.parametrize("call", ["pow(x, 1.5)", "pow(1.5, x)", "pow(x, 9.0)"])
def test_powers_with_a_number(call, tmp_path):
    x = torch.tensor([0.3, -2.0, 4.0])
    check(computed(tmp_path, "pow", call, x), eval(call, {"pow": pow, "x": x.double()}))


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


@pytest.mark.parametrize("name", ["float_mod", "float_fmod", "float_floordiv"])
def test_division_by_a_number(name, tmp_path):
    got = [
        computed(tmp_path, name, call, DIVIDED, torch.full_like(DIVIDED, 0.75))
        for call in (f"{name}(x, 0.75)", f"{name}(x, y)")
    ]
    assert torch.equal(*got)


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


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_nan_is_passed_on(name, tmp_path):
    """NaN with either number, through the interpreter; it would pass NaN on without the flag as well, a GPU would not."""
    x, y = torch.tensor([1.0, math.nan, -2.0, math.nan]), torch.tensor([math.nan, 3.0, 5.0, math.nan])
    got = computed(tmp_path, name, f"{name}(x, y)", x, y)
    torch.testing.assert_close(got, getattr(torch, name)(x, y), equal_nan=True)
    assert "propagate_nan=tl.PropagateNan.ALL" in (HELPERS / f"{name}.py.jinja").read_text()


def test_operands_of_tensor_cores_are_rounded(tmp_path):
    """To the nearest of those with ten bits after the first: a tensor core would cut the others off."""
    x = torch.tensor([1.0 + 3 / 2048, 1.0 + 5 / 4096, -1.0 - 3 / 4096, 3e38, 0.0, math.inf, -math.inf, math.nan])
    got = computed(tmp_path, "to_tf32", "to_tf32(x)", x, x)
    wanted = torch.tensor([1.0 + 2 / 1024, 1.0 + 1 / 1024, -1.0 - 1 / 1024, got[3], 0.0, math.inf, -math.inf, math.nan])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert (got.view(torch.int32) & 0x1FFF == 0)[:-1].all()
    assert abs(got[3] / x[3] - 1) <= 2**-11


OF_INTEGERS = ("floor_mod", "floor_div", "truncdiv")
OF_TWO = (*OF_INTEGERS, "pow", "float_mod", "float_fmod", "float_floordiv", "maximum", "minimum", "product")


def test_every_helper_compiles(tmp_path):
    names = sorted(p.name.removesuffix(".py.jinja") for p in HELPERS.glob("*.py.jinja"))
    requests = []
    for name in names:
        calls = [f"{name}(x, y)", f"{name}(x, 3)", f"{name}(3, y)"] if name in OF_TWO else [f"{name}(x)"]
        file = written(tmp_path, name, " + ".join(calls))
        pointer = "*i64" if name in OF_INTEGERS else "*fp32"
        signature = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), pointer)
        requests += [
            CompileRequest(file, "kernel", signature, {"BLOCK": 128}, target) for target in ("sm_90", "gfx942")
        ]
    with compiler(workers=1) as compiles:
        results = compiles.compile(requests)
    assert not [(r.error, q.path.name) for r, q in zip(results, requests) if r.error]
