"""Cosine similarities as scores, with a learned temperature."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class CosineAttention(nn.Module):
    """`F.normalize` before the product; a clamped, learned log-scale per head."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((num_heads, 1, 1))))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logit_scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        attn = (attn * logit_scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class TemperatureAttention(nn.Module):
    """Divided by the norms by hand and by a temperature; causal."""

    def __init__(self, num_heads):
        super().__init__()
        self.temperature = nn.Parameter(0.2 * torch.ones(num_heads))

    def forward(self, q, k, v):
        q = q / q.norm(dim=-1, keepdim=True)
        k = k / k.norm(dim=-1, keepdim=True)
        sim = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.temperature.abs().view(1, -1, 1, 1)
        n = sim.shape[-1]
        mask = torch.ones(n, n, device=sim.device).tril() == 0
        weights = torch.softmax(sim.masked_fill(mask, float("-inf")), dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


class DividedScoresAttention(nn.Module):
    """The *scores* are divided by the outer product of norms."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, q, k, v):
        dots = torch.matmul(q, k.transpose(-1, -2))
        q_norm = torch.linalg.vector_norm(q, dim=-1).unsqueeze(-1)
        k_norm = torch.linalg.vector_norm(k, dim=-1).unsqueeze(-2)
        cosine = dots / (q_norm * k_norm).clamp_min(1e-3)
        return torch.matmul(F.softmax(self.scale * cosine, dim=-1), v)


class WindowAttentionV2(nn.Module):
    """Swin V2: cosine scores, and a bias that a small MLP computes from log-spaced coordinates."""

    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((num_heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 32, bias=True),
            nn.ReLU(inplace=True),
            nn.Linear(32, num_heads, bias=False),
        )
        side = torch.arange(-(window_size - 1), window_size, dtype=torch.float32)
        table = torch.stack(torch.meshgrid([side, side], indexing="ij"), dim=-1)
        table = table / (window_size - 1) * 8
        table = torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / math.log2(8)
        self.register_buffer("relative_coords_table", table, persistent=False)

        axis = torch.arange(window_size)
        coords = torch.stack(torch.meshgrid([axis, axis], indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :] + window_size - 1
        index = relative[0] * (2 * window_size - 1) + relative[1]
        self.register_buffer("relative_position_index", index, persistent=False)

        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B_, N, C = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=qkv_bias)
        qkv = qkv.reshape(B_, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]

        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logit_scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        attn = attn * logit_scale

        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(N, N, -1).permute(2, 0, 1)
        attn = attn + 16 * torch.sigmoid(bias.contiguous()).unsqueeze(0)
        attn = torch.softmax(attn, dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C))


PROGRAMS = [
    Program(
        name="cosine_normalize",
        family="cosine",
        build=built(lambda dim, heads: CosineAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="cosine_temperature_causal",
        family="cosine",
        build=built(lambda dim, heads: TemperatureAttention(heads)),
        inputs=feed(building.heads_last),
        traced=Sizes(2, 37),
        others=(Sizes(1, 19), Sizes(3, 1)),
    ),
    Program(
        name="cosine_divided_scores",
        family="cosine",
        build=built(lambda dim, heads: DividedScoresAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 19, 50),
        others=(Sizes(3, 37), Sizes(2, 1, 19)),
    ),
    Program(
        name="cosine_swin_v2",
        family="cosine",
        build=built(lambda dim, heads, window=6: WindowAttentionV2(dim, window, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 36),
        others=(Sizes(3, 36), Sizes(2, 36)),
        note="the window, 6 x 6 tokens, is fixed; the batch counts windows",
    ),
]
