"""Programs with nothing to fuse: no wide tensor is written, or only lone rows are reduced."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import built, feed


class LinearAttention(nn.Module):
    """Keys and values are contracted first: nothing is as wide as rows x stream."""

    def forward(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhkd,bhke->bhde", k, v)
        norm = torch.einsum("bhqd,bhd->bhq", q, k.sum(dim=2))
        return torch.einsum("bhqd,bhde->bhqe", q, kv) / norm.unsqueeze(-1)


class Classifier(nn.Module):
    """An MLP with a softmax over classes at its end."""

    def __init__(self, dim, classes=10):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(2 * dim, classes)

    def forward(self, x):
        return torch.softmax(self.out(F.gelu(self.up(self.norm(x)))), dim=-1)


PROGRAMS = [
    Program(
        name="unfused_linear_attention",
        family="unfused",
        build=built(lambda dim, heads: LinearAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        fused=False,
    ),
    Program(
        name="unfused_classifier",
        family="unfused",
        build=built(lambda dim, heads: Classifier(dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        fused=False,
    ),
]
