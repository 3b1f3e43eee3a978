"""What follows a chain position by position is computed by its last kernel: which ops are left to eager, and what is not
taken in.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from whole_path import assert_right, fused

import rewriter.pipeline
from rewriter import rewrite
from rewriter.derive import NotDerivable

VIEWS = {
    "aten." + name for name in "transpose permute unsqueeze view reshape expand slice select split alias t".split()
}


class Ops(TorchDispatchMode):
    """Notes what runs: kernels, and ops of PyTorch beside views."""

    def __init__(self):
        super().__init__()
        self.kernels, self.eager = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        if name.startswith("flashlight."):
            self.kernels += 1
        elif name not in VIEWS:
            self.eager.append(name.removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def ran(result, args) -> tuple[int, list[str]]:
    """(how many chains are called, the ops of PyTorch that are)"""
    with Ops() as ops:
        result.module(*args)
    return ops.kernels, ops.eager


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads(count: int, b: int, m: int) -> tuple[Tensor, ...]:
    """`count` pairs of queries and keys, then values."""
    pairs = (t for _ in range(count) for t in (r(b, 3, m, 8), r(b, 3, m, 8).flip(2)))
    return *pairs, r(b, 3, m, 16)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 4, -1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    away = torch.arange(q.size(2))[:, None] - torch.arange(k.size(2))
    return torch.softmax((q @ k.mT / 4).masked_fill(away.abs() > 3, -torch.inf), -1) @ v


# -- what is taken in ---------------------------------------------------------------------------------------------------


def subtracted(q0, k0, q1, k1, v):
    return attend(q0, k0, v) - 0.2 * attend(q1, k1, v)


def of_weights(q0, k0, q1, k1, v):
    """One chain, as ever: the weights are subtracted."""
    return (torch.softmax(q0 @ k0.mT / 4, -1) - 0.2 * torch.softmax(q1 @ k1.mT / 4, -1)) @ v


def learned(q0, k0, q1, k1, v, lam):
    return attend(q0, k0, v) + lam * attend(q1, k1, v)


def gated_both_ways(q0, k0, q1, k1, v, g):
    return g * attend(q0, k0, v) + (1 - g) * attend(q1, k1, v)


def summed(q0, k0, q1, k1, q2, k2, v):
    return attend(q0, k0, v) + attend(q1, k1, v) + attend(q2, k2, v)


def residual(q, k, v, x):
    return x + attend(q, k, v)


def near_and_far(q, k, v, g):
    """Gates of heads and rows, [B, H, M]."""
    g = torch.sigmoid(g)
    return g[..., None] * attend(q, k, v) + (1 - g)[..., None] * windowed(q, k, v)


def activated(q, k, v):
    return F.gelu(attend(q, k, v))


def gated_by_positions(q, k, v, g):
    """[B, M, H, E], and gates that lie so."""
    return attend(q, k, v).transpose(1, 2) * torch.sigmoid(g)


def kept_too(q0, k0, q1, k1, v):
    out = attend(q1, k1, v)
    return attend(q0, k0, v) + out, out


def queried_by(q0, k0, q1, k1, v):
    """The first result meets queries, which are multiplied as a matrix, and the second result."""
    first = attend(q0, k0, v)
    return first + attend(q1 + first[..., :8].exp(), k1, v)


def normalised(q0, k0, q1, k1, v):
    x = attend(q0, k0, v) - 0.2 * attend(q1, k1, v)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def none(b: int, m: int) -> tuple[Tensor, ...]:
    return ()


def gates(*shape: int):
    """Makes one more input, of a shape with the batch for 2 and the length for 20."""
    return lambda b, m: (r(*({2: b, 20: m}.get(n, n) for n in shape)),)


TAKEN = {  # what else is given, kernels, ops left to PyTorch
    subtracted: (none, 2, []),
    of_weights: (none, 1, []),
    learned: (gates(3, 1, 1), 2, []),
    gated_both_ways: (gates(2, 3, 20, 1), 2, []),
    summed: (none, 3, []),
    residual: (gates(2, 3, 20, 16), 1, []),
    near_and_far: (gates(2, 3, 20), 2, ["sigmoid"]),
    activated: (none, 1, []),
    gated_by_positions: (gates(2, 20, 3, 16), 1, []),
    kept_too: (none, 2, []),
    queried_by: (none, 2, ["exp", "add"]),
    normalised: (none, 2, ["pow", "mean", "add", "rsqrt", "mul"]),
}


def pairs_of(program) -> int:
    return {summed: 3}.get(program, 2 if "q1" in program.__code__.co_varnames else 1)


@pytest.mark.parametrize("program", TAKEN, ids=lambda f: f.__name__)
def test_follows_in_the_epilogue(program):
    more, kernels, eager = TAKEN[program]
    sizes = [(*heads(pairs_of(program), b, m), *more(b, m)) for b, m in ((2, 20), (1, 7))]
    result = rewrite(program, sizes[0])
    assert ran(result, sizes[0]) == (kernels, eager)
    for args in sizes:
        assert_right(result, program, args)


def test_a_row_of_what_follows_is_a_kernel_more():
    args = heads(2, 2, 20)
    result = fused(normalised, args, rows=True)
    assert ran(result, args) == (3, [])
    assert_right(result, normalised, args)


# -- what is not --------------------------------------------------------------------------------------------------------


def compared(q, k, v):
    """Eager compares what it has rounded."""
    out = attend(q, k, v)
    return torch.where(out > 0.1, out, v)


def repeated(q, k, v):
    """Larger than the result, whose rows would be computed for each."""
    return attend(q, k, v)[:, :, None] * torch.arange(1, 4)[:, None, None]


def moved(q, k, v, order):
    """Each tile would be gathered."""
    return attend(q, k, v)[:, :, order] * v


def squared_and_measured(q, k, v):
    """Two values for one result, both read by rows."""
    out = attend(q, k, v)
    return (
        out.sin() * torch.rsqrt(out.cos().pow(2).mean(-1, keepdim=True)) * torch.rsqrt(out.sum(-1, keepdim=True).abs())
    )


def crossed(q0, k0, q1, k1, v):
    """The first chain's last result comes after the second chain, which reads its first: neither can wait for the other."""
    p = torch.softmax(q0 @ k0.mT / 4, -1)
    second = attend((p @ v)[..., :8] + q1, k1, v)
    return second + p @ v.flip(-1)


LEFT = {
    compared: ((), 1, {"gt", "where"}),
    repeated: ((), 1, {"arange", "mul"}),
    moved: ((torch.arange(20).flip(0),), 1, {"index", "mul"}),
    squared_and_measured: ((), 1, {"sin", "cos", "pow", "mean", "rsqrt", "mul", "sum", "abs"}),
}


@pytest.mark.parametrize("program", LEFT, ids=lambda f: f.__name__)
def test_stays_eager(program):
    more, kernels, eager = LEFT[program]
    args = *heads(pairs_of(program), 2, 20), *more
    result = rewrite(program, args)
    found, ops = ran(result, args)
    assert (found, set(ops)) == (kernels, eager)
    assert_right(result, program, args)


def test_chains_that_wait_for_each_other_take_nothing_in():
    args = heads(2, 2, 20)
    result = fused(crossed, args)
    assert "add" in ran(result, args)[1]
    assert_right(result, crossed, args)


def test_what_cannot_be_derived_with_what_follows_is_without(monkeypatch):
    original = rewriter.pipeline.derive

    def refusing(program, *args):
        if any(o.name.startswith("sub") for o in program.outputs):
            raise NotDerivable("a difference")
        return original(program, *args)

    monkeypatch.setattr(rewriter.pipeline, "derive", refusing)
    args = heads(2, 2, 20)
    result = fused(subtracted, args)
    assert ran(result, args) == (2, ["mul", "sub"])
    assert_right(result, subtracted, args)


# -- modules ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


class Gated(nn.Module):
    """Heads are merged before the gate."""

    def __init__(self):
        super().__init__()
        self.qkvg, self.out = nn.Linear(32, 4 * 32), nn.Linear(32, 32)

    def forward(self, x):
        b, m, _ = x.shape
        q, k, v, g = self.qkvg(x).chunk(4, -1)
        q, k, v = (t.reshape(b, m, 2, 16).transpose(1, 2) for t in (q, k, v))
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, m, 32) * torch.sigmoid(g))


class Whole(nn.Module):
    """Holds a chain, and calls a module with another."""

    def __init__(self):
        super().__init__()
        self.attention, self.g = Attention(), nn.Parameter(r(3, 1, 1))

    def forward(self, q, k, v, k1):
        return self.g * self.attention(q, k, v) + (1 - self.g) * attend(q, k1, v)


class Parts(nn.Module):
    """Calls two modules with a chain each, and is not rewritten itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, q, k, v, k1):
        return self.first(q, k, v) - self.second(q, k1, v)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "kernels", "eager"), [(Whole, 2, []), (Parts, 2, ["sub"])])
def test_modules_take_in_what_they_hold(kind, kernels, eager):
    module, args = kind().eval(), (*heads(1, 2, 20), heads(1, 2, 20)[1].flip(3))
    result = fused(module, args)
    assert ran(result, args) == (kernels, eager)
    assert_right(result, module, args)


@torch.no_grad()
def test_heads_that_are_merged_are_written_so():
    module, args = Gated().eval(), (r(2, 20, 32),)
    result = fused(module, args)
    kernels, eager = ran(result, args)
    assert kernels == 1 and not set(eager) & {"mul", "sigmoid", "clone"}
    assert re.search(r"mul = gated\(q\w*, k\w*\.mT, v\w*, g\)", result.sources["module.py"])
    for x in (args[0], r(1, 5, 32)):
        assert_right(result, module, (x,))


def grouped(q, k, v):
    """Groups share a head of keys; written with all heads as one dimension."""
    scores = torch.einsum("bgrmd,bgnd->bgrmn", q.unflatten(0, (-1, 2)).transpose(1, 2), k) / 4
    return torch.einsum("bgrmn,bgne->bmgre", scores.softmax(-1), v).flatten(2).tanh()


def test_dimensions_that_lie_together_stay_axes_of_their_own():
    """A tile has all features of one head, as it had before they were merged."""
    q, k, v = heads(1, 4, 20)
    args = q, k[:2], v[:2]
    result = fused(grouped, args)
    assert ran(result, args) == (1, [])
    (text,) = (t for n, t in result.sources.items() if n == "kernels/grouped.py")
    assert (
        re.search(r"acc = tl\.full\(\[BLOCK_M, BLOCK_E\]", text)
        and "//" not in text[text.index("m_i[") : text.index("Why")]
    )
    assert_right(result, grouped, args)


# -- what they read -----------------------------------------------------------------------------------------------------


def test_gates_of_another_type_leave_products_as_they_are():
    """A kernel of 16-bit operands, whatever the gate."""
    q, k, v = (t.bfloat16() for t in heads(1, 2, 20))
    plain, gated = (rewrite(f, (q, k, v, *more)) for f, more in ((attend, ()), (residual, (r(2, 3, 20, 16),))))
    loops = [
        re.findall(r".*tl\.dot\(.*", next(t for n, t in x.sources.items() if "kernels/" in n and "dot" in t))
        for x in (plain, gated)
    ]
    assert loops[0] and loops[0] == loops[1]


def test_sums_in_fp16_are_rounded_once():
    args = tuple(t.half() for t in (*heads(1, 2, 20), r(2, 3, 20, 16)))
    result = fused(residual, args)
    (text,) = (t for n, t in result.sources.items() if n == "kernels/residual.py")
    assert "(x + acc / l_i[:, None]).to(out_ptr.dtype.element_ty)" in text
    assert_right(result, residual, args, dtype=torch.float16)


def rounded_after(q, k, v, x):
    return attend(q, k, v).half().float() * x


def rounded_beside(q, k, v, x):
    return attend(q, k, v) * torch.sigmoid(x).half()


def rounded_at_last(q, k, v, x):
    return attend(q, k, v).half() * torch.sigmoid(x).half()


@pytest.mark.parametrize(
    ("program", "eager"),
    [(rounded_after, ["_to_copy", "mul"]), (rounded_beside, ["sigmoid", "_to_copy"]), (rounded_at_last, [])],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_a_program_rounds_itself_is_rounded(program, eager):
    """What is finer than that sees it; what is no finer is rounded as coarsely in any case."""
    args = (*heads(1, 2, 20), r(2, 3, 20, 16))
    result = fused(program, args)
    assert ran(result, args) == (1, eager)
    if program is not rounded_at_last:  # rounds once where eager rounds twice
        assert_right(result, program, args)
