"""What is cut out of a graph: where rows x stream begins, and where it ends."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_path import assert_right, fused

from rewriter import rewrite
from rewriter.lift import lift
from rewriter.trace import capture


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def keep(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


def masked(q, k, v, mask):
    p = torch.exp((q @ k.mT).masked_fill(~mask, -math.inf))
    return (p @ v) / p.sum(-1, keepdim=True)


def masked_by_lengths_and_pairs(q, k, v, lengths, pairs):
    """[B, 1, N] and [M, N]: batch and rows are no sides of anything."""
    return masked(q, k, v, (torch.arange(k.shape[1]) < lengths[:, None, None]) & pairs)


def masked_by_lengths_and_documents(q, k, v, lengths, ids):
    same = ids[:, None] == ids[None, :]
    return masked(q, k, v, same & (torch.arange(k.shape[1]) < lengths[:, None, None]))


def groups_of_one_key_head(q, k, v):
    """[B, 1, R, M, D] and [B, G, N, D]: G is of the keys alone, but what is weighed is weighed over N."""
    groups = q.unflatten(1, (-1, 4))
    s = torch.einsum("bgrmd,bgnd->bgrmn", groups, k).flatten(1, 2)
    e = s.exp().unflatten(1, (-1, 4))
    return torch.einsum("bgrmn,bgne->bgrme", e, v) / e.sum(-1, keepdim=True)


def groups_of_one_key_head_last(q, k, v):
    """The same in [B, M, R, D] and [B, N, G, D]."""
    s = torch.einsum("bmgrd,bngd->bgrmn", q.unflatten(2, (-1, 4)), k).flatten(1, 2)
    e = s.exp().unflatten(1, (-1, 4))
    out = torch.einsum("bgrmn,bnge->bgrme", e, v) / e.sum(-1, keepdim=True)
    return out.flatten(1, 2).transpose(1, 2).flatten(-2)


def one_key_head(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def outer_sums(q, k, v):
    """Rows and stream meet in a sum; only the stream is reduced."""
    return torch.tanh(q[:, :, None] + k[:, None, :]).sum(-1).softmax(-1) @ v


ONE = {
    masked_by_lengths_and_pairs: (r(2, 5, 8), r(2, 7, 8), r(2, 7, 8), torch.tensor([3, 7]), keep(5, 7)),
    masked_by_lengths_and_documents: (*(r(2, 5, 8) for _ in "qkv"), torch.tensor([3, 5]), torch.arange(5) // 2),
    groups_of_one_key_head: (r(2, 4, 5, 8), r(2, 1, 7, 8), r(2, 1, 7, 8)),
    groups_of_one_key_head_last: (r(2, 5, 4, 8), r(2, 7, 1, 8), r(2, 7, 1, 8)),
    one_key_head: (r(2, 4, 5, 8), r(2, 1, 7, 8), r(2, 1, 7, 8)),
    outer_sums: (r(2, 5, 8), r(2, 7, 8), r(2, 7, 8)),
}


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_one_region_that_ends_with_the_stream(function):
    args = ONE[function]
    lifted = lift(capture(function, args, {}))
    assert [len(region.outputs) for region in lifted.regions] == [1] and not lifted.unfused
    (output,) = lifted.regions[0].outputs
    assert output.meta["val"].dim() == args[0].dim() + ("groups" in function.__name__)


def test_what_an_opaque_op_reads_is_written_by_the_chain():
    """Weights are written once, for cumsum; scores and their sum are not."""

    def attend(q, k, v):
        p = torch.relu(q @ k.mT)
        return (p / (p.sum(-1, keepdim=True) + 1)).cumsum(-1) @ v

    lifted = lift(capture(attend, (r(2, 5, 8), r(2, 7, 8), r(2, 7, 8)), {}))
    (region,) = lifted.regions
    assert [n.name for n in region.outputs] == ["div"]
    assert any("cumsum" in reason.text for reason in lifted.unfused)


class Layer(nn.Module):
    """Attention and a gated layer, each after a norm and added to what it read."""

    def __init__(self, dim: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT, -1) @ v)
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(gate.sigmoid() * up)


def squared(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ p @ v


def of_two_layers(q, k, v):
    """Each operand has rows and stream of its own."""
    return (q @ k.mT).softmax(-1) @ (k @ v.mT).softmax(-1)


def short_product(q, k, v):
    """Summed over what both operands have; what is left of each is its own side of the same rows x stream."""
    p = (q @ k.mT).softmax(-1)
    return (p[:, :, None, :] * v.mT[:, None]).sum(-1), p.square().sum(-1)


def loss(q, k, v):
    """Scores less the one that each row points at, over all rows: they meet, but not as matrices do."""
    logits = (q[0] @ k[0].mT).float()
    return torch.nn.functional.cross_entropy(logits, torch.arange(q.shape[1]))


@pytest.mark.parametrize("function, written", [(squared, 1), (of_two_layers, 2), (short_product, 0), (loss, 0)])
def test_a_product_of_two_wide_values_stays_eager(function, written):
    """Its operands are written, once, and that is said; between chains it is no chain's."""
    rewritten = rewrite(function, (r(2, 33, 8), r(2, 33, 8), r(2, 33, 8)))
    said = [x for x in rewritten.report["unfused"] if "product of two wide values" in x["reason"]]
    assert len(said) == min(1, written)  # a line says it once
    assert len(rewritten.report["chains"]) == max(1, written)


def test_layers_are_not_computed_again_by_those_after_them():
    """x + f(norm(x)): the dense layer that x comes from is normalised, and written all the same."""
    model = nn.Sequential(*(Layer(16) for _ in range(3)), nn.LayerNorm(16)).eval().requires_grad_(False)
    found = [(chain["passes"], chain["modules"]) for chain in rewrite(model, (r(2, 9, 16),)).report["chains"]]
    assert found == [(1, ["0", "1", "2"])]


def turned(points, turns, values):
    """Three coordinates, of which no size says so, are no rows of what a matrix turns: pairs of points are wide."""
    points = torch.einsum("bnij,bnhj->bnhi", turns, points)
    away = (points[:, :, None] - points[:, None]).square().sum((-1, -2))
    return torch.softmax(-away, -1) @ values


def test_what_is_paired_later_is_computed_once():
    args = r(2, 9, 4, 3), r(2, 9, 3, 3), r(2, 9, 8)
    (region,) = lift(capture(turned, args, {})).regions
    assert "turns" not in {n.name for n in region.inputs}
    assert [chain["passes"] for chain in rewrite(turned, args).report["chains"]] == [1]


class Biased(nn.Module):
    """Two layers that share nothing but their bias: the dense layers between are no part of a chain."""

    def __init__(self):
        super().__init__()
        self.slope, self.dense = nn.Parameter(torch.tensor(0.3)), nn.Linear(8, 8)

    def forward(self, x):
        n = torch.arange(x.shape[1])
        bias = -self.slope * (n - n[:, None]).abs()
        for _ in range(2):
            x = x + torch.softmax(self.dense(x) @ x.mT + bias, -1) @ self.dense(x)
        return x


class Triangles(nn.Module):
    """Attention within each row of pairs: the pairs are computed once, not for each pair of them again."""

    def forward(self, x, y):
        pairs = torch.einsum("bsi,bsj->bij", x, y)[..., None] * torch.arange(4)
        return torch.softmax(pairs @ pairs.mT, -1) @ pairs


@pytest.mark.parametrize(
    "program, args, passes", [(Biased(), (r(2, 40, 8),), [1, 1]), (Triangles(), (r(2, 3, 9), r(2, 3, 9)), [1])]
)
def test_what_chains_share_is_computed_once(program, args, passes):
    result = fused(program, args)
    assert [c["passes"] for c in result.report["chains"]] == passes
    with torch.no_grad():
        assert_right(result, program, args)


def test_what_is_read_at_many_places_is_written():
    """Skewed again and again: a score that is computed for each would be computed a dozen times for one weight."""

    def skew(s):
        return F.pad(s, (0, 1)).flatten(-2)[..., : s.shape[-2] * s.shape[-1]].reshape(s.shape)

    def program(q, k, v):
        s = q @ k.mT
        terms = s, skew(s), skew(skew(s)), skew(s.mT), skew(s).mT, skew(skew(s).mT), skew(skew(s.mT)), skew(skew(s)).mT
        return torch.softmax(sum(terms) + s.mT + skew(skew(skew(s))), -1) @ v

    lifted = lift(capture(program, tuple(r(2, 7, 8) for _ in range(3)), {}))
    assert not lifted.regions and any("at many places" in reason.text for reason in lifted.unfused)
