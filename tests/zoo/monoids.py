"""Reductions over keys that are no sums: max, min, any, arg-max; late interaction, distances between sets."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


def sets(sizes, shape, generator):
    """two sets of points [B, Q, 3], [B, K, 3]"""
    a = torch.randn(sizes.batch, sizes.q, 3, generator=generator)
    return a, torch.randn(sizes.batch, sizes.keys, 3, generator=generator)


def sets_on_a_grid(sizes, shape, generator):
    """as `sets`, in quarters: distances are exact in every dtype, and now and then equal a radius"""
    return tuple((4 * t).round() / 4 for t in sets(sizes, shape, generator))


def whole_numbers(sizes, shape, generator):
    """as `one_head`, in small whole numbers: products are exact in every dtype, and maxima often equal"""
    return tuple((1.5 * t).round() for t in building.one_head(sizes, shape, generator))


def codes_and_book(sizes, shape, generator):
    """z [B, S, d] and a codebook [K, d], in small whole numbers"""
    z, k, _ = whole_numbers(sizes, shape, generator)
    return z, k[0]


def codes_of_a_batch(sizes):
    """batch and positions merged, or not"""
    return (sizes.q, sizes.keys), (sizes.batch * sizes.q, sizes.keys)


def queries_and_documents(sizes, shape, generator):
    """unit vectors of B queries [B, Q, d], of B + 1 documents [B + 1, K, d], and their mask [B + 1, K]"""
    more = Sizes(sizes.batch + 1, sizes.q, sizes.keys)
    q, k, _ = building.one_head(more, shape, generator)
    (mask,) = building.padding_mask(more, shape, generator)
    return F.normalize(q[1:], dim=-1), F.normalize(k, dim=-1), mask


class ColBERT(nn.Module):
    """Late interaction, all queries with all documents: max over a document's tokens, sum over a query's."""

    def forward(self, Q, D, mask):
        scores = torch.einsum("qid,pjd->qpij", Q, D)
        scores = scores.masked_fill(mask[None, :, None, :] == 0, float("-inf"))
        return scores.max(dim=-1).values.sum(dim=-1)


class ColBERTFilled(nn.Module):
    """As published: a matmul with transposed queries, -9999 at padding, max over the second axis."""

    def forward(self, Q, D, D_mask):
        scores = D.unsqueeze(0) @ Q.unsqueeze(1).permute(0, 1, 3, 2).to(dtype=D.dtype)
        D_padding = ~D_mask.bool().unsqueeze(0).unsqueeze(-1).expand(scores.shape)
        scores[D_padding] = -9999
        scores = scores.max(2).values
        return scores.sum(-1)


class ColBERTWhere(nn.Module):
    """`torch.where` for the padding, and both axes at the end: `amax`, then `sum`."""

    def forward(self, Q, D, mask):
        sim = torch.tensordot(Q, D, dims=([2], [2]))  # [q, i, p, j]
        sim = torch.where(mask.bool()[None, None], sim, -torch.inf)
        return sim.amax(-1).sum(1)


class MaxSimPaired(nn.Module):
    """Each query with its own document, without a mask: relevance, both ways."""

    def forward(self, q, d, weight):
        sim = torch.bmm(F.normalize(q, dim=-1), F.normalize(d, dim=-1).transpose(1, 2))
        per_token = sim.amax(dim=2)
        return per_token, (per_token * weight.softmax(-1)).sum(-1)


class MaxSimPairedEinsum(nn.Module):
    """Norms divide the score, not the vectors; `torch.max` with its indices thrown away."""

    def forward(self, q, d, weight):
        dots = torch.einsum("bid,bjd->bij", q, d)
        sim = dots / (q.norm(dim=-1)[:, :, None] * d.norm(dim=-1)[:, None, :])
        best, _ = torch.max(sim, dim=-1)
        return best, torch.einsum("bi,bi->b", best, F.softmax(weight, dim=-1))


def token_weights(sizes, shape, generator):
    """a number per query token [B, Q]"""
    return (2 * torch.randn(sizes.batch, sizes.q, generator=generator),)


def one_head_queries_and_keys(sizes, shape, generator):
    """q [B, Q, d], k [B, K, d]"""
    return building.one_head(sizes, shape, generator)[:2]


class ChamferDistance(nn.Module):
    """Each point to the nearest of the other set, both ways: minima over both axes of one matrix."""

    def forward(self, a, b):
        dist = ((a.unsqueeze(2) - b.unsqueeze(1)) ** 2).sum(-1)
        return dist.min(dim=2)[0].mean(dim=1) + dist.min(dim=1)[0].mean(dim=1)


class ChamferDistanceCdist(nn.Module):
    """`cdist`, squared after the minimum, which a square keeps."""

    def forward(self, a, b):
        d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return d.amin(-1).square().mean(-1) + d.amin(-2).square().mean(-1)


class Hausdorff(nn.Module):
    """The largest of the smallest distances, one way."""

    def forward(self, a, b):
        dist = torch.linalg.vector_norm(a[:, :, None] - b[:, None], dim=-1)
        return dist.min(dim=-1).values.max(dim=-1).values


class HausdorffNegated(nn.Module):
    """Minimum as a negated maximum of negated squares."""

    def forward(self, a, b):
        similar = -(a.unsqueeze(2) - b.unsqueeze(1)).pow(2).sum(-1)
        return (-similar.amax(2)).amax(1).sqrt()


class Neighbours(nn.Module):
    """Is there any point within a radius, are all within another, and how many are."""

    def __init__(self, radius=0.5, bound=4.0):
        super().__init__()
        self.radius = radius
        self.bound = bound

    def forward(self, a, b):
        dist = (a[:, :, None] - b[:, None]).square().sum(-1)
        near = dist < self.radius**2
        return near.any(dim=-1), (dist < self.bound**2).all(dim=-1), near.sum(dim=-1)


class NeighboursCompared(Neighbours):
    """The same from a minimum, a maximum and a sum of ones and zeros."""

    def forward(self, a, b):
        dist = torch.sum((a.unsqueeze(-2) - b.unsqueeze(-3)) ** 2, dim=-1)
        count = torch.where(dist < self.radius**2, 1, 0).sum(-1)
        return dist.amin(-1) < self.radius**2, dist.amax(-1) < self.bound**2, count


class HardAttention(nn.Module):
    """Each query takes the value of the key that matches best, and says which and how well."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        best, index = scores.max(dim=-1)
        taken = torch.gather(v, 1, index.unsqueeze(-1).expand(-1, -1, v.size(-1)))
        return taken, index, best


class HardAttentionArgmax(nn.Module):
    """`argmax`, then advanced indexing; the score by `amax`."""

    def forward(self, q, k, v):
        scores = torch.einsum("bqd,bkd->bqk", q, k)
        index = scores.argmax(-1)
        batch = torch.arange(q.shape[0], device=q.device)[:, None]
        return v[batch, index], index, scores.amax(-1)


class VectorQuantizer(nn.Module):
    """The nearest code of a codebook: distances expanded, as VQ-VAE's code has it; codes by embedding."""

    def forward(self, z, codebook):
        flat = z.reshape(-1, z.size(-1))
        distances = (
            torch.sum(flat**2, dim=1, keepdim=True)
            + torch.sum(codebook**2, dim=1)
            - 2 * torch.matmul(flat, codebook.t())
        )
        indices = torch.argmin(distances, dim=1)
        return F.embedding(indices, codebook).view(z.shape), indices.view(z.shape[:-1])


class VectorQuantizerDifference(nn.Module):
    """Distances by broadcasting, and `min` with its index."""

    def forward(self, z, codebook):
        distances = (z.unsqueeze(2) - codebook).pow(2).sum(-1)
        _, indices = distances.min(dim=-1)
        return codebook[indices], indices


class MaxPlus(nn.Module):
    """Tropical attention: a maximum where softmax attention has a sum of products."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        return (scores.unsqueeze(-1) + v.unsqueeze(-3)).amax(dim=-2)


class MaxPlusTransposed(nn.Module):
    """Keys last: `torch.max` over the final axis."""

    def forward(self, q, k, v):
        s = torch.einsum("bqd,bkd->bqk", q * q.shape[-1] ** -0.5, k)
        return torch.max(s[:, :, None, :] + v.transpose(1, 2)[:, None], dim=-1)[0]


BOTH = "minima along both axes: rows and stream change places"

PROGRAMS = [
    Program(
        name="colbert",
        family="monoids",
        build=small(lambda dim, heads: ColBERT()),
        inputs=feed(queries_and_documents),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="colbert_published",
        family="monoids",
        build=small(lambda dim, heads: ColBERTFilled()),
        inputs=feed(queries_and_documents),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 37, 20)),
        twin="colbert",
        note="a finite fill, put in by a boolean index",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="colbert_where",
        family="monoids",
        build=small(lambda dim, heads: ColBERTWhere()),
        inputs=feed(queries_and_documents),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 1, 20)),
        twin="colbert",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="max_sim_paired",
        family="monoids",
        build=small(lambda dim, heads: MaxSimPaired()),
        inputs=feed(one_head_queries_and_keys, token_weights),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="max_sim_paired_einsum",
        family="monoids",
        build=small(lambda dim, heads: MaxSimPairedEinsum()),
        inputs=feed(one_head_queries_and_keys, token_weights),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="max_sim_paired",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="chamfer",
        family="monoids",
        build=small(lambda dim, heads: ChamferDistance()),
        inputs=feed(sets),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=BOTH,
    ),
    Program(
        name="chamfer_cdist",
        family="monoids",
        build=small(lambda dim, heads: ChamferDistanceCdist()),
        inputs=feed(sets),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="chamfer",
        dtypes=("fp32",),
        part=2,
        passes=2,
        kernels=2,
        why=BOTH,
    ),
    Program(
        name="hausdorff",
        family="monoids",
        build=small(lambda dim, heads: Hausdorff()),
        inputs=feed(sets),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="hausdorff_negated",
        family="monoids",
        build=small(lambda dim, heads: HausdorffNegated()),
        inputs=feed(sets),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="hausdorff",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="neighbours",
        family="monoids",
        build=small(lambda dim, heads: Neighbours()),
        inputs=feed(sets_on_a_grid),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="any, all and a count: booleans and integers out",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="neighbours_compared",
        family="monoids",
        build=small(lambda dim, heads: NeighboursCompared()),
        inputs=feed(sets_on_a_grid),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="neighbours",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="hard_attention",
        family="monoids",
        build=small(lambda dim, heads: HardAttention()),
        inputs=feed(whole_numbers),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="of equal maxima, the first; the gather after it is narrow",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="hard_attention_argmax",
        family="monoids",
        build=small(lambda dim, heads: HardAttentionArgmax()),
        inputs=feed(whole_numbers),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="hard_attention",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="vector_quantizer",
        family="monoids",
        build=small(lambda dim, heads: VectorQuantizer()),
        inputs=feed(codes_and_book),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 37, 20)),
        note="the user's own expansion of the distance; rows are batch and positions merged",
        wide=codes_of_a_batch,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="vector_quantizer_difference",
        family="monoids",
        build=small(lambda dim, heads: VectorQuantizerDifference()),
        inputs=feed(codes_and_book),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 37, 50), Sizes(3, 23, 20)),
        twin="vector_quantizer",
        wide=codes_of_a_batch,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="max_plus",
        family="monoids",
        build=small(lambda dim, heads: MaxPlus()),
        inputs=feed(building.one_head),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="a 4-D sum under a maximum: nothing a product unit can do",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="max_plus_transposed",
        family="monoids",
        build=small(lambda dim, heads: MaxPlusTransposed()),
        inputs=feed(building.one_head),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="max_plus",
        part=2,
        passes=1,
        kernels=1,
    ),
]
