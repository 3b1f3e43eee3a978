"""Loads of boxes by descriptors, as GPUs with a tensor memory accelerator make them: here by Triton's interpreter."""

import math
import sys

import pytest
import torch
from whole_path import assert_right, fused


def biased(q, k, v, bias):
    s = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + bias
    return torch.softmax(s, -1) @ v


def inputs(rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    shapes = (2, 3, rows, 16), (2, 3, columns, 16), (2, 3, columns, 16), (2, 1, rows, columns)
    return tuple(torch.randn(shape, dtype=torch.float16) for shape in shapes)


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes") / "of_pairs"
    result = fused(biased, inputs(40, 80), folder)
    (file,) = (m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(f"{folder}/kernels/bia"))
    return result, file


@pytest.fixture
def described(rewritten, monkeypatch):
    """The shapes of tensors that descriptors are made of."""
    _, file = rewritten
    shapes: list[tuple[int, ...]] = []

    def noted(t, shape, *layout):
        shapes.append(tuple(shape))
        return made(t, shape, *layout)

    made = file.TensorDescriptor
    monkeypatch.setattr(file, "TensorDescriptor", noted)
    monkeypatch.setattr(file, "has_tma", lambda device: True)
    file.PREPARED.clear()
    yield shapes
    file.PREPARED.clear()


@pytest.mark.parametrize("rows, columns", [(40, 80), (33, 64), (1, 72), (16, 8)])
def test_a_tensor_of_pairs_is_loaded_by_boxes_where_its_rows_are_aligned(rows, columns, rewritten, described):
    args = inputs(rows, columns)
    assert_right(rewritten[0], biased, args, dtype=torch.float16)
    assert described == [tuple(t.shape) for t in args]


@pytest.mark.parametrize("columns", [37, 76])
def test_elsewhere_it_is_loaded_by_pointers(columns, rewritten, described):
    args = inputs(40, columns)
    assert_right(rewritten[0], biased, args, dtype=torch.float16)
    assert described == [tuple(t.shape) for t in args[:3]]


def test_it_is_never_copied(rewritten, described, monkeypatch):
    """A tensor of features that does not lie in rows is."""
    q, k, v, bias = inputs(40, 64)
    padded = torch.cat([bias, bias], -1)[..., 3:67]
    args = q, k.mT.contiguous().mT, v, padded
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **how: (copied.append(tuple(t.shape)), clone(t, **how))[1])
    out = rewritten[0].module(*args)
    torch.testing.assert_close(out, biased(*args), atol=5e-3, rtol=0)
    assert copied == [tuple(k.shape)] and tuple(bias.shape) not in described


def latents(q, c):
    """Keys that are values as well."""
    return torch.softmax(torch.einsum("bhmd,bhnd->bhmn", q, c) * 0.25, -1) @ c


def test_keys_that_are_values_are_loaded_once():
    args = inputs(40, 80)[:2]
    result = fused(latents, args)
    text = result.sources["kernels/latents.py"]
    loop = text.partition("    for start in ")[2].partition("\n\n")[0]
    assert loop.count(".load(") == 1 and "tl.trans(c)" in loop and "tl.dot(p.to(tl.float16), c, " in loop
    for rows, columns in ((40, 80), (33, 150)):
        assert_right(result, latents, inputs(rows, columns)[:2], dtype=torch.float16)
