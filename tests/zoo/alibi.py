"""ALiBi: a bias linear in the distance, with a slope per head."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


def get_slopes(n):
    """The published slopes, for any number of heads."""

    def get_slopes_power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return get_slopes_power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return get_slopes_power_of_2(closest) + get_slopes(2 * closest)[0::2][: n - closest]


class ALiBiAttention(nn.Module):
    """Causal; the bias is made afresh from two aranges."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = math.sqrt(dim // num_heads)
        self.register_buffer("m", torch.tensor(get_slopes(num_heads))[:, None, None])
        self.kqv = nn.Linear(dim, 3 * dim, bias=False)

    def get_relative_positions(self, seq_len, device):
        x = torch.arange(seq_len, device=device)[None, :]
        y = torch.arange(seq_len, device=device)[:, None]
        return x - y

    def forward(self, x):
        batch_size, seq_len, _ = x.shape
        key, query, value = self.kqv(x).chunk(3, dim=-1)
        key = key.view(batch_size, seq_len, self.num_heads, -1).permute(0, 2, 3, 1)
        query = query.view(batch_size, seq_len, self.num_heads, -1).transpose(1, 2)
        value = value.view(batch_size, seq_len, self.num_heads, -1).transpose(1, 2)

        bias = (self.m * self.get_relative_positions(seq_len, x.device)).unsqueeze(0)
        score = torch.matmul(query, key) / self.scale + bias.to(x.dtype)
        future = torch.triu(torch.ones(seq_len, seq_len, device=x.device), diagonal=1).bool()
        score = score.masked_fill(future, float("-inf"))
        attn = F.softmax(score, dim=-1)
        out = torch.matmul(attn, value)
        return out.transpose(1, 2).reshape(batch_size, seq_len, -1)


class SymmetricALiBi(nn.Module):
    """Both ways, with learned slopes; different lengths of queries and keys."""

    def __init__(self, n_heads):
        super().__init__()
        self.log_slopes = nn.Parameter(torch.tensor(get_slopes(n_heads)).log())

    def forward(self, q, k, v):
        i = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
        j = torch.arange(k.shape[1], device=q.device, dtype=q.dtype)
        distance = (i[:, None] - j[None, :]).abs()
        bias = -torch.einsum("h,qk->hqk", self.log_slopes.exp(), distance)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(logits + bias, dim=-1), v)


class ALiBiBufferSDPA(nn.Module):
    """The bias, causal mask included, is a buffer of a fixed length; SDPA adds it."""

    def __init__(self, n_heads: int, max_seq_len: int):
        super().__init__()
        future = torch.full((max_seq_len, max_seq_len), float("-inf")).triu_(1)
        # Row-constant shifts vanish in the softmax, so the key's position does for the distance.
        positions = torch.arange(max_seq_len).view(1, 1, -1)
        slopes = torch.tensor(get_slopes(n_heads)).view(-1, 1, 1)
        self.register_buffer("bias", slopes * positions + future, persistent=False)

    def forward(self, q, k, v):
        n = q.size(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, :n, :n].to(q.dtype))


PROGRAMS = [
    Program(
        name="alibi_causal_arange",
        family="alibi",
        build=built(lambda dim, heads: ALiBiAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="alibi_learned_slopes",
        family="alibi",
        build=built(lambda dim, heads: SymmetricALiBi(heads)),
        inputs=feed(building.heads_last),
        traced=Sizes(2, 19, 37),
        others=(Sizes(1, 50), Sizes(3, 1, 19)),
    ),
    Program(
        name="alibi_buffer_sdpa",
        family="alibi",
        build=built(lambda dim, heads, max_len=128: ALiBiBufferSDPA(heads, max_len)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(2, 1)),
        note="a bias buffer of max_len, sliced to the length",
    ),
]
