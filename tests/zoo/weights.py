"""The weights are an output: whole, averaged over heads, or summed over queries."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


class WeightsReturned(nn.Module):
    """(output, weights), causal, as model libraries return them; the softmax is in fp32."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        n = query.shape[2]
        causal_mask = torch.full((n, n), float("-inf"), device=query.device).triu(1)
        attn_weights = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        attn_weights = attn_weights + causal_mask.to(attn_weights.dtype)
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32)
        attn_weights = attn_weights.to(query.dtype)
        attn_output = torch.matmul(attn_weights, value)
        attn_output = attn_output.transpose(1, 2).reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class WeightsReturnedByHand(WeightsReturned):
    """By hand; the output is divided as well as the weights; einsum, heads last."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.head_dim)
        i = torch.arange(x.shape[1], device=x.device)
        seen = i[:, None] >= i[None, :]
        top = torch.where(seen, s, -torch.inf).amax(-1, keepdim=True)
        e = torch.where(seen, torch.exp(s - top), 0.0)
        total = e.sum(-1, keepdim=True)
        out = torch.einsum("bhqk,bkhd->bhqd", e, v) / total
        return self.o_proj(out.transpose(1, 2).flatten(2)), e / total


class WeightsOnly(nn.Module):
    """An attention map and nothing else; cross-attention."""

    def forward(self, q, k):
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)), dim=-1)


class WeightsOnlyLogspace(nn.Module):
    """The same map as exp(s - logsumexp s)."""

    def forward(self, q, k):
        s = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        return (s - torch.logsumexp(s, dim=-1, keepdim=True)).exp()


class WeightsAveraged(nn.Module):
    """`nn.MultiheadAttention` as it is, with `need_weights` left at its default."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x, memory):
        return self.attn(x, memory, memory)


class WeightsAveragedByHand(WeightsAveraged):
    """The same parameters; the average as a contraction over heads."""

    def forward(self, x, memory):
        heads = self.attn.num_heads
        w_q, w_k, w_v = self.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        q = F.linear(x, w_q, b_q).unflatten(-1, (heads, -1))
        k = F.linear(memory, w_k, b_k).unflatten(-1, (heads, -1))
        v = F.linear(memory, w_v, b_v).unflatten(-1, (heads, -1))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return self.attn.out_proj(out), torch.einsum("bhqk->bqk", weights) / heads


class WeightsMaxOverHeads(nn.Module):
    """The strongest head's weight for each pair, beside the output."""

    def forward(self, q, k, v):
        attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        return attn @ v, attn.amax(dim=1)


class WeightsMaxOverHeadsUnbound(nn.Module):
    """Head by head, with `torch.maximum`."""

    def forward(self, q, k, v):
        scores = torch.einsum("bhqd,bhkd->hbqk", q, k) / q.shape[-1] ** 0.5
        weights = F.softmax(scores, dim=-1)
        strongest = weights[0]
        for head in weights[1:]:
            strongest = torch.maximum(strongest, head)
        return torch.einsum("hbqk,bhkd->bhqd", weights, v), strongest


class AttentionReceived(nn.Module):
    """How much attention each key gets from all queries: the score of cache eviction; causal."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(1)
        attn = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return attn @ v, attn.sum(dim=-2)


class AttentionReceivedEinsum(nn.Module):
    """SDPA for the output, and the weights once more for their column sums."""

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        i = torch.arange(q.shape[2], device=q.device)
        p = torch.where(i[:, None] < i, -torch.inf, s).softmax(dim=-1)
        return out, torch.einsum("bhqk->bhk", p)


class ResidualScores(nn.Module):
    """RealFormer: raw scores are added to the previous layer's, and returned for the next."""

    def forward(self, q, k, v, prev):
        attn_scores = torch.matmul(q, k.transpose(-1, -2)) * q.size(-1) ** -0.5
        attn_scores = attn_scores + prev
        attn_weights = F.softmax(attn_scores, dim=-1)
        return torch.matmul(attn_weights, v), attn_scores


class ResidualScoresBaddbmm(nn.Module):
    """`baddbmm` adds the scores; batch and heads merged for it."""

    def forward(self, q, k, v, prev):
        b, h, n, d = q.shape
        q, k, v, prev = (t.flatten(0, 1) for t in (q, k, v, prev))
        scores = torch.baddbmm(prev, q, k.mT, alpha=d**-0.5)
        out = torch.bmm(torch.softmax(scores, dim=2), v)
        return out.view(b, h, n, d), scores.view(b, h, n, -1)


WRITE = "a weight can be written only when its row's maximum and sum are final"
HEADS = "a weight of the average can be written only when the rows of all heads are final, and heads are a grid before"
COLUMNS = "a sum over queries needs finished rows: rows and stream change places"

PROGRAMS = [
    Program(
        name="weights_returned",
        family="weights",
        build=small(lambda dim, heads: WeightsReturned(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=2,
        kernels=1,
        why=WRITE,
    ),
    Program(
        name="weights_returned_by_hand",
        family="weights",
        build=small(lambda dim, heads: WeightsReturnedByHand(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="weights_returned",
        part=2,
        passes=2,
        kernels=1,
        why=WRITE,
    ),
    Program(
        name="weights_only",
        family="weights",
        build=small(lambda dim, heads: WeightsOnly()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=1,
        why=WRITE,
    ),
    Program(
        name="weights_only_logspace",
        family="weights",
        build=small(lambda dim, heads: WeightsOnlyLogspace()),
        inputs=feed(building.queries_and_keys),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 1, 20)),
        twin="weights_only",
        part=2,
        passes=2,
        kernels=1,
        why=WRITE,
    ),
    Program(
        name="weights_averaged_module",
        family="weights",
        build=small(lambda dim, heads: WeightsAveraged(dim, heads)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=HEADS,
    ),
    Program(
        name="weights_averaged_by_hand",
        family="weights",
        build=small(lambda dim, heads: WeightsAveragedByHand(dim, heads)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="weights_averaged_module",
        part=2,
        passes=2,
        kernels=2,
        why=HEADS,
    ),
    Program(
        name="weights_max_over_heads",
        family="weights",
        build=small(lambda dim, heads: WeightsMaxOverHeads(), heads=4),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=HEADS,
    ),
    Program(
        name="weights_max_over_heads_unbound",
        family="weights",
        build=small(lambda dim, heads: WeightsMaxOverHeadsUnbound(), heads=4),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="weights_max_over_heads",
        note="the number of heads is fixed by the loop",
        part=2,
        passes=2,
        kernels=2,
        why=HEADS,
    ),
    Program(
        name="attention_received",
        family="weights",
        build=small(lambda dim, heads: AttentionReceived()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=COLUMNS,
    ),
    Program(
        name="attention_received_sdpa",
        family="weights",
        build=small(lambda dim, heads: AttentionReceivedEinsum()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="attention_received",
        part=2,
        passes=3,
        kernels=3,
        why=COLUMNS + "; no wide value joins the call to the weights",
    ),
    Program(
        name="scores_returned",
        family="weights",
        build=small(lambda dim, heads: ResidualScores()),
        inputs=feed(building.heads_first, building.pair_bias),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        note="a score needs nothing of its row: it is written as it is met",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="scores_returned_baddbmm",
        family="weights",
        build=small(lambda dim, heads: ResidualScoresBaddbmm()),
        inputs=feed(building.heads_first, building.pair_bias),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="scores_returned",
        part=2,
        passes=1,
        kernels=1,
    ),
]
