"""Linear attention without a mask: two narrow products are to be left as they are."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class LinearAttention(nn.Module):
    """elu + 1 as a feature map; a matmul of keys and values, then one with queries."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, q, k, v):
        Q, K = F.elu(q) + 1, F.elu(k) + 1
        KV = torch.matmul(K.transpose(-2, -1), v)
        Z = 1 / (torch.matmul(Q, K.sum(dim=-2).unsqueeze(-1)) + self.eps)
        return torch.matmul(Q, KV) * Z


class LinearAttentionEinsum(LinearAttention):
    """The published code: einsum with the normaliser inside."""

    def forward(self, queries, keys, values):
        Q = F.elu(queries).add(1)
        K = F.elu(keys).add(1)
        KV = torch.einsum("nhsd,nhsm->nhmd", K, values)
        Z = 1 / (torch.einsum("nhld,nhd->nhl", Q, K.sum(dim=2)) + self.eps)
        return torch.einsum("nhld,nhmd,nhl->nhlm", Q, KV, Z)


class LinearAttentionQuadratic(LinearAttention):
    """Written as attention: the weights are there, though they never had to be."""

    def forward(self, q, k, v):
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
        return weights @ v / (weights.sum(dim=-1, keepdim=True) + self.eps)


class EfficientAttention(nn.Module):
    """Two softmaxes, over the queries' features and over the keys' positions; no weights."""

    def forward(self, q, k, v):
        context = torch.matmul(F.softmax(k, dim=-2).transpose(-2, -1), v)
        return torch.matmul(F.softmax(q, dim=-1), context)


class EfficientAttentionEinsum(nn.Module):
    """The keys' softmax by hand, dividing the context."""

    def forward(self, q, k, v):
        e = torch.exp(k - k.amax(dim=2, keepdim=True))
        context = torch.einsum("bhnd,bhne->bhde", e, v) / e.sum(dim=2).unsqueeze(-1)
        return torch.einsum("bhnd,bhde->bhne", q.softmax(-1), context)


PROGRAMS = [
    Program(
        name="linear_attention_matmul",
        family="linear",
        build=small(lambda dim, heads: LinearAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        fused=False,
        part=2,
    ),
    Program(
        name="linear_attention_einsum",
        family="linear",
        build=small(lambda dim, heads: LinearAttentionEinsum()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        twin="linear_attention_matmul",
        fused=False,
        part=2,
    ),
    Program(
        name="linear_attention_quadratic",
        family="linear",
        build=small(lambda dim, heads: LinearAttentionQuadratic()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="linear_attention_matmul",
        note="wide as written: one pass, unless cost turns it into its twins' two narrow products",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="efficient_attention",
        family="linear",
        build=small(lambda dim, heads: EfficientAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        fused=False,
        part=2,
    ),
    Program(
        name="efficient_attention_einsum",
        family="linear",
        build=small(lambda dim, heads: EfficientAttentionEinsum()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        twin="efficient_attention",
        fused=False,
        part=2,
    ),
]
