"""Combinations as whole models have them: several features at once, attention in a submodule, two chains."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class Gemma2Attention(nn.Module):
    """Grouped queries, rotary embedding, a sliding window and softcap, as in Gemma 2."""

    def __init__(self, hidden_size, num_heads, num_kv_heads, head_dim, sliding_window):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sliding_window = sliding_window
        self.attn_logit_softcapping = 5.0
        self.scaling = 24**-0.5  # query_pre_attn_scalar need not be the head dim
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def rotary(self, x):
        half = x.shape[-1] // 2
        freqs = 10000.0 ** -(torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * freqs
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    def forward(self, hidden_states):
        batch_size, input_len, _ = hidden_states.shape
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        xq, xk, xv = self.qkv_proj(hidden_states).split([q_size, kv_size, kv_size], dim=-1)
        xq = xq.view(batch_size, -1, self.num_heads, self.head_dim)
        xk = xk.view(batch_size, -1, self.num_kv_heads, self.head_dim)
        xv = xv.view(batch_size, -1, self.num_kv_heads, self.head_dim)
        xq, xk = self.rotary(xq), self.rotary(xk)

        key = torch.repeat_interleave(xk, self.num_heads // self.num_kv_heads, dim=2)
        value = torch.repeat_interleave(xv, self.num_heads // self.num_kv_heads, dim=2)
        q, k, v = xq.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        q = q * self.scaling
        scores = torch.matmul(q, k.transpose(2, 3))
        mask = torch.full((1, 1, input_len, input_len), -2.3819763e38, device=q.device).triu(1)
        all_ones = torch.ones_like(mask)
        sliding_mask = torch.triu(all_ones, -1 * self.sliding_window + 1) * torch.tril(
            all_ones, self.sliding_window - 1
        )
        mask = torch.where(sliding_mask == 1, mask, -2.3819763e38)
        scores = scores / self.attn_logit_softcapping
        scores = torch.tanh(scores)
        scores = scores * self.attn_logit_softcapping
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        output = torch.matmul(scores, v)
        output = output.transpose(1, 2).contiguous().view(batch_size, input_len, -1)
        return self.o_proj(output)


def build_alibi_tensor(attention_mask, num_heads, dtype):
    """One row per batch element and head: positions count real tokens only."""
    batch_size, seq_length = attention_mask.shape
    base = torch.tensor(2 ** (-(2 ** -(math.log2(num_heads) - 3))), device=attention_mask.device)
    powers = torch.arange(1, 1 + num_heads, device=attention_mask.device, dtype=torch.int32)
    slopes = torch.pow(base, powers)
    arange_tensor = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = slopes[..., None] * arange_tensor
    return alibi.reshape(batch_size * num_heads, 1, seq_length).to(dtype)


class BloomAttention(nn.Module):
    """ALiBi is the tensor that `baddbmm` adds to; batch and heads merged; qkv packed per head."""

    def __init__(self, hidden_size, n_head):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = n_head
        self.head_dim = hidden_size // n_head
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.beta = 1.0
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=True)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = nn.Dropout(0.0)

    def forward(self, hidden_states, attention_mask):
        batch_size, q_length, _ = hidden_states.shape
        alibi = build_alibi_tensor(attention_mask, self.num_heads, hidden_states.dtype)
        future = torch.ones(q_length, q_length, dtype=torch.bool, device=alibi.device).triu(1)
        masked = future[None, None] | (attention_mask[:, None, None, :] == 0)
        causal_mask = masked.to(hidden_states.dtype) * torch.finfo(hidden_states.dtype).min

        fused_qkv = self.query_key_value(hidden_states)
        fused_qkv = fused_qkv.view(batch_size, q_length, self.num_heads, 3, self.head_dim)
        query_layer = fused_qkv[..., 0, :].transpose(1, 2)
        key_layer = fused_qkv[..., 1, :].transpose(1, 2)
        value_layer = fused_qkv[..., 2, :].transpose(1, 2)
        query_layer = query_layer.reshape(batch_size * self.num_heads, -1, self.head_dim)
        key_layer = key_layer.reshape(batch_size * self.num_heads, -1, self.head_dim)
        key_layer = key_layer.transpose(-1, -2)
        value_layer = value_layer.reshape(batch_size * self.num_heads, -1, self.head_dim)

        attention_scores = alibi.baddbmm(
            batch1=query_layer, batch2=key_layer, beta=self.beta, alpha=self.inv_norm_factor
        )
        attn_weights = attention_scores.view(batch_size, self.num_heads, q_length, -1)
        attn_weights = attn_weights + causal_mask
        attention_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32)
        attention_probs = self.attention_dropout(attention_probs.to(query_layer.dtype))
        attention_probs_reshaped = attention_probs.view(batch_size * self.num_heads, q_length, -1)
        context_layer = torch.bmm(attention_probs_reshaped, value_layer)
        context_layer = context_layer.view(batch_size, self.num_heads, q_length, self.head_dim)
        context_layer = context_layer.permute(0, 2, 1, 3)
        return self.dense(context_layer.reshape(batch_size, q_length, self.hidden_size))


class LeftPaddedCausal(nn.Module):
    """Causal and key padding in one finite mask; padded on the left, so early rows are masked throughout."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = dim // n_heads
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def _prepare_mask(self, attention_mask, dtype):
        length = attention_mask.shape[-1]
        min_dtype = torch.finfo(dtype).min
        causal_mask = torch.full((length, length), min_dtype, dtype=dtype, device=attention_mask.device)
        causal_mask = torch.triu(causal_mask, diagonal=1)
        causal_mask = causal_mask[None, None].expand(attention_mask.shape[0], 1, -1, -1).clone()
        padding_mask = causal_mask + attention_mask[:, None, None, :].to(dtype)
        return causal_mask.masked_fill(padding_mask == 0, min_dtype)

    def forward(self, x, attention_mask):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (t.view(B, T, self.n_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        att = torch.matmul(q, k.transpose(-1, -2)) / (self.head_dim**0.5)
        att = att + self._prepare_mask(attention_mask, att.dtype)
        att = nn.functional.softmax(att, dim=-1)
        return self.c_proj(torch.matmul(att, v).transpose(1, 2).reshape(B, T, C))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.attend = nn.Softmax(dim=-1)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = [
            t.view(b, n, self.heads, d // self.heads).permute(0, 2, 1, 3) for t in self.to_qkv(x).chunk(3, dim=-1)
        ]
        attn = self.attend(torch.matmul(q, k.transpose(-1, -2)) * (d // self.heads) ** -0.5)
        return self.to_out(torch.matmul(attn, v).permute(0, 2, 1, 3).flatten(2))


class EncoderBlock(nn.Module):
    """A whole block: the attention is a submodule; norms, an MLP and residuals are around it."""

    def __init__(self, dim, heads, mlp_ratio=2):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * mlp_ratio), nn.GELU(), nn.Linear(dim * mlp_ratio, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TwoLayerEncoder(nn.Module):
    """A class token in front, a learned position buffer of a fixed length, and two equal layers."""

    def __init__(self, dim, heads, max_len):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, max_len + 1, dim) * 0.2)
        self.layers = nn.ModuleList([EncoderBlock(dim, heads) for _ in range(2)])
        self.head = nn.Linear(dim, 10)

    def forward(self, patches):
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        x = x + self.pos_embed[:, : x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class DecoderLayer(nn.Module):
    """Two chains in one forward: causal self-attention, then cross-attention, each spelled in place."""

    def __init__(self, d_model, nhead):
        super().__init__()
        self.nhead = nhead
        self.self_qkv = nn.Linear(d_model, 3 * d_model)
        self.self_out = nn.Linear(d_model, d_model)
        self.cross_q = nn.Linear(d_model, d_model)
        self.cross_kv = nn.Linear(d_model, 2 * d_model)
        self.cross_out = nn.Linear(d_model, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.linear1 = nn.Linear(d_model, 2 * d_model)
        self.linear2 = nn.Linear(2 * d_model, d_model)

    def heads(self, t):
        return t.unflatten(-1, (self.nhead, -1)).transpose(1, 2)

    def forward(self, tgt, memory):
        T = tgt.shape[1]
        q, k, v = map(self.heads, self.self_qkv(tgt).chunk(3, dim=-1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores + torch.full((T, T), -torch.inf, device=tgt.device).triu(1).to(scores)
        y = torch.softmax(scores, dim=-1) @ v
        tgt = self.norm1(tgt + self.self_out(y.transpose(1, 2).flatten(2)))

        q = self.heads(self.cross_q(tgt))
        k, v = map(self.heads, self.cross_kv(memory).chunk(2, dim=-1))
        y = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
        tgt = self.norm2(tgt + self.cross_out(y.transpose(1, 2).flatten(2)))
        return self.norm3(tgt + self.linear2(F.relu(self.linear1(tgt))))


def alibi_window_attention(q, k, v, alibi_slopes, window: int = 16):
    """A plain function with a default argument: ALiBi and a window, on [S, H, D] without a batch."""
    s = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    i = torch.arange(q.shape[0], device=q.device)[:, None]
    j = torch.arange(k.shape[0], device=q.device)[None]
    s = s - alibi_slopes[:, None, None] * (i - j).abs()
    s = torch.where((i - j).abs() < window, s, -torch.inf)
    return torch.einsum("hqk,khd->qhd", s.softmax(-1), v)


PROGRAMS = [
    Program(
        name="combo_gemma2",
        family="combos",
        build=built(
            lambda dim, heads, kv_heads=2, head_dim=32, window=16: Gemma2Attention(
                dim, heads, kv_heads, head_dim, window
            )
        ),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="a finite fill, added; in fp16 and bf16 the mask makes the scores fp32",
    ),
    Program(
        name="combo_bloom",
        family="combos",
        build=built(lambda dim, heads: BloomAttention(dim, heads)),
        inputs=feed(building.tokens, building.padding_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1)),
        note="a finite fill, added; heads are a power of two",
    ),
    Program(
        name="combo_left_padding",
        family="combos",
        build=built(lambda dim, heads: LeftPaddedCausal(dim, heads)),
        inputs=feed(building.tokens, building.left_padding_mask),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="rows masked throughout, by a finite fill: uniform weights over all keys",
    ),
    Program(
        name="combo_encoder_block",
        family="combos",
        build=built(lambda dim, heads: EncoderBlock(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
    ),
    Program(
        name="combo_two_layers",
        family="combos",
        build=built(lambda dim, heads, max_len=128: TwoLayerEncoder(dim, heads, max_len)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 36),
        others=(Sizes(3, 49), Sizes(2, 1)),
        note="two equal layers; a position buffer of max_len, sliced; one token more than the input",
    ),
    Program(
        name="combo_decoder_layer",
        family="combos",
        build=built(lambda dim, heads: DecoderLayer(dim, heads)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(1, 19, 37),
        others=(Sizes(3, 37, 19), Sizes(2, 1, 50)),
        note="two chains",
    ),
    Program(
        name="combo_function_alibi_window",
        family="combos",
        build=built(lambda dim, heads: alibi_window_attention),
        inputs=feed(building.sequence_heads_last, building.slopes),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 1)),
        note="a plain function; no batch",
    ),
]
