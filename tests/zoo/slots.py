"""Softmax over the other axis: slots compete for inputs, and weights are then normalised over inputs."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


def one_wide_head(sizes, shape, generator):
    """slots [B, Q, dim]; keys and values of the inputs [B, K, dim]"""
    (slots,) = building.tokens(sizes, shape, generator)
    return (
        slots,
        *building.memory(sizes, shape, generator),
        *building.memory(sizes, shape, generator),
    )


NUM_SLOTS = 19


def slots_and_inputs(sizes):
    return ((NUM_SLOTS, sizes.q),)


class SlotUpdate(nn.Module):
    """One step of slot attention: softmax over slots, + eps, divided by the sum over inputs."""

    def __init__(self, dim, eps=1e-8):
        super().__init__()
        self.eps = eps
        self.scale = dim**-0.5

    def forward(self, q, k, v):
        dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
        attn = dots.softmax(dim=1) + self.eps
        attn = attn / attn.sum(dim=-1, keepdim=True)
        return torch.einsum("bjd,bij->bid", v, attn)


class SlotUpdateInputsFirst(SlotUpdate):
    """The published layout: inputs are rows, slots columns; the weights are transposed at the end."""

    def forward(self, slots, k, v):
        q = slots * self.scale
        attn_logits = torch.matmul(k, q.transpose(1, 2))  # [b, inputs, slots]
        attn = F.softmax(attn_logits, dim=-1)
        attn = attn + self.eps
        attn = attn / torch.sum(attn, dim=-2, keepdim=True)
        return torch.matmul(attn.transpose(1, 2), v)


class SlotUpdateMean(SlotUpdate):
    """A weighted mean: the updates, not the weights, are divided; softmax by hand."""

    def forward(self, q, k, v):
        logits = torch.bmm(q, k.mT) * self.scale
        logits = logits - logits.amax(dim=1, keepdim=True)
        attn = logits.exp() / logits.exp().sum(dim=1, keepdim=True) + self.eps
        return torch.bmm(attn, v) / attn.sum(dim=2).unsqueeze(-1)


class SlotAttention(nn.Module):
    """The whole module, on slots given: norms, a GRU and an MLP around each of its steps."""

    def __init__(self, dim, iters=2, eps=1e-8, hidden_dim=48):
        super().__init__()
        self.iters = iters
        self.eps = eps
        self.scale = dim**-0.5
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)

    def forward(self, slots, inputs):
        b, n_s, d = slots.shape
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.to_q(slots)
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps
            attn = attn / attn.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, d), slots_prev.reshape(-1, d))
            slots = slots.reshape(b, -1, d)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return slots


class MultiHeadSlotAttention(nn.Module):
    """Slots are parameters, as many as there are; heads compete together: one softmax over slots and heads."""

    def __init__(self, dim, heads, num_slots):
        super().__init__()
        self.heads = heads
        self.slots = nn.Parameter(torch.randn(num_slots, dim))
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)

    def forward(self, inputs):
        b, n, d = inputs.shape
        q = self.slots.view(1, -1, self.heads, d // self.heads).transpose(1, 2)
        k = self.to_k(inputs).view(b, n, self.heads, -1).transpose(1, 2)
        v = self.to_v(inputs).view(b, n, self.heads, -1).transpose(1, 2)
        dots = torch.matmul(q, k.transpose(-1, -2)) * (d // self.heads) ** -0.5  # [b, h, s, n]
        attn = F.softmax(dots.flatten(1, 2), dim=1).view(dots.shape) + 1e-6
        attn = attn / attn.sum(dim=-1, keepdim=True)
        return torch.matmul(attn, v).transpose(1, 2).reshape(b, -1, d)


class MultiHeadSlotsEinsum(MultiHeadSlotAttention):
    """A softmax over two axes by logsumexp."""

    def forward(self, inputs):
        q = self.slots.unflatten(-1, (self.heads, -1))
        k = self.to_k(inputs).unflatten(-1, (self.heads, -1))
        v = self.to_v(inputs).unflatten(-1, (self.heads, -1))
        dots = torch.einsum("shd,bnhd->bshn", q, k) / q.shape[-1] ** 0.5
        attn = torch.exp(dots - dots.logsumexp(dim=(1, 2), keepdim=True)) + 1e-6
        updates = torch.einsum("bshn,bnhd->bshd", attn, v)
        return (updates / attn.sum(-1).unsqueeze(-1)).flatten(2)


class SoftKMeans(nn.Module):
    """One step of soft k-means: distances, a softmax over centroids, centroids as weighted means."""

    def __init__(self, temperature=0.5):
        super().__init__()
        self.temperature = temperature

    def forward(self, centroids, points):
        d = (centroids.unsqueeze(2) - points.unsqueeze(1)).pow(2).mean(-1)  # [b, c, n]
        r = torch.softmax(-d / self.temperature, dim=1)
        return torch.einsum("bcn,bnd->bcd", r, points) / r.sum(dim=2, keepdim=True)


class SoftKMeansPointsFirst(SoftKMeans):
    """Points are rows: responsibilities, then their columns made to sum to one."""

    def forward(self, centroids, points):
        diff = points[:, :, None, :] - centroids[:, None, :, :]
        logits = -diff.square().mean(dim=-1) / self.temperature
        responsibility = F.softmax(logits, dim=2)
        weight = responsibility / responsibility.sum(dim=1, keepdim=True)
        return weight.transpose(1, 2) @ points


class SoftmaxOverQueries(nn.Module):
    """Inverted attention: each key shares itself out among queries; nothing is normalised after."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        return scores.softmax(dim=-2) @ v


class SoftmaxOverQueriesByHand(nn.Module):
    """The normaliser is a property of the key, and divides its value."""

    def forward(self, q, k, v):
        s = torch.einsum("bhqd,bhkd->bhkq", q, k) * q.shape[-1] ** -0.5
        top = s.max(dim=-1, keepdim=True).values
        e = torch.exp(s - top)
        return torch.einsum("bhkq,bhkd->bhqd", e, v / e.sum(-1, keepdim=True))


SWAP = "the softmax runs over rows: it must be complete, for each input, before any slot sums over inputs"

PROGRAMS = [
    Program(
        name="slot_update",
        family="slots",
        build=small(lambda dim, heads: SlotUpdate(dim)),
        inputs=feed(one_wide_head),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 7, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="slot_update_inputs_first",
        family="slots",
        build=small(lambda dim, heads: SlotUpdateInputsFirst(dim)),
        inputs=feed(one_wide_head),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 7, 50), Sizes(3, 37, 20)),
        twin="slot_update",
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="slot_update_mean",
        family="slots",
        build=small(lambda dim, heads: SlotUpdateMean(dim)),
        inputs=feed(one_wide_head),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 1, 50), Sizes(3, 23, 20)),
        twin="slot_update",
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="slot_attention",
        family="slots",
        build=small(lambda dim, heads: SlotAttention(dim)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 7, 50), Sizes(3, 23, 20)),
        note="two iterations: two equal chains",
        part=2,
        passes=4,
        kernels=2,  # both iterations share them
        why=SWAP,
    ),
    Program(
        name="slot_multihead_parameters",
        family="slots",
        build=small(lambda dim, heads, num_slots=NUM_SLOTS: MultiHeadSlotAttention(dim, heads, num_slots)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="a fixed number of slots: were all of them one tile, one pass would do",
        wide=slots_and_inputs,
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="slot_multihead_logsumexp",
        family="slots",
        build=small(lambda dim, heads, num_slots=NUM_SLOTS: MultiHeadSlotsEinsum(dim, heads, num_slots)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="slot_multihead_parameters",
        wide=slots_and_inputs,
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="soft_k_means",
        family="slots",
        build=small(lambda dim, heads: SoftKMeans()),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 7, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="soft_k_means_points_first",
        family="slots",
        build=small(lambda dim, heads: SoftKMeansPointsFirst()),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 23, 50), Sizes(3, 7, 20)),
        twin="soft_k_means",
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="softmax_over_queries",
        family="slots",
        build=small(lambda dim, heads: SoftmaxOverQueries()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
    Program(
        name="softmax_over_queries_by_hand",
        family="slots",
        build=small(lambda dim, heads: SoftmaxOverQueriesByHand()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 23)),
        twin="softmax_over_queries",
        part=2,
        passes=2,
        kernels=2,
        why=SWAP,
    ),
]
