"""Prefix-LM: the prefix is seen by all, the rest is causal."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class PrefixLMAttention(nn.Module):
    """The prefix has a length of its own in each batch element."""

    def forward(self, q, k, v, prefix_lengths):
        n = q.shape[-2]
        pos = torch.arange(n, device=q.device)
        causal = pos[None, :] <= pos[:, None]  # [n, n]
        in_prefix = pos[None, :] < prefix_lengths[:, None]  # [b, n]
        mask = causal[None, None] | in_prefix[:, None, None, :]
        scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = torch.where(mask, scores, torch.full_like(scores, float("-inf")))
        return torch.matmul(torch.softmax(scores, dim=-1), v)


class ImagePrefixAttention(nn.Module):
    """A fixed number of image tokens comes first; the mask is made by slice assignment."""

    def __init__(self, dim, n_heads, n_image_tokens):
        super().__init__()
        self.n_heads = n_heads
        self.n_image_tokens = n_image_tokens
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = [y.reshape(b, t, self.n_heads, -1).transpose(1, 2) for y in self.qkv(x).split(d, dim=-1)]
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        mask[:, : self.n_image_tokens] = True
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


PROGRAMS = [
    Program(
        name="prefix_lengths",
        family="prefix",
        build=built(lambda dim, heads: PrefixLMAttention()),
        inputs=feed(building.heads_first, building.key_lengths),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="prefix_slice_assignment",
        family="prefix",
        build=built(lambda dim, heads, prefix=9: ImagePrefixAttention(dim, heads, prefix)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 9)),
        note="at least as long as the prefix, 9",
    ),
]
