"""Numbers about a softmax are outputs: its log-sum-exp, its entropy, its largest weight."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class LogSumExpReturned(nn.Module):
    """`torch.logsumexp` of the scores beside the output, as for merging blocks of keys."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        lse = torch.logsumexp(scores, dim=-1)
        return torch.matmul(torch.softmax(scores, dim=-1), v), lse


class LogSumExpByHand(nn.Module):
    """Maximum plus logarithm of the sum; weights by hand from both."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        m = s.amax(dim=-1, keepdim=True)
        e = torch.exp(s - m)
        total = e.sum(dim=-1, keepdim=True)
        return torch.einsum("bhqk,bhkd->bhqd", e, v) / total, (m + torch.log(total)).squeeze(-1)


class LogSumExpFirst(nn.Module):
    """The log-sum-exp comes first, and weights are exp(s - lse)."""

    def forward(self, q, k, v):
        s = q @ k.mT * (1 / q.size(-1) ** 0.5)
        lse = s.logsumexp(-1, keepdim=True)
        return (s - lse).exp() @ v, lse[..., 0]


class BlocksMerged(nn.Module):
    """Two sets of keys, attended to apart, are merged by their log-sum-exps (as in ring attention)."""

    def attend(self, q, k, v):
        s = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)

    def forward(self, q, k1, v1, k2, v2):
        out1, lse1 = self.attend(q, k1, v1)
        out2, lse2 = self.attend(q, k2, v2)
        lse = torch.logaddexp(lse1, lse2)
        return torch.exp(lse1 - lse) * out1 + torch.exp(lse2 - lse) * out2


class BlocksConcatenated(nn.Module):
    """The same as one softmax over scores put side by side."""

    def forward(self, q, k1, v1, k2, v2):
        scale = q.size(-1) ** -0.5
        dots = torch.cat((q @ k1.mT, q @ k2.mT), dim=-1) * scale
        first, second = dots.softmax(dim=-1).tensor_split([k1.shape[2]], dim=-1)
        return first @ v1 + second @ v2


def two_memories(sizes, shape, generator):
    """q [B, H, Q, d]; k1, v1 [B, H, K, d]; k2, v2 [B, H, K + 3, d]"""
    more = Sizes(sizes.batch, sizes.q, sizes.keys + 3)
    _, k2, v2 = building.heads_first(more, shape, generator)
    return *building.heads_first(sizes, shape, generator), k2, v2


class EntropyLogSoftmax(nn.Module):
    """Entropy of each row's weights, from `log_softmax`; causal."""

    def forward(self, q, k, v):
        n = q.size(-2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        future = torch.ones(n, n, device=q.device).triu(1) == 1
        scores = scores.masked_fill(future, -1e4)
        log_p = F.log_softmax(scores, dim=-1)
        p = log_p.exp()
        return p @ v, -(p * log_p).sum(dim=-1)


class EntropyFromLogSumExp(nn.Module):
    """Entropy as logsumexp less the expected score; causal, and the mask's zeros are put in by hand."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        i = torch.arange(q.shape[2], device=q.device)
        seen = i[:, None] >= i
        masked = s.masked_fill(~seen, -torch.inf)
        p = masked.softmax(dim=-1)
        expected = torch.where(seen, p * s, 0).sum(-1)
        return torch.einsum("bhqk,bhkd->bhqd", p, v), masked.logsumexp(-1) - expected


class EntropyEps(nn.Module):
    """-sum p log(p + eps), of finished weights; causal."""

    def __init__(self, eps=1e-7):
        super().__init__()
        self.eps = eps

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mask = torch.full_like(scores[0, 0], float("-inf")).triu(diagonal=1)
        attn = F.softmax(scores + mask, dim=-1)
        entropy = -torch.sum(attn * torch.log(attn + self.eps), dim=-1)
        return torch.matmul(attn, v), entropy


class EntropyEntr(nn.Module):
    """`torch.special.entr` of the weights, which is 0 at 0; causal."""

    def forward(self, q, k, v):
        s = q @ k.mT / q.shape[-1] ** 0.5
        live = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        p = torch.where(live, s, -torch.inf).softmax(-1)
        return p @ v, torch.special.entr(p).sum(-1)


class EntropyOnly(nn.Module):
    """Mean entropy of a head, no output: a regulariser; p log p by hand."""

    def forward(self, q, k):
        p = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]), -1)
        return -(p * p.log()).sum(-1).mean(dim=(0, 2))


class EntropyOnlyLogits(nn.Module):
    """The same from logits less their log-sum-exp, as `Categorical` has it."""

    def forward(self, q, k):
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        return -(logits * torch.softmax(logits, dim=-1)).sum(dim=-1).mean(2).mean(0)


class Confidence(nn.Module):
    """The largest weight of each row, and a margin: largest weight less the mean of their squares."""

    def forward(self, q, k, v):
        attn = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)), dim=-1)
        top = attn.max(dim=-1).values
        return attn @ v, top, top - attn.pow(2).sum(dim=-1)


class ConfidenceByHand(nn.Module):
    """The largest weight is one over the sum; the squares are exponentials, too."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        s = s - s.amax(-1, keepdim=True)
        e = s.exp()
        total = e.sum(-1)
        top = 1 / total
        concentration = (2 * s).exp().sum(-1) / total**2
        return torch.einsum("bhqk,bhkd->bhqd", e, v) / total.unsqueeze(-1), top, top - concentration


PROGRAMS = [
    Program(
        name="lse_returned",
        family="statistics",
        build=small(lambda dim, heads: LogSumExpReturned()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lse_by_hand",
        family="statistics",
        build=small(lambda dim, heads: LogSumExpByHand()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="lse_returned",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lse_first",
        family="statistics",
        build=small(lambda dim, heads: LogSumExpFirst()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 20, 50), Sizes(2, 1)),
        twin="lse_returned",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lse_blocks_merged",
        family="statistics",
        build=small(lambda dim, heads: BlocksMerged()),
        inputs=feed(two_memories),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="two chains, merged by narrow arithmetic",
        part=2,
        passes=2,
        kernels=2,
        why="no wide value joins the two sets of keys: what joins them is narrow",
    ),
    Program(
        name="lse_blocks_concatenated",
        family="statistics",
        build=small(lambda dim, heads: BlocksConcatenated()),
        inputs=feed(two_memories),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        twin="lse_blocks_merged",
        note="a stream in two pieces",
        part=2,
        passes=2,
        kernels=1,
        why="two sets of keys: each is swept once",
    ),
    Program(
        name="entropy_log_softmax",
        family="statistics",
        build=small(lambda dim, heads: EntropyLogSoftmax()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite fill: 0 * log 0 would be NaN",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="entropy_from_lse",
        family="statistics",
        build=small(lambda dim, heads: EntropyFromLogSumExp()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="entropy_log_softmax",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="entropy_eps",
        family="statistics",
        build=small(lambda dim, heads: EntropyEps()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="entropy_log_softmax",
        note="equal to its twin but for eps",
        part=2,
        passes=2,
        kernels=1,
        why="log(p + eps) reads a finished weight: the row's maximum and sum do not come out of it",
    ),
    Program(
        name="entropy_entr",
        family="statistics",
        build=small(lambda dim, heads: EntropyEntr()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="entropy_log_softmax",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="entropy_only",
        family="statistics",
        build=small(lambda dim, heads: EntropyOnly()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="entropy_only_logits",
        family="statistics",
        build=small(lambda dim, heads: EntropyOnlyLogits()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="entropy_only",
        note="softmax of what is a log-softmax already",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="confidence",
        family="statistics",
        build=small(lambda dim, heads: Confidence()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="confidence_by_hand",
        family="statistics",
        build=small(lambda dim, heads: ConfidenceByHand()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="confidence",
        part=2,
        passes=1,
        kernels=1,
    ),
]
