"""Row attention over an alignment (AlphaFold's Evoformer): 5-D, two biases, a sigmoid gate."""

import math

import torch
import torch.nn as nn

from . import Program, Sizes, building
from .building import feed, small

ROWS = 5


def alignment(sizes, shape, generator):
    """m [B, R, N, dim], as many rows whatever the sizes"""
    return (torch.randn(sizes.batch, ROWS, sizes.q, shape.dim, generator=generator),)


def alignment_mask(sizes, shape, generator):
    """float [B, R, N] of 0 and 1; the first residue of each row is real"""
    mask = torch.rand(sizes.batch, ROWS, sizes.q, generator=generator) < 0.8
    mask[..., 0] = True
    return (mask.float(),)


def permute_final_dims(tensor, inds):
    zero_index = -1 * len(inds)
    first_inds = list(range(len(tensor.shape[:zero_index])))
    return tensor.permute(first_inds + [zero_index + i for i in inds])


class Attention(nn.Module):
    """Any number of biases, added one by one; batch dimensions come before the sequence."""

    def __init__(self, c_q, c_hidden, no_heads):
        super().__init__()
        self.c_hidden = c_hidden
        self.no_heads = no_heads
        self.linear_q = nn.Linear(c_q, c_hidden * no_heads, bias=False)
        self.linear_k = nn.Linear(c_q, c_hidden * no_heads, bias=False)
        self.linear_v = nn.Linear(c_q, c_hidden * no_heads, bias=False)
        self.linear_o = nn.Linear(c_hidden * no_heads, c_q)
        self.linear_g = nn.Linear(c_q, c_hidden * no_heads)
        self.sigmoid = nn.Sigmoid()

    def _prep_qkv(self, q_x, kv_x):
        q, k, v = self.linear_q(q_x), self.linear_k(kv_x), self.linear_v(kv_x)
        q = q.view(q.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        k = k.view(k.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        v = v.view(v.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        q /= math.sqrt(self.c_hidden)
        return q, k, v

    def _wrap_up(self, o, q_x):
        g = self.sigmoid(self.linear_g(q_x))
        g = g.view(g.shape[:-1] + (self.no_heads, -1))
        o = o * g
        o = o.reshape(o.shape[:-2] + (-1,))
        return self.linear_o(o)

    def forward(self, q_x, kv_x, biases):
        q, k, v = self._prep_qkv(q_x, kv_x)
        a = torch.matmul(q, permute_final_dims(k, (1, 0)))
        for b in biases:
            a += b
        a = torch.softmax(a, dim=-1)
        o = torch.matmul(a, v).transpose(-2, -3)
        return self._wrap_up(o, q_x)


class MSARowAttentionWithPairBias(nn.Module):
    """The layer as it is published: norms, the mask bias [B, R, 1, 1, N], the pair bias [B, 1, H, N, N]."""

    def __init__(self, c_m, c_z, no_heads, inf=1e4):
        super().__init__()
        self.inf = inf
        self.layer_norm_m = nn.LayerNorm(c_m)
        self.layer_norm_z = nn.LayerNorm(c_z)
        self.linear_z = nn.Linear(c_z, no_heads, bias=False)
        self.mha = Attention(c_m, c_m // no_heads, no_heads)

    def forward(self, m, z, mask):
        m = self.layer_norm_m(m)
        mask_bias = (self.inf * (mask - 1))[..., :, None, None, :]
        z = self.linear_z(self.layer_norm_z(z))
        z = permute_final_dims(z, (2, 0, 1)).unsqueeze(-4)
        return self.mha(q_x=m, kv_x=m, biases=[mask_bias, z])


class RowAttentionEinsum(MSARowAttentionWithPairBias):
    """Named axes: b sequences of an alignment, s its rows, i and j residues, h heads, c features."""

    def forward(self, m, z, mask):
        heads, mha = self.mha.no_heads, self.mha
        m = self.layer_norm_m(m)
        q, k, v, g = (
            linear(m).unflatten(-1, (heads, -1)) for linear in (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g)
        )
        logits = torch.einsum("bsihc,bsjhc->bhsij", q, k) * mha.c_hidden**-0.5
        logits = logits + torch.einsum("bijc,hc->bhij", self.layer_norm_z(z), self.linear_z.weight)[:, :, None]
        logits = logits.masked_fill(mask[:, None, :, None, :] == 0, -self.inf)
        weights = torch.softmax(logits, dim=-1)
        out = torch.einsum("bhsij,bsjhc->bsihc", weights, v) * torch.sigmoid(g)
        return mha.linear_o(out.flatten(-2))


class RowAttentionSDPA(MSARowAttentionWithPairBias):
    """Batch and rows merged for SDPA, and both biases in one float mask."""

    def forward(self, m, z, mask):
        b, s, n, _ = m.shape
        heads, mha = self.mha.no_heads, self.mha
        m = self.layer_norm_m(m)
        q, k, v = (
            linear(m).view(b * s, n, heads, -1).transpose(1, 2) for linear in (mha.linear_q, mha.linear_k, mha.linear_v)
        )
        pair = self.linear_z(self.layer_norm_z(z)).permute(0, 3, 1, 2)
        bias = self.inf * (mask.view(b, s, 1, 1, n) - 1) + pair.unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias.flatten(0, 1))
        out = out.transpose(1, 2).reshape(b, s, n, -1)
        return mha.linear_o(out * mha.linear_g(m).sigmoid())


class MSAColumnAttention(nn.Module):
    """Attention down the columns of an alignment: the same layer, with rows and residues exchanged."""

    def __init__(self, c_m, no_heads, inf=1e4):
        super().__init__()
        self.inf = inf
        self.layer_norm_m = nn.LayerNorm(c_m)
        self.mha = Attention(c_m, c_m // no_heads, no_heads)

    def forward(self, m, mask):
        m, mask = m.transpose(-2, -3), mask.transpose(-1, -2)
        m = self.layer_norm_m(m)
        bias = (self.inf * (mask - 1))[..., :, None, None, :]
        m = self.mha(q_x=m, kv_x=m, biases=[bias])
        return m.transpose(-2, -3)


class ColumnAttentionEinsum(MSAColumnAttention):
    """Nothing is exchanged: the einsum runs over the alignment's first axis."""

    def forward(self, m, mask):
        heads, mha = self.mha.no_heads, self.mha
        m = self.layer_norm_m(m)
        q, k, v, g = (
            linear(m).unflatten(-1, (heads, -1)) for linear in (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g)
        )
        logits = torch.einsum("bqnhc,bknhc->bnhqk", q, k) / mha.c_hidden**0.5
        logits = logits + self.inf * (mask.transpose(1, 2)[:, :, None, None, :] - 1)
        out = torch.einsum("bnhqk,bknhc->bqnhc", logits.softmax(-1), v)
        return mha.linear_o((out * g.sigmoid()).flatten(-2))


def tall_alignment(sizes, shape, generator):
    """m [B, S, 5, dim]: long down its columns"""
    return tuple(m.transpose(1, 2).contiguous() for m in alignment(sizes, shape, generator))


def tall_alignment_mask(sizes, shape, generator):
    """float [B, S, 5]"""
    return tuple(m.transpose(1, 2).contiguous() for m in alignment_mask(sizes, shape, generator))


PROGRAMS = [
    Program(
        name="evoformer_row_openfold",
        family="evoformer",
        build=small(lambda dim, heads: MSARowAttentionWithPairBias(dim, dim // 2, heads)),
        inputs=feed(alignment, building.pair_features, alignment_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="evoformer_row_einsum",
        family="evoformer",
        build=small(lambda dim, heads: RowAttentionEinsum(dim, dim // 2, heads)),
        inputs=feed(alignment, building.pair_features, alignment_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="evoformer_row_openfold",
        note="a finite fill",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="evoformer_row_sdpa",
        family="evoformer",
        build=small(lambda dim, heads: RowAttentionSDPA(dim, dim // 2, heads)),
        inputs=feed(alignment, building.pair_features, alignment_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="evoformer_row_openfold",
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="evoformer_column_openfold",
        family="evoformer",
        build=small(lambda dim, heads: MSAColumnAttention(dim, heads)),
        inputs=feed(tall_alignment, tall_alignment_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="evoformer_column_einsum",
        family="evoformer",
        build=small(lambda dim, heads: ColumnAttentionEinsum(dim, heads)),
        inputs=feed(tall_alignment, tall_alignment_mask),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="evoformer_column_openfold",
        note="a finite mask, -1e4, added",
        part=2,
        passes=1,
        kernels=1,
    ),
]
