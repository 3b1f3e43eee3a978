"""Sliding, dilated and chunked (block-local) windows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Program, Sizes, building
from .building import built, feed


class SlidingBand(nn.Module):
    """A causal band from the difference of positions."""

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device).unsqueeze(1)
        j = torch.arange(k.size(2), device=q.device).unsqueeze(0)
        distance = i - j
        outside = (distance < 0) | (distance >= self.window)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(outside, float("-inf"))
        return F.softmax(scores, dim=-1) @ v


class SlidingLogMask(nn.Module):
    """The band is `tril` of `triu` of ones, and its *logarithm* is added to the scores."""

    def __init__(self, sliding_window):
        super().__init__()
        self.sliding_window = sliding_window

    def _make_sliding_window_causal_mask(self, tgt_len, dtype, device):
        tensor = torch.full((tgt_len, tgt_len), fill_value=1, device=device)
        mask = torch.tril(tensor, diagonal=0)
        # triu keeps the diagonal it is given, hence the + 1
        mask = torch.triu(mask, diagonal=-self.sliding_window + 1)
        return torch.log(mask).to(dtype)

    def forward(self, query_states, key_states, value_states):
        q_len = query_states.shape[-2]
        mask = self._make_sliding_window_causal_mask(q_len, query_states.dtype, query_states.device)
        attn_weights = torch.matmul(query_states, key_states.transpose(2, 3))
        attn_weights = attn_weights / math.sqrt(query_states.shape[-1])
        attn_weights = attn_weights + mask[None, None, :, :]
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32)
        attn_weights = attn_weights.to(query_states.dtype)
        return torch.matmul(attn_weights, value_states)


class LocalEncoderAttention(nn.Module):
    """A window to both sides, handed to SDPA as a boolean mask."""

    def __init__(self, dim, num_heads, radius):
        super().__init__()
        self.num_heads, self.radius = num_heads, radius
        self.in_proj = nn.Linear(dim, dim * 3)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.in_proj(x).view(batch, length, 3, self.num_heads, -1).unbind(dim=2)
        position = torch.arange(length, device=x.device)
        local = (position[None] - position[:, None]).abs() <= self.radius
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=local)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, dim))


class DilatedAttention(nn.Module):
    """Every `dilation`-th key of the past, by a remainder."""

    def __init__(self, window=8, dilation=2):
        super().__init__()
        self.window = window
        self.dilation = dilation

    def forward(self, q, k, v):
        n = q.shape[1]  # q, k, v: [B, S, H, D]
        rows = torch.arange(n, device=q.device)[:, None]
        cols = torch.arange(n, device=q.device)[None, :]
        delta = rows - cols
        keep = (delta >= 0) & (delta < self.window * self.dilation) & (delta % self.dilation == 0)
        att = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        att = torch.where(keep, att, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", att, v)


class DilatedOffsetsAttention(nn.Module):
    """The same set of keys as a list of offsets: a key is kept if any offset hits it."""

    def __init__(self, window=8, dilation=2):
        super().__init__()
        self.register_buffer("offsets", torch.arange(window) * dilation, persistent=False)

    def forward(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        index = torch.arange(q.size(-2), device=q.device)
        back = index.view(-1, 1) - index.view(1, -1)
        allowed = (back.unsqueeze(-1) == self.offsets).any(dim=-1)
        bias = torch.zeros_like(back, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
        weights = torch.softmax(q @ k.mT / math.sqrt(q.size(-1)) + bias, dim=-1)
        return (weights @ v).transpose(1, 2)


class ChunkedCausalAttention(nn.Module):
    """Causal within blocks of a fixed size: blocks are compared by floor division."""

    def __init__(self, hidden_size, num_heads, chunk_size):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.chunk_size = chunk_size
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def create_chunked_attention_mask(self, seq_len, device):
        idx = torch.arange(seq_len, device=device)
        block = torch.div(idx, self.chunk_size, rounding_mode="floor")
        same_block = block.unsqueeze(0) == block.unsqueeze(1)
        token_pos = idx.unsqueeze(0) <= idx.unsqueeze(1)
        return same_block & token_pos

    def forward(self, hidden_states):
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        mask = self.create_chunked_attention_mask(hidden_states.shape[1], hidden_states.device)
        attn = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        attn = attn.masked_fill(~mask[None, None], torch.finfo(attn.dtype).min)
        attn = torch.softmax(attn, dim=-1, dtype=torch.float32).to(query.dtype)
        out = torch.matmul(attn, value).transpose(1, 2)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous())


class BlockLocalView(nn.Module):
    """Blocks by a 5-D view, attention inside each: no mask at all."""

    def __init__(self, block: int):
        super().__init__()
        self.block = block

    def forward(self, q, k, v):
        b, h, s, d = q.shape
        q, k, v = (x.view(b, h, s // self.block, self.block, d) for x in (q, k, v))
        w = torch.einsum("bhnqd,bhnkd->bhnqk", q * d**-0.5, k).softmax(dim=-1)
        return torch.einsum("bhnqk,bhnkd->bhnqd", w, v).reshape(b, h, s, d)


PROGRAMS = [
    Program(
        name="sliding_band",
        family="windows",
        build=built(lambda dim, heads, window=11: SlidingBand(window)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 67), Sizes(2, 1)),
    ),
    Program(
        name="sliding_log_mask",
        family="windows",
        build=built(lambda dim, heads, window=11: SlidingLogMask(window)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 19),
        others=(Sizes(1, 50), Sizes(3, 1)),
        twin="sliding_band",
    ),
    Program(
        name="sliding_both_sides_sdpa",
        family="windows",
        build=built(lambda dim, heads, window=8: LocalEncoderAttention(dim, heads, window)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(1, 1)),
    ),
    Program(
        name="dilated_remainder",
        family="windows",
        build=built(lambda dim, heads, window=8: DilatedAttention(window)),
        inputs=feed(building.heads_last),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(1, 1)),
    ),
    Program(
        name="dilated_offsets",
        family="windows",
        build=built(lambda dim, heads, window=8: DilatedOffsetsAttention(window)),
        inputs=feed(building.heads_last),
        traced=Sizes(1, 37),
        others=(Sizes(2, 19), Sizes(1, 1)),
        twin="dilated_remainder",
        note="the predicate has an `any` over the offsets, a buffer",
    ),
    Program(
        name="chunked_floor_division",
        family="windows",
        build=built(lambda dim, heads, chunk=16: ChunkedCausalAttention(dim, heads, chunk)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="chunked_view",
        family="windows",
        build=built(lambda dim, heads, chunk=16: BlockLocalView(chunk)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 48),
        others=(Sizes(3, 64), Sizes(2, 16)),
        note="rows and stream are one block long, a constant; lengths are multiples of it",
    ),
]
