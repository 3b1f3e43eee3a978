"""Attention sinks: weights that sum to less than one."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class SinkAttention(nn.Module):
    """A learned logit per head is appended by `cat`, then dropped; keys and values are repeated; window."""

    def __init__(self, hidden_size, num_heads, num_kv_heads, sliding_window):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = sliding_window
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size)
        self.sinks = nn.Parameter(torch.zeros(num_heads))

    def forward(self, hidden_states):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = torch.repeat_interleave(key, self.num_key_value_groups, dim=1)
        value = torch.repeat_interleave(value, self.num_key_value_groups, dim=1)

        n = query.shape[2]
        pos = torch.arange(n, device=query.device)
        ahead = pos[:, None] < pos[None, :]
        behind = pos[:, None] - pos[None, :] >= self.sliding_window
        mask = torch.zeros(n, n, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(ahead | behind, torch.finfo(query.dtype).min)

        attn_weights = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        attn_weights = attn_weights + mask
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        combined_logits = torch.cat([attn_weights, sinks], dim=-1)
        # the maximum is subtracted here so that bf16 does not overflow
        combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
        probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
        scores = probs[..., :-1]  # we drop the sink here
        attn_output = torch.matmul(scores, value).transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(*input_shape, -1))


def sink_sdpa(Q, K, V, S, sm_scale, sliding_window=0):
    # sliding_window == 0 means no sliding window
    n_tokens, n_heads, q_mult, d_head = Q.shape
    K = K[:, :, None, :].expand(-1, -1, q_mult, -1)
    V = V[:, :, None, :].expand(-1, -1, q_mult, -1)
    S = S.reshape(n_heads, q_mult, 1, 1).expand(-1, -1, n_tokens, -1)
    mask = torch.triu(Q.new_full((n_tokens, n_tokens), -float("inf")), diagonal=1)
    if sliding_window > 0:
        mask += torch.tril(mask.new_full((n_tokens, n_tokens), -float("inf")), diagonal=-sliding_window)
    QK = torch.einsum("qhmd,khmd->hmqk", Q, K)
    QK *= sm_scale
    QK += mask[None, None, :, :]
    QK = torch.cat([QK, S], dim=-1)
    W = torch.softmax(QK, dim=-1)
    W = W[..., :-1]
    attn = torch.einsum("hmqk,khmd->qhmd", W, V)
    return attn.reshape(n_tokens, -1)


class TokensOnlySinkAttention(nn.Module):
    """The same idea without a batch: [S, H_kv, G, D], groups as an axis; slices of a packed qkv."""

    def __init__(self, hidden_size, num_heads, num_kv_heads, sliding_window):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.sinks = nn.Parameter(torch.zeros(num_heads))
        self.norm = nn.RMSNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, self.head_dim * (num_heads + 2 * num_kv_heads))
        self.out = nn.Linear(self.head_dim * num_heads, hidden_size)
        self.sm_scale = 1 / math.sqrt(self.head_dim)

    def forward(self, x):
        t = self.norm(x)
        qkv = self.qkv(t)
        end_q = self.num_heads * self.head_dim
        end_k = end_q + self.num_kv_heads * self.head_dim
        q = qkv[:, :end_q].contiguous()
        k = qkv[:, end_q:end_k].contiguous()
        v = qkv[:, end_k:].contiguous()
        q = q.view(-1, self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim)
        k = k.view(-1, self.num_kv_heads, self.head_dim)
        v = v.view(-1, self.num_kv_heads, self.head_dim)
        t = sink_sdpa(q, k, v, self.sinks, self.sm_scale, self.sliding_window)
        return x + self.out(t)


class FirstColumnSink(nn.Module):
    """The learned logit comes first; the weights are divided by hand before its column is dropped."""

    def __init__(self, n_heads):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(1, n_heads, 1, 1))

    def forward(self, q, k, v):
        b, h, n, d = q.shape
        sim = torch.einsum("bhid,bhjd->bhij", q, k) / d**0.5
        sim = torch.cat((self.sink.expand(b, h, n, 1), sim), dim=-1)
        e = torch.exp(sim - sim.amax(dim=-1, keepdim=True))
        attn = (e / e.sum(dim=-1, keepdim=True))[..., 1:]
        return torch.einsum("bhij,bhjd->bhid", attn, v)


class NullKeyValueAttention(nn.Module):
    """A learned key and value are put before the others: the sink has a value, too."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.null_k = nn.Parameter(torch.randn(heads, 1, dim // heads))
        self.null_v = nn.Parameter(torch.randn(heads, 1, dim // heads))
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b = x.shape[0]
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_kv(x).chunk(2, -1))
        k = torch.cat((self.null_k.expand(b, -1, -1, -1), k), dim=-2)
        v = torch.cat((self.null_v.expand(b, -1, -1, -1), v), dim=-2)
        attn = (q * self.scale @ k.transpose(-1, -2)).softmax(dim=-1)
        return self.to_out((attn @ v).transpose(1, 2).flatten(2))


class SoftmaxOne(nn.Module):
    """exp(x) / (1 + sum exp(x)); with the maximum m subtracted, the 1 becomes exp(-m)."""

    def forward(self, q, k, v):
        x = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        m = x.max(dim=-1, keepdim=True).values
        exp_x = torch.exp(x - m)
        weights = exp_x / (torch.exp(-m) + exp_x.sum(dim=-1, keepdim=True))
        return weights @ v


class SoftmaxOneClamped(nn.Module):
    """Softmax-plus-one with the maximum taken over 0 as well."""

    def forward(self, q, k, v):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.size(-1) ** -0.5
        shift = scores.amax(dim=-1, keepdim=True).clamp(min=0)
        numerator = (scores - shift).exp()
        denominator = numerator.sum(-1, keepdim=True) + (-shift).exp()
        return torch.einsum("bhqk,bhkd->bhqd", numerator, v) / denominator


class SoftmaxOneUnsafe(nn.Module):
    """Softmax-plus-one as the formula has it, no maximum."""

    def forward(self, q, k, v):
        e = torch.exp(torch.matmul(q, k.mT) * (1 / q.shape[-1] ** 0.5))
        return torch.matmul(e / (1 + torch.sum(e, dim=-1, keepdim=True)), v)


class SoftmaxOnePadded(nn.Module):
    """Softmax-plus-one as a column of zeros, padded on and sliced off."""

    def forward(self, q, k, v):
        scores = (q * q.size(-1) ** -0.5).matmul(k.transpose(2, 3))
        return F.softmax(F.pad(scores, (1, 0)), dim=-1)[..., 1:].matmul(v)


PROGRAMS = [
    Program(
        name="sink_cat_window_grouped",
        family="sinks",
        build=built(lambda dim, heads, kv_heads=2, window=16: SinkAttention(dim, heads, kv_heads, window)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        note="a finite fill, added",
    ),
    Program(
        name="sink_cat_tokens_only",
        family="sinks",
        build=built(lambda dim, heads, kv_heads=2, window=16: TokensOnlySinkAttention(dim, heads, kv_heads, window)),
        inputs=feed(building.tokens_unbatched),
        traced=Sizes(1, 37),
        others=(Sizes(1, 67), Sizes(1, 1)),
        note="no batch",
    ),
    Program(
        name="sink_first_column",
        family="sinks",
        build=built(lambda dim, heads: FirstColumnSink(heads)),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 19, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
    ),
    Program(
        name="sink_null_key_value",
        family="sinks",
        build=built(lambda dim, heads: NullKeyValueAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1)),
    ),
    Program(
        name="softmax_one_shifted",
        family="sinks",
        build=built(lambda dim, heads: SoftmaxOne()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="softmax_one_clamped",
        family="sinks",
        build=built(lambda dim, heads: SoftmaxOneClamped()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1, 37)),
        twin="softmax_one_shifted",
    ),
    Program(
        name="softmax_one_unsafe",
        family="sinks",
        build=built(lambda dim, heads: SoftmaxOneUnsafe()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50),
        others=(Sizes(3, 19), Sizes(2, 1)),
        twin="softmax_one_shifted",
        note="exp without the maximum: overflows where scores exceed 88 (fp16: 11)",
    ),
    Program(
        name="softmax_one_padded",
        family="sinks",
        build=built(lambda dim, heads: SoftmaxOnePadded()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37, 19),
        others=(Sizes(3, 37), Sizes(2, 1, 19)),
        twin="softmax_one_shifted",
    ),
]
