"""Lone long rows, for `--rows`: softmax, norms, weighted moments. Nothing is wider than the input."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes
from .building import feed, small

OFFSET = 10.0


def rows(sizes, shape, generator):
    """x [B, Q, K]: rows of K, with a mean of 10 and a spread of 1"""
    return (OFFSET + torch.randn(sizes.batch, sizes.q, sizes.keys, generator=generator),)


def skewed_rows(sizes, shape, generator):
    """x [B, Q, K], exponentially distributed, from 2 on"""
    size = (sizes.batch, sizes.q, sizes.keys)
    return (2 - torch.rand(size, generator=generator).clamp(min=1e-4).log(),)


def row_weights(sizes, shape, generator):
    """a number per place in a row [B, Q, K]"""
    return (torch.randn(sizes.batch, sizes.q, sizes.keys, generator=generator),)


def gain_and_bias(sizes, shape, generator):
    """[K], [K]"""
    return tuple(torch.randn(sizes.keys, generator=generator) for _ in range(2))


def images(sizes, shape, generator):
    """x [B, dim, Q, K], with a mean of 3"""
    size = (sizes.batch, shape.dim, sizes.q, sizes.keys)
    return (3 + torch.randn(size, generator=generator),)


class Softmax(nn.Module):
    """By call, with a temperature."""

    def forward(self, x):
        return F.softmax(x / 0.7, dim=-1)


class SoftmaxByHand(nn.Module):
    def forward(self, x):
        e = torch.exp((x - x.max(dim=-1, keepdim=True).values) * (1 / 0.7))
        return e / e.sum(dim=-1, keepdim=True)


class LogSoftmax(nn.Module):
    """Along the middle axis."""

    def forward(self, x):
        return torch.log_softmax(x, dim=1)


class LogSoftmaxByHand(nn.Module):
    def forward(self, x):
        return x - torch.logsumexp(x, dim=1, keepdim=True)


class LayerNorm(nn.Module):
    """Over all of a row, whatever its length; gain and bias are inputs."""

    def forward(self, x, gain, bias):
        return F.layer_norm(x, (x.shape[-1],), gain, bias)


class LayerNormByHand(nn.Module):
    """The mean, then the mean of centred squares."""

    def forward(self, x, gain, bias):
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)
        return centred * torch.rsqrt(variance + 1e-5) * gain + bias


class LayerNormVar(nn.Module):
    """`torch.var`, biased, and a division by a square root."""

    def forward(self, x, gain, bias):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return gain * (x - mean) / (var + 1e-5).sqrt() + bias


class RMSNorm(nn.Module):
    """As language models have it: squares in fp32, the gain after."""

    def forward(self, x, gain, bias):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed = x.to(torch.float32) * torch.rsqrt(variance + 1e-6)
        return gain * normed.to(x.dtype) + bias


class RMSNormCall(nn.Module):
    """`F.rms_norm`."""

    def forward(self, x, gain, bias):
        return F.rms_norm(x, (x.shape[-1],), gain, eps=1e-6) + bias


class GroupNorm(nn.Module):
    """A row is all pixels of a group of channels; gain and bias per channel."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x):
        return F.silu(self.norm(x))


class GroupNormByHand(GroupNorm):
    """Channels are split, the rest flattened, and put back."""

    def forward(self, x):
        b, c, h, w = x.shape
        grouped = x.view(b, self.norm.num_groups, -1)
        mean = grouped.mean(-1, keepdim=True)
        centred = grouped - mean
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.norm.eps)
        normed = (centred * scale).view(b, c, h, w)
        y = normed * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        return y * torch.sigmoid(y)


class AttentiveStatistics(nn.Module):
    """Attentive statistics pooling: weighted mean and deviation over time; the weights are a softmax."""

    def forward(self, x, scores):
        w = torch.softmax(scores, dim=-1)
        mean = torch.sum(x * w, dim=-1)
        variance = torch.sum(w * (x - mean.unsqueeze(-1)) ** 2, dim=-1)
        return torch.cat((mean, variance.clamp(min=1e-6).sqrt()), dim=1)


class AttentiveStatisticsEinsum(nn.Module):
    """Divided late; sums by einsum."""

    def forward(self, x, scores):
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        total = e.sum(-1)
        mean = torch.einsum("bct,bct->bc", e, x) / total
        centred = x - mean[..., None]
        variance = torch.einsum("bct,bct,bct->bc", e, centred, centred) / total
        return torch.cat((mean, variance.clamp_min(1e-6).sqrt()), -1)


class Kurtosis(nn.Module):
    """Third and fourth moments of a row, standardised."""

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True, unbiased=False)
        z = (x - mean) / std
        return z.pow(3).mean(dim=-1), z.pow(4).mean(dim=-1) - 3


class KurtosisMoments(nn.Module):
    """Central moments first, ratios at the end."""

    def forward(self, x):
        c = x - x.mean(-1, keepdim=True)
        c2 = c * c
        m2, m3, m4 = c2.mean(-1), (c2 * c).mean(-1), (c2 * c2).mean(-1)
        return m3 / m2**1.5, m4 / m2.square() - 3


class LogSumExpRows(nn.Module):
    """One number per row, and the row's entropy."""

    def forward(self, x):
        log_p = F.log_softmax(x, dim=-1)
        return torch.logsumexp(x, dim=-1), -(log_p.exp() * log_p).sum(-1)


class LogSumExpRowsByHand(nn.Module):
    def forward(self, x):
        m = x.amax(-1, keepdim=True)
        e = (x - m).exp()
        total = e.sum(-1)
        lse = m.squeeze(-1) + total.log()
        return lse, total.log() - (e * (x - m)).sum(-1) / total


FINAL = "what is written needs the whole row: a row longer than a tile is read twice"
FOURTH = "the mean first, then all powers of what is off it; one pass takes an action on four moments"


def program(name, module, *inputs, **fields):
    return Program(
        name=name,
        family="rows",
        build=small(module),
        inputs=feed(*inputs),
        rows=True,
        part=2,
        kernels=1,
        **fields,
    )


LONG = Sizes(2, 5, 301)
OTHERS = (Sizes(1, 7, 520), Sizes(3, 4, 37))

PROGRAMS = [
    program(
        "rows_softmax",
        lambda dim, heads: Softmax(),
        rows,
        traced=LONG,
        others=OTHERS,
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_softmax_by_hand",
        lambda dim, heads: SoftmaxByHand(),
        rows,
        traced=LONG,
        others=OTHERS,
        twin="rows_softmax",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_log_softmax",
        lambda dim, heads: LogSoftmax(),
        rows,
        traced=Sizes(2, 301, 5),
        others=(Sizes(1, 520, 7), Sizes(3, 37, 4)),
        note="the row is the middle axis",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_log_softmax_by_hand",
        lambda dim, heads: LogSoftmaxByHand(),
        rows,
        traced=Sizes(2, 301, 5),
        others=(Sizes(1, 520, 7), Sizes(3, 37, 4)),
        twin="rows_log_softmax",
        note="the row is the middle axis",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_layer_norm",
        lambda dim, heads: LayerNorm(),
        rows,
        gain_and_bias,
        traced=LONG,
        others=OTHERS,
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_layer_norm_by_hand",
        lambda dim, heads: LayerNormByHand(),
        rows,
        gain_and_bias,
        traced=LONG,
        others=OTHERS,
        twin="rows_layer_norm",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_layer_norm_var",
        lambda dim, heads: LayerNormVar(),
        rows,
        gain_and_bias,
        traced=LONG,
        others=OTHERS,
        twin="rows_layer_norm",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_rms_norm",
        lambda dim, heads: RMSNorm(),
        rows,
        gain_and_bias,
        traced=LONG,
        others=OTHERS,
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_rms_norm_call",
        lambda dim, heads: RMSNormCall(),
        rows,
        gain_and_bias,
        traced=LONG,
        others=OTHERS,
        twin="rows_rms_norm",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_group_norm",
        lambda dim, heads, groups=4: GroupNorm(dim, groups),
        images,
        traced=Sizes(2, 11, 7),
        others=(Sizes(1, 6, 9), Sizes(3, 5, 5)),
        note="a row is three axes of the input",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_group_norm_by_hand",
        lambda dim, heads, groups=4: GroupNormByHand(dim, groups),
        images,
        traced=Sizes(2, 11, 7),
        others=(Sizes(1, 6, 9), Sizes(3, 5, 5)),
        twin="rows_group_norm",
        passes=2,
        why=FINAL,
    ),
    program(
        "rows_attentive_statistics",
        lambda dim, heads: AttentiveStatistics(),
        rows,
        row_weights,
        traced=LONG,
        others=OTHERS,
        note="a weighted variance: the action of a softmax on that of moments",
        passes=1,
    ),
    program(
        "rows_attentive_statistics_einsum",
        lambda dim, heads: AttentiveStatisticsEinsum(),
        rows,
        row_weights,
        traced=LONG,
        others=OTHERS,
        twin="rows_attentive_statistics",
        passes=1,
    ),
    program(
        "rows_kurtosis",
        lambda dim, heads: Kurtosis(),
        skewed_rows,
        traced=LONG,
        others=OTHERS,
        passes=2,
        why=FOURTH,
    ),
    program(
        "rows_kurtosis_moments",
        lambda dim, heads: KurtosisMoments(),
        skewed_rows,
        traced=LONG,
        others=OTHERS,
        twin="rows_kurtosis",
        passes=2,
        why=FOURTH,
    ),
    program(
        "rows_logsumexp_entropy",
        lambda dim, heads: LogSumExpRows(),
        rows,
        traced=LONG,
        others=OTHERS,
        passes=1,
    ),
    program(
        "rows_logsumexp_entropy_by_hand",
        lambda dim, heads: LogSumExpRowsByHand(),
        rows,
        traced=LONG,
        others=OTHERS,
        twin="rows_logsumexp_entropy",
        passes=1,
    ),
]
