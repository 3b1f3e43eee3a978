"""Triangle attention over a pair tensor: edges that start, or end, at one node; a bias from the third edge."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import feed, small


def edge_mask(sizes, shape, generator):
    """float [B, N, N] of 0 and 1; all of the first row and column are real"""
    mask = torch.rand(sizes.batch, sizes.q, sizes.q, generator=generator) < 0.8
    mask[:, 0] = True
    mask[:, :, 0] = True
    return (mask.float(),)


class TriangleAttention(nn.Module):
    """As published: the ending node is the starting node of the transposed pair tensor."""

    def __init__(self, c_in, no_heads, starting=True, inf=1e4):
        super().__init__()
        self.no_heads = no_heads
        self.starting = starting
        self.inf = inf
        self.layer_norm = nn.LayerNorm(c_in)
        self.linear = nn.Linear(c_in, no_heads, bias=False)
        self.linear_q = nn.Linear(c_in, c_in, bias=False)
        self.linear_k = nn.Linear(c_in, c_in, bias=False)
        self.linear_v = nn.Linear(c_in, c_in, bias=False)
        self.linear_g = nn.Linear(c_in, c_in)
        self.linear_o = nn.Linear(c_in, c_in)

    def mha(self, x, biases):
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        q, k, v = (t.view(t.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3) for t in (q, k, v))
        q = q / q.shape[-1] ** 0.5
        a = torch.matmul(q, k.transpose(-1, -2))
        for bias in biases:
            a = a + bias
        o = torch.matmul(a.softmax(dim=-1), v).transpose(-2, -3)
        g = self.linear_g(x).sigmoid()
        o = o * g.view(g.shape[:-1] + (self.no_heads, -1))
        return self.linear_o(o.reshape(o.shape[:-2] + (-1,)))

    def forward(self, x, mask):
        if not self.starting:
            x = x.transpose(-2, -3)
            mask = mask.transpose(-1, -2)
        x = self.layer_norm(x)
        mask_bias = (self.inf * (mask - 1))[..., :, None, None, :]
        triangle_bias = self.linear(x).permute(0, 3, 1, 2).unsqueeze(-4)
        x = self.mha(x, [mask_bias, triangle_bias])
        if not self.starting:
            x = x.transpose(-2, -3)
        return x


class TriangleEinsum(TriangleAttention):
    """Nothing is transposed: the einsum says which node is shared; the mask is filled in."""

    def forward(self, x, mask):
        x = self.layer_norm(x)
        q, k, v, g = (
            linear(x).unflatten(-1, (self.no_heads, -1))
            for linear in (self.linear_q, self.linear_k, self.linear_v, self.linear_g)
        )
        scale = q.shape[-1] ** -0.5
        edges = self.linear(x)
        if self.starting:  # edge i-j looks at edges i-k; the third is j-k
            logits = torch.einsum("bijhd,bikhd->bhijk", q, k) * scale
            logits = logits + torch.einsum("bjkh->bhjk", edges)[:, :, None]
            logits = logits.masked_fill(mask[:, None, :, None, :] < 0.5, -self.inf)
            out = torch.einsum("bhijk,bikhd->bijhd", logits.softmax(-1), v)
        else:  # edge i-j looks at edges k-j; the third is k-i
            logits = torch.einsum("bijhd,bkjhd->bhijk", q, k) * scale
            logits = logits + torch.einsum("bkih->bhik", edges)[:, :, :, None]
            logits = logits.masked_fill(mask.mT[:, None, None, :, :] < 0.5, -self.inf)
            out = torch.einsum("bhijk,bkjhd->bijhd", logits.softmax(-1), v)
        return self.linear_o((torch.sigmoid(g) * out).flatten(-2))


class TriangleAxial(TriangleAttention):
    """One axis is folded into the batch, and what is left is ordinary attention with a repeated bias."""

    def forward(self, x, mask):
        b, n, _, c = x.shape
        x = self.layer_norm(x)
        x = x if self.starting else x.transpose(1, 2)
        mask = mask if self.starting else mask.transpose(1, 2)
        bias = self.linear(x).movedim(-1, 1)  # [b, h, n, n]
        bias = bias.repeat_interleave(n, dim=0)  # [b * n, h, n, n]
        x, mask = x.reshape(b * n, n, c), mask.reshape(b * n, n)
        q, k, v = (
            linear(x).view(b * n, n, self.no_heads, -1).transpose(1, 2)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        bias = bias + (mask - 1)[:, None, None, :] * self.inf
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2) * self.linear_g(x).sigmoid()
        out = self.linear_o(out).view(b, n, n, c)
        return out if self.starting else out.transpose(1, 2)


PROGRAMS = [
    Program(
        name="triangle_starting_openfold",
        family="triangle",
        build=small(lambda dim, heads: TriangleAttention(dim, heads)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="triangle_starting_einsum",
        family="triangle",
        build=small(lambda dim, heads: TriangleEinsum(dim, heads)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        twin="triangle_starting_openfold",
        note="a finite fill",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="triangle_starting_axial",
        family="triangle",
        build=small(lambda dim, heads: TriangleAxial(dim, heads)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        twin="triangle_starting_openfold",
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="triangle_ending_openfold",
        family="triangle",
        build=small(lambda dim, heads: TriangleAttention(dim, heads, starting=False)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="triangle_ending_einsum",
        family="triangle",
        build=small(lambda dim, heads: TriangleEinsum(dim, heads, starting=False)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        twin="triangle_ending_openfold",
        note="a finite fill",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="triangle_ending_axial",
        family="triangle",
        build=small(lambda dim, heads: TriangleAxial(dim, heads, starting=False)),
        inputs=feed(building.pair_tokens, edge_mask),
        traced=Sizes(2, 19),
        others=(Sizes(1, 23), Sizes(3, 11)),
        twin="triangle_ending_openfold",
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
]
