"""Top-k, scans, sorts and wide products in the middle: they stay eager, what surrounds them is fused."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class TopTwo(nn.Module):
    """Only the two best keys of each row are attended to: the second best score is a threshold."""

    def forward(self, q, k, v):
        dots = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        top, _ = dots.topk(2, dim=-1)
        vk = top[..., -1:]
        dots = dots.masked_fill(dots < vk, -torch.finfo(dots.dtype).max)
        return dots.softmax(dim=-1) @ v


class TopTwoScattered(nn.Module):
    """The two best are softmaxed apart and scattered back into a row of zeros."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        values, indices = torch.topk(scores, k=2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, indices, torch.softmax(values, dim=-1))
        return torch.matmul(weights, v)


class StickBreaking(nn.Module):
    """Stick-breaking attention: a row's weights are shares of what later keys have left; causal."""

    def forward(self, q, k, v):
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        past = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril(-1)
        log_left = F.logsigmoid(-logits).masked_fill(~past, 0)
        after = log_left.flip(-1).cumsum(dim=-1).flip(-1) - log_left
        weights = torch.exp(F.logsigmoid(logits) + after).masked_fill(~past, 0)
        return weights @ v


class StickBreakingTotal(nn.Module):
    """The sum over later keys as the row's total less a forward cumsum."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        i = torch.arange(q.shape[2], device=q.device)
        past = i[:, None] > i[None, :]
        left = torch.where(past, -F.softplus(s), 0.0)
        after = left.sum(-1, keepdim=True) - left.cumsum(-1)
        w = torch.where(past, torch.sigmoid(s) * after.exp(), 0.0)
        return torch.einsum("bhqk,bhkd->bhqd", w, v)


class ContextualPositions(nn.Module):
    """CoPE: a key's position counts gates between it and the query; embeddings interpolate; causal."""

    def __init__(self, head_dim, npos_max):
        super().__init__()
        self.npos_max = npos_max
        self.pos_emb = nn.Parameter(torch.randn(1, head_dim, npos_max) * 0.3)

    def positions(self, gates):
        return gates.flip(-1).cumsum(dim=-1).flip(-1)

    def forward(self, q, k, v):
        n = q.size(-2)
        mask = torch.full((n, n), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        attn_logits = torch.matmul(q, k.transpose(-1, -2)) + mask
        pos = self.positions(torch.sigmoid(attn_logits)).clamp(max=self.npos_max - 1)
        pos_ceil = pos.ceil().long()
        pos_floor = pos.floor().long()
        logits_int = torch.matmul(q, self.pos_emb)
        logits_ceil = logits_int.gather(-1, pos_ceil)
        logits_floor = logits_int.gather(-1, pos_floor)
        w = pos - pos_floor
        attn_logits = attn_logits + logits_ceil * w + logits_floor * (1 - w)
        return torch.softmax(attn_logits / math.sqrt(q.size(-1)), dim=-1) @ v


class ContextualPositionsTotal(ContextualPositions):
    """Positions as a total less a forward scan, which rounding may take below zero."""

    def positions(self, gates):
        return (gates.sum(-1, keepdim=True) - gates.cumsum(-1) + gates).clamp(min=0)


class Sparsemax(nn.Module):
    """Scores projected onto the simplex: sorted, summed up, thresholded."""

    def forward(self, q, k, v):
        z = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        z_sorted, _ = torch.sort(z, dim=-1, descending=True)
        j = torch.arange(1, z.size(-1) + 1, device=z.device, dtype=z.dtype)
        total = z_sorted.cumsum(-1)
        support = (1 + j * z_sorted > total).sum(-1, keepdim=True)
        tau = (total.gather(-1, support - 1) - 1) / support
        return torch.matmul(torch.clamp(z - tau, min=0), v)


class SparsemaxMasked(nn.Module):
    """The threshold from masked sums; relu, einsum."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        ordered = s.sort(dim=-1, descending=True).values
        rank = torch.arange(s.shape[-1], device=s.device) + 1
        live = rank * ordered > ordered.cumsum(-1) - 1
        tau = (torch.where(live, ordered, 0).sum(-1, keepdim=True) - 1) / live.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bhkd->bhqd", F.relu(s - tau), v)


class Rollout(nn.Module):
    """Attention rollout of two layers: averaged heads plus the identity, normalised, multiplied."""

    def layer(self, q, k):
        attn = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)), dim=-1)
        attn = attn.mean(dim=1)
        attn = attn + torch.eye(attn.size(-1), device=attn.device, dtype=attn.dtype)
        return attn / attn.sum(dim=-1, keepdim=True)

    def forward(self, q1, k1, q2, k2):
        return torch.bmm(self.layer(q2, k2), self.layer(q1, k1))


class RolloutHalves(nn.Module):
    """The identity by where; a row's sum is known to be two."""

    def layer(self, q, k):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        attn = torch.einsum("bhqk->bqk", F.softmax(s, dim=-1)) / q.shape[1]
        i = torch.arange(q.shape[2], device=q.device)
        return torch.where(i[:, None] == i[None, :], attn + 1, attn) / 2

    def forward(self, q1, k1, q2, k2):
        return self.layer(q2, k2) @ self.layer(q1, k1)


class TwoHops(nn.Module):
    """Weights multiplied by themselves before they meet the values."""

    def forward(self, q, k, v):
        attn = torch.softmax(q @ k.mT / math.sqrt(q.size(-1)), dim=-1)
        return (attn @ attn) @ v


class TwoHopsByHand(nn.Module):
    """Softmax by hand, einsum."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        e = torch.exp(s - s.amax(-1, keepdim=True))
        a = e / e.sum(-1, keepdim=True)
        twice = torch.einsum("bhij,bhjk->bhik", a, a)
        return torch.einsum("bhik,bhkd->bhid", twice, v)


class TwoHopsOneByOne(nn.Module):
    """The same weights meet the values, then what comes of them: no wide product."""

    def forward(self, q, k, v):
        attn = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)), dim=-1)
        return torch.matmul(attn, torch.matmul(attn, v))


def two_layers(sizes, shape, generator):
    """queries and keys of two layers [B, H, S, d] each"""
    first = building.queries_and_keys(sizes, shape, generator)
    return *first, *building.queries_and_keys(sizes, shape, generator)


def program(name, module, *, inputs=building.heads_first, **fields):
    return Program(name=name, family="opaque", build=small(module), inputs=feed(inputs), part=2, **fields)


WEIGHTS = "a weight can be written only when its row's maximum and sum are final"
HEADS = "an average over heads can be written only when the rows of all heads are final"

PROGRAMS = [
    program(
        "top_two_threshold",
        lambda dim, heads: TopTwo(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="the scores are written for top-k; what follows reads them",
        eager=("matmul", "topk"),
        passes=1,
        kernels=1,
    ),
    program(
        "top_two_scattered",
        lambda dim, heads: TopTwoScattered(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="top_two_threshold",
        fused=False,
        note="what scatter writes meets the values in one matmul: nothing is left to fuse",
        eager=("matmul", "topk", "scatter"),
    ),
    program(
        "stick_breaking",
        lambda dim, heads: StickBreaking(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="the scan reads scores, weights read both",
        eager=("cumsum",),
        passes=1,
        kernels=1,
    ),
    program(
        "stick_breaking_total",
        lambda dim, heads: StickBreakingTotal(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="stick_breaking",
        eager=("cumsum",),
        passes=2,
        kernels=1,
        why="the total is in an exponent that nothing bounds before it is final: the scan is opaque",
    ),
    program(
        "contextual_positions",
        lambda dim, heads, npos_max=12: ContextualPositions(dim // heads, npos_max),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        eager=("cumsum",),
        passes=1,
        kernels=1,
    ),
    program(
        "contextual_positions_total",
        lambda dim, heads, npos_max=12: ContextualPositionsTotal(dim // heads, npos_max),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="contextual_positions",
        eager=("cumsum",),
        passes=2,
        kernels=1,
        why="the row's sum of gates is in the exponent and in an index: it must be final first",
    ),
    program(
        "sparsemax",
        lambda dim, heads: Sparsemax(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        eager=("matmul", "sort", "cumsum"),
        passes=2,
        kernels=2,
        why="the threshold is looked up where a first reduction points",
    ),
    program(
        "sparsemax_masked",
        lambda dim, heads: SparsemaxMasked(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="sparsemax",
        eager=("matmul", "sort", "cumsum"),
        passes=2,
        kernels=1,
        why="the threshold is inside a clamp: it must be final first",
    ),
    program(
        "rollout",
        lambda dim, heads: Rollout(),
        inputs=two_layers,
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="two chains, a wide product of what they return",
        eager=("bmm",),
        passes=4,
        kernels=4,
        why=HEADS,
    ),
    program(
        "rollout_halves",
        lambda dim, heads: RolloutHalves(),
        inputs=two_layers,
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="rollout",
        note="two chains, a wide product of what they return",
        eager=("matmul",),
        passes=4,
        kernels=4,
        why=HEADS,
    ),
    program(
        "two_hops",
        lambda dim, heads: TwoHops(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        eager=("matmul",),
        passes=2,
        kernels=1,
        why=WEIGHTS,
    ),
    program(
        "two_hops_by_hand",
        lambda dim, heads: TwoHopsByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="two_hops",
        eager=("einsum",),
        passes=2,
        kernels=1,
        why=WEIGHTS,
    ),
    program(
        "two_hops_one_by_one",
        lambda dim, heads: TwoHopsOneByOne(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="two_hops",
        passes=2,
        kernels=2,
        why="the second product streams over rows of the first, which must all be there",
    ),
]
