"""Mask tensors as inputs: boolean and additive, -inf and finite fills; rows masked throughout."""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


def clones(module, N):
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


class MultiHeadedAttention(nn.Module):
    """`mask == 0` is filled with -1e9; linears in a list, sliced."""

    def __init__(self, h, d_model, dropout=0.1):
        super().__init__()
        assert d_model % h == 0
        self.d_k = d_model // h
        self.h = h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, query, mask):
        nbatches = query.size(0)
        query, key, value = [
            lin(query).view(nbatches, -1, self.h, self.d_k).transpose(1, 2) for lin in self.linears[:3]
        ]
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = self.dropout(scores.softmax(dim=-1))
        x = torch.matmul(p_attn, value)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class BooleanMaskAttention(nn.Module):
    """~mask is filled with -inf."""

    def forward(self, q, k, v, mask):
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attn = attn.masked_fill(~mask, -torch.inf)
        return attn.softmax(dim=-1) @ v


class BooleanMaskSDPA(nn.Module):
    """The boolean mask goes to SDPA."""

    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class BooleanMaskByHand(nn.Module):
    """Softmax by hand with where: zeros are put where the mask is, not exp(-inf)."""

    def forward(self, q, k, v, mask):
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        top = torch.where(mask, logits, -torch.inf).amax(-1, keepdim=True)
        p = torch.where(mask, torch.exp(logits - top), 0.0)
        return torch.einsum("bhqk,bhkd->bhqd", p, v) / p.sum(-1, keepdim=True)


class SharedMaskLeastNumber(nn.Module):
    """One mask [Q, K] for all; `torch.finfo(dtype).min` where it is False."""

    def forward(self, q, k, v, mask):
        dots = torch.einsum("b i h d, b j h d -> b h i j", q, k) / q.shape[-1] ** 0.5
        mask_value = -torch.finfo(dots.dtype).max
        dots.masked_fill_(~mask[None, None], mask_value)
        attn = F.softmax(dots, dim=-1, dtype=torch.float32)
        attn = attn.type(dots.dtype)
        return torch.einsum("b h i j, b j h d -> b i h d", attn, v)


class AdditiveMaskAttention(nn.Module):
    """A float mask [Q, K] is added in place."""

    def forward(self, q, k, v, attn_bias):
        weights = q @ k.transpose(-2, -1)
        weights = weights * (1 / math.sqrt(q.size(-1)))
        weights += attn_bias
        return torch.softmax(weights, dim=-1) @ v


class AdditiveMaskSDPA(nn.Module):
    """The float mask goes to SDPA, unsqueezed."""

    def forward(self, q, k, v, attn_bias):
        return F.scaled_dot_product_attention(q, k, v, attn_bias[None, None])


class BaddbmmMaskAttention(nn.Module):
    """The mask is what `baddbmm` adds to; batch and heads come merged."""

    def forward(self, q, k, v, attn_mask):
        q_scaled = q * math.sqrt(1.0 / float(q.size(-1)))
        attn_output_weights = torch.baddbmm(attn_mask, q_scaled, k.transpose(-2, -1))
        attn_output_weights = F.softmax(attn_output_weights, dim=-1)
        return torch.bmm(attn_output_weights, v)


class PairBiasGatedAttention(nn.Module):
    """A learned map of a pair bias per head, plus a padding bias: two float masks; a sigmoid gate after."""

    def __init__(self, c_in, no_heads, inf=1e4):
        super().__init__()
        self.no_heads = no_heads
        self.inf = inf
        self.linear_q = nn.Linear(c_in, c_in, bias=False)
        self.linear_k = nn.Linear(c_in, c_in, bias=False)
        self.linear_v = nn.Linear(c_in, c_in, bias=False)
        self.linear_g = nn.Linear(c_in, c_in)
        self.linear_o = nn.Linear(c_in, c_in)
        self.linear_z = nn.Linear(no_heads, no_heads, bias=False)

    def forward(self, m, z, mask):
        q = self.linear_q(m).view(m.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        k = self.linear_k(m).view(m.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        v = self.linear_v(m).view(m.shape[:-1] + (self.no_heads, -1)).transpose(-2, -3)
        q = q / math.sqrt(q.shape[-1])

        mask_bias = (self.inf * (mask.to(m.dtype) - 1))[..., None, None, :]
        pair = self.linear_z(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        a = torch.matmul(q, k.transpose(-1, -2))
        for b in (mask_bias, pair):
            a += b
        a = torch.nn.functional.softmax(a, -1)
        o = torch.matmul(a, v).transpose(-2, -3)

        g = torch.sigmoid(self.linear_g(m)).view(m.shape[:-1] + (self.no_heads, -1))
        o = o * g
        return self.linear_o(o.reshape(o.shape[:-2] + (-1,)))


class NanToNumAttention(nn.Module):
    """Rows masked throughout are NaN after the softmax and set to zero."""

    def forward(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        probs = scores.masked_fill(mask.logical_not(), float("-inf")).softmax(-1)
        return torch.nan_to_num(probs, nan=0.0) @ v


class EmptyRowsFiniteFill(nn.Module):
    """Finite fill: rows masked throughout become uniform weights."""

    def forward(self, q, k, v, mask):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * k.size(-1) ** -0.5
        scores = torch.where(mask, scores, scores.new_full((), torch.finfo(scores.dtype).min))
        return torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, dim=-1), v)


class SafeDenominatorAttention(nn.Module):
    """By hand, with a guard of its own: empty rows have their maximum and their sum replaced."""

    def forward(self, q, k, v, mask):
        s = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        s = s.masked_fill(~mask, float("-inf"))
        m = s.max(dim=-1, keepdim=True).values
        m = torch.where(torch.isinf(m), torch.zeros_like(m), m)
        p = torch.exp(s - m)
        total = p.sum(dim=-1, keepdim=True)
        total = torch.where(total == 0, torch.ones_like(total), total)
        return (p / total) @ v


class BatchLengthsAttention(nn.Module):
    """A batch element of length 0 has nothing to attend to."""

    def forward(self, q, k, v, lengths):
        scores = q.matmul(k.mT).div(q.shape[-1] ** 0.5)
        beyond = torch.arange(k.shape[-2], device=k.device) >= lengths[:, None, None, None]
        scores = scores.masked_fill(beyond, -math.inf)
        return scores.softmax(dim=3).matmul(v)


PROGRAMS = [
    Program(
        name="mask_annotated_fill",
        family="masks",
        build=built(lambda dim, heads: MultiHeadedAttention(heads, dim)),
        inputs=feed(building.tokens, building.live_mask),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="a finite fill, -1e9, that fp16 can't hold: eager refuses",
        dtypes=("fp32", "bf16"),
    ),
    Program(
        name="mask_bool_fill",
        family="masks",
        build=built(lambda dim, heads: BooleanMaskAttention()),
        inputs=feed(building.heads_first, building.live_mask),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="mask_bool_sdpa",
        family="masks",
        build=built(lambda dim, heads: BooleanMaskSDPA()),
        inputs=feed(building.heads_first, building.live_mask),
        traced=Sizes(2, 19, 50),
        others=(Sizes(1, 67), Sizes(3, 1, 37)),
        twin="mask_bool_fill",
    ),
    Program(
        name="mask_bool_by_hand",
        family="masks",
        build=built(lambda dim, heads: BooleanMaskByHand()),
        inputs=feed(building.heads_first, building.live_mask),
        traced=Sizes(1, 50, 37),
        others=(Sizes(3, 37), Sizes(2, 1)),
        twin="mask_bool_fill",
    ),
    Program(
        name="mask_shared_least_number",
        family="masks",
        build=built(lambda dim, heads: SharedMaskLeastNumber()),
        inputs=feed(building.heads_last, building.live_mask_2d),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19, 50), Sizes(2, 1)),
        note="a finite fill",
    ),
    Program(
        name="mask_additive",
        family="masks",
        build=built(lambda dim, heads: AdditiveMaskAttention()),
        inputs=feed(building.heads_first, building.additive_mask_2d),
        traced=Sizes(1, 19, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="mask_additive_sdpa",
        family="masks",
        build=built(lambda dim, heads: AdditiveMaskSDPA()),
        inputs=feed(building.heads_first, building.additive_mask_2d),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1, 19)),
        twin="mask_additive",
    ),
    Program(
        name="mask_additive_baddbmm",
        family="masks",
        build=built(lambda dim, heads, head_dim=40: BaddbmmMaskAttention()),
        inputs=feed(building.heads_merged, building.additive_mask_merged),
        traced=Sizes(1, 37),
        others=(Sizes(2, 19, 50), Sizes(3, 1)),
        note="head dim 40; [B*H, S, D]",
    ),
    Program(
        name="mask_pair_bias",
        family="masks",
        build=built(lambda dim, heads: PairBiasGatedAttention(dim, heads)),
        inputs=feed(building.tokens, building.pair_bias, building.padding_mask),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
        note="a finite fill, -1e4, added",
    ),
    Program(
        name="empty_rows_softmax",
        family="masks",
        build=built(lambda dim, heads: BooleanMaskAttention()),
        inputs=feed(building.heads_first, building.live_mask_some_rows_empty),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 2, 1)),
        note="rows masked throughout: NaN",
        nan_rows=True,
    ),
    Program(
        name="empty_rows_sdpa",
        family="masks",
        build=built(lambda dim, heads: BooleanMaskSDPA()),
        inputs=feed(building.heads_first, building.live_mask_some_rows_empty),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 19, 37)),
        note="rows masked throughout: zeros",
    ),
    Program(
        name="empty_rows_additive_sdpa",
        family="masks",
        build=built(lambda dim, heads, head_dim=24: BooleanMaskSDPA()),
        inputs=feed(building.heads_first, building.additive_mask_some_rows_empty),
        traced=Sizes(2, 19),
        others=(Sizes(1, 50), Sizes(3, 37)),
        note="rows masked throughout: zeros; head dim 24",
    ),
    Program(
        name="empty_rows_finite_fill",
        family="masks",
        build=built(lambda dim, heads: EmptyRowsFiniteFill()),
        inputs=feed(building.heads_first, building.live_mask_some_rows_empty),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
        note="rows masked throughout: uniform weights",
    ),
    Program(
        name="empty_rows_nan_to_num",
        family="masks",
        build=built(lambda dim, heads: NanToNumAttention()),
        inputs=feed(building.heads_first, building.live_mask_some_rows_empty),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(2, 19)),
        twin="empty_rows_sdpa",
        note="rows masked throughout: zeros, by nan_to_num",
    ),
    Program(
        name="empty_rows_safe_denominator",
        family="masks",
        build=built(lambda dim, heads: SafeDenominatorAttention()),
        inputs=feed(building.heads_first, building.live_mask_some_rows_empty),
        traced=Sizes(2, 37),
        others=(Sizes(1, 19), Sizes(3, 50)),
        twin="empty_rows_sdpa",
        note="rows masked throughout: zeros, by a guarded division",
    ),
    Program(
        name="empty_batch_element_softmax",
        family="masks",
        build=built(lambda dim, heads: BatchLengthsAttention()),
        inputs=feed(building.heads_first, building.key_lengths_some_zero),
        traced=Sizes(2, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
        note="rows masked throughout (all of the first batch element): NaN",
        nan_rows=True,
    ),
]
