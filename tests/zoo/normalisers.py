"""Scores normalised otherwise: by L1 or L2 norms, by clamped sums; retention and mLSTM."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class L1Normalize(nn.Module):
    """Signed scores over the sum of their magnitudes, by `F.normalize`."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        return torch.matmul(F.normalize(scores, p=1, dim=-1), v)


class L1ByHand(nn.Module):
    """The sum of magnitudes by hand, clamped, dividing the output."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        total = s.abs().sum(dim=-1, keepdim=True).clamp_min(1e-12)
        return torch.einsum("bhqk,bhkd->bhqd", s, v) / total


class L2Normalize(nn.Module):
    """Tanh scores over their L2 norm, by `F.normalize`; causal."""

    def forward(self, q, k, v):
        n = q.size(-2)
        scores = torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)))
        scores = scores * torch.ones(n, n, device=q.device, dtype=q.dtype).tril()
        return F.normalize(scores, dim=-1) @ v


class L2ByHand(nn.Module):
    """The square root of a sum of squares, clamped; masked by where."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k).tanh()
        i = torch.arange(q.shape[2], device=q.device)
        s = torch.where(i[:, None] >= i[None, :], s, 0.0)
        norm = s.pow(2).sum(-1, keepdim=True).sqrt()
        return torch.einsum("bhqk,bhkd->bhqd", s / norm.clamp(min=1e-12), v)


class ClampedSum(nn.Module):
    """Softplus weights over their sum, which is kept from falling below one."""

    def forward(self, q, k, v):
        w = F.softplus(torch.matmul(q, k.transpose(-1, -2)) * q.size(-1) ** -0.5 - 3)
        return torch.matmul(w / w.sum(dim=-1, keepdim=True).clamp(min=1.0), v)


class ClampedSumMaximum(nn.Module):
    """`torch.maximum` with a one, after the product; softplus written out."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5 - 3
        w = torch.log1p(torch.exp(s))
        total = torch.maximum(w.sum(-1), torch.ones_like(q[..., 0]))
        return torch.einsum("bhqk,bhkd->bhqd", w, v) / total[..., None]


class SignedSoftmax(nn.Module):
    """exp of magnitudes, with the score's sign back on it: the maximum is of another value than is multiplied."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        return (torch.sign(scores) * scores.abs().softmax(dim=-1)) @ v


class SignedSoftmaxByHand(nn.Module):
    """Two exponentials, one less the other, over their sum: each score has one that counts."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        e = torch.exp(s.abs() - s.abs().amax(-1, keepdim=True))
        signed = torch.where(s > 0, e, -e)
        return torch.einsum("bhqk,bhkd->bhqd", signed, v) / e.sum(-1, keepdim=True)


class SquaredWeights(nn.Module):
    """Softmax weights sharpened by a power and normalised again."""

    def forward(self, q, k, v):
        p = torch.softmax(q @ k.mT / math.sqrt(q.size(-1)), dim=-1) ** 2
        return (p / p.sum(dim=-1, keepdim=True)) @ v


class SquaredWeightsL1(nn.Module):
    """The same with `F.normalize`, of a product of the weights with themselves."""

    def forward(self, q, k, v):
        p = F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5, -1)
        return torch.einsum("bhqk,bhkd->bhqd", F.normalize(p * p, p=1.0, dim=-1, eps=1e-20), v)


class Retention(nn.Module):
    """RetNet in parallel: a decay per head, scores over the sum of their magnitudes, at least one."""

    def __init__(self, heads):
        super().__init__()
        decay = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float)))
        self.register_buffer("decay", decay)

    def forward(self, q, k, v):
        slen = q.size(2)
        mask = torch.tril(torch.ones(slen, slen).to(self.decay))
        index = torch.arange(slen).to(self.decay)
        mask = torch.masked_fill(index[:, None] - index[None, :], ~mask.bool(), float("inf"))
        mask = torch.exp(mask * self.decay[:, None, None])
        mask = torch.nan_to_num(mask)
        mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
        qk_mat = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        qk_mat = qk_mat * mask
        qk_mat = qk_mat / qk_mat.detach().abs().sum(dim=-1, keepdim=True).clamp(min=1, max=5e4)
        return torch.matmul(qk_mat, v)


class RetentionEinsum(Retention):
    """The decay as a power of a distance, the mask by where, the sums after the product."""

    def forward(self, q, k, v):
        i = torch.arange(q.shape[2], device=q.device)
        back = i[:, None] - i[None, :]
        decay = torch.exp(back.clamp(min=0) * self.decay[:, None, None])
        decay = torch.where(back >= 0, decay, 0.0)
        decay = decay * torch.rsqrt(decay.sum(-1, keepdim=True))
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5 * decay
        total = s.abs().sum(-1).clamp(1, 5e4)
        return torch.einsum("bhqk,bhkd->bhqd", s, v) / total.unsqueeze(-1)


def gates(sizes, shape, generator):
    """input and forget gates before their activations [B, H, S, 1] each"""
    size = (sizes.batch, shape.heads, sizes.q, 1)
    return torch.randn(size, generator=generator), 2 + torch.randn(size, generator=generator)


class MLSTM(nn.Module):
    """xLSTM's matrix memory in parallel: the maximum is of the gates, the normaliser signed and bounded below."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, queries, keys, values, igate_preact, fgate_preact):
        B, NH, S, DH = queries.shape
        log_fgates = F.logsigmoid(fgate_preact)
        ltr = torch.tril(torch.ones((S, S), dtype=torch.bool, device=queries.device))
        zero = torch.zeros((B, NH, 1, 1), dtype=queries.dtype, device=queries.device)
        log_fgates_cumsum = torch.cat([zero, torch.cumsum(log_fgates, dim=-2)], dim=-2)
        rep = log_fgates_cumsum.repeat(1, 1, 1, S + 1)
        _log_fg_matrix = rep - rep.transpose(-2, -1)
        log_fg_matrix = torch.where(ltr, _log_fg_matrix[:, :, 1:, 1:], -float("inf"))
        log_D_matrix = log_fg_matrix + igate_preact.transpose(-2, -1)
        max_log_D, _ = torch.max(log_D_matrix, dim=-1, keepdim=True)
        D_matrix = torch.exp(log_D_matrix - max_log_D)
        keys_scaled = keys / math.sqrt(DH)
        C_matrix = (queries @ keys_scaled.transpose(-2, -1)) * D_matrix
        normalizer = torch.maximum(C_matrix.sum(dim=-1, keepdim=True).abs(), torch.exp(-max_log_D))
        C_matrix_normalized = C_matrix / (normalizer + self.eps)
        return C_matrix_normalized @ values


class MLSTMEinsum(MLSTM):
    """Sums of gates are subtracted as they are; the normaliser divides the output."""

    def forward(self, q, k, v, i_gate, f_gate):
        total = F.logsigmoid(f_gate).cumsum(dim=2).squeeze(-1)  # [b, h, s]
        t = torch.arange(q.shape[2], device=q.device)
        log_d = total.unsqueeze(-1) + (i_gate.squeeze(-1) - total).unsqueeze(-2)
        log_d = log_d.masked_fill(t[None, :] > t[:, None], float("-inf"))
        m = log_d.amax(dim=-1, keepdim=True)
        c = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5 * (log_d - m).exp()
        n = c.sum(-1, keepdim=True).abs().maximum((-m).exp())
        return torch.einsum("bhqk,bhkd->bhqd", c, v) / (n + self.eps)


def program(name, module, **fields):
    """A program on q, k and v [B, H, S, d], in one pass."""
    return Program(
        name=name,
        family="normalisers",
        build=small(module),
        inputs=fields.pop("inputs", feed(building.heads_first)),
        part=2,
        passes=1,
        kernels=1,
        **fields,
    )


PROGRAMS = [
    program(
        "normaliser_l1",
        lambda dim, heads: L1Normalize(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
    ),
    program(
        "normaliser_l1_by_hand",
        lambda dim, heads: L1ByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="normaliser_l1",
    ),
    program(
        "normaliser_l2_causal",
        lambda dim, heads: L2Normalize(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
    ),
    program(
        "normaliser_l2_by_hand_causal",
        lambda dim, heads: L2ByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="normaliser_l2_causal",
    ),
    program(
        "normaliser_clamped",
        lambda dim, heads: ClampedSum(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="short rows have sums below one, long rows above",
    ),
    program(
        "normaliser_clamped_maximum",
        lambda dim, heads: ClampedSumMaximum(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="normaliser_clamped",
    ),
    program(
        "normaliser_signed_softmax",
        lambda dim, heads: SignedSoftmax(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
    ),
    program(
        "normaliser_signed_softmax_by_hand",
        lambda dim, heads: SignedSoftmaxByHand(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="normaliser_signed_softmax",
    ),
    program(
        "normaliser_squared_weights",
        lambda dim, heads: SquaredWeights(),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="the first normaliser cancels out of the second",
    ),
    program(
        "normaliser_squared_weights_l1",
        lambda dim, heads: SquaredWeightsL1(),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="normaliser_squared_weights",
        note="a clamped norm: the first normaliser is read by the clamp",
    ),
    program(
        "retention",
        lambda dim, heads: Retention(heads),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="rows of a mask of arange, normalised: narrow",
    ),
    program(
        "retention_einsum",
        lambda dim, heads: RetentionEinsum(heads),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="retention",
    ),
    program(
        "mlstm",
        lambda dim, heads: MLSTM(),
        inputs=feed(building.heads_first, gates),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a cumsum of gates, which is narrow and stays eager",
    ),
    program(
        "mlstm_einsum",
        lambda dim, heads: MLSTMEinsum(),
        inputs=feed(building.heads_first, gates),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="mlstm",
    ),
]
