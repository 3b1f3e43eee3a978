"""Weights by a function of each score alone: no softmax."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class SigmoidAttention(nn.Module):
    """sigmoid(score - log n): the logarithm of the length is a Python number."""

    def forward(self, q, k, v):
        n = k.shape[-2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return torch.sigmoid(scores - math.log(n)) @ v


class SigmoidBiasCausal(nn.Module):
    """A learned bias per head; masked after the sigmoid, not before."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(-2.0 * torch.ones(num_heads, 1, 1))

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = torch.einsum("bhqd,bhkd->bhqk", q, k) / (C // self.num_heads) ** 0.5
        attn = torch.sigmoid(attn + self.bias)
        attn = attn.masked_fill(torch.ones(T, T, device=x.device).triu(1).bool(), 0.0)
        return self.proj(torch.einsum("bhqk,bhkd->bqhd", attn, v).reshape(B, T, C))


class ReLUAttention(nn.Module):
    """relu(scores) divided by the number of keys."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) * q.size(-1) ** -0.5
        weights = F.relu(scores) / k.size(-2)
        return torch.matmul(weights, v)


class NormalisedReLUAttention(nn.Module):
    """relu(scores) divided by its own sum, guarded by an epsilon; keys have lengths."""

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.act = nn.ReLU()
        self.eps = eps

    def forward(self, q, k, v, lengths):
        valid = torch.arange(k.size(1), device=k.device) < lengths.unsqueeze(-1)
        w = self.act(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(-1)))
        w = w * valid[:, None, None, :].to(w.dtype)
        w = w / (w.sum(dim=-1, keepdim=True) + self.eps)
        return torch.einsum("bhqk,bkhd->bqhd", w, v)


class SquaredReLUAttention(nn.Module):
    """One head of small keys and wide values, squared relu over the length, gated: a gated attention unit."""

    def __init__(self, dim, query_key_dim=16, hidden=96):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_hidden = nn.Sequential(nn.Linear(dim, hidden * 2), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(dim, query_key_dim), nn.SiLU())
        self.gamma = nn.Parameter(torch.ones(2, query_key_dim))
        self.beta = nn.Parameter(torch.zeros(2, query_key_dim))
        self.to_out = nn.Linear(hidden, dim)
        self.scale = query_key_dim**-0.5

    def forward(self, x):
        seq_len = x.shape[1]
        normed_x = self.norm(x)
        v, gate = self.to_hidden(normed_x).chunk(2, dim=-1)
        qk = self.to_qk(normed_x)
        q, k = (torch.einsum("...d,hd->...hd", qk, self.gamma) + self.beta).unbind(dim=-2)
        sim = torch.einsum("bid,bjd->bij", q, k) * self.scale
        A = F.relu(sim) ** 2 / seq_len
        V = torch.einsum("bij,bjd->bid", A, v)
        return self.to_out(V * gate)


class SquaredReLUCausal(nn.Module):
    """relu squared by `square`, masked by `tril`, divided by the number of visible keys at the end."""

    def forward(self, q, k, v):
        s = q @ k.mT
        w = torch.tril(torch.relu(s * q.shape[-1] ** -0.5).square())
        counts = torch.arange(1, q.shape[-2] + 1, device=q.device, dtype=q.dtype)
        return (w @ v) / counts[:, None]


class SiLUAttention(nn.Module):
    """silu(scores) / n with a causal mask multiplied in, normed and gated (HSTU)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, x):
        B, n, D = x.shape
        u, v, q, k = torch.split(F.silu(self.uvqk(x)), [D, D, D, D], dim=-1)
        qk_attn = torch.einsum(
            "bnhd,bmhd->bhnm",
            q.view(B, n, self.heads, -1),
            k.view(B, n, self.heads, -1),
        )
        qk_attn = F.silu(qk_attn) / n
        qk_attn = qk_attn * torch.ones(n, n, dtype=x.dtype, device=x.device).tril()
        attn_output = torch.einsum("bhnm,bmhd->bnhd", qk_attn, v.view(B, n, self.heads, -1))
        return self.o(u * self.norm(attn_output.reshape(B, n, D)))


PROGRAMS = [
    Program(
        name="sigmoid_log_length",
        family="pointwise",
        build=built(lambda dim, heads: SigmoidAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 37), Sizes(2, 50, 37), Sizes(1, 1, 37)),
        note="math.log(n) makes the number of keys a Python number: only batch and queries vary",
    ),
    Program(
        name="sigmoid_bias_causal",
        family="pointwise",
        build=built(lambda dim, heads: SigmoidBiasCausal(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1)),
    ),
    Program(
        name="relu_over_length",
        family="pointwise",
        build=built(lambda dim, heads: ReLUAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="relu_normalised_lengths",
        family="pointwise",
        build=built(lambda dim, heads: NormalisedReLUAttention()),
        inputs=feed(building.heads_last, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 19, 50), Sizes(3, 1)),
    ),
    Program(
        name="relu_squared_gated_unit",
        family="pointwise",
        build=built(lambda dim, heads: SquaredReLUAttention(dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="one head; keys of 16, values of 96",
    ),
    Program(
        name="relu_squared_causal",
        family="pointwise",
        build=built(lambda dim, heads: SquaredReLUCausal()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(1, 1)),
    ),
    Program(
        name="silu_recommender",
        family="pointwise",
        build=built(lambda dim, heads: SiLUAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
    ),
]
