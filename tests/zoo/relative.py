"""Relative position biases looked up in tables: T5's buckets, clipped distances, Swin's windows."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import built, feed


class T5Attention(nn.Module):
    """T5's encoder: logarithmic buckets, an embedding of them, and no scale."""

    def __init__(self, d_model, num_heads, num_buckets=32, max_distance=128):
        super().__init__()
        self.relative_attention_num_buckets = num_buckets
        self.relative_attention_max_distance = max_distance
        self.n_heads = num_heads
        self.key_value_proj_dim = d_model // num_heads
        self.inner_dim = d_model
        self.q = nn.Linear(d_model, self.inner_dim, bias=False)
        self.k = nn.Linear(d_model, self.inner_dim, bias=False)
        self.v = nn.Linear(d_model, self.inner_dim, bias=False)
        self.o = nn.Linear(self.inner_dim, d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        # T5 has no scale in the forward; it is in the initial weights.
        nn.init.normal_(self.q.weight, std=(d_model * self.key_value_proj_dim) ** -0.5)

    @staticmethod
    def _relative_position_bucket(relative_position, bidirectional=True, num_buckets=32, max_distance=128):
        relative_buckets = 0
        if bidirectional:
            num_buckets //= 2
            relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
            relative_position = torch.abs(relative_position)
        else:
            relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
        max_exact = num_buckets // 2
        is_small = relative_position < max_exact
        relative_position_if_large = max_exact + (
            torch.log(relative_position.float() / max_exact)
            / math.log(max_distance / max_exact)
            * (num_buckets - max_exact)
        ).to(torch.long)
        relative_position_if_large = torch.min(
            relative_position_if_large,
            torch.full_like(relative_position_if_large, num_buckets - 1),
        )
        relative_buckets += torch.where(is_small, relative_position, relative_position_if_large)
        return relative_buckets

    def compute_bias(self, query_length, key_length, device):
        context_position = torch.arange(query_length, dtype=torch.long, device=device)[:, None]
        memory_position = torch.arange(key_length, dtype=torch.long, device=device)[None, :]
        relative_position = memory_position - context_position
        relative_position_bucket = self._relative_position_bucket(
            relative_position,
            bidirectional=True,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        values = self.relative_attention_bias(relative_position_bucket)
        return values.permute([2, 0, 1]).unsqueeze(0)

    def forward(self, hidden_states):
        batch_size, seq_length = hidden_states.shape[:2]

        def shape(states):
            return states.view(batch_size, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)

        query_states = shape(self.q(hidden_states))
        key_states = shape(self.k(hidden_states))
        value_states = shape(self.v(hidden_states))
        scores = torch.matmul(query_states, key_states.transpose(3, 2))
        scores += self.compute_bias(seq_length, seq_length, device=scores.device)
        attn_weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        attn_output = torch.matmul(attn_weights, value_states)
        attn_output = attn_output.transpose(1, 2).contiguous()
        return self.o(attn_output.view(batch_size, -1, self.inner_dim))


class RelativePositionBias(nn.Module):
    """Buckets for a causal decoder, in a submodule that is called with the scores."""

    def __init__(self, scale, heads, num_buckets=32, max_distance=64):
        super().__init__()
        self.scale = scale
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def forward(self, qk_dots):
        i, j, device = *qk_dots.shape[-2:], qk_dots.device
        n = (torch.arange(i, device=device)[:, None] - torch.arange(j, device=device)).clamp(min=0)
        max_exact = self.num_buckets // 2
        # clamp: log(0) is in the branch that `where` throws away, but -inf has no integer
        large = torch.log(n.clamp(min=1).float() / max_exact)
        large = large / math.log(self.max_distance / max_exact) * (self.num_buckets - max_exact)
        large = (max_exact + large.long()).clamp(max=self.num_buckets - 1)
        bias = self.relative_attention_bias(torch.where(n < max_exact, n, large))
        return qk_dots + torch.einsum("ijh->hij", bias) * self.scale


class BucketedDecoderAttention(nn.Module):
    """T5's causal buckets, x-transformers style."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.rel_pos = RelativePositionBias(self.scale**-0.5, heads)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, h = x.shape[0], x.shape[1], self.heads
        q, k, v = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = (t.reshape(b, n, h, -1).transpose(1, 2) for t in (q, k, v))
        dots = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        dots = self.rel_pos(dots)
        causal_mask = torch.ones((n, n), dtype=torch.bool, device=x.device).triu(1)
        dots = dots.masked_fill(causal_mask, -torch.finfo(dots.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", dots.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class ClippedRelativeBias(nn.Module):
    """Distances clipped to a range index a table of biases, [2 * clip + 1, H]."""

    def __init__(self, num_heads, clip=12):
        super().__init__()
        self.clip = clip
        self.table = nn.Parameter(torch.zeros(2 * clip + 1, num_heads))

    def forward(self, q, k, v):
        rel = torch.arange(k.size(-2), device=q.device).unsqueeze(0)
        rel = rel - torch.arange(q.size(-2), device=q.device).unsqueeze(1)
        bias = self.table[rel.clamp(-self.clip, self.clip) + self.clip]  # [q, k, h]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.movedim(-1, 0))


def window_partition(x, window_size):
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows, window_size, H, W):
    # Not `int(windows.shape[0] / ...)`, as older code has it: that makes the batch a Python number.
    C = windows.shape[-1]
    x = windows.view(-1, H // window_size, W // window_size, window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, H, W, C)


class WindowAttention(nn.Module):
    """Swin: an index buffer gathers the bias of a window from a table; a mask per window, if shifted."""

    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size[0] - 1) * (2 * window_size[1] - 1), num_heads)
        )
        coords_h = torch.arange(self.window_size[0])
        coords_w = torch.arange(self.window_size[1])
        coords = torch.stack(torch.meshgrid([coords_h, coords_w], indexing="ij"))
        coords_flatten = torch.flatten(coords, 1)
        relative_coords = coords_flatten[:, :, None] - coords_flatten[:, None, :]
        relative_coords = relative_coords.permute(1, 2, 0).contiguous()
        relative_coords[:, :, 0] += self.window_size[0] - 1
        relative_coords[:, :, 1] += self.window_size[1] - 1
        relative_coords[:, :, 0] *= 2 * self.window_size[1] - 1
        self.register_buffer("relative_position_index", relative_coords.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)

        relative_position_bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(
            self.window_size[0] * self.window_size[1],
            self.window_size[0] * self.window_size[1],
            -1,
        )
        relative_position_bias = relative_position_bias.permute(2, 0, 1).contiguous()
        attn = attn + relative_position_bias.unsqueeze(0)

        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.softmax(attn)
        x = (attn @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class ShiftedWindowBlock(nn.Module):
    """Swin's block: the image is rolled and cut into windows; the mask parts what the roll joined."""

    def __init__(self, dim, input_resolution, num_heads, window_size=4, shift_size=2):
        super().__init__()
        self.input_resolution = input_resolution
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, (window_size, window_size), num_heads)

        H, W = input_resolution
        img_mask = torch.zeros((1, H, W, 1))
        slices = (
            slice(0, -window_size),
            slice(-window_size, -shift_size),
            slice(-shift_size, None),
        )
        cnt = 0
        for h in slices:
            for w in slices:
                img_mask[:, h, w, :] = cnt
                cnt += 1
        mask_windows = window_partition(img_mask, window_size).view(-1, window_size * window_size)
        attn_mask = mask_windows.unsqueeze(1) - mask_windows.unsqueeze(2)
        attn_mask = attn_mask.masked_fill(attn_mask != 0, -100.0)
        self.register_buffer("attn_mask", attn_mask)

    def forward(self, x):
        H, W = self.input_resolution
        B, L, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        shifted_x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        x_windows = window_partition(shifted_x, self.window_size)
        x_windows = x_windows.view(-1, self.window_size * self.window_size, C)
        attn_windows = self.attn(x_windows, mask=self.attn_mask)
        attn_windows = attn_windows.view(-1, self.window_size, self.window_size, C)
        shifted_x = window_reverse(attn_windows, self.window_size, H, W)
        x = torch.roll(shifted_x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        return shortcut + x.view(B, H * W, C)


PROGRAMS = [
    Program(
        name="t5_encoder",
        family="relative",
        build=built(lambda dim, heads: T5Attention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 67), Sizes(2, 1)),
    ),
    Program(
        name="t5_causal_submodule",
        family="relative",
        build=built(lambda dim, heads: BucketedDecoderAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 50),
        others=(Sizes(1, 37), Sizes(3, 1)),
        note="a finite fill",
    ),
    Program(
        name="relative_clipped_sdpa",
        family="relative",
        build=built(lambda dim, heads: ClippedRelativeBias(heads)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37, 19),
        others=(Sizes(3, 50), Sizes(2, 1, 37)),
    ),
    Program(
        name="swin_window",
        family="relative",
        build=built(lambda dim, heads, window=7: WindowAttention(dim, (window, window), heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 49),
        others=(Sizes(3, 49), Sizes(2, 49)),
        note="the window, 7 x 7 tokens, is fixed; the batch counts windows",
    ),
    Program(
        name="swin_shifted_block",
        family="relative",
        build=built(
            lambda dim, heads, side=8, window=4: ShiftedWindowBlock(dim, (side, side), heads, window, window // 2)
        ),
        inputs=feed(building.tokens),
        traced=Sizes(1, 64),
        others=(Sizes(3, 64), Sizes(2, 64)),
        note="the image, 8 x 8 tokens in windows of 4 x 4, is fixed; a finite mask, -100, added",
    ),
]
