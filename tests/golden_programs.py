"""The programs whose kernels are kept whole in goldens/: few, each for what no other shows.

They are not the zoo's: a golden holds lines of its program, and is to change with the emitter only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


class SoftcapCausal(nn.Module):
    """A cap, then a mask that keeps what is not ahead."""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = 30.0 * torch.tanh(scores / 30.0)
        length = query.shape[-2]
        ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
        return torch.softmax(scores, dim=-1) @ value


class GroupedWindow(nn.Module):
    """A few key heads for many query heads, [B, S, H, D]; a query sees the `window` keys up to its own."""

    def __init__(self, group, window):
        super().__init__()
        self.group, self.window = group, window

    def forward(self, query, key, value):
        key = key.repeat_interleave(self.group, dim=2)
        value = value.repeat_interleave(self.group, dim=2)
        scores = torch.einsum("bmhd,bnhd->bhmn", query, key) * query.shape[-1] ** -0.5
        i = torch.arange(query.shape[1], device=query.device)[:, None]
        j = torch.arange(key.shape[1], device=key.device)[None, :]
        seen = (j <= i) & (i - j < self.window)
        weights = torch.where(seen, scores, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhmn,bnhd->bmhd", weights, value)


class SinkByCat(nn.Module):
    """A learned logit per head takes a share of the weights, and is dropped."""

    def __init__(self, heads):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, query, key, value):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        sinks = self.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)
        return weights[..., :-1] @ value


class BucketedBias(nn.Module):
    """T5: no scale; a bias per head and bucket of the distance, buckets growing with it."""

    def __init__(self, heads, buckets=32, farthest=128):
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.buckets, self.farthest = buckets, farthest

    def _bucket(self, distance):
        half = self.buckets // 2
        side = (distance > 0).long() * half
        distance = distance.abs()
        near = half // 2
        far = torch.log(distance.float() / near) / math.log(self.farthest / near) * (half - near)
        far = torch.clamp(near + far.long(), max=half - 1)
        return side + torch.where(distance < near, distance, far)

    def forward(self, query, key, value):
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        columns = torch.arange(key.shape[2], device=key.device)[None, :]
        bias = self.table(self._bucket(columns - rows)).permute(2, 0, 1)
        scores = torch.matmul(query, key.transpose(3, 2)) + bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return torch.matmul(weights, value)


class Documents(nn.Module):
    """Several documents in one row: a token sees those of its own."""

    def forward(self, query, key, value, ids):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        same = ids[:, None, :, None] == ids[:, None, None, :]
        return scores.masked_fill(~same, torch.finfo(scores.dtype).min).softmax(-1) @ value


class TwoProducts(nn.Module):
    """Multi-head latent attention: scores from a part per head and a rotary part that all heads share."""

    def forward(self, q_nope, k_nope, q_rope, k_rope, value):
        scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
        scores = torch.einsum("bshd,bthd->bsht", q_nope, k_nope)
        scores = scores + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        weights = (scores * scale).softmax(dim=-1, dtype=torch.float32).type_as(value)
        return torch.einsum("bsht,bthd->bshd", weights, value)


class GroupedDecode(nn.Module):
    """A step of decoding: the last few positions against a cache, of which heads share a part."""

    def forward(self, query, key, value):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        i = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
        ahead = torch.arange(key.shape[2], device=key.device) > i
        return scores.masked_fill(ahead, float("-inf")).softmax(-1) @ value


@dataclass(frozen=True)
class Golden:
    """A program and what it is called with: floats of `shapes`, then ids. `sizes` are what its kernel is run at."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        floats = tuple(torch.randn(shape, dtype=torch.float16) for shape in self.shapes)
        return (*floats, torch.randint(3, self.ids)) if self.ids else floats


_HEADS_FIRST = (2, 4, 20, 64)
GOLDENS = {
    "softcap_causal": Golden(SoftcapCausal, (_HEADS_FIRST,) * 3),
    "grouped_window": Golden(
        lambda: GroupedWindow(4, 128),
        ((2, 20, 8, 128), *((2, 20, 2, 128),) * 2),
        sizes={"H": 8, "S0": 2},
    ),
    "sink_by_cat": Golden(lambda: SinkByCat(4), (_HEADS_FIRST, *((2, 4, 30, 64),) * 2)),
    "bucketed_bias": Golden(lambda: BucketedBias(4), (_HEADS_FIRST, *((2, 4, 30, 64),) * 2)),
    "documents": Golden(Documents, ((2, 4, 20, 40),) * 3, ids=(2, 20)),
    "two_products": Golden(
        TwoProducts,
        ((2, 20, 4, 128), (2, 30, 4, 128), (2, 20, 4, 64), (2, 30, 64), (2, 30, 4, 128)),
    ),
    "grouped_decode": Golden(
        GroupedDecode, ((2, 8, 1, 64), *((2, 2, 300, 64),) * 2), sizes={"H": 8, "S14": 2, "M": 2, "N": 700}
    ),
}
