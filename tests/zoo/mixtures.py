"""Two softmaxes over one score, or one pair of positions, mixed by a learned gate."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class LocalAndGlobal(nn.Module):
    """One score, softmaxed within a window and over all keys; a gate per head mixes the weights."""

    def __init__(self, heads, window):
        super().__init__()
        self.window = window
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        i = torch.arange(q.size(-2), device=q.device)
        far = (i[:, None] - i[None, :]).abs() > self.window
        near_weights = scores.masked_fill(far, float("-inf")).softmax(dim=-1)
        all_weights = scores.softmax(dim=-1)
        g = torch.sigmoid(self.gate)[None, :, None, None]
        return (g * near_weights + (1 - g) * all_weights) @ v


class LocalAndGlobalOutputs(LocalAndGlobal):
    """Each softmax has its own product with the values; the gate mixes the outputs by `lerp`."""

    def forward(self, q, k, v):
        n = q.shape[2]
        scores = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        ones = torch.ones(n, n, dtype=torch.bool, device=q.device)
        near = ones.triu(-self.window) & ones.tril(self.window)
        bias = torch.where(near, 0.0, -torch.inf).to(q.dtype)
        local = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores + bias, -1), v)
        everywhere = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), v)
        return torch.lerp(everywhere, local, self.gate.sigmoid().view(-1, 1, 1))


class SoftAndSharp(nn.Module):
    """The score at two temperatures; the gate depends on the row and the head; causal."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_gate = nn.Linear(dim, heads)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), 3.0))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        sim = torch.matmul(q, k.mT) * (d // self.heads) ** -0.5
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        sim = torch.where(causal, sim, torch.finfo(sim.dtype).min)
        gate = self.to_gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        sharp = F.softmax(sim * self.sharpness.exp().clamp(max=4), dim=-1)
        attn = gate * F.softmax(sim, dim=-1) + (1 - gate) * sharp
        return (attn @ v).transpose(1, 2).reshape(b, n, d)


class SoftAndSharpByHand(SoftAndSharp):
    """By hand, one maximum for both: the sharper softmax's exponent is a multiple of the other's."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        sim = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        i = torch.arange(x.shape[1], device=x.device)
        sim = sim.masked_fill(i[None, :] > i[:, None], float("-inf"))
        sim = sim - sim.amax(dim=-1, keepdim=True)
        soft, sharp = sim.exp(), (sim * self.sharpness.exp().clamp(max=4)).exp()
        soft_out = torch.einsum("bhij,bjhd->bhid", soft, v) / soft.sum(-1, keepdim=True)
        sharp_out = torch.einsum("bhij,bjhd->bhid", sharp, v) / sharp.sum(-1, keepdim=True)
        gate = torch.sigmoid(self.to_gate(x)).permute(0, 2, 1)[..., None]
        out = gate * soft_out + (1 - gate) * sharp_out
        return out.permute(0, 2, 1, 3).flatten(2)


class GatedPositionalSelfAttention(nn.Module):
    """ConViT: content and positional weights gated per head, then divided by their sum."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qk = nn.Linear(dim, dim * 2, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.proj = nn.Linear(dim, dim)

    def get_rel_indices(self, num_patches, device):
        ind = torch.arange(num_patches, device=device).view(1, -1)
        ind = (ind - torch.arange(num_patches, device=device).view(-1, 1)) / 8
        return torch.stack((ind, ind.abs(), ind**2), dim=-1).unsqueeze(0)

    def get_attention(self, x):
        B, N, C = x.shape
        qk = self.qk(x).reshape(B, N, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = qk[0], qk[1]
        pos_score = self.get_rel_indices(N, x.device).to(x.dtype).expand(B, -1, -1, -1)
        pos_score = self.pos_proj(pos_score).permute(0, 3, 1, 2)
        patch_score = (q @ k.transpose(-2, -1)) * self.scale
        patch_score = patch_score.softmax(dim=-1)
        pos_score = pos_score.softmax(dim=-1)
        gating = self.gating_param.view(1, -1, 1, 1)
        attn = (1.0 - torch.sigmoid(gating)) * patch_score + torch.sigmoid(gating) * pos_score
        attn /= attn.sum(dim=-1).unsqueeze(-1)
        return attn

    def forward(self, x):
        B, N, C = x.shape
        attn = self.get_attention(x)
        v = self.v(x).reshape(B, N, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class GatedPositionalWrittenOut(GatedPositionalSelfAttention):
    """The positional score term by term; the output, not the weights, is divided."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k = self.qk(x).view(b, n, 2, self.num_heads, -1).unbind(2)
        v = self.v(x).view(b, n, self.num_heads, -1)
        i = torch.arange(n, device=x.device, dtype=x.dtype)
        apart = (i[None, :] - i[:, None]) / 8
        w, bias = self.pos_proj.weight[:, :, None, None], self.pos_proj.bias[:, None, None]
        place = w[:, 0] * apart + w[:, 1] * apart.abs() + w[:, 2] * apart.square() + bias
        content = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        gate = self.gating_param.sigmoid().view(-1, 1, 1)
        weights = content.softmax(-1) * (1 - gate) + place.softmax(-1) * gate
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        out = out / weights.sum(-1).transpose(1, 2).unsqueeze(-1)
        return self.proj(out.reshape(b, n, -1))


PROGRAMS = [
    Program(
        name="mixture_local_global",
        family="mixtures",
        build=small(lambda dim, heads, window=6: LocalAndGlobal(heads, window)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="mixture_local_global_outputs",
        family="mixtures",
        build=small(lambda dim, heads, window=6: LocalAndGlobalOutputs(heads, window)),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="mixture_local_global",
        note="one score, two outputs, mixed after",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="mixture_temperatures",
        family="mixtures",
        build=small(lambda dim, heads: SoftAndSharp(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        note="a finite fill",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="mixture_temperatures_by_hand",
        family="mixtures",
        build=small(lambda dim, heads: SoftAndSharpByHand(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="mixture_temperatures",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="mixture_convit",
        family="mixtures",
        build=small(lambda dim, heads: GatedPositionalSelfAttention(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="the sum of the mixed weights is one: a normaliser that need not be computed",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="mixture_convit_written_out",
        family="mixtures",
        build=small(lambda dim, heads: GatedPositionalWrittenOut(dim, heads), heads=4),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="mixture_convit",
        part=2,
        passes=1,
        kernels=1,
    ),
]
