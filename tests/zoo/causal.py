"""Causal masks: by buffer, triu, tril, arange, multiplication and by SDPA's own flag."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


@dataclass
class GPTConfig:
    block_size: int = 1024
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True


class CausalSelfAttention(nn.Module):
    """GPT-2: the mask is a float buffer of a fixed length, sliced, compared with zero."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.register_buffer(
            "bias",
            torch.tril(torch.ones(config.block_size, config.block_size)).view(
                1, 1, config.block_size, config.block_size
            ),
        )

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class TriuLlamaAttention(nn.Module):
    """The mask is `triu` of a matrix of -inf, added; softmax in fp32, then cast back."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_heads, self.head_dim).transpose(1, 2)
        keys = xk.view(bsz, seqlen, self.n_heads, self.head_dim).transpose(1, 2)
        values = xv.view(bsz, seqlen, self.n_heads, self.head_dim).transpose(1, 2)

        mask = torch.full((seqlen, seqlen), float("-inf"), device=x.device)
        mask = torch.triu(mask, diagonal=1)

        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        output = output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class ArangeWhereAttention(nn.Module):
    """Positions are compared; `where` fills with the dtype's least number instead of -inf."""

    def forward(self, q, k, v):
        pos = torch.arange(q.shape[-2], device=q.device)
        visible = pos[:, None] >= pos[None, :]
        s = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5)
        s = torch.where(visible, s, torch.finfo(s.dtype).min)
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(s, -1), v)


class CausalFlagSDPA(nn.Module):
    """`is_causal=True`, and a scale of its own."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5)


class MultiplicativeMaskAttention(nn.Module):
    """The mask is multiplied into the exponentials, so the maximum is over masked scores, too."""

    def forward(self, q, k, v):
        t = q.shape[2]
        mask = torch.ones(t, t, dtype=q.dtype, device=q.device).tril()
        scores = q.matmul(k.transpose(2, 3)) / q.shape[3] ** 0.5
        exp_scores = torch.exp(scores - scores.max(dim=-1, keepdim=True)[0]) * mask
        return exp_scores.matmul(v) / exp_scores.sum(dim=-1, keepdim=True)


class LastQueriesAttention(nn.Module):
    """Fewer queries than keys: the queries are the last ones, so the diagonal is shifted (decoding with a cache)."""

    def forward(self, q, k, v):
        # q: [B, Sq, H, D], k, v: [B, Sk, H, D]
        q_len, kv_len = q.size(1), k.size(1)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        attn_weights = torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(q.size(-1)))
        causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
        causal = causal.tril(diagonal=kv_len - q_len)
        attn_weights = attn_weights.masked_fill(causal.logical_not(), float("-inf"))
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(attn_weights, v).permute(0, 2, 1, 3).contiguous()


PROGRAMS = [
    Program(
        name="causal_gpt2_buffer",
        family="causal",
        build=built(lambda dim, heads, max_len=128: CausalSelfAttention(GPTConfig(max_len, heads, dim))),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="a mask buffer of max_len, sliced to the length",
    ),
    Program(
        name="causal_triu_added",
        family="causal",
        build=built(lambda dim, heads: TriuLlamaAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1)),
    ),
    Program(
        name="causal_arange_where",
        family="causal",
        build=built(lambda dim, heads: ArangeWhereAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(1, 1)),
        note="a finite fill",
    ),
    Program(
        name="causal_sdpa_flag",
        family="causal",
        build=built(lambda dim, heads: CausalFlagSDPA()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50),
        others=(Sizes(3, 19), Sizes(2, 1)),
        twin="causal_arange_where",
    ),
    Program(
        name="causal_multiplied",
        family="causal",
        build=built(lambda dim, heads: MultiplicativeMaskAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 67), Sizes(1, 1)),
        twin="causal_arange_where",
    ),
    Program(
        name="causal_last_queries",
        family="causal",
        build=built(lambda dim, heads: LastQueriesAttention()),
        inputs=feed(building.heads_last),
        traced=Sizes(1, 19, 50),
        others=(Sizes(3, 1, 37), Sizes(2, 37, 67), Sizes(1, 37, 37)),
        note="the queries are the last of the keys: q <= kv",
    ),
]
