"""Scores that also multiply queries, or keys, by embeddings of their distance: DeBERTa, Shaw."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class DisentangledSelfAttention(nn.Module):
    """DeBERTa: content to position and position to content, each a bmm with all distances, then a gather."""

    def __init__(self, hidden_size, num_heads, att_span=8):
        super().__init__()
        self.num_attention_heads = num_heads
        self.att_span = att_span
        self.query_proj = nn.Linear(hidden_size, hidden_size)
        self.key_proj = nn.Linear(hidden_size, hidden_size)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.pos_key_proj = nn.Linear(hidden_size, hidden_size)
        self.pos_query_proj = nn.Linear(hidden_size, hidden_size)
        self.rel_embeddings = nn.Embedding(att_span * 2, hidden_size)

    def transpose_for_scores(self, x):
        x = x.view(x.size()[:-1] + (self.num_attention_heads, -1))
        return x.permute(0, 2, 1, 3).contiguous().view(-1, x.size(1), x.size(-1))

    def forward(self, hidden_states, attention_mask):
        query_layer = self.transpose_for_scores(self.query_proj(hidden_states))
        key_layer = self.transpose_for_scores(self.key_proj(hidden_states))
        value_layer = self.transpose_for_scores(self.value_proj(hidden_states))
        scale = math.sqrt(query_layer.size(-1) * 3)
        attention_scores = torch.bmm(query_layer, key_layer.transpose(-1, -2) / scale)
        attention_scores = attention_scores + self.disentangled_att_bias(query_layer, key_layer, scale)
        b, n, _ = hidden_states.shape
        attention_scores = attention_scores.view(b, self.num_attention_heads, n, n)
        mask = attention_mask.unsqueeze(1).unsqueeze(2) * attention_mask[:, None, :, None]
        attention_scores = attention_scores.masked_fill(~mask.bool(), -1e4)
        attention_probs = torch.softmax(attention_scores, dim=-1)
        context_layer = torch.bmm(attention_probs.view(-1, n, n), value_layer)
        context_layer = context_layer.view(b, self.num_attention_heads, n, -1)
        return context_layer.permute(0, 2, 1, 3).reshape(b, n, -1)

    def disentangled_att_bias(self, query_layer, key_layer, scale):
        n = query_layer.size(-2)
        ids = torch.arange(n, device=query_layer.device)
        relative_pos = (ids[:, None] - ids[None, :]).unsqueeze(0)
        rel = self.rel_embeddings.weight.unsqueeze(0)
        repeat = query_layer.size(0) // self.num_attention_heads
        pos_query = self.transpose_for_scores(self.pos_query_proj(rel)).repeat(repeat, 1, 1)
        pos_key = self.transpose_for_scores(self.pos_key_proj(rel)).repeat(repeat, 1, 1)

        c2p_att = torch.bmm(query_layer, pos_key.transpose(-1, -2))
        c2p_pos = torch.clamp(relative_pos + self.att_span, 0, self.att_span * 2 - 1)
        c2p_index = c2p_pos.squeeze(0).expand([query_layer.size(0), n, n])
        c2p_att = torch.gather(c2p_att, dim=-1, index=c2p_index)

        p2c_pos = torch.clamp(-relative_pos + self.att_span, 0, self.att_span * 2 - 1)
        p2c_att = torch.bmm(key_layer, pos_query.transpose(-1, -2))
        p2c_index = p2c_pos.squeeze(0).expand([query_layer.size(0), n, n])
        p2c_att = torch.gather(p2c_att, dim=-1, index=p2c_index).transpose(-1, -2)
        return c2p_att / scale + p2c_att / scale


class DisentangledEinsum(DisentangledSelfAttention):
    """An embedding for each pair is looked up first, then contracted with the query or the key."""

    def forward(self, x, mask):
        heads = self.num_attention_heads
        q, k, v = (p(x).unflatten(-1, (heads, -1)) for p in (self.query_proj, self.key_proj, self.value_proj))
        i = torch.arange(x.shape[1], device=x.device)
        apart = i[:, None] - i[None, :]
        last = 2 * self.att_span - 1
        pos_k = self.pos_key_proj(self.rel_embeddings.weight).unflatten(-1, (heads, -1))
        pos_q = self.pos_query_proj(self.rel_embeddings.weight).unflatten(-1, (heads, -1))
        index = (apart + self.att_span).clamp(0, last)
        to_key, to_query = pos_k[index], pos_q[index]  # [q, k, h, d]
        s = torch.einsum("bqhd,bkhd->bhqk", q, k)
        s = s + torch.einsum("bqhd,qkhd->bhqk", q, to_key)
        s = s + torch.einsum("bkhd,qkhd->bhqk", k, to_query)
        live = (mask[:, None, :, None] * mask[:, None, None, :]) == 1
        p = (s / (3 * q.shape[-1]) ** 0.5).masked_fill(~live, -1e4).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)


class ShawAttention(nn.Module):
    """Relative positions in keys *and* values (Shaw et al.): an embedding per pair, clipped."""

    def __init__(self, head_dim, clip=6):
        super().__init__()
        self.clip = clip
        self.rel_keys = nn.Embedding(2 * clip + 1, head_dim)
        self.rel_values = nn.Embedding(2 * clip + 1, head_dim)

    def forward(self, q, k, v):
        range_q = torch.arange(q.size(2), device=q.device)
        range_k = torch.arange(k.size(2), device=q.device)
        distance = (range_k[None, :] - range_q[:, None]).clamp(-self.clip, self.clip) + self.clip
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores + torch.einsum("bhqd,qkd->bhqk", q, self.rel_keys(distance))
        attn = torch.softmax(scores / math.sqrt(q.size(-1)), dim=-1)
        return torch.matmul(attn, v) + torch.einsum("bhqk,qkd->bhqd", attn, self.rel_values(distance))


class ShawAttentionMerged(ShawAttention):
    """As the published code multiplies: batch and heads merged, positions first."""

    def forward(self, q, k, v):
        b, h, n, d = q.shape
        j = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
        index = (j - torch.arange(n, device=q.device).unsqueeze(1)).clamp(-self.clip, self.clip)
        a_k, a_v = (F.embedding(index + self.clip, e.weight) for e in (self.rel_keys, self.rel_values))
        q_rows = q.permute(2, 0, 1, 3).reshape(n, b * h, d)
        relative = torch.matmul(q_rows, a_k.transpose(1, 2)).view(n, b, h, -1).permute(1, 2, 0, 3)
        p = F.softmax((q @ k.mT + relative) * d**-0.5, dim=-1)
        p_rows = p.permute(2, 0, 1, 3).reshape(n, b * h, -1)
        return p @ v + torch.matmul(p_rows, a_v).view(n, b, h, d).permute(1, 2, 0, 3)


class ShawKeysGather(nn.Module):
    """Keys only, long ahead: products with all clipped distances, then a gather along them; causal."""

    def __init__(self, head_dim, clip=10):
        super().__init__()
        self.clip = clip
        self.table = nn.Parameter(torch.randn(clip + 1, head_dim))

    def forward(self, q, k, v):
        n = q.size(-2)
        i = torch.arange(n, device=q.device)
        back = i[:, None] - i[None, :]
        by_distance = q @ self.table.t()  # [b, h, q, clip + 1]
        index = back.clamp(0, self.clip).expand(*q.shape[:2], n, n)
        scores = q @ k.transpose(-1, -2) + by_distance.gather(-1, index)
        scores = scores.masked_fill(back < 0, float("-inf"))
        return (scores / q.size(-1) ** 0.5).softmax(dim=-1) @ v


class ShawKeysLookup(ShawKeysGather):
    """Advanced indexing of the table; the sum of a key and its position's embedding is multiplied at once."""

    def forward(self, q, k, v):
        i = torch.arange(q.shape[2], device=q.device)
        back = i.unsqueeze(1) - i.unsqueeze(0)
        moved = k.unsqueeze(2) + self.table[back.clamp(0, self.clip)]  # [b, h, q, k, d]
        scores = torch.einsum("bhqd,bhqkd->bhqk", q * q.shape[-1] ** -0.5, moved)
        weights = torch.where(back >= 0, scores, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class AxialDecomposed(nn.Module):
    """ViTDet, SAM: keys on a grid; the query's products with row and column embeddings are added."""

    def __init__(self, head_dim, width):
        super().__init__()
        self.width = width
        self.rel_pos_h = nn.Parameter(torch.randn(64, head_dim) * 0.3)
        self.rel_pos_w = nn.Parameter(torch.randn(width, head_dim) * 0.3)

    def forward(self, q, k, v):
        B, heads, n, d = q.shape
        h, w = k.shape[2] // self.width, self.width
        attn = (q * d**-0.5) @ k.transpose(-2, -1)
        rel_h = torch.einsum("bnqc,hc->bnqh", q, self.rel_pos_h[:h])
        rel_w = torch.einsum("bnqc,wc->bnqw", q, self.rel_pos_w)
        attn = attn.view(B, heads, n, h, w) + rel_h[..., :, None] + rel_w[..., None, :]
        attn = attn.view(B, heads, n, h * w).softmax(dim=-1)
        return attn @ v


class AxialDecomposedIndexed(AxialDecomposed):
    """A key's row and column by floor division and remainder; embeddings are added to the keys."""

    def forward(self, q, k, v):
        j = torch.arange(k.shape[2], device=q.device)
        place = self.rel_pos_h[j // self.width] + self.rel_pos_w[j % self.width]
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        s = s + torch.einsum("bhqd,kd->bhqk", q, place)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(s, -1), v)


PROGRAMS = [
    Program(
        name="deberta_gather",
        family="disentangled",
        build=small(lambda dim, heads, span=8: DisentangledSelfAttention(dim, heads, span)),
        inputs=feed(building.tokens, building.padding_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite fill; rows of padding are masked throughout",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="deberta_einsum",
        family="disentangled",
        build=small(lambda dim, heads, span=8: DisentangledEinsum(dim, heads, span)),
        inputs=feed(building.tokens, building.padding_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="deberta_gather",
        note="a finite fill; rows of padding are masked throughout",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="shaw_keys_and_values",
        family="disentangled",
        build=small(lambda dim, heads, clip=6: ShawAttention(dim // heads, clip)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="shaw_keys_and_values_merged",
        family="disentangled",
        build=small(lambda dim, heads, clip=6: ShawAttentionMerged(dim // heads, clip)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="shaw_keys_and_values",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="shaw_keys_gather",
        family="disentangled",
        build=small(lambda dim, heads, clip=10: ShawKeysGather(dim // heads, clip)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="shaw_keys_lookup",
        family="disentangled",
        build=small(lambda dim, heads, clip=10: ShawKeysLookup(dim // heads, clip)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="shaw_keys_gather",
        note="keys that depend on the row",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="decomposed_grid",
        family="disentangled",
        build=small(lambda dim, heads, width=5: AxialDecomposed(dim // heads, width)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 35),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="keys are a grid, 5 wide",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="decomposed_grid_indexed",
        family="disentangled",
        build=small(lambda dim, heads, width=5: AxialDecomposedIndexed(dim // heads, width)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 35),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        twin="decomposed_grid",
        note="keys are a grid, 5 wide",
        part=2,
        passes=1,
        kernels=1,
    ),
]
