"""A softmax within groups of keys, then one over groups, or over all keys."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small

GROUP = 4


def grouped_keys(sizes, shape, generator):
    """as `heads_first`, with four times as many keys: groups of four"""
    return building.heads_first(Sizes(sizes.batch, sizes.q, GROUP * sizes.keys), shape, generator)


def queries_and_grouped_keys(sizes):
    return ((sizes.q, GROUP * sizes.keys),)


def documents(sizes, shape, generator):
    """one query per batch element and head [B, H, d]; words [B, sentences, words, dim]: S sentences of 7"""
    query = torch.randn(sizes.batch, sizes.keys, shape.heads, shape.head_dim, generator=generator)
    words = torch.randn(sizes.batch, sizes.q, 7, shape.dim, generator=generator)
    return query, words


class GroupThenGroups(nn.Module):
    """Each group's best score by softmax-weighted mean; groups by a softmax of those; 5-D."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = scores.unflatten(-1, (-1, GROUP))  # [b, h, q, groups, in group]
        within = scores.softmax(dim=-1)
        between = (within * scores).sum(dim=-1).softmax(dim=-1)
        weights = (within * between.unsqueeze(-1)).flatten(-2)
        return weights @ v


class GroupThenGroupsSummaries(nn.Module):
    """Each group is summed up first, then the summaries are attended to."""

    def forward(self, q, k, v):
        k, v = (t.unflatten(2, (-1, GROUP)) for t in (k, v))
        s = torch.einsum("bhqd,bhgjd->bhqgj", q, k) * q.shape[-1] ** -0.5
        e = torch.exp(s - s.amax(-1, keepdim=True))
        within = e / e.sum(-1, keepdim=True)
        summary = torch.einsum("bhqgj,bhgjd->bhqgd", within, v)
        between = torch.einsum("bhqgj,bhqgj->bhqg", within, s).softmax(-1)
        return torch.einsum("bhqg,bhqgd->bhqd", between, summary)


class GroupThenAll(nn.Module):
    """Weights within groups of four are the scores of a second softmax, over all keys."""

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        local = F.softmax(scores.unflatten(-1, (-1, GROUP)), dim=-1).flatten(-2)
        return torch.matmul(F.softmax(3 * local + 0.5 * scores, dim=-1), v)


class GroupThenAllViews(nn.Module):
    """Keys stay in their groups throughout: the second softmax runs over two axes, by logsumexp."""

    def forward(self, q, k, v):
        b, h, n, d = q.shape
        k, v = (t.reshape(b, h, -1, GROUP, d) for t in (k, v))
        s = torch.einsum("bhqd,bhgjd->bhqgj", q * d**-0.5, k)
        local = (s - s.logsumexp(-1, keepdim=True)).exp()
        t = 3 * local + 0.5 * s
        p = torch.exp(t - torch.logsumexp(t, dim=(-2, -1), keepdim=True))
        return torch.einsum("bhqgj,bhgjd->bhqd", p, v)


class StridedGroups(nn.Module):
    """Groups are every n-th key, as many as there are, four in each: the short axis is outside."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = scores.unflatten(-1, (GROUP, -1))  # [b, h, q, 4, groups]
        within = scores.softmax(dim=-2)
        between = scores.amax(dim=-2, keepdim=True).softmax(dim=-1)
        return (within * between).flatten(-2) @ v


class StridedGroupsSplit(nn.Module):
    """The four are tensors of their own, joined by `torch.maximum` and sums."""

    def forward(self, q, k, v):
        ks, vs = k.chunk(GROUP, dim=2), v.chunk(GROUP, dim=2)
        scores = [torch.einsum("bhqd,bhkd->bhqk", q, part) * q.shape[-1] ** -0.5 for part in ks]
        top = torch.maximum(torch.maximum(scores[0], scores[1]), torch.maximum(scores[2], scores[3]))
        es = [torch.exp(s - top) for s in scores]
        between = top.softmax(-1) / sum(es)
        return sum(torch.einsum("bhqk,bhkd->bhqd", between * e, part) for e, part in zip(es, vs, strict=True))


class HierarchicalDocuments(nn.Module):
    """Words of a sentence, then sentences: keys have two axes, and queries attend along both in turn."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_sentence = nn.Linear(dim // heads, dim // heads, bias=False)

    def forward(self, query, words):
        k, v = self.to_kv(words).chunk(2, dim=-1)
        k, v = (t.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for t in (k, v))
        q = query.transpose(1, 2)  # [b, h, q, d]
        word_scores = torch.einsum("bhqd,bhswd->bhqsw", q, k) / math.sqrt(q.shape[-1])
        word_weights = word_scores.softmax(dim=-1)
        sentences = torch.einsum("bhqsw,bhswd->bhqsd", word_weights, v)
        sentence_scores = torch.einsum("bhqd,bhqsd->bhqs", self.to_sentence(q), sentences)
        sentence_weights = sentence_scores.softmax(dim=-1)
        return torch.einsum("bhqs,bhqsd->bhqd", sentence_weights, sentences).transpose(1, 2)


class HierarchicalDocumentsScores(HierarchicalDocuments):
    """A sentence's score is the weighted mean of its words': the summaries need not be there for it."""

    def forward(self, query, words):
        k, v = self.to_kv(words).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [b, s, w, h, d]
        a = torch.einsum("bqhd,bswhd->bhqsw", query, k) * query.shape[-1] ** -0.5
        a = a.softmax(-1)
        second = torch.einsum("bqhd,bswhd->bhqsw", self.to_sentence(query), v)
        b = (a * second).sum(-1).softmax(-1)
        return torch.einsum("bhqs,bhqsw,bswhd->bqhd", b, a, v)


INNER = "groups are short: each is complete within a tile"


def program(name, module, inputs=grouped_keys, **fields):
    return Program(
        name=name,
        family="hierarchical",
        build=small(module),
        inputs=feed(inputs),
        note=INNER,
        part=2,
        **fields,
    )


PROGRAMS = [
    program(
        "hierarchical_groups",
        lambda dim, heads: GroupThenGroups(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        wide=queries_and_grouped_keys,
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_groups_summaries",
        lambda dim, heads: GroupThenGroupsSummaries(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        twin="hierarchical_groups",
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_then_all",
        lambda dim, heads: GroupThenAll(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        wide=queries_and_grouped_keys,
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_then_all_views",
        lambda dim, heads: GroupThenAllViews(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        twin="hierarchical_then_all",
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_strided",
        lambda dim, heads: StridedGroups(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        wide=queries_and_grouped_keys,
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_strided_split",
        lambda dim, heads: StridedGroupsSplit(),
        traced=Sizes(2, 37, 17),
        others=(Sizes(1, 20, 19), Sizes(3, 23, 5)),
        twin="hierarchical_strided",
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_documents",
        lambda dim, heads: HierarchicalDocuments(dim, heads),
        inputs=documents,
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 37, 50), Sizes(3, 11, 20)),
        passes=1,
        kernels=1,
    ),
    program(
        "hierarchical_documents_scores",
        lambda dim, heads: HierarchicalDocumentsScores(dim, heads),
        inputs=documents,
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 37, 50), Sizes(3, 11, 20)),
        twin="hierarchical_documents",
        passes=1,
        kernels=1,
    ),
]
