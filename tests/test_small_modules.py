"""Small modules through the whole path: layers that are equal, and values that are narrow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right, fused

from rewriter import rewrite


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Layer(nn.Module):
    """Causal or not."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        s = q @ k.mT
        if self.causal:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        return x + s.softmax(-1) @ v


def test_equal_layers_share_a_kernel():
    model = nn.Sequential(*(Layer(causal) for causal in (True, False, True, True))).eval()
    result = fused(model, (r(2, 7, 8),))
    assert sorted(n for n in result.sources if n.startswith("kernels/layer")) == [
        "kernels/layer.py",
        "kernels/layer_2.py",
    ]
    assert {chain["kernels"][0]: chain["modules"] for chain in result.report["chains"]} == {
        "kernels/layer.py": ["0", "2", "3"],
        "kernels/layer_2.py": ["1"],
    }
    for sizes in ((2, 7), (1, 37)):
        with torch.no_grad():
            assert_right(result, model, (r(*sizes, 8),))


class Channels(nn.Module):
    """Channels attend to channels: their scores are sums along positions."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).mT.chunk(3, 1)
        return (torch.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT, -1) @ v).mT


def test_a_summary_is_normalised():
    """Summed in one kernel whatever the length, its softmax taken in another; what that weighs is as long again."""
    model = Channels().eval()
    result = rewrite(model, (r(2, 17, 8),))
    (chain,) = result.report["chains"]
    assert chain["passes"] == 3
    for sizes in ((2, 17), (1, 130), (3, 1)):
        with torch.no_grad():
            assert_right(result, model, (r(*sizes, 8),))
    half = rewrite(model.half(), (r(2, 17, 8).half(),))
    with torch.no_grad():
        assert_right(half, model, (r(2, 50, 8).half(),), dtype=torch.float16)


class Features(nn.Module):
    """Linear attention with softmaxes over features and over positions: two narrow products."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out((q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2))


class FeaturesApart(nn.Module):
    """Without heads, by layers of their own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.q(x).softmax(-1), self.k(x).softmax(1), self.v(x)
        return q @ (k.mT @ v)


@pytest.mark.parametrize(
    "program, args",
    [
        (Features(2), (r(2, 17, 8),)),
        (FeaturesApart(), (r(2, 17, 8),)),
        (
            lambda q, k, v: torch.softmax(k, 1).mT @ v,
            (r(2, 17, 8), r(2, 19, 8), r(2, 19, 8)),
        ),  # positions weighed into a summary
        (lambda q, k, v: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT, (r(2, 17, 8), r(2, 19, 8), r(2, 19, 8))),
    ],
    ids=["features", "features_apart", "summary", "cosines"],
)
def test_narrow_values_are_left(program, args):
    assert not rewrite(program, args).report["chains"]


class Routed(nn.Module):
    """A layer that says more than what is read of it, in a tuple."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x), x.sum(-1)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Routed()

    def forward(self, x):
        y, _ = self.mlp((x @ x.mT).softmax(-1) @ x)
        return x + y


def test_a_submodule_that_returns_a_tuple_is_not_taken_for_one_that_returns_a_tensor():
    torch.manual_seed(0)
    model = Mixed().eval()
    result = fused(model, (r(2, 7, 8),))
    with torch.no_grad():
        assert_right(result, model, (r(3, 5, 8),))


def test_what_a_folded_choice_drops_is_no_input():
    """Where the choice is made by constants, the kernel reads one side: the text for a CPU asks for no more."""

    def program(q, k, v, a, b):
        kind = torch.zeros(q.shape[-2], dtype=torch.long)
        same = kind[:, None] == kind
        return torch.softmax(q @ k.mT + torch.where(same, a.expand(*same.shape), b.expand(*same.shape)), -1) @ v

    args = (r(2, 7, 8), r(2, 7, 8), r(2, 7, 8), r(7, 1), r(7, 1))
    assert_right(fused(program, args), program, args)


class Padded(nn.Module):
    """Positions past a length are zeros for the layers, and masked as keys; sums so far are keys."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.ff = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        x = x * mask[..., None]
        q, k = self.q(x), self.k(x).cumsum(1)
        x = x + torch.softmax((q @ k.mT).masked_fill(~mask[:, None], -1e9), -1) @ k
        return self.ff(x * mask[..., None])


def test_what_a_mask_leaves_is_narrow_for_a_dense_layer():
    model, args = Padded().eval(), (r(2, 7, 8), torch.tensor([7, 4]))
    result = rewrite(model, args)
    assert [chain["passes"] for chain in result.report["chains"]] == [1]
    assert all(f"self.{name}(" in result.sources["module.py"] for name in ("q", "k", "ff"))
    for n in (7, 37):
        with torch.no_grad():
            assert_right(result, model, (r(2, n, 8), torch.tensor([5, 4])))


class Copied(nn.Module):
    """Asks for what is contiguous already in the example, at a length that needs no padding."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x.contiguous().view(b * n, c)).view(b, n, 24).chunk(3, -1)
        out = F.pad((q @ k.mT).softmax(-1) @ v, (0, 0, 0, -n % 4))
        return out[:, :n].contiguous().view(b * n, c)


def test_copies_that_the_example_does_not_need():
    model = Copied().eval()
    result = fused(model, (r(2, 8, 8),))
    with torch.no_grad():
        for x in (r(3, 7, 8), r(9, 2, 8).transpose(0, 1)):
            assert_right(result, model, (x,))


def first_column_is_free(q, k, v):
    scores = (q @ k.mT).clone()
    scores[..., -k.shape[1]] = 0.0
    return scores.softmax(-1) @ v


def test_a_position_made_from_sizes_is_assigned_to():
    result = fused(first_column_is_free, (r(2, 7, 8), r(2, 9, 8), r(2, 9, 8)))
    for n in (9, 5, 1):
        assert_right(result, first_column_is_free, (r(3, 4, 8), r(3, n, 8), r(3, n, 8)))


class OneQuery(nn.Module):
    """A query attends by itself; it is the first token, or learned."""

    def __init__(self, learned: bool):
        super().__init__()
        self.learned = learned
        self.query = nn.Parameter(r(1, 1, 8))
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        b = x.shape[0]
        q = self.q(self.query.expand(b, -1, -1) if self.learned else x[:, :1])
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("learned", [False, True])
def test_one_query_attends(learned):
    model = OneQuery(learned).eval()
    result = fused(model, (r(2, 9, 8),))
    assert result.report["chains"][0]["passes"] == 1
    with torch.no_grad():
        for sizes in ((2, 9), (1, 40), (3, 1)):
            assert_right(result, model, (r(*sizes, 8),))
