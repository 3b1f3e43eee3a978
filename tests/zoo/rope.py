"""Rotary embeddings and norms of queries and keys, before the attention."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


def rotate_half(x):
    """Rotates half the hidden dims of the input."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class RotaryAttention(nn.Module):
    """Halves are rotated; cosines and sines are buffers of a fixed length; causal by an additive mask."""

    def __init__(self, dim, num_heads, max_position_embeddings):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim))
        freqs = torch.outer(torch.arange(max_position_embeddings).float(), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos()[None, None, :, :], persistent=False)
        self.register_buffer("sin_cached", emb.sin()[None, None, :, :], persistent=False)

    def forward(self, x):
        bsz, q_len, _ = x.size()
        q = self.q_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.cos_cached[:, :, :q_len, :], self.sin_cached[:, :, :q_len, :]
        q = (q * cos) + (rotate_half(q) * sin)
        k = (k * cos) + (rotate_half(k) * sin)

        attn_weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        mask = x.new_full((q_len, q_len), torch.finfo(x.dtype).min)
        mask_cond = torch.arange(mask.size(-1), device=mask.device)
        mask.masked_fill_(mask_cond < (mask_cond + 1).view(mask.size(-1), 1), 0)
        attn_weights = attn_weights + mask[None, None, :, :]
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
        attn_output = torch.matmul(attn_weights, v).transpose(1, 2)
        return self.o_proj(attn_output.reshape(bsz, q_len, -1))


class InterleavedRotaryAttention(nn.Module):
    """Pairs of neighbours are rotated, by stack and flatten; angles are made in the forward."""

    def __init__(self, dim, heads, base=10000.0):
        super().__init__()
        self.heads = heads
        self.base = base
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def apply_rope(self, x):
        # x: [B, S, H, D]
        d = x.shape[-1]
        freq = self.base ** (-torch.arange(0, d, 2, device=x.device).float() / d)
        t = torch.arange(x.shape[1], device=x.device).float()
        angle = torch.einsum("s,f->sf", t, freq)[:, None, :]
        x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack([x0 * angle.cos() - x1 * angle.sin(), x0 * angle.sin() + x1 * angle.cos()], dim=-1)
        return out.flatten(-2).type_as(x)

    def forward(self, x):
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.apply_rope(q), self.apply_rope(k)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class PartialRotaryAttention(nn.Module):
    """Only the first dims of each head are rotated (Phi); position ids gather cosines and sines; head dim 80."""

    def __init__(self, hidden_size, num_heads, head_dim, max_len):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.rotary_ndims = int(head_dim * 0.4)
        self.Wqkv = nn.Linear(hidden_size, 3 * num_heads * head_dim)
        self.dense = nn.Linear(num_heads * head_dim, hidden_size)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, self.rotary_ndims, 2) / self.rotary_ndims))
        freqs = torch.outer(torch.arange(max_len), inv_freq)
        self.register_buffer("cos", torch.cat((freqs, freqs), dim=-1).cos())
        self.register_buffer("sin", torch.cat((freqs, freqs), dim=-1).sin())

    def forward(self, hidden_states, position_ids):
        bsz, q_len, _ = hidden_states.size()
        qkv = self.Wqkv(hidden_states).view(bsz, q_len, 3, self.num_heads, self.head_dim)
        query, key, value = (t.squeeze(2).transpose(1, 2) for t in qkv.split(1, dim=2))
        cos = self.cos[position_ids].unsqueeze(1)  # [bs, 1, seq_len, dim]
        sin = self.sin[position_ids].unsqueeze(1)

        query_rot, query_pass = query[..., : self.rotary_ndims], query[..., self.rotary_ndims :]
        key_rot, key_pass = key[..., : self.rotary_ndims], key[..., self.rotary_ndims :]
        query_rot = query_rot * cos + rotate_half(query_rot) * sin
        key_rot = key_rot * cos + rotate_half(key_rot) * sin
        query = torch.cat((query_rot, query_pass), dim=-1)
        key = torch.cat((key_rot, key_pass), dim=-1)

        # fp32 here, as the scores of this model overflow fp16
        scores = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(2, 3))
        scores = scores / math.sqrt(self.head_dim)
        visible = position_ids[:, None, :, None] >= position_ids[:, None, None, :]
        scores = scores.masked_fill(~visible, float("-inf"))
        attn_weights = F.softmax(scores, dim=-1).to(value.dtype)
        out = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
        return self.dense(out.view(bsz, q_len, -1))


class RMSNormHeadsAttention(nn.Module):
    """Each head's queries and keys pass an RMSNorm with shared weights (Qwen3); grouped."""

    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim = dim // n_heads
        self.groups = n_heads // n_kv_heads
        self.q_proj = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.q_norm_weight = nn.Parameter(torch.ones(self.head_dim))
        self.k_norm_weight = nn.Parameter(torch.ones(self.head_dim))

    @staticmethod
    def rms_norm(x, weight, eps=1e-6):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.rms_norm(self.q_proj(x).view(b, s, -1, self.head_dim), self.q_norm_weight)
        k = self.rms_norm(self.k_proj(x).view(b, s, -1, self.head_dim), self.k_norm_weight)
        v = self.v_proj(x).view(b, s, -1, self.head_dim)
        k, v = (t.repeat_interleave(self.groups, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.head_dim**-0.5
        hidden = torch.ones(s, s, device=x.device, dtype=torch.bool).triu(diagonal=1)
        scores.masked_fill_(hidden, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", F.softmax(scores, dim=-1), v)
        return self.o_proj(out.reshape(b, s, -1))


class LayerNormHeadsAttention(nn.Module):
    """`nn.LayerNorm` on each head's queries and keys, as in large vision transformers."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = attn @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class FullWidthNormAttention(nn.Module):
    """The norm is over all heads at once, before they are split (OLMo 2)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.att_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.q_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.k_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.att_proj(x).split((C, C, C), dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2) for t in (q, k, v))
        att = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=T > 1)
        return self.attn_out(att.transpose(1, 2).contiguous().view(B, T, C))


PROGRAMS = [
    Program(
        name="rope_halves_buffers",
        family="rope",
        build=built(lambda dim, heads, max_len=128: RotaryAttention(dim, heads, max_len)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="cosine and sine buffers of max_len, sliced to the length; a finite fill, added",
    ),
    Program(
        name="rope_interleaved_sdpa",
        family="rope",
        build=built(lambda dim, heads: InterleavedRotaryAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1)),
    ),
    Program(
        name="rope_partial_position_ids",
        family="rope",
        build=built(
            lambda dim, heads, head_dim=80, max_len=128: PartialRotaryAttention(dim, heads, head_dim, max_len + 128)
        ),
        inputs=feed(building.tokens, building.positions),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
        note="head dim 80; the causal mask compares position ids, an input; positions start below 100",
    ),
    Program(
        name="qk_norm_rms_grouped",
        family="rope",
        build=built(lambda dim, heads, kv_heads=2: RMSNormHeadsAttention(dim, heads, kv_heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(2, 1)),
    ),
    Program(
        name="qk_norm_layer_norm",
        family="rope",
        build=built(lambda dim, heads: LayerNormHeadsAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 19), Sizes(3, 1)),
    ),
    Program(
        name="qk_norm_full_width_sdpa",
        family="rope",
        build=built(lambda dim, heads: FullWidthNormAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 2)),
        note="is_causal depends on the length being 1, so 1 is another program",
    ),
]
