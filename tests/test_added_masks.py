"""Masks that are added to scores: tensors that hold -inf or the lowest number of their dtype, and choices between 0 and
such a number. What they hide is left out, as where a program fills it.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from library_programs import said
from test_sparsity import at
from torch import nn
from zoo_checks import held_tensors

from rewriter import rewrite
from rewriter.trace.masks import masking_number

LOWEST = torch.finfo(torch.float32).min


def added(q, k, v, mask):
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def beside_a_bias(q, k, v, mask):
    rows, columns = at(q)
    return (q @ k.mT * 0.3 + mask - (rows - columns).abs() * 0.1).softmax(-1) @ v


def beside_a_bias_first(q, k, v, mask):
    rows, columns = at(q)
    return (q @ k.mT * 0.3 - (rows - columns).abs() * 0.5 + mask).softmax(-1) @ v


def of_sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliced(q, k, v, mask):
    return added(q, k, v, mask[:, :, :, : k.shape[2]])


def chosen(q, k, v):
    rows, columns = at(q)
    return added(q, k, v, torch.where(columns <= rows, 0.0, LOWEST))


def chosen_the_other_way(q, k, v):
    """A bias where something is kept, and rows that see nothing."""
    rows, columns = at(q)
    return added(q, k, v, torch.where(columns > rows - 70, LOWEST, (columns - rows) * 0.1))


def upper_triangle(q, k, v):
    n = q.shape[2]
    return added(q, k, v, torch.full((n, n), LOWEST, device=q.device).triu(1))


def times_the_lowest(q, k, v):
    rows, columns = at(q)
    return added(q, k, v, (columns > rows).to(q.dtype) * LOWEST)


def of_ones(q, k, v):
    """Two triangles of ones, and where their product is none the lowest number."""
    ones = torch.ones(q.shape[2], q.shape[2], device=q.device)
    near = ones.triu(-69) * ones.tril()
    return added(q, k, v, (1.0 - near) * LOWEST)


def of_logarithms(q, k, v):
    """A window: whole numbers, then their logarithms."""
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.int64, device=q.device)
    return added(q, k, v, ones.tril().triu(-40).log())


def twice(q, k, v, mask):
    """Where both hide something, their sum is -inf."""
    rows, columns = at(q)
    return (q @ k.mT * 0.3 + mask + torch.where(columns <= rows, 0.0, LOWEST)).softmax(-1) @ v


def doubled(q, k, v):
    """The lowest number times two is -inf: rows that see nothing are NaN."""
    rows, columns = at(q)
    return (q @ k.mT * 0.3 + torch.where(columns > rows - 60, LOWEST, 0.0) * 2.0).softmax(-1) @ v


def doubled_and_divided(q, k, v):
    rows, columns = at(q)
    mask = (columns > rows - 60).to(q.dtype) * -60000.0
    return (q @ k.mT * 0.3 + (mask + mask) / 8.0).softmax(-1) @ v


def twice_by_numbers(q, k, v):
    """Where both hide something, their sum is -inf: of rows that see nothing, what one of them hides is left."""
    rows, columns = at(q)
    less = torch.where(columns > 30, LOWEST, 0.0) * 0.75
    return (q @ k.mT * 0.3 + torch.where(columns <= rows - 60, 0.0, LOWEST) + less).softmax(-1) @ v


def scaled_after(q, k, v, mask):
    return ((q @ k.mT + mask) * 0.3).softmax(-1) @ v


def beside_another(q, k, v, mask, bias):
    return (q @ k.mT * 0.3 + mask + bias).softmax(-1) @ v


def taken_away(q, k, v, mask):
    """What a mask holds most of counts most."""
    return (q @ k.mT * 0.3 - mask).softmax(-1) @ v


def from_ones(keep):
    return (1.0 - keep[:, None, None].to(torch.float32)) * LOWEST


def by_filling(keep):
    return torch.zeros(keep.shape, device=keep.device).masked_fill(keep == 0, -math.inf)[:, None, None]


def by_a_choice(keep):
    return torch.where(keep.bool(), 0.0, LOWEST)[:, None, None]


def by_logarithms(keep):
    return keep.log()[:, None, None]


def mask_of(keep: torch.Tensor, number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, number)


def tensors(count: int, length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(count, 2, length, 16, dtype=dtype) for _ in range(3)]


def keeps(count: int, length: int) -> torch.Tensor:
    """Whole tiles are hidden, some rows see nothing, and of a batch nothing is hidden."""
    keep = torch.rand(count, 1, length, length) < 0.5
    keep[:, :, :, 64:128] = False
    keep[:, :, 5:9] = False
    keep[-1] = True
    return keep


def text_of(result) -> str:
    (text,) = (text for file, text in result.sources.items() if file.startswith("kernels/") and "__" not in file)
    return text


@pytest.mark.parametrize("number", (-math.inf, LOWEST), ids=("inf", "lowest"))
@pytest.mark.parametrize(
    "program", (added, beside_a_bias, of_sdpa, sliced, twice, scaled_after), ids=lambda p: p.__name__
)
def test_a_tensor_that_masks_when_it_is_traced(program, number):
    result = rewrite(program, (*tensors(2, 150), mask_of(keeps(2, 150), number)))
    assert ("_map_kernel" in text_of(result)) is (program is not twice or number == -math.inf)
    # At a call, a mask may hide by the other number, or hold any bias.
    for count, length, numbers in ((2, 150, (-math.inf, LOWEST, -1e4, -2.0)), (1, 37, (number,)), (2, 200, (number,))):
        for mask in (mask_of(keeps(count, length), n) for n in numbers):
            args = (*tensors(count, length), mask)
            with said(kernels=1):
                torch.testing.assert_close(result.module(*args), program(*args), rtol=1e-4, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    "program",
    (chosen, chosen_the_other_way, upper_triangle, times_the_lowest, of_ones),
    ids=lambda p: p.__name__,
)
def test_a_choice_between_zero_and_the_lowest_number(program):
    result = rewrite(program, tensors(2, 150))
    assert "    low = tl.max(" in text_of(result) and "    cut = " in text_of(result)
    for count, length in ((2, 150), (1, 37), (2, 260)):
        args = tensors(count, length)
        with said(kernels=1):
            torch.testing.assert_close(result.module(*args), program(*args), rtol=1e-4, atol=2e-6)


def test_logarithms_of_ones_and_zeros():
    result = rewrite(of_logarithms, tensors(2, 150))
    assert "    first = " in text_of(result) and "tl.log(" not in text_of(result)
    for length in (150, 37, 260):
        args = tensors(1, length)
        torch.testing.assert_close(result.module(*args), of_logarithms(*args), rtol=1e-4, atol=2e-6)


def test_numbers_that_overflow_together_are_no_fill():
    result = rewrite(twice_by_numbers, tensors(2, 150))
    for length in (150, 260):
        args = tensors(1, length)
        torch.testing.assert_close(result.module(*args), twice_by_numbers(*args), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "program, dtype", ((doubled, torch.float32), (doubled_and_divided, torch.float16)), ids=("fp32", "fp16")
)
def test_numbers_beyond_those_of_a_dtype_are_infinite(program, dtype):
    result = rewrite(program, tensors(2, 150, dtype))
    assert "    last = " in text_of(result)
    for length in (150, 37):
        args = tensors(1, length, dtype)
        with said(kernels=1):
            out = result.module(*args)
        torch.testing.assert_close(out, program(*args), rtol=4e-3, atol=4e-3, equal_nan=True)


def test_what_is_hidden_is_not_read():
    q, k, v = tensors(1, 300)
    mask = mask_of(torch.arange(300).expand(1, 1, 300, 300) < 100, LOWEST)
    result = rewrite(added, (q, k, v, mask))
    v[:, :, 128:] = math.nan
    torch.testing.assert_close(result.module(q, k, v, mask), added(q, k, v.nan_to_num(), mask))


@pytest.mark.parametrize("mask", (torch.zeros(2, 1, 150, 150), torch.full((2, 1, 150, 150), -1e4)))
def test_a_bias_makes_no_map(mask):
    assert "_map_kernel" not in text_of(rewrite(added, (*tensors(2, 150), mask)))


def test_half_precision_absorbs_nothing():
    """-65504 + 20 is another number than -65504 in fp16."""
    low = torch.finfo(torch.float16).min
    args = (*tensors(2, 150, torch.float16), mask_of(keeps(2, 150), low, torch.float16))
    assert "    low = tl.max(" not in text_of(rewrite(added, args))


def test_what_another_tensor_masks_at_a_call():
    """A bias of the example that is a mask at a call: rows that see nothing are NaN, or have what the two leave."""
    result = rewrite(beside_another, (*tensors(2, 150), mask_of(keeps(2, 150), LOWEST), torch.randn(2, 1, 150, 150)))
    assert "    low = tl.max(" in text_of(result)
    for number in (-math.inf, LOWEST, -1e4):
        other = mask_of(torch.rand(2, 1, 150, 150) < 0.7, number)
        args = (*tensors(2, 150), mask_of(keeps(2, 150), LOWEST), other)
        torch.testing.assert_close(result.module(*args), beside_another(*args), rtol=1e-4, atol=2e-6, equal_nan=True)


def test_views_of_a_mask_that_the_model_makes():
    """What `forward` hands to a module's kernel is a view of the mask that it is given."""
    layer = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.randn(2, 150, 32)
    kwargs = {"attn_mask": torch.full((150, 150), -math.inf).triu(1), "need_weights": False}
    assert "_map_kernel" in text_of(rewrite(layer, (x, x, x), kwargs))


@pytest.mark.parametrize("made", (from_ones, by_filling, by_a_choice, by_logarithms), ids=lambda m: m.__name__)
def test_a_mask_that_the_program_makes_of_little(made):
    """Of each position of a text: it is computed beside the kernel, which reads it."""

    def program(q, k, v, keep):
        return added(q, k, v, made(keep))

    def args(length, *kept):
        return *tensors(len(kept), length), (torch.arange(length) < torch.tensor(kept)[:, None]).long()

    result = rewrite(program, args(150, 150, 30))
    assert "_map_kernel" in text_of(result)
    for inputs in (args(150, 150, 30), args(260, 70, 0), args(37, 37), args(37, 1)):
        with said(kernels=1):
            torch.testing.assert_close(result.module(*inputs), program(*inputs), rtol=1e-4, atol=2e-6, equal_nan=True)


def test_a_bias_that_the_program_makes_of_little_makes_no_map():
    def program(q, k, v, distances):
        return added(q, k, v, (distances * -1e4).exp()[:, None, None])

    assert "_map_kernel" not in text_of(rewrite(program, (*tensors(2, 150), torch.rand(2, 150))))


def test_a_mask_keeps_the_order_of_sums():
    """Beside -1e9 a sum is rounded to multiples of 64, and rows that see nothing are what eager's order makes them."""
    result = rewrite(beside_a_bias_first, (*tensors(2, 150), mask_of(keeps(2, 150), -math.inf)))
    args = (*tensors(2, 150), mask_of(keeps(2, 150), -1e9))
    torch.testing.assert_close(result.module(*args), beside_a_bias_first(*args), rtol=1e-4, atol=2e-6)


def test_a_mask_that_is_subtracted_hides_nothing():
    args = (*tensors(2, 150), mask_of(keeps(2, 150), LOWEST))
    result = rewrite(taken_away, args)
    assert "_map_kernel" not in text_of(result)
    torch.testing.assert_close(result.module(*args), taken_away(*args), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "tensor, number",
    [
        (torch.tensor([0.0, -math.inf, LOWEST]), -math.inf),
        (torch.tensor([0.0, LOWEST]), LOWEST),
        (torch.tensor([0.0, LOWEST], dtype=torch.float64), None),
        (torch.tensor([0, -(2**31)], dtype=torch.int32), None),
        (torch.empty(3, device="meta"), None),
        (torch.tensor([0.0, math.nan]), None),
    ],
)
def test_by_which_number_a_tensor_masks(tensor, number):
    assert masking_number(tensor) == number


def test_a_map_is_of_the_mask_at_hand():
    """Calls alike in all but the mask share what launches: in 16 bits it is loaded by boxes, and looked at beside."""
    half = torch.float16
    bands = [torch.ones(150, 150).tril(k).triu(k - 40)[None, None] > 0 for k in (0, 60, -60)]
    masks = [mask_of(band, -math.inf, half) for band in bands]
    result = rewrite(added, (*tensors(1, 150, half), masks[0]))
    assert "_map_kernel" in text_of(result) and not held_tensors(result.sources)
    for mask in (*masks, masks[0], mask_of(bands[1], torch.finfo(half).min, half), mask_of(bands[1], -2.0, half)):
        args = (*tensors(1, 150, half), mask)
        with said(kernels=1):
            out = result.module(*args)
        torch.testing.assert_close(out, added(*args), rtol=4e-3, atol=4e-3, equal_nan=True)
