"""Second moments under a softmax: of the values, of positions, centred or not.

Centred moments are of values far from zero: expanded to E[v²] - E[v]², they would lose their digits.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small

OFFSET = 20.0


def far_values(sizes, shape, generator):
    """as `heads_first`, with values that have a mean of 20 and a spread of 1"""
    q, k, v = building.heads_first(sizes, shape, generator)
    return q, k, v + OFFSET


def far_scalars(sizes, shape, generator):
    """q [B, Q, d], k [B, K, d], and one value per key, with a mean of 20 and a spread of 1 [B, K]"""
    q, k, _ = building.one_head(sizes, shape, generator)
    return q, k, OFFSET + torch.randn(sizes.batch, sizes.keys, generator=generator)


class SecondMoment(nn.Module):
    """Mean and raw second moment: two products with the same weights."""

    def forward(self, q, k, v):
        attn = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1)
        return attn @ v, attn @ v.pow(2)


class SecondMomentConcatenated(nn.Module):
    """One product, with values and their squares side by side; split after."""

    def forward(self, q, k, v):
        w = F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5, dim=-1)
        both = torch.einsum("bhqk,bhkd->bhqd", w, torch.cat((v, v * v), dim=-1))
        mean, square = both.chunk(2, dim=-1)
        return mean, square


class StandardDeviation(nn.Module):
    """Cross-attention for style transfer (AdaAttN): the deviation from E[v²] - E[v]², clamped."""

    def forward(self, content, style, value):
        S = torch.softmax(torch.bmm(content, style.transpose(1, 2)), dim=-1)
        mean = torch.bmm(S, value)
        std = torch.sqrt(torch.relu(torch.bmm(S, value**2) - mean**2) + 1e-5)
        return std * F.layer_norm(content, content.shape[-1:]) + mean


class StandardDeviationEinsum(nn.Module):
    """By hand, divided late, with einsum and rsqrt's inverse."""

    def forward(self, content, style, value):
        s = torch.einsum("bqd,bkd->bqk", content, style)
        e = (s - s.amax(-1, keepdim=True)).exp()
        total = e.sum(-1, keepdim=True)
        mean = torch.einsum("bqk,bkd->bqd", e, value) / total
        square = torch.einsum("bqk,bkd->bqd", e, value * value) / total
        std = ((square - mean * mean).clamp(min=0) + 1e-5).sqrt()
        centred = content - content.mean(-1, keepdim=True)
        return std * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)) + mean


class CentredMoment(nn.Module):
    """Mean and variance of the values under the weights, by the definition: a 5-D difference."""

    def forward(self, q, k, v):
        attn = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1)
        mu = attn @ v
        deviation = v.unsqueeze(-3) - mu.unsqueeze(-2)  # [b, h, q, k, d]
        return mu, (attn.unsqueeze(-1) * deviation.pow(2)).sum(dim=-2)


class CentredMomentEinsum(nn.Module):
    """The square is contracted with the weights by einsum; heads last."""

    def forward(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        p = torch.einsum("bqhd,bkhd->bqkh", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=2)
        mean = torch.einsum("bqkh,bkhd->bqhd", p, v)
        apart = torch.square(v[:, None] - mean[:, :, None])
        variance = torch.einsum("bqkh,bqkhd->bqhd", p, apart)
        return mean.transpose(1, 2), variance.transpose(1, 2)


class CentredScalar(nn.Module):
    """One value per key: an expected value and its variance."""

    def forward(self, q, k, y):
        w = torch.softmax(torch.bmm(q, k.mT) / math.sqrt(q.shape[-1]), dim=-1)
        mean = torch.einsum("bqk,bk->bq", w, y)
        return mean, (w * (y[:, None, :] - mean[..., None]) ** 2).sum(-1)


class CentredScalarUnnormalised(nn.Module):
    """Weights are never normalised: both sums are divided by theirs."""

    def forward(self, q, k, y):
        s = torch.einsum("bqd,bkd->bqk", q, k) * q.size(-1) ** -0.5
        e = torch.exp(s - s.max(dim=2, keepdim=True).values)
        total = e.sum(2)
        mean = torch.matmul(e, y.unsqueeze(-1)).squeeze(-1) / total
        residual = y.unsqueeze(1) - mean.unsqueeze(2)
        return mean, torch.sum(e * residual * residual, dim=2) / total


class SoftArgmax(nn.Module):
    """Where a query matches: expected position and its spread; the values are positions."""

    def forward(self, q, k):
        p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        position = torch.arange(k.shape[-2], device=k.device, dtype=p.dtype)
        mean = (p * position).sum(dim=-1, keepdim=True)
        spread = (p * (position - mean).pow(2)).sum(dim=-1).sqrt()
        return mean.squeeze(-1), spread


class SoftArgmaxMatmul(nn.Module):
    """Positions as a column to multiply by; the spread by a weighted norm."""

    def forward(self, q, k):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.size(-1))
        weights = F.softmax(scores, dim=-1)
        steps = torch.ones_like(k[..., 0]).cumsum(-1) - 1  # [b, h, k]
        mean = torch.matmul(weights, steps.unsqueeze(-1))
        spread = torch.einsum("bhqk,bhqk->bhq", weights, (steps.unsqueeze(-2) - mean) ** 2)
        return mean[..., 0], torch.sqrt(spread)


CHAN = "one pass by an action on (m, l, mean, M2), as Chan merges moments; without it: the mean first, then its squares"

PROGRAMS = [
    Program(
        name="moment_raw",
        family="moments",
        build=small(lambda dim, heads: SecondMoment()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="moment_raw_concatenated",
        family="moments",
        build=small(lambda dim, heads: SecondMomentConcatenated()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="moment_raw",
        note="values twice as wide",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="moment_deviation",
        family="moments",
        build=small(lambda dim, heads: StandardDeviation()),
        inputs=feed(building.one_head),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="the user's own expansion of the variance: values are near zero",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="moment_deviation_by_hand",
        family="moments",
        build=small(lambda dim, heads: StandardDeviationEinsum()),
        inputs=feed(building.one_head),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="moment_deviation",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="moment_centred",
        family="moments",
        build=small(lambda dim, heads: CentredMoment()),
        inputs=feed(far_values),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
    Program(
        name="moment_centred_einsum",
        family="moments",
        build=small(lambda dim, heads: CentredMomentEinsum()),
        inputs=feed(far_values),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="moment_centred",
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
    Program(
        name="moment_centred_scalar",
        family="moments",
        build=small(lambda dim, heads: CentredScalar()),
        inputs=feed(far_scalars),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
    Program(
        name="moment_centred_scalar_unnormalised",
        family="moments",
        build=small(lambda dim, heads: CentredScalarUnnormalised()),
        inputs=feed(far_scalars),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="moment_centred_scalar",
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
    Program(
        name="moment_soft_argmax",
        family="moments",
        build=small(lambda dim, heads: SoftArgmax()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
    Program(
        name="moment_soft_argmax_matmul",
        family="moments",
        build=small(lambda dim, heads: SoftArgmaxMatmul()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="moment_soft_argmax",
        part=2,
        passes=1,
        kernels=1,
        why=CHAN,
    ),
]
