"""Scores pressed into (-cap, cap) by tanh."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import built, feed


class SoftcapAttention(nn.Module):
    """tanh(scores / cap) * cap, in three statements; causal after it."""

    def __init__(self, softcap=15.0):
        super().__init__()
        self.softcap = softcap

    def forward(self, query, key, value):
        attn_weights = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5
        attn_weights = attn_weights / self.softcap
        attn_weights = torch.tanh(attn_weights)
        attn_weights = attn_weights * self.softcap
        mask = torch.full(attn_weights.shape[-2:], float("-inf"), device=query.device).triu(1)
        attn_weights = attn_weights + mask.to(query.dtype)
        attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(attn_weights, value)


class BoundedExponentAttention(nn.Module):
    """As the cap bounds the scores, exp goes without a maximum; in-place ops on [B, S, H, D]."""

    def __init__(self, dim, heads, cap=8.0):
        super().__init__()
        self.heads, self.cap = heads, cap
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        logits = torch.einsum("bthd,bshd->bhts", q, k).mul_(1 / math.sqrt(q.shape[-1]))
        logits.div_(self.cap).tanh_().mul_(self.cap)
        e = logits.exp()
        o = torch.einsum("bhts,bshd->bthd", e, v)
        o = o / e.sum(-1).transpose(1, 2).unsqueeze(-1)
        return self.wo(o.flatten(-2))


PROGRAMS = [
    Program(
        name="softcap_causal",
        family="softcap",
        build=built(lambda dim, heads, cap=3.0: SoftcapAttention(cap)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="softcap_without_maximum",
        family="softcap",
        build=built(lambda dim, heads: BoundedExponentAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1)),
    ),
]
