"""Differential attention: the weights of one softmax less a learned share of another's; a norm after."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


def lambda_init_fn(depth):
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


class MultiheadDiffAttn(nn.Module):
    """The published code: heads in pairs, 5-D; weights are subtracted, then multiplied by the values; causal."""

    def __init__(self, embed_dim, num_heads, depth=1):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads // 2
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.lambda_init = lambda_init_fn(depth)
        self.lambda_q1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k1 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_q2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.lambda_k2 = nn.Parameter(torch.zeros(self.head_dim).normal_(mean=0, std=0.1))
        self.subln = nn.RMSNorm(2 * self.head_dim, eps=1e-5)

    def forward(self, x):
        bsz, tgt_len, embed_dim = x.size()
        src_len = tgt_len
        q = self.q_proj(x).view(bsz, tgt_len, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(bsz, src_len, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(bsz, src_len, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q *= self.scaling
        attn_weights = torch.matmul(q, k.transpose(-1, -2))
        attn_mask = torch.triu(torch.zeros([tgt_len, src_len]).float().fill_(float("-inf")).type_as(attn_weights), 1)
        attn_weights = torch.nan_to_num(attn_weights)
        attn_weights += attn_mask
        attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights)

        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1).float()).type_as(q)
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1).float()).type_as(q)
        lambda_full = lambda_1 - lambda_2 + self.lambda_init
        attn_weights = attn_weights.view(bsz, self.num_heads, 2, tgt_len, src_len)
        attn_weights = attn_weights[:, :, 0] - lambda_full * attn_weights[:, :, 1]

        attn = torch.matmul(attn_weights, v)
        attn = self.subln(attn)
        attn = attn * (1 - self.lambda_init)
        attn = attn.transpose(1, 2).reshape(bsz, tgt_len, self.num_heads * 2 * self.head_dim)
        return self.out_proj(attn)


class MultiheadFlashDiff(MultiheadDiffAttn):
    """The published code for fast attention calls: two of them, and their outputs subtracted; causal."""

    def forward(self, x):
        bsz, n, _ = x.size()
        q = self.q_proj(x).view(bsz, n, self.num_heads, 2, self.head_dim)
        k = self.k_proj(x).view(bsz, n, self.num_heads, 2, self.head_dim)
        v = self.v_proj(x).view(bsz, n, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q1, q2 = q[:, :, :, 0].transpose(1, 2), q[:, :, :, 1].transpose(1, 2)
        k1, k2 = k[:, :, :, 0].transpose(1, 2), k[:, :, :, 1].transpose(1, 2)
        attn1 = F.scaled_dot_product_attention(q1, k1, v, is_causal=True)
        attn2 = F.scaled_dot_product_attention(q2, k2, v, is_causal=True)

        lambda_1 = torch.exp((self.lambda_q1 * self.lambda_k1).sum(-1).float()).type_as(q)
        lambda_2 = torch.exp((self.lambda_q2 * self.lambda_k2).sum(-1).float()).type_as(q)
        attn = attn1 - (lambda_1 - lambda_2 + self.lambda_init) * attn2
        attn = self.subln(attn) * (1 - self.lambda_init)
        return self.out_proj(attn.transpose(1, 2).flatten(2))


class DiffHalvesAttention(nn.Module):
    """All heads in one softmax; the second half's *outputs* are subtracted; values twice as wide, repeated."""

    def __init__(self, hidden_size, num_heads, lambda_std=0.1, layer_idx=3):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.lambda_init = lambda_init_fn(layer_idx)
        self.lambda_q1 = nn.Parameter(torch.normal(0, lambda_std, size=(self.head_dim,)))
        self.lambda_k1 = nn.Parameter(torch.normal(0, lambda_std, size=(self.head_dim,)))
        self.lambda_q2 = nn.Parameter(torch.normal(0, lambda_std, size=(self.head_dim,)))
        self.lambda_k2 = nn.Parameter(torch.normal(0, lambda_std, size=(self.head_dim,)))
        self.groupnorm = nn.RMSNorm(2 * self.head_dim, eps=1e-5, elementwise_affine=False)

    def forward(self, hidden_states):
        bsz, target_len, _ = hidden_states.size()
        query, key, value = (
            t.view(bsz, target_len, self.num_heads, self.head_dim).transpose(1, 2)
            for t in self.qkv(hidden_states).chunk(3, dim=-1)
        )
        value = torch.cat(torch.chunk(value, 2, dim=1), dim=-1)
        value = value.repeat(1, 2, 1, 1)
        attn_weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32)
        attn_weights = attn_weights.to(query.dtype)
        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1, dtype=torch.float32))
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1, dtype=torch.float32))
        lambda_full = lambda_1.to(query.dtype) - lambda_2.to(query.dtype) + self.lambda_init

        attn_output = torch.matmul(attn_weights, value)
        attn_output1, attn_output2 = torch.chunk(attn_output, 2, dim=1)
        attn_output = attn_output1 - lambda_full * attn_output2
        attn_output = (1 - self.lambda_init) * self.groupnorm(attn_output)
        attn_output = attn_output.transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(bsz, target_len, -1))


class DiffEinsumAttention(DiffHalvesAttention):
    """The pair is an axis of its own, contracted with the weights (1, -lambda); the norm is by hand."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1, self.head_dim)).unbind(2)
        scores = torch.einsum("bqphd,bkphd->bphqk", q, k) * self.head_dim**-0.5
        lam = (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp()
        share = torch.stack((torch.ones_like(lam), -(lam + self.lambda_init)))
        weights = torch.einsum("p,bphqk->bhqk", share, scores.softmax(-1))
        out = torch.einsum("bhqk,bkrhd->bqhrd", weights, v).flatten(-2)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.o_proj(((1 - self.lambda_init) * out).flatten(2))


PROGRAMS = [
    Program(
        name="differential_published",
        family="differential",
        build=small(lambda dim, heads: MultiheadDiffAttn(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="differential_published_sdpa",
        family="differential",
        build=small(lambda dim, heads: MultiheadFlashDiff(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1)),
        twin="differential_published",
        part=2,
        passes=2,
        kernels=2,
        why="no wide value joins the two calls: what joins them is narrow",
    ),
    Program(
        name="differential_halves",
        family="differential",
        build=small(lambda dim, heads: DiffHalvesAttention(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        note="the heads of a pair are rows of one chain; they meet after it",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="differential_einsum",
        family="differential",
        build=small(lambda dim, heads: DiffEinsumAttention(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="differential_halves",
        part=2,
        passes=1,
        kernels=1,
    ),
]
