"""16-bit operands that a program widens: they are read as they are stored where their products are exact."""

import re
import sys

import pytest
import torch
from whole_path import assert_right, fused


def scores(q, k):
    return q.float() @ k.float().mT / 4


def back_to_16_bits(q, k, v):
    return scores(q, k).softmax(-1).to(v.dtype) @ v


def by_einsum(q, k, v):
    s = torch.einsum("bid,bjd->bij", q.to(torch.float32), k.type(torch.float32))
    return torch.einsum("bij,bjd->bid", s.softmax(-1).type_as(v), v)


def widened_values(q, k, v):
    return scores(q, k).softmax(-1) @ v.float()


def without_values(q, k):
    return torch.logsumexp(30 * torch.tanh(scores(q, k) / 30), -1)


def scaled_after_it(q, k, v):
    return (q.float() * 0.3 @ k.float().mT).softmax(-1).to(v.dtype) @ v


def read_by_more(q, k, v):
    wide = k.float()
    return (q.float() @ wide.mT + wide.exp().sum(-1)[:, None]).softmax(-1).to(v.dtype) @ v


def inputs(count: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    shapes = (2, rows, 16), (2, columns, 16), (2, columns, 16)
    return tuple(torch.randn(shape, dtype=torch.float16) for shape in shapes[:count])


# What the launch takes in fp32, whether products are of fp32 operands, whether exponentials are in base 2.
CASES = {
    back_to_16_bits: (0, 0, True),
    by_einsum: (0, 0, True),
    widened_values: (1, 1, False),
    without_values: (0, 0, False),
    scaled_after_it: (2, 1, False),
    read_by_more: (2, 1, False),
}


@pytest.mark.parametrize("program", CASES, ids=lambda program: program.__name__)
def test_operands_are_read_as_stored_where_products_are_exact(program):
    count = program.__code__.co_argcount
    result = fused(program, inputs(count, 20, 50))
    (text,) = (t for name, t in result.sources.items() if name.startswith("kernels/") and "@triton" in t)
    wide = len(re.findall(r"^    \w+: \(.*\), torch\.float32, any strides", text, re.M))
    in_full = len(set(re.findall(r'(\w+) = tl\.dot\(.*input_precision="ieee"', text)))
    assert (wide, in_full, "tl.exp2(" in text) == CASES[program]
    for rows, columns in ((20, 50), (33, 7)):
        args = inputs(count, rows, columns)
        assert_right(result, program, args, dtype=program(*args).dtype)


def test_operands_of_two_16_bit_types_are_multiplied_in_one_that_holds_both(tmp_path):
    """Numbers of bf16 may be too large for fp16."""
    q, k, v = inputs(3, 20, 50)
    args = q * 1e-3, k.to(torch.bfloat16) * 1e5, v
    fused(back_to_16_bits, args, tmp_path / "of_two_types")
    kernels = f"{tmp_path}/of_two_types/kernels/back"
    (file,) = (m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(kernels))
    torch.testing.assert_close(file.launch(*args), back_to_16_bits(*args), atol=2e-3, rtol=0)
