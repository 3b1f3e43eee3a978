"""Fewer heads of keys and values than of queries: grouped and multi-query attention."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class RepeatInterleaveAttention(nn.Module):
    """Keys and values are copied for each head of a group."""

    def forward(self, q, k, v):
        groups = q.size(1) // k.size(1)
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        attn = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1)
        return attn @ v


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(batch, kv heads, seqlen, head_dim) to (batch, heads, seqlen, head_dim), by expand and reshape."""
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


class ExpandReshapeAttention(nn.Module):
    """Keys and values are expanded, then reshaped; causal."""

    def __init__(self, hidden_size, num_attention_heads, num_key_value_heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.num_key_value_groups = num_attention_heads // num_key_value_heads
        self.scaling = head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def forward(self, hidden_states):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = repeat_kv(key_states, self.num_key_value_groups)
        value_states = repeat_kv(value_states, self.num_key_value_groups)

        attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) * self.scaling
        causal_mask = torch.full(
            attn_weights.shape[-2:],
            torch.finfo(attn_weights.dtype).min,
            dtype=attn_weights.dtype,
            device=attn_weights.device,
        ).triu(diagonal=1)
        attn_weights = attn_weights + causal_mask[None, None]
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query_states.dtype)
        attn_output = torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())


class GroupedViewAttention(nn.Module):
    """Nothing is repeated: queries are viewed as [B, S, H_kv, G, D] and the groups get an axis of their own."""

    def forward(self, q, k, v):
        b, n, h, d = q.shape
        h_kv = k.shape[2]
        q = q.view(b, n, h_kv, h // h_kv, d) * d**-0.5
        logits = torch.einsum("bskgd,btkd->bkgst", q, k)
        logits = logits.float()
        probs = torch.exp(logits - torch.logsumexp(logits, dim=-1, keepdim=True))
        return torch.einsum("bkgst,btkd->bskgd", probs.type_as(q), v).reshape(b, n, h, d)


class BroadcastGroupsAttention(nn.Module):
    """A 5-D matmul broadcasts keys of size 1 over the group."""

    def forward(self, q, k, v):
        h_kv = k.size(1)
        q = q.unflatten(1, (h_kv, -1))  # b hk g s d
        scores = q @ k.unsqueeze(2).mT / q.size(-1) ** 0.5
        return (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


class GroupedSDPA(nn.Module):
    """SDPA's own `enable_gqa`, causal, with packed slices of unequal widths (head dim 96)."""

    def __init__(self, dim, n_heads, n_kv_heads, head_dim):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.qkv_proj = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x):
        B, L, _ = x.shape
        qkv = self.qkv_proj(x)
        query_pos = self.n_heads * self.head_dim
        kv_pos = self.n_kv_heads * self.head_dim
        q = qkv[..., :query_pos].view(B, L, self.n_heads, self.head_dim)
        k = qkv[..., query_pos : query_pos + kv_pos].view(B, L, self.n_kv_heads, self.head_dim)
        v = qkv[..., query_pos + kv_pos :].view(B, L, self.n_kv_heads, self.head_dim)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(B, L, query_pos))


class MultiQueryEinsum(nn.Module):
    """One head of keys and values, without an axis for it; head dim 256."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, head_dim, bias=False)
        self.v_proj = nn.Linear(dim, head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)) * self.scaling
        k, v = self.k_proj(x), self.v_proj(x)
        sim = torch.einsum("bqhd,bkd->bhqk", q, k)
        attn = sim.softmax(dim=-1)
        out = torch.einsum("bhqk,bkd->bqhd", attn, v)
        return self.o_proj(out.flatten(2))


class FoldedMultiQuery(nn.Module):
    """One head of keys; the heads of queries are folded into the rows of a `baddbmm` (GPT-BigCode)."""

    def __init__(self, embed_dim, num_heads, max_positions):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kv_dim = self.head_dim
        self.c_attn = nn.Linear(embed_dim, embed_dim + 2 * self.kv_dim)
        self.c_proj = nn.Linear(embed_dim, embed_dim)
        self.register_buffer(
            "bias",
            torch.tril(torch.ones((max_positions, max_positions), dtype=torch.bool)),
            persistent=False,
        )

    def _attn(self, query, key, value, attention_mask):
        scale_factor = self.head_dim**-0.5
        # (batch_size, query_length, num_heads, key_length)
        query_shape = query.shape
        batch_size = query_shape[0]
        key_length = key.size(-1)
        query_length = query_shape[1]
        attn_shape = (batch_size, query_length, self.num_heads, key_length)
        attn_view = (batch_size, query_length * self.num_heads, key_length)
        query = query.reshape(batch_size, query_length * self.num_heads, self.head_dim)

        attn_weights = torch.empty(attn_view, device=query.device, dtype=query.dtype)
        attn_weights = torch.baddbmm(attn_weights, query, key, beta=0, alpha=scale_factor)
        attn_weights = attn_weights.view(attn_shape)
        mask_value = torch.full([], torch.finfo(attn_weights.dtype).min, dtype=attn_weights.dtype, device=query.device)
        attn_weights = torch.where(attention_mask, attn_weights, mask_value)
        attn_weights = torch.nn.functional.softmax(attn_weights, dim=-1)
        return torch.bmm(attn_weights.view(attn_view), value).view(query_shape)

    def forward(self, hidden_states):
        length = hidden_states.size(1)
        query, key, value = self.c_attn(hidden_states).split((self.embed_dim, self.kv_dim, self.kv_dim), dim=2)
        mask = self.bias[None, :length, :length].unsqueeze(2)
        return self.c_proj(self._attn(query, key.transpose(-1, -2), value, mask))


PROGRAMS = [
    Program(
        name="grouped_repeat_interleave",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=2: RepeatInterleaveAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="grouped_expand_reshape",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=2, head_dim=24: ExpandReshapeAttention(dim, heads, kv_heads, head_dim)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 67), Sizes(3, 1)),
        note="head dim 24; a finite fill, added",
    ),
    Program(
        name="grouped_view_einsum",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=2, head_dim=40: GroupedViewAttention()),
        inputs=feed(building.heads_last),
        traced=Sizes(1, 19),
        others=(Sizes(3, 37, 50), Sizes(2, 1)),
        note="head dim 40; softmax by logsumexp",
    ),
    Program(
        name="grouped_broadcast_matmul",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=2: BroadcastGroupsAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
        twin="grouped_repeat_interleave",
    ),
    Program(
        name="grouped_sdpa_packed",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=2, head_dim=96: GroupedSDPA(dim, heads, kv_heads, head_dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 19), Sizes(2, 1)),
        note="head dim 96",
    ),
    Program(
        name="multi_query_einsum",
        family="grouped",
        build=built(lambda dim, heads, kv_heads=1, head_dim=256: MultiQueryEinsum(dim, heads, head_dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 19),
        others=(Sizes(2, 37), Sizes(3, 1)),
        note="head dim 256",
    ),
    Program(
        name="multi_query_folded_baddbmm",
        family="grouped",
        build=built(lambda dim, heads, max_len=128: FoldedMultiQuery(dim, heads, max_len)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1)),
        note="rows are (position, head) pairs; a mask buffer of max_len; a finite fill",
    ),
]
