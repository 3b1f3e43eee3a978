"""Several documents in one row: a token sees only its own."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import built, feed


class PackedDocuments(nn.Module):
    """One row of ids for the whole batch, [S]; causal within a document."""

    def forward(self, q, k, v, document_id):
        same = document_id[:, None] == document_id[None, :]
        order = torch.ones_like(same).tril()
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~(same & order), float("-inf"))
        probs = F.softmax(scores, dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", probs, v)


class SegmentIds(nn.Module):
    """Ids per batch element, [B, S]; both ways; a bias of 0 or the least number is added, JAX style."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)
        self.out = nn.Linear(features, features)

    def forward(self, inputs, segment_ids):
        heads = (self.num_heads, inputs.shape[-1] // self.num_heads)
        query = self.query(inputs).unflatten(-1, heads)
        key = self.key(inputs).unflatten(-1, heads)
        value = self.value(inputs).unflatten(-1, heads)
        mask = torch.eq(segment_ids[:, None, :, None], segment_ids[:, None, None, :])
        bias = (~mask).to(inputs.dtype) * torch.finfo(inputs.dtype).min
        query = query / heads[1] ** 0.5
        logits = torch.einsum("...qhd,...khd->...hqk", query, key) + bias
        weights = torch.softmax(logits, dim=-1)
        return self.out(torch.einsum("...hqk,...khd->...qhd", weights, value).flatten(-2))


class EndOfTextDocuments(nn.Module):
    """Documents found from the tokens: a `cumsum` counts the end-of-text tokens before each."""

    def __init__(self, vocab, dim, heads, eot=0):
        super().__init__()
        self.eot, self.heads = eot, heads
        self.embed = nn.Embedding(vocab, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, idx):
        doc = (idx == self.eot).cumsum(dim=1)
        b, t = idx.shape
        q, k, v = self.qkv(self.embed(idx)).view(b, t, self.heads, -1).chunk(3, dim=-1)
        ar = torch.arange(t, device=idx.device)
        mask = (doc[:, :, None] == doc[:, None, :]) & (ar[:, None] >= ar)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None]
        )
        return self.out(y.transpose(1, 2).flatten(2))


PROGRAMS = [
    Program(
        name="documents_one_row",
        family="documents",
        build=built(lambda dim, heads: PackedDocuments()),
        inputs=feed(building.heads_first, building.document_ids),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="documents_per_batch",
        family="documents",
        build=built(lambda dim, heads: SegmentIds(dim, heads)),
        inputs=feed(building.tokens, building.batch_document_ids),
        traced=Sizes(2, 50),
        others=(Sizes(1, 37), Sizes(3, 1)),
        note="a finite fill, added",
    ),
    Program(
        name="documents_from_tokens_sdpa",
        family="documents",
        build=built(lambda dim, heads: EndOfTextDocuments(100, dim, heads)),
        inputs=feed(building.token_ids),
        traced=Sizes(1, 37),
        others=(Sizes(3, 67), Sizes(1, 1)),
        note="no floating input; qkv is packed per head",
    ),
]
