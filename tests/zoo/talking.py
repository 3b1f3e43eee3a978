"""Talking heads: scores and weights of all heads are mixed before and after the softmax."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import feed, small


class TalkingHeadAttn(nn.Module):
    """CaiT: an `nn.Linear` over the heads, which are permuted to the end and back."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class TalkingHeadsUnrolled(TalkingHeadAttn):
    """Heads are never an axis of the mixture: one weighted sum of matrices per head, in a loop."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).unbind(-2) for t in self.qkv(x).chunk(3, -1))
        scores = [qi @ ki.mT * self.scale for qi, ki in zip(q, k, strict=True)]
        weights = []
        for row, bias in zip(self.proj_l.weight, self.proj_l.bias, strict=True):
            mixed = sum(w * s for w, s in zip(row, scores, strict=True)) + bias
            weights.append(torch.softmax(mixed, dim=-1))
        outs = []
        for row, bias, vi in zip(self.proj_w.weight, self.proj_w.bias, v, strict=True):
            outs.append((sum(w * p for w, p in zip(row, weights, strict=True)) + bias) @ vi)
        return self.proj(torch.cat(outs, dim=-1))


class TalkingHeadsEinsum(nn.Module):
    """The paper's notation: W[h, g] before, W[g, h'] after; causal."""

    def __init__(self, heads):
        super().__init__()
        self.pre_softmax = nn.Parameter(torch.eye(heads) + 0.3 * torch.randn(heads, heads))
        self.post_softmax = nn.Parameter(torch.eye(heads) + 0.3 * torch.randn(heads, heads))

    def forward(self, q, k, v):
        n = q.shape[-2]
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        dots = torch.einsum("b h i j, h g -> b g i j", dots, self.pre_softmax)
        mask = torch.ones(n, n, device=q.device, dtype=torch.bool).triu(1)
        dots = dots.masked_fill(mask, -torch.finfo(dots.dtype).max)
        attn = dots.softmax(dim=-1)
        attn = torch.einsum("b g i j, g h -> b h i j", attn, self.post_softmax)
        return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


class TalkingHeadsConv(TalkingHeadsEinsum):
    """The mixtures as 1 x 1 convolutions over maps of scores."""

    def forward(self, q, k, v):
        i = torch.arange(q.size(2), device=q.device)
        future = i.unsqueeze(0) > i.unsqueeze(1)
        logits = torch.matmul(q, k.transpose(-2, -1)) / q.size(-1) ** 0.5
        logits = F.conv2d(logits, self.pre_softmax.t()[:, :, None, None])
        weights = F.softmax(logits.masked_fill(future, float("-inf")), dim=-1)
        weights = F.conv2d(weights, self.post_softmax.t()[:, :, None, None])
        return torch.matmul(weights, v)


class ScoresTalk(nn.Module):
    """Heads are mixed before the softmax only."""

    def __init__(self, heads):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(heads, heads) * heads**-0.5)

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        scores = torch.einsum("gh,bhqk->bgqk", self.mix, scores)
        return torch.matmul(torch.softmax(scores, dim=-1), v)


class ScoresTalkInQueries(ScoresTalk):
    """The mixture is folded into the queries: one contraction over heads and features."""

    def forward(self, q, k, v):
        mixed = self.mix.view(1, *self.mix.shape, 1, 1) * q.unsqueeze(1)  # [b, g, h, q, d]
        scores = torch.einsum("bghqd,bhkd->bgqk", mixed, k) * q.size(-1) ** -0.5
        return torch.einsum("bgqk,bgkd->bgqd", F.softmax(scores, -1), v)


class ReAttention(nn.Module):
    """DeepViT: weights are mixed over heads, then normalised over heads."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.reattn_weights = nn.Parameter(torch.randn(heads, heads))
        self.norm = nn.LayerNorm(heads)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        attn = dots.softmax(dim=-1)
        attn = torch.einsum("b h i j, h g -> b g i j", attn, self.reattn_weights)
        attn = self.norm(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class ReAttentionByHand(ReAttention):
    """Heads last throughout; the norm over them by hand."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        weights = torch.softmax(torch.einsum("bihd,bjhd->bijh", q * self.scale, k), dim=2)
        weights = weights @ self.reattn_weights
        weights = weights - weights.mean(-1, keepdim=True)
        spread = weights.pow(2).mean(-1, keepdim=True)
        weights = weights / torch.sqrt(spread + self.norm.eps) * self.norm.weight + self.norm.bias
        return self.to_out(torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2))


AFTER = "in one pass, the mixture after the softmax takes an accumulator per pair of heads: sixteen"

PROGRAMS = [
    Program(
        name="talking_cait",
        family="talking",
        build=small(lambda dim, heads: TalkingHeadAttn(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="two heads, so four accumulators, in one pass; a bias after the softmax: a plain sum of values",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="talking_unrolled",
        family="talking",
        build=small(lambda dim, heads: TalkingHeadsUnrolled(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="talking_cait",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="talking_einsum_causal",
        family="talking",
        build=small(lambda dim, heads: TalkingHeadsEinsum(heads), heads=4),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite fill",
        part=2,
        passes=2,
        kernels=1,
        why=AFTER,
    ),
    Program(
        name="talking_conv_causal",
        family="talking",
        build=small(lambda dim, heads: TalkingHeadsConv(heads), heads=4),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="talking_einsum_causal",
        note="a 1 x 1 convolution is a contraction over channels",
        part=2,
        passes=2,
        kernels=1,
        why=AFTER,
    ),
    Program(
        name="talking_before_only",
        family="talking",
        build=small(lambda dim, heads: ScoresTalk(heads)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 1, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="talking_before_in_queries",
        family="talking",
        build=small(lambda dim, heads: ScoresTalkInQueries(heads)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 20, 50), Sizes(2, 1)),
        twin="talking_before_only",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="talking_reattention",
        family="talking",
        build=small(lambda dim, heads: ReAttention(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=2,
        kernels=1,
        why="the norm over heads reads finished weights of all heads",
    ),
    Program(
        name="talking_reattention_by_hand",
        family="talking",
        build=small(lambda dim, heads: ReAttentionByHand(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="talking_reattention",
        part=2,
        passes=2,
        kernels=1,
        why="the norm over heads reads finished weights of all heads",
    ),
]
