"""Multi-head latent attention: keys and values from a narrow latent, a rotary part shared by all heads, Dv != Dqk."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


def rotate(x, theta=10000.0):
    """Rotary embedding of pairs (0, 1), (2, 3), ... of the last dim; positions are dim 1."""
    half = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * theta ** (-half / x.shape[-1])
    shape = (1, x.shape[1]) + (1,) * (x.dim() - 3) + (x.shape[-1] // 2,)
    cos, sin = angles.cos().view(shape).to(x.dtype), angles.sin().view(shape).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class LatentAttention(nn.Module):
    """Keys are a `cat` of a part per head and a rotary part expanded over the heads; causal."""

    def __init__(self, hidden_size, num_heads, kv_lora_rank=32):
        super().__init__()
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = hidden_size // num_heads
        self.qk_rope_head_dim = self.qk_nope_head_dim // 2
        self.v_head_dim = self.qk_nope_head_dim
        self.q_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * self.q_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, hidden_size, bias=False)
        self.softmax_scale = self.q_head_dim**-0.5

    def forward(self, hidden_states):
        bsz, q_len, _ = hidden_states.size()
        q = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, self.q_head_dim)
        q_nope, q_pe = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed_kv = self.kv_a_proj_with_mqa(hidden_states)
        compressed_kv, k_pe = torch.split(compressed_kv, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed_kv))
        kv = kv.view(bsz, q_len, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, value_states = torch.split(kv, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        q_pe, k_pe = rotate(q_pe), rotate(k_pe.unsqueeze(2))

        query_states = torch.cat([q_nope, q_pe], dim=-1).transpose(1, 2)
        k_pe = k_pe.expand(-1, -1, self.num_heads, -1)
        key_states = torch.cat([k_nope, k_pe], dim=-1).transpose(1, 2)
        value_states = value_states.transpose(1, 2)

        attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) * self.softmax_scale
        causal = torch.ones(q_len, q_len, dtype=torch.bool, device=q.device).tril()
        attn_weights = attn_weights.masked_fill(~causal, float("-inf"))
        attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
        attn_output = torch.matmul(attn_weights, value_states)
        attn_output = attn_output.transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(bsz, q_len, self.num_heads * self.v_head_dim))


class MLA(nn.Module):
    """Two products are summed into the scores: the rotary keys have no head axis and are never copied."""

    def __init__(self, dim, n_heads, kv_lora_rank=32):
        super().__init__()
        self.n_heads = n_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = dim // n_heads
        self.qk_rope_head_dim = dim // n_heads // 2
        self.v_head_dim = dim // n_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.wq = nn.Linear(dim, n_heads * self.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(dim, kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.wkv_b = nn.Linear(kv_lora_rank, n_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.wo = nn.Linear(n_heads * self.v_head_dim, dim, bias=False)
        self.softmax_scale = self.qk_head_dim**-0.5

    def forward(self, x):
        bsz, seqlen, _ = x.size()
        q = self.wq(x).view(bsz, seqlen, self.n_heads, self.qk_head_dim)
        q_nope, q_pe = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        kv, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        q_pe, k_pe = rotate(q_pe), rotate(k_pe)
        kv = self.wkv_b(self.kv_norm(kv)).view(bsz, seqlen, self.n_heads, -1)
        k_nope, v = torch.split(kv, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)

        scores = torch.einsum("bshd,bthd->bsht", q_nope, k_nope)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, k_pe)) * self.softmax_scale
        mask = torch.full((seqlen, seqlen), float("-inf"), device=x.device).triu_(1)
        scores = scores + mask.to(x.dtype).unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        x = torch.einsum("bsht,bthd->bshd", scores, v)
        return self.wo(x.flatten(2))


class AbsorbedMLA(nn.Module):
    """The up-projection is absorbed into the queries and the output: keys and values are one tensor, the latent."""

    def __init__(self, dim, n_heads, kv_lora_rank=32):
        super().__init__()
        self.n_heads, self.kv_lora_rank = n_heads, kv_lora_rank
        self.nope, self.rope, self.v = dim // n_heads, dim // n_heads // 2, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * (self.nope + self.rope), bias=False)
        self.wkv_a = nn.Linear(dim, kv_lora_rank + self.rope, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.wkv_b = nn.Linear(kv_lora_rank, n_heads * (self.nope + self.v), bias=False)
        self.wo = nn.Linear(n_heads * self.v, dim, bias=False)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, self.n_heads, -1)
        q_nope, q_pe = q[..., : self.nope], rotate(q[..., self.nope :])
        latent, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.rope], dim=-1)
        latent, k_pe = self.kv_norm(latent), rotate(k_pe)
        up = self.wkv_b.weight.view(self.n_heads, -1, self.kv_lora_rank)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, up[:, : self.nope])
        scores = torch.einsum("bshc,btc->bsht", q_latent, latent)
        scores += torch.einsum("bshr,btr->bsht", q_pe, k_pe)
        scores *= (self.nope + self.rope) ** -0.5
        pos = torch.arange(s, device=x.device)
        scores = scores.masked_fill((pos[:, None] < pos[None, :]).unsqueeze(1), float("-inf"))
        out = torch.einsum("bsht,btc->bshc", torch.softmax(scores, dim=-1), latent)
        out = torch.einsum("bshc,hdc->bshd", out, up[:, self.nope :])
        return self.wo(out.flatten(2))


PROGRAMS = [
    Program(
        name="mla_concatenated",
        family="mla",
        build=built(lambda dim, heads, kv_rank=32: LatentAttention(dim, heads, kv_rank)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="Dqk = 24, Dv = 16",
    ),
    Program(
        name="mla_two_products",
        family="mla",
        build=built(lambda dim, heads, kv_rank=32: MLA(dim, heads, kv_rank)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 50), Sizes(3, 1)),
        note="scores are [B, S, H, T]; Dqk = 16 + 8, Dv = 16",
    ),
    Program(
        name="mla_absorbed",
        family="mla",
        build=built(lambda dim, heads, kv_rank=32: AbsorbedMLA(dim, heads, kv_rank)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
        twin="mla_two_products",
        note="keys and values are one tensor; Dqk = 32 + 8, Dv = 32, whatever the dim",
    ),
    Program(
        name="mla_absorbed_wide",
        family="mla",
        build=built(lambda dim, heads, kv_rank=512: AbsorbedMLA(dim, heads, kv_rank), heads=2),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 19),),
        note="a latent as wide as published: no program holds all of it",
    ),
]
