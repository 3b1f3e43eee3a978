"""The temperature depends on the row: on its token, its position, or on statistics of its own scores."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class TokenTemperature(nn.Module):
    """Each query has its own temperature, a softplus of a projection of its token; causal."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.temperature = nn.Linear(dim, heads)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        tau = F.softplus(self.temperature(x)).transpose(1, 2).unsqueeze(-1) + 0.1
        att = (q @ k.transpose(-2, -1)) / (tau * math.sqrt(k.size(-1)))
        mask = torch.tril(torch.ones(T, T, device=x.device)).view(1, 1, T, T)
        att = att.masked_fill(mask == 0, float("-inf"))
        return (F.softmax(att, dim=-1) @ v).transpose(1, 2).reshape(B, T, C)


class TokenTemperatureInQueries(TokenTemperature):
    """The temperature divides the queries; SDPA does the rest."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        tau = F.softplus(self.temperature(x)).movedim(-1, 1)[..., None] + 0.1
        y = F.scaled_dot_product_attention(q / tau, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class LogLengthScale(nn.Module):
    """Scores grow with the logarithm of the position (log-n scaling); causal."""

    def __init__(self, trained=16):
        super().__init__()
        self.trained = trained

    def forward(self, q, k, v):
        n = q.size(-2)
        i = torch.arange(1, n + 1, device=q.device, dtype=q.dtype)
        scale = (torch.log(i) / math.log(self.trained)).clamp(min=1.0)
        s = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) * scale[:, None]
        s = s + torch.full((n, n), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        return s.softmax(dim=-1) @ v


class LogLengthScaleCounted(LogLengthScale):
    """The scale counts the keys that the row sees: a sum over the mask."""

    def forward(self, q, k, v):
        i = torch.arange(q.shape[2], device=q.device)
        seen = i[None, :] <= i[:, None]
        count = seen.sum(dim=-1, keepdim=True).to(q.dtype)
        scale = torch.log(count).div(math.log(self.trained)).clamp(min=1)
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        p = torch.where(seen, s * scale, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", p, v)


class StandardisedScores(nn.Module):
    """Scores have their mean taken off and are divided by their deviation before the softmax."""

    def __init__(self, gain=2.0):
        super().__init__()
        self.gain = gain

    def forward(self, q, k, v):
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        s = (s - s.mean(dim=-1, keepdim=True)) / (s.std(dim=-1, keepdim=True) + 1e-5)
        return torch.matmul(torch.softmax(self.gain * s, dim=-1), v)


class StandardisedScoresByHand(StandardisedScores):
    """The deviation by hand; the mean is left to the softmax, which takes no notice of it."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        mu = s.mean(-1, keepdim=True)
        sigma = ((s - mu).square().sum(-1, keepdim=True) / (s.shape[-1] - 1)).sqrt()
        weights = F.softmax(s * (self.gain / (sigma + 1e-5)), dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class PeakScaled(nn.Module):
    """Scores over the largest magnitude of their row: the softmax is never sharper than e^4 to one."""

    def forward(self, q, k, v):
        s = q @ k.mT
        s = 4 * s / s.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6)
        return s.softmax(-1) @ v


class PeakScaledNormalize(nn.Module):
    """`F.normalize` by the infinity norm."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k)
        weights = torch.softmax(4.0 * F.normalize(s, p=float("inf"), dim=-1, eps=1e-6), dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class EntropyTemperature(nn.Module):
    """Adaptive temperature: the entropy of a first softmax says how much sharper the second is."""

    def entropy(self, s):
        p = F.softmax(s, dim=-1)
        return -(p * torch.log_softmax(s, dim=-1)).sum(dim=-1, keepdim=True)

    def forward(self, q, k, v):
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        h = self.entropy(s)
        beta = torch.clamp(0.4 * h * h - 0.3 * h + 1.0, min=1.0)
        return torch.matmul(F.softmax(beta * s, dim=-1), v)


class EntropyTemperatureByHand(EntropyTemperature):
    """Entropy as logsumexp less the mean score; the second softmax by hand."""

    def entropy(self, s):
        e = torch.exp(s - s.amax(-1, keepdim=True))
        mean = (e * s).sum(-1, keepdim=True) / e.sum(-1, keepdim=True)
        return s.logsumexp(-1, keepdim=True) - mean

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        h = self.entropy(s)
        s = s * (1 + h * (0.4 * h - 0.3)).clamp_min(1)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return torch.einsum("bhqk,bhkd->bhqd", e, v) / e.sum(-1, keepdim=True)


class SoftmaxTwice(nn.Module):
    """A softmax of a softmax's weights."""

    def forward(self, q, k, v):
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)), dim=-1)
        return torch.softmax(8 * p, dim=-1) @ v


class SoftmaxTwiceByHand(nn.Module):
    """The second without a maximum, which weights below one never need."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        e = torch.exp(s - s.amax(-1, keepdim=True))
        again = torch.exp(8 * e / e.sum(-1, keepdim=True))
        return torch.einsum("bhqk,bhkd->bhqd", again, v) / again.sum(-1, keepdim=True)


class ThresholdedWeights(nn.Module):
    """Weights below the uniform weight are cut off, softly; what is left is normalised again."""

    def forward(self, q, k, v):
        p = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)), dim=-1)
        p = F.relu(p - 0.5 / k.size(-2))
        return (p / p.sum(dim=-1, keepdim=True)) @ v


class ThresholdedWeightsLate(nn.Module):
    """The cut by clamp; the sum divides the output."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        kept = ((s - s.logsumexp(-1, keepdim=True)).exp() * k.shape[2] - 0.5).clamp(min=0)
        return torch.einsum("bhqk,bhkd->bhqd", kept, v) / kept.sum(-1).unsqueeze(-1)


SHARPER = "the exponent is a multiple of the score by what the whole row decides: no sum of exponentials survives it"
NONLINEAR = "a nonlinear function reads finished weights"


def program(name, module, inputs=building.heads_first, **fields):
    return Program(name=name, family="temperatures", build=small(module), inputs=feed(inputs), part=2, **fields)


PROGRAMS = [
    program(
        "temperature_token",
        lambda dim, heads: TokenTemperature(dim, heads),
        inputs=building.tokens,
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        passes=1,
        kernels=1,
    ),
    program(
        "temperature_token_in_queries",
        lambda dim, heads: TokenTemperatureInQueries(dim, heads),
        inputs=building.tokens,
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="temperature_token",
        passes=1,
        kernels=1,
    ),
    program(
        "temperature_log_length",
        lambda dim, heads: LogLengthScale(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        passes=1,
        kernels=1,
    ),
    program(
        "temperature_log_length_counted",
        lambda dim, heads: LogLengthScaleCounted(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="temperature_log_length",
        note="the sum over the mask reads no input: it may stay a narrow row of its own",
        passes=1,
        kernels=1,
    ),
    program(
        "temperature_standardised",
        lambda dim, heads: StandardisedScores(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "temperature_standardised_by_hand",
        lambda dim, heads: StandardisedScoresByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="temperature_standardised",
        note="mean and centred squares in one pass by a moment action, else in two",
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "temperature_peak",
        lambda dim, heads: PeakScaled(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "temperature_peak_normalize",
        lambda dim, heads: PeakScaledNormalize(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="temperature_peak",
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "temperature_entropy",
        lambda dim, heads: EntropyTemperature(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "temperature_entropy_by_hand",
        lambda dim, heads: EntropyTemperatureByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="temperature_entropy",
        passes=2,
        kernels=1,
        why=SHARPER,
    ),
    program(
        "softmax_twice",
        lambda dim, heads: SoftmaxTwice(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        passes=2,
        kernels=1,
        why=NONLINEAR,
    ),
    program(
        "softmax_twice_by_hand",
        lambda dim, heads: SoftmaxTwiceByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="softmax_twice",
        passes=2,
        kernels=1,
        why=NONLINEAR,
    ),
    program(
        "thresholded_weights",
        lambda dim, heads: ThresholdedWeights(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        passes=2,
        kernels=1,
        why=NONLINEAR,
    ),
    program(
        "thresholded_weights_late",
        lambda dim, heads: ThresholdedWeightsLate(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="thresholded_weights",
        passes=2,
        kernels=1,
        why=NONLINEAR,
    ),
]
