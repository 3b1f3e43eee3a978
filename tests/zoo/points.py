"""Invariant point attention: scalar, point and pair outputs of one softmax, in frames that differ per residue."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import feed, small
from .evoformer import permute_final_dims


def frames(sizes, shape, generator):
    """rotations [B, N, 3, 3] and translations [B, N, 3]"""
    random = torch.randn(sizes.batch, sizes.q, 3, 3, generator=generator)
    rotations = torch.linalg.qr(random).Q
    rotations = rotations * torch.linalg.det(rotations)[..., None, None]
    return rotations, torch.randn(sizes.batch, sizes.q, 3, generator=generator)


def residue_mask(sizes, shape, generator):
    """float [B, N] of 0 and 1"""
    mask = torch.rand(sizes.batch, sizes.q, generator=generator) < 0.8
    mask[:, 0] = True
    return (mask.float(),)


class InvariantPointAttention(nn.Module):
    """As in AlphaFold 2's ports to PyTorch: differences of points broadcast to [B, N, N, H, P, 3]."""

    def __init__(self, c_s, c_z, c_hidden, no_heads, no_qk_points=4, no_v_points=3, inf=1e4):
        super().__init__()
        self.c_hidden = c_hidden
        self.no_heads = no_heads
        self.no_qk_points = no_qk_points
        self.no_v_points = no_v_points
        self.inf = inf
        self.eps = 1e-6
        hc = c_hidden * no_heads
        self.linear_q = nn.Linear(c_s, hc)
        self.linear_kv = nn.Linear(c_s, 2 * hc)
        self.linear_q_points = nn.Linear(c_s, no_heads * no_qk_points * 3)
        self.linear_kv_points = nn.Linear(c_s, no_heads * (no_qk_points + no_v_points) * 3)
        self.linear_b = nn.Linear(c_z, no_heads)
        self.head_weights = nn.Parameter(torch.full((no_heads,), 0.541324854612918))
        self.linear_out = nn.Linear(no_heads * (c_z + c_hidden + no_v_points * 4), c_s)
        self.softmax = nn.Softmax(dim=-1)

    def global_points(self, projected, rotations, translations):
        points = torch.split(projected, projected.shape[-1] // 3, dim=-1)
        points = torch.stack(points, dim=-1)
        points = torch.einsum("bnij,bnpj->bnpi", rotations, points) + translations.unsqueeze(-2)
        return points.view(points.shape[:-2] + (self.no_heads, -1, 3))

    def forward(self, s, z, rotations, translations, mask):
        q = self.linear_q(s)
        kv = self.linear_kv(s)
        q = q.view(q.shape[:-1] + (self.no_heads, -1))
        kv = kv.view(kv.shape[:-1] + (self.no_heads, -1))
        k, v = torch.split(kv, self.c_hidden, dim=-1)
        q_pts = self.global_points(self.linear_q_points(s), rotations, translations)
        kv_pts = self.global_points(self.linear_kv_points(s), rotations, translations)
        k_pts, v_pts = torch.split(kv_pts, [self.no_qk_points, self.no_v_points], dim=-2)

        b = self.linear_b(z)
        a = torch.matmul(permute_final_dims(q, (1, 0, 2)), permute_final_dims(k, (1, 2, 0)))
        a *= math.sqrt(1.0 / (3 * self.c_hidden))
        a += math.sqrt(1.0 / 3) * permute_final_dims(b, (2, 0, 1))

        pt_att = q_pts.unsqueeze(-4) - k_pts.unsqueeze(-5)
        pt_att = pt_att**2
        pt_att = sum(torch.unbind(pt_att, dim=-1))
        head_weights = F.softplus(self.head_weights).view(*((1,) * len(pt_att.shape[:-2])), -1, 1)
        head_weights = head_weights * math.sqrt(1.0 / (3 * (self.no_qk_points * 9.0 / 2)))
        pt_att = pt_att * head_weights
        pt_att = torch.sum(pt_att, dim=-1) * (-0.5)
        square_mask = mask.unsqueeze(-1) * mask.unsqueeze(-2)
        square_mask = self.inf * (square_mask - 1)
        pt_att = permute_final_dims(pt_att, (2, 0, 1))
        a = a + pt_att
        a = a + square_mask.unsqueeze(-3)
        a = self.softmax(a)

        o = torch.matmul(a, v.transpose(-2, -3)).transpose(-2, -3)
        o = o.reshape(o.shape[:-2] + (-1,))
        o_pt = torch.sum(
            a[..., None, :, :, None] * permute_final_dims(v_pts, (1, 3, 0, 2))[..., None, :, :],
            dim=-2,
        )
        o_pt = permute_final_dims(o_pt, (2, 0, 3, 1)) - translations[..., None, None, :]
        o_pt = torch.einsum("bnji,bnhpj->bnhpi", rotations, o_pt)
        o_pt_norm = torch.sqrt(torch.sum(o_pt**2, dim=-1) + self.eps).flatten(-2)
        o_pt = o_pt.reshape(*o_pt.shape[:-3], -1, 3)
        o_pair = torch.matmul(a.transpose(-2, -3), z.to(dtype=a.dtype))
        o_pair = o_pair.reshape(o_pair.shape[:-2] + (-1,))
        s = self.linear_out(torch.cat((o, *torch.unbind(o_pt, dim=-1), o_pt_norm, o_pair), -1))
        return s * mask.unsqueeze(-1)


class InvariantPointEinsum(InvariantPointAttention):
    """Every product an einsum; squared differences per coordinate; the mask is filled in; heads last."""

    def points(self, linear, s, rotations, translations):
        local = linear(s).unflatten(-1, (3, self.no_heads, -1))  # [b, n, xyz, h, p]
        turned = torch.einsum("bnij,bnjhp->bnihp", rotations, local)
        return turned + translations[..., None, None]

    def forward(self, s, z, rotations, translations, mask):
        q = self.linear_q(s).unflatten(-1, (self.no_heads, -1))
        k, v = self.linear_kv(s).unflatten(-1, (self.no_heads, -1)).chunk(2, dim=-1)
        q_pts = self.points(self.linear_q_points, s, rotations, translations)
        kv_pts = self.points(self.linear_kv_points, s, rotations, translations)
        k_pts, v_pts = kv_pts.tensor_split([self.no_qk_points], dim=-1)

        apart = sum((q_pts[:, :, None, xyz] - k_pts[:, None, :, xyz]).square() for xyz in range(3)).sum(
            -1
        )  # [b, i, j, h]
        weight = F.softplus(self.head_weights) * (9 * self.no_qk_points / 2) ** -0.5
        logits = torch.einsum("bihc,bjhc->bijh", q, k) * self.c_hidden**-0.5
        logits = (logits + self.linear_b(z) - 0.5 * weight * apart) * (1 / 3) ** 0.5
        real = mask.bool()
        both = (real[:, :, None] & real[:, None, :]).unsqueeze(-1)
        attn = torch.where(both, logits, logits - self.inf).softmax(dim=2)

        scalars = torch.einsum("bijh,bjhc->bihc", attn, v).flatten(2)
        points = torch.einsum("bijh,bjxhp->bixhp", attn, v_pts) - translations[..., None, None]
        points = torch.einsum("bixy,bixhp->biyhp", rotations, points)
        norms = (points.square().sum(2) + self.eps).sqrt().flatten(2)
        pairs = torch.einsum("bijh,bijc->bihc", attn, z).flatten(2)
        out = self.linear_out(torch.cat((scalars, points.flatten(2), norms, pairs), dim=-1))
        return torch.where(real.unsqueeze(-1), out, 0)


class PointsOnly(nn.Module):
    """Point attention and nothing else: the score is a distance, the values are places; plain inputs."""

    def __init__(self, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self, q_points, k_points, v_points):
        # [B, N, H, P, 3]
        gap = q_points[:, :, None] - k_points[:, None]
        score = -0.5 * F.softplus(self.weight) * (gap**2).sum(dim=(-1, -2))
        attn = torch.softmax(score, dim=2)
        return (attn[..., None, None] * v_points[:, None]).sum(dim=2)


class PointsOnlyCdist(PointsOnly):
    """Points and coordinates flattened into one feature axis, and `cdist`."""

    def forward(self, q_points, k_points, v_points):
        q, k, v = (p.flatten(-2).transpose(1, 2) for p in (q_points, k_points, v_points))
        d = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
        attn = F.softmax(d.pow(2) * (-0.5 * F.softplus(self.weight)[:, None, None]), dim=-1)
        return torch.matmul(attn, v).transpose(1, 2).unflatten(-1, (-1, 3))


def points(sizes, shape, generator):
    """queries', keys' and values' points [B, N, H, 4, 3]"""
    size = (sizes.batch, sizes.q, shape.heads, 4, 3)
    other = (sizes.batch, sizes.keys, shape.heads, 4, 3)
    sizes_of_all = (size, other, other)
    return tuple(0.7 * torch.randn(s, generator=generator) for s in sizes_of_all)


PAIRS = "the pair output multiplies by z[i, j]: heads are its rows, and rows its grid"

PROGRAMS = [
    Program(
        name="ipa_openfold",
        family="points",
        build=small(lambda dim, heads: InvariantPointAttention(dim, dim // 2, dim // heads, heads), 4),
        inputs=feed(building.tokens, building.pair_features, frames, residue_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a finite mask, -1e4, added",
        part=2,
        passes=2,
        kernels=2,
        why=PAIRS,
    ),
    Program(
        name="ipa_einsum",
        family="points",
        build=small(lambda dim, heads: InvariantPointEinsum(dim, dim // 2, dim // heads, heads), 4),
        inputs=feed(building.tokens, building.pair_features, frames, residue_mask),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="ipa_openfold",
        note="a finite mask, -1e4, added",
        part=2,
        passes=2,
        kernels=2,
        why=PAIRS,
    ),
    Program(
        name="points_only",
        family="points",
        build=small(lambda dim, heads: PointsOnly(heads)),
        inputs=feed(points),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 1, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="points_only_cdist",
        family="points",
        build=small(lambda dim, heads: PointsOnlyCdist(heads)),
        inputs=feed(points),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="points_only",
        dtypes=("fp32",),
        part=2,
        passes=1,
        kernels=1,
    ),
]
