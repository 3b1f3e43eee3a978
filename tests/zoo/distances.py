"""Scores that are no products: squared distances by broadcasting, `cdist`, additive scores.

The points lie far from the origin, compared with their distances: |a|² + |b|² - 2ab loses all digits there.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small

OFFSET = 10.0


def far_points(sizes, shape, generator):
    """queries [B, Q, 8], keys [B, K, 8], values [B, K, dim]; points have a mean of 10 and a spread of 0.5"""
    q = OFFSET + 0.5 * torch.randn(sizes.batch, sizes.q, 8, generator=generator)
    k = OFFSET + 0.5 * torch.randn(sizes.batch, sizes.keys, 8, generator=generator)
    return q, k, torch.randn(sizes.batch, sizes.keys, shape.dim, generator=generator)


def scalars(sizes, shape, generator):
    """where to predict [Q]; training points and their values [K], [K]: no batch, no features"""
    x = torch.rand(sizes.q, generator=generator) * 5
    x_train = (torch.rand(sizes.keys, generator=generator) * 5).sort().values
    return x, x_train, 2 * torch.sin(x_train) + x_train**0.8


def heads_first_far(sizes, shape, generator):
    """as `heads_first`, with queries and keys that have a mean of 10 and a spread of 0.5"""
    q, k, v = building.heads_first(sizes, shape, generator)
    return OFFSET + 0.5 * q, OFFSET + 0.5 * k, v


class KernelRegression(nn.Module):
    """Nadaraya-Watson with a Gaussian kernel, as the formula has it: no maximum, no softmax."""

    def __init__(self, bandwidth):
        super().__init__()
        self.bandwidth = bandwidth

    def forward(self, x, x_train, y_train):
        sq_dist = ((x[:, :, None, :] - x_train[:, None, :, :]) ** 2).sum(-1)
        weights = torch.exp(-0.5 * sq_dist / self.bandwidth**2)
        return weights @ y_train / weights.sum(-1, keepdim=True)


class KernelRegressionSoftmax(KernelRegression):
    """Its weights as a softmax; the difference divided before it is squared."""

    def forward(self, x, x_train, y_train):
        u = (x.unsqueeze(2) - x_train.unsqueeze(1)).div(self.bandwidth)
        attn = F.softmax(-u.pow(2).sum(dim=-1) / 2, dim=-1)
        return torch.bmm(attn, y_train)


class KernelRegressionCdist(KernelRegression):
    """`torch.cdist`, without its way through a matmul."""

    def forward(self, x, x_train, y_train):
        d = torch.cdist(x, x_train, compute_mode="donot_use_mm_for_euclid_dist")
        k = torch.exp(-(d**2) / (2 * self.bandwidth**2))
        k = k / torch.sum(k, dim=2, keepdim=True)
        return torch.einsum("bij,bjd->bid", k, y_train)


class NWKernelRegression(nn.Module):
    """d2l.ai: one feature, queries repeated into a matrix, a learned width; no batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand((1,)) + 1)

    def forward(self, queries, keys, values):
        queries = queries.repeat_interleave(keys.shape[0]).reshape((-1, keys.shape[0]))
        attention_weights = nn.functional.softmax(-(((queries - keys) * self.w) ** 2) / 2, dim=1)
        return torch.bmm(attention_weights.unsqueeze(1), values.expand(queries.shape[0], -1).unsqueeze(-1)).reshape(-1)


class NWKernelRegressionShort(NWKernelRegression):
    """The same on broadcast vectors, and a matrix times a vector."""

    def forward(self, x, x_train, y_train):
        diff = x[:, None] - x_train[None, :]
        weights = torch.softmax(-0.5 * (self.w * diff).square(), dim=-1)
        return weights @ y_train


class EuclideanAttention(nn.Module):
    """L2 attention: minus squared distances as scores, per head."""

    def forward(self, q, k, v):
        diff = q.unsqueeze(-2) - k.unsqueeze(-3)
        scores = -(diff * diff).sum(dim=-1) / q.size(-1) ** 0.5
        return scores.softmax(dim=-1) @ v


class EuclideanAttentionNorm(nn.Module):
    """The same by the norm of differences, squared again."""

    def forward(self, q, k, v):
        dist = torch.linalg.vector_norm(q[:, :, :, None] - k[:, :, None], dim=-1)
        weights = torch.softmax(-dist.square() * q.shape[-1] ** -0.5, -1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class LaplaceAttention(nn.Module):
    """Neural processes: weights by the L1 distance."""

    def forward(self, q, k, v):
        weights = -torch.abs(q.unsqueeze(-2) - k.unsqueeze(-3)).sum(dim=-1)
        return torch.matmul(torch.softmax(weights, dim=-1), v)


class LaplaceAttentionCdist(nn.Module):
    """`cdist` with p = 1."""

    def forward(self, q, k, v):
        return F.softmin(torch.cdist(q, k, p=1.0), dim=-1) @ v


class AdditiveAttention(nn.Module):
    """Bahdanau's: queries and keys are added, and a small network scores the sum; lengths mask keys."""

    def __init__(self, dim, num_hiddens):
        super().__init__()
        self.W_q = nn.Linear(dim, num_hiddens, bias=False)
        self.W_k = nn.Linear(dim, num_hiddens, bias=False)
        self.w_v = nn.Linear(num_hiddens, 1, bias=False)

    def forward(self, queries, keys, valid_lens):
        values = keys
        queries, keys = self.W_q(queries), self.W_k(keys)
        features = queries.unsqueeze(2) + keys.unsqueeze(1)
        features = torch.tanh(features)
        scores = self.w_v(features).squeeze(-1)
        mask = torch.arange(scores.size(2), device=scores.device)[None, :] < valid_lens[:, None]
        scores = scores.masked_fill(~mask[:, None, :], -1e6)
        return torch.bmm(nn.functional.softmax(scores, dim=-1), values)


class AdditiveAttentionEinsum(AdditiveAttention):
    """The last layer as a contraction with a vector; -inf instead of a finite fill."""

    def forward(self, queries, keys, valid_lens):
        hidden = self.W_q(queries)[:, :, None] + self.W_k(keys)[:, None]
        e = torch.einsum("bijh,h->bij", hidden.tanh(), self.w_v.weight[0])
        past = torch.arange(keys.shape[1], device=keys.device) >= valid_lens.view(-1, 1, 1)
        a = torch.where(past, -torch.inf, e).softmax(-1)
        return torch.einsum("bij,bjd->bid", a, keys)


class GraphAttention(nn.Module):
    """GAT: a leaky ReLU of a sum of two scalars per pair, on a dense adjacency."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.W = nn.Linear(dim, dim, bias=False)
        self.a = nn.Parameter(torch.randn(2, heads, dim // heads) * 0.5)

    def forward(self, x, adj):
        h = self.W(x).unflatten(-1, (self.heads, -1))  # [b, n, h, d]
        left, right = (h * self.a[0]).sum(-1), (h * self.a[1]).sum(-1)
        e = F.leaky_relu(left.unsqueeze(2) + right.unsqueeze(1), negative_slope=0.2)
        e = e.masked_fill(~adj.transpose(1, 2).transpose(2, 3), -9e15)
        attention = torch.softmax(e, dim=2)
        return F.elu(torch.einsum("bijh,bjhd->bihd", attention, h).flatten(2))


class GraphAttentionHeadsFirst(GraphAttention):
    """The published code's way: [..., 1] columns added to rows; where; heads before nodes."""

    def forward(self, x, adj):
        h = self.W(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        Wh1 = torch.matmul(h, self.a[0].unsqueeze(-1))
        Wh2 = torch.matmul(h, self.a[1].unsqueeze(-1))
        e = F.leaky_relu(Wh1 + Wh2.transpose(-1, -2), 0.2)
        attention = torch.where(adj > 0, e, torch.full_like(e, -1e4))
        h_prime = torch.matmul(F.softmax(attention, dim=-1), h)
        return F.elu(h_prime.transpose(1, 2).reshape(x.shape))


PROGRAMS = [
    Program(
        name="kernel_regression_formula",
        family="distances",
        build=small(lambda dim, heads, bandwidth=0.7: KernelRegression(bandwidth)),
        inputs=feed(far_points),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="exp without the maximum: underflows where all points are far",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="kernel_regression_softmax",
        family="distances",
        build=small(lambda dim, heads, bandwidth=0.7: KernelRegressionSoftmax(bandwidth)),
        inputs=feed(far_points),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="kernel_regression_formula",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="kernel_regression_cdist",
        family="distances",
        build=small(lambda dim, heads, bandwidth=0.7: KernelRegressionCdist(bandwidth)),
        inputs=feed(far_points),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20, 37)),
        twin="kernel_regression_formula",
        dtypes=("fp32",),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="kernel_regression_d2l",
        family="distances",
        build=small(lambda dim, heads: NWKernelRegression()),
        inputs=feed(scalars),
        traced=Sizes(1, 37, 50),
        others=(Sizes(1, 50), Sizes(1, 1, 20)),
        note="no batch, no features: a matrix times a vector",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="kernel_regression_d2l_short",
        family="distances",
        build=small(lambda dim, heads: NWKernelRegressionShort()),
        inputs=feed(scalars),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50, 20), Sizes(1, 20, 50)),
        twin="kernel_regression_d2l",
        note="no batch, no features: a matrix times a vector",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="euclidean_attention",
        family="distances",
        build=small(lambda dim, heads: EuclideanAttention()),
        inputs=feed(heads_first_far),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="euclidean_attention_norm",
        family="distances",
        build=small(lambda dim, heads: EuclideanAttentionNorm()),
        inputs=feed(heads_first_far),
        traced=Sizes(2, 37, 20),
        others=(Sizes(1, 50), Sizes(3, 1, 20)),
        twin="euclidean_attention",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="laplace_attention",
        family="distances",
        build=small(lambda dim, heads: LaplaceAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="laplace_attention_cdist",
        family="distances",
        build=small(lambda dim, heads: LaplaceAttentionCdist()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="laplace_attention",
        dtypes=("fp32",),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="additive_attention",
        family="distances",
        build=small(lambda dim, heads: AdditiveAttention(dim, dim // 2)),
        inputs=feed(building.tokens, building.memory, building.key_lengths),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="a finite fill, which fp16 does not hold",
        dtypes=("fp32", "bf16"),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="additive_attention_einsum",
        family="distances",
        build=small(lambda dim, heads: AdditiveAttentionEinsum(dim, dim // 2)),
        inputs=feed(building.tokens, building.memory, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 1, 20)),
        twin="additive_attention",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="graph_attention",
        family="distances",
        build=small(lambda dim, heads: GraphAttention(dim, heads)),
        inputs=feed(building.tokens, building.live_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite fill, which fp16 does not hold",
        dtypes=("fp32", "bf16"),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="graph_attention_heads_first",
        family="distances",
        build=small(lambda dim, heads: GraphAttentionHeadsFirst(dim, heads)),
        inputs=feed(building.tokens, building.live_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="graph_attention",
        note="a finite fill",
        part=2,
        passes=1,
        kernels=1,
    ),
]
